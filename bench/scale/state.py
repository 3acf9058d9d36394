"""What each rank holds of a state, without a process group: shares of tensors, values, generators of its own."""

from __future__ import annotations

import hashlib
import mmap
import random
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np

from holdfast.core.memory import page_aligned
from holdfast.distributed.ownership import divide
from holdfast.distributed.words import Agreement
from holdfast.format.values import TensorLeaf, encode_value
from holdfast.saving.image import Image, PartImage
from holdfast.saving.plan import RNG_PART
from holdfast.state.capture import capture
from holdfast.state.rng import capture_rng
from holdfast.state.tensors import Shard, TensorSpec, group_of

__all__ = ["Held", "State"]

NOTHING = msgspec.Raw(b"null")
MOMENTS = ("exp_avg", "exp_avg_sq")
ITEM_BYTES = 4


@dataclass(frozen=True)
class State:
    """A model with AdamW's moments over `world` ranks: so many parameters. Of each, and of each of its moments, every
    rank holds `share_bytes`. `spread`: as FSDP does, a box each; else as DDP, all of it.

    The bytes of a snapshot are all equal, unless they are to be `real`."""

    world: int
    parameters: int
    share_bytes: int
    spread: bool = True
    real: bool = False

    @property
    def shares(self) -> int:
        """How many tensors, or boxes of some, each rank holds."""
        return self.parameters * (1 + len(MOMENTS))

    @cached_property
    def group(self) -> str:
        """What stands for all ranks."""
        return group_of(range(self.world))

    def names(self) -> list[str]:
        """The tree paths of all tensors that are not a rank's own."""
        parameters = [f"layers.{number}.weight" for number in range(self.parameters)]
        moments = [f"optimizer/state/{p}/{moment}" for p in parameters for moment in MOMENTS]
        return [f"model/{p}" for p in parameters] + moments

    def specs(self, rank: int, world: int) -> list[TensorSpec]:
        """What the rank would capture of them among so many."""
        columns = 16
        rows = self.world * self.share_bytes // (ITEM_BYTES * columns)  # of the whole, if it is spread
        if not self.spread:
            rows //= self.world
            return [TensorSpec(name, "float32", (rows, columns)) for name in self.names()]
        first, end = rank * rows // world, (rank + 1) * rows // world
        shard = Shard(
            ((first, 0), (rows, columns)), group=self.group if world == self.world else group_of(range(world))
        )
        return [TensorSpec(name, "float32", (end - first, columns), None, shard) for name in self.names()]

    @cached_property
    def trees(self) -> dict[str, msgspec.Raw]:
        """The values of the parts that are alike on all ranks."""
        parameters = [f"layers.{number}.weight" for number in range(self.parameters)]
        model = {p: TensorLeaf(f"model/{p}", "torch.Parameter") for p in parameters}
        moments = {
            p: {m: TensorLeaf(f"optimizer/state/{p}/{m}", "torch.Tensor") for m in MOMENTS}
            for p in parameters
        }
        groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": parameters}]
        optimizer = {"state": moments, "param_groups": groups}
        return {part: _encoded(tree, part) for part, tree in (("model", model), ("optimizer", optimizer))}

    def content(self, name: str) -> bytes:
        """The bytes of a whole tensor, where they are real."""
        nbytes = self.share_bytes * (self.world if self.spread else 1)
        return hashlib.shake_128(name.encode()).digest(nbytes)


class Held:
    """What one rank holds, and the images of it."""

    def __init__(self, state: State, rank: int) -> None:
        self._state, self._rank = state, rank
        specs = state.specs(rank, state.world)
        self._tree, generators, self.own_bytes = _generators(rank)
        same = {} if state.spread else {s.name: (state.group, range(state.world)) for s in specs}
        self._specs = [*specs, *generators]
        self.division = divide(self._specs, same, [*state.trees, RNG_PART], rank)

    def image(self, fill: int = 0) -> Image:
        """Return what a snapshot of it is; bytes that are not real are all equal to `fill`."""
        parts: dict[str, PartImage] = {}
        offset = 0
        taken = iter(self.division.taken)
        for sheet, tensors in self.division.sheets.items():
            size = tensors[-1].end if tensors else 0
            sources = [next(taken) for _ in tensors]
            plain = not self._state.real and not any(
                self._specs[s.source].name in self.own_bytes for s in sources
            )
            data = _equal(size, fill) if plain else memoryview(b"".join(map(self._bytes_of, sources)))
            tree = self._tree if sheet == RNG_PART else self._state.trees.get(sheet, NOTHING)
            kind = {"model": "module", "optimizer": "optimizer", RNG_PART: ""}.get(sheet, "rank")
            parts[sheet] = PartImage(tree, kind, {}, tensors, data, offset)
            offset = page_aligned(offset + size)
        return Image(parts, agreement=Agreement(self.division.agreed))

    def _bytes_of(self, taken: object) -> bytes:
        spec, rows = self._specs[taken.source], taken.rows  # type: ignore[attr-defined]
        if spec.name in self.own_bytes:
            return self.own_bytes[spec.name]
        row = spec.nbytes // spec.shape[0]
        first = spec.shard.box[0][0] if spec.shard is not None else 0
        first, end = rows if rows is not None else (first, first + spec.shape[0])
        if not self._state.real:
            return bytes((end - first) * row)
        return self._state.content(spec.name)[first * row : end * row]


def _generators(rank: int) -> tuple[msgspec.Raw, list[TensorSpec], dict[str, bytes]]:
    """Return values and tensors of the random generators, as the rank would capture them."""
    random.seed(rank)
    np.random.seed(rank)
    found = capture({RNG_PART: capture_rng()})
    own = {source.spec.name: np.asarray(source.value).tobytes() for source in found.tensors}
    return _encoded(found.tree[RNG_PART], RNG_PART), [source.spec for source in found.tensors], own


def _encoded(tree: object, part: str) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(encode_value(tree, part)))


_made: dict[int, memoryview] = {}


def _equal(size: int, fill: int) -> memoryview:
    """Return so many equal bytes, which all snapshots share."""
    if fill not in _made or len(_made[fill]) < size:
        memory = mmap.mmap(-1, max(size, 1 << 20))
        if fill:
            memory.write(bytes([fill]) * len(memory))
        _made[fill] = memoryview(memory).toreadonly()
    return _made[fill][:size]
