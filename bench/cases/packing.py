"""Pack a trained state for the way to a mirror, and unpack it: against zstd over the same files."""

from __future__ import annotations

import pathlib
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import zstandard
from torch import nn

import holdfast
from bench.contestants import HOLDFAST, LIMIT
from bench.figures import CaseResult, Column
from bench.rounds import Plan
from bench.states import State
from holdfast.catalog.content import open_file
from holdfast.catalog.unpacking import open_packed
from holdfast.core.memory import map_pages, touch
from holdfast.format.datafile import DataHeader, encode_header
from holdfast.format.packed import Pack
from holdfast.format.packing import Packing
from holdfast.stores import MemoryStore

KINDS = {"weights": "fp32 weights", "first": "Adam m", "second": "Adam v", "bf16": "bf16 weights"}
COLUMNS = (
    *(Column(kind, f"{title}: ratio", unit="ratio") for kind, title in KINDS.items()),
    Column("ratio", "all: ratio", unit="ratio"),
    Column("pack", "pack", unit="MB/s"),
    Column("unpack", "unpack", unit="MB/s"),
)
KEY = "data/000000000000-bench/x.safetensors.zst"
Coded = list[bytes | bytearray | memoryview]


@dataclass(frozen=True, slots=True)
class _File:
    """A data file as holdfast wrote it, in memory: its parsed header, and its bytes."""

    header: DataHeader
    raw: memoryview


def packing_case(plan: Plan) -> CaseResult:
    """Pack and unpack the data files of a small language model that was trained for real."""
    steps = 3 if plan.quick else 300
    about = (
        f"Weights and Adam moments of a byte-level language model after {steps} steps of AdamW on Python's library, "
        "in fp32, and its weights rounded to bf16: one data file each, from memory to memory, digests included. "
        "The limit is a copy in memory. Here more is better."
    )
    result = CaseResult("g", "Packed for a mirror", about, COLUMNS)
    plan.say(f"{result.title}: trains for {steps} steps")
    files = {kind: _file_of(tensors) for kind, tensors in _trained(plan.quick, steps).items()}
    result.facts["bytes"] = sum(len(f.raw) for f in files.values())
    memory = map_pages(int(max(len(f.raw) for f in files.values())))
    touch(memory)
    for i in range(plan.rounds):
        plan.say(f"{result.title}: round {i + 1}")
        for who, pack, unpack in _ways():
            result.add(who, _measured(files, pack, unpack, memory))
    return result


def _measured(
    files: dict[str, _File],
    pack: Callable[[_File], Coded],
    unpack: Callable[[_File, Coded, memoryview], None],
    memory: memoryview,
) -> dict[str, float]:
    """Return ratios, and bytes a second over all files. Every file is compared with what was packed."""
    found: dict[str, float] = {}
    packed_seconds = unpacked_seconds = 0.0
    plain = stored = 0
    for kind, file in files.items():
        started = time.perf_counter()
        coded = pack(file)
        packed_seconds += time.perf_counter() - started
        target = memory[: len(file.raw)]
        target[:] = bytes(len(target))
        started = time.perf_counter()
        unpack(file, coded, target)
        unpacked_seconds += time.perf_counter() - started
        if target != file.raw:
            raise ValueError(f"{kind} did not come back as it was")
        size = sum(map(len, coded))
        found[kind] = len(file.raw) / size
        plain, stored = plain + len(file.raw), stored + size
    return found | {
        "ratio": plain / stored,
        "pack": plain / packed_seconds,
        "unpack": plain / unpacked_seconds,
    }


def _ways() -> Iterator[tuple[str, Callable[[_File], Coded], Callable[[_File, Coded, memoryview], None]]]:
    yield LIMIT, lambda file: [bytearray(file.raw)], _copy_back
    for level in (1, 3):
        yield f"zstd -{level}", _zstd(level), _zstd_back
    yield f"{HOLDFAST}, 1 thread", _holdfast(1), _holdfast_back
    yield HOLDFAST, _holdfast(Pack().threads), _holdfast_back


def _copy_back(file: _File, coded: Coded, target: memoryview) -> None:
    target[:] = coded[0]


def _zstd(level: int) -> Callable[[_File], Coded]:
    return lambda file: [zstandard.ZstdCompressor(level=level).compress(file.raw)]


def _zstd_back(file: _File, coded: Coded, target: memoryview) -> None:
    target[:] = zstandard.ZstdDecompressor().decompress(coded[0])


def _holdfast(threads: int) -> Callable[[_File], Coded]:
    def pack(file: _File) -> Coded:
        packing = Packing(file.header, Pack(threads=threads))
        return list(packing.body([file.raw[file.header.data_start :]]))

    return pack


def _holdfast_back(file: _File, coded: Coded, target: memoryview) -> None:
    store = MemoryStore()
    store.write(KEY, coded)
    found = open_packed(store, KEY)
    if found is None:
        raise ValueError("what was packed is gone")
    start = len(found.tail.raw_header)
    target[:start] = found.tail.raw_header
    found.read_into(start, target[start:])


def _file_of(tensors: dict[str, torch.Tensor]) -> _File:
    """Save tensors as a part of a run, and return its data file."""
    store = MemoryStore()
    saved = holdfast.save(store, {"part": tensors})
    [entry] = saved.manifest.parts["part"].files
    file = open_file(store, entry)
    raw = store.read(entry.key, 0, entry.size)
    if raw[: file.header.data_start] != encode_header(file.header.tensors, file.header.digests):
        raise ValueError("a data file has but one form")
    return _File(file.header, memoryview(raw))


# ---- something that was trained -----------------------------------------------------------------------------------


class _Model(nn.Module):
    """A small causal transformer over bytes."""

    def __init__(self, width: int, layers: int, tokens: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(tokens, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        self.mask = nn.Transformer.generate_square_subsequent_mask(tokens)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        x = self.embed(data) + self.place.weight
        found: torch.Tensor = self.head(self.norm(self.body(x, mask=self.mask, is_causal=True)))
        return found


def _trained(quick: bool, steps: int) -> State:
    """Return weights and moments of a model after some steps of training that lower its loss."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads that wait for each other take minutes on a machine that is busy
    width, layers, tokens, batch = (64, 1, 32, 4) if quick else (256, 3, 128, 8)
    text = torch.frombuffer(bytearray(_text(2 << 20)), dtype=torch.uint8)
    model = _Model(width, layers, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)
    losses: list[float] = []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - tokens - 1, (batch,)).tolist()
        rows = torch.stack([text[s : s + tokens + 1] for s in starts]).long()
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    if steps > 100 and losses[-1] > 0.6 * losses[0]:
        raise ValueError(f"nothing was learnt: the loss went from {losses[0]:.2f} to {losses[-1]:.2f}")
    named = dict(model.named_parameters())
    moments = {k: {n: optimizer.state[p][k] for n, p in named.items()} for k in ("exp_avg", "exp_avg_sq")}
    weights = {name: p.detach() for name, p in named.items()}
    rounded = {name: p.to(torch.bfloat16) for name, p in weights.items()}
    return {"weights": weights, "first": moments["exp_avg"], "second": moments["exp_avg_sq"], "bf16": rounded}


def _text(size: int) -> bytes:
    """Return source text of the Python library."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(_read(sorted(library.glob("*.py")), size))[:size]


def _read(paths: Iterable[pathlib.Path], size: int) -> Iterator[bytes]:
    for path in paths:
        if size <= 0:
            return
        found = path.read_bytes()
        size -= len(found)
        yield found
