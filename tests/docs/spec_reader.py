"""A reader of the format that follows `docs/format.md` alone: json, blake3, zstandard, numpy, no holdfast.

It is not fast and has no features. It exists to show that the page says enough, and to notice when it no
longer does.
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
import zoneinfo
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from blake3 import blake3

COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,254}")
MANIFEST_KEY = re.compile(r"checkpoints/(\d{12})(?:-(\d{4}))?\.json")
TRASH_KEY = re.compile(r"trash/(\d{12})-([0-9a-f]+)(?:-(\d{1,12}))?\.json")
MANIFEST_DEFAULTS: dict[str, Any] = {
    "metrics": {}, "reasons": [], "parent": None, "new_bytes": 0, "exact": True, "demoted": False,
    "world_size": 1, "environment": {}, "loop": {},
}  # fmt: skip
MANIFEST_MEMBERS = {
    "format",
    "run",
    "step",
    "attempt",
    "generation",
    "time",
    "clock",
    "parts",
    *MANIFEST_DEFAULTS,
}

# canonical type -> (bytes, carrier, carrier elements per element, numpy type to read it with)
TYPES = {
    "bool": (1, "BOOL", 1, "|b1"),
    "uint8": (1, "U8", 1, "|u1"),
    "int8": (1, "I8", 1, "|i1"),
    "float8_e5m2": (1, "F8_E5M2", 1, "|u1"),
    "float8_e4m3fn": (1, "F8_E4M3", 1, "|u1"),
    "float8_e5m2fnuz": (1, "F8_E5M2FNUZ", 1, "|u1"),
    "float8_e4m3fnuz": (1, "F8_E4M3FNUZ", 1, "|u1"),
    "float8_e8m0fnu": (1, "U8", 1, "|u1"),
    "float4_e2m1fn_x2": (1, "U8", 1, "|u1"),
    "int16": (2, "I16", 1, "<i2"),
    "uint16": (2, "U16", 1, "<u2"),
    "float16": (2, "F16", 1, "<f2"),
    "bfloat16": (2, "BF16", 1, "<u2"),
    "int32": (4, "I32", 1, "<i4"),
    "uint32": (4, "U32", 1, "<u4"),
    "float32": (4, "F32", 1, "<f4"),
    "complex32": (4, "F16", 2, "<u4"),
    "complex64": (8, "C64", 1, "<c8"),
    "float64": (8, "F64", 1, "<f8"),
    "int64": (8, "I64", 1, "<i8"),
    "uint64": (8, "U64", 1, "<u8"),
    "complex128": (16, "F64", 2, "<c16"),
}
NAMED_IN_LAYOUT = {"float8_e8m0fnu", "float4_e2m1fn_x2", "complex32", "complex128"}
BY_CARRIER = {carrier: name for name, (_, carrier, _, _) in TYPES.items() if name not in NAMED_IN_LAYOUT}


class Refused(Exception):
    """The bytes are not what the format allows."""


def require(holds: object, what: str) -> None:
    if not holds:
        raise Refused(what)


def open_sealed(raw: bytes, characters: int = 64) -> dict[str, Any]:
    tail = characters + 14
    head, end = raw[:-tail], raw[-tail:]
    require(end.startswith(b',"digest":"') and end.endswith(b'"}\n'), "does not end in a digest")
    require(blake3(head).hexdigest()[:characters].encode() == end[11:-3], "the digest differs")
    require(head.startswith(b"{"), "is not an object")
    content: dict[str, Any] = json.loads(head + b"}", object_pairs_hook=members)
    return content


def members(found: list[tuple[str, Any]]) -> dict[str, Any]:
    require(len(dict(found)) == len(found), "a key occurs twice")
    return dict(found)


def check_key(key: str) -> str:
    for component in key.split("/"):
        require(COMPONENT.fullmatch(component) and component not in (".", ".."), f"key {key!r}")
    return key


def check_name(name: str) -> str:
    require(1 <= len(name.encode()) <= 1024, f"name {name!r}")
    require(unicodedata.normalize("NFC", name) == name, f"name {name!r}")
    require(not any(unicodedata.category(c) in ("Cc", "Cs") for c in name), f"name {name!r}")
    return name


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@dataclass
class Tensor:
    name: str
    type: str
    shape: list[int]
    stride: list[int] | None
    start: int
    end: int
    box: list[list[int]] | None = None
    rows: list[list[int]] | None = None

    @property
    def whole(self) -> list[int]:
        return self.shape if self.box is None else self.box[1]


LARGEST = {1: 67108864, 2: 4194304}


def cut(tensors: list[tuple[int, list[int]]], version: int) -> list[tuple[int, int]]:
    """The digest blocks of a data region, from (size, shape) of each tensor in data order."""
    blocks: list[tuple[int, int]] = []
    position, group = 0, None
    for size, shape in tensors:
        if size == 0:
            continue
        if size >= 65536:
            if group is not None:
                blocks.append((group, position))
                group = None
            row = size // (shape[0] if shape else 1)
            largest = LARGEST[version]
            step = (largest // row) * row if row <= largest else largest
            blocks += [(position + o, position + min(o + step, size)) for o in range(0, size, step)]
        elif group is None:
            group = position
        elif position + size - group > 1048576:
            blocks.append((group, position))
            group = position
        position += size
    if group is not None:
        blocks.append((group, position))
    return blocks


def unpack(raw: bytes) -> bytes:
    """The plain file that a packed one holds."""
    require(len(raw) >= 72 and raw[-40:-32] == b"HFPACK1\n", "the magic")
    header_size, plain_size, tail_size, many = (
        int.from_bytes(raw[i : i + 8], "little") for i in range(len(raw) - 72, len(raw) - 40, 8)
    )
    require(72 + header_size + 26 * many <= tail_size <= min(len(raw), 2**31), "the size of the tail")
    require(many <= header_size + plain_size // 2**20, "the number of chunks")
    begin = len(raw) - tail_size
    require(blake3(raw[begin:-32]).digest() == raw[-32:], "the tail's digest")
    position = begin + header_size
    entries: list[tuple[int, int, bool, list[int], bytes]] = []
    for _ in range(many):
        size, width, turned = (
            int.from_bytes(raw[position : position + 4], "little"),
            raw[position + 4],
            raw[position + 5],
        )
        require(width in (1, 2, 4, 8) and turned <= (width > 1), "an element")
        require(0 < size <= 1 << 20 and size % width == 0, "the size of a chunk")
        position += 6
        frames = [int.from_bytes(raw[i : i + 4], "little") for i in range(position, position + 4 * width, 4)]
        require(all(f < size // width for f in frames), "the size of a frame")
        position += 4 * width
        entries.append((size, width, bool(turned), frames, raw[position : position + 16]))
        position += 16
    require(position == len(raw) - 72, "the end of the index")
    require(header_size + sum(e[0] for e in entries) == plain_size, "the size of the plain file")
    position = 0
    chunks: list[bytes] = []
    for size, width, turned, frames, digest in entries:
        n = size // width
        stored = raw[position : position + sum(f or n for f in frames)]
        position += sum(f or n for f in frames)
        require(blake3(stored).digest()[:16] == digest, "the digest of a chunk")
        chunks.append(_chunk(stored, n, frames, turned))
    require(position == begin, "the end of the chunks")
    return raw[begin : begin + header_size] + b"".join(chunks)


def _chunk(stored: bytes, n: int, frames: list[int], turned: bool) -> bytes:
    if not any(frames):
        return stored
    width, k, at = len(frames), 0, 0
    elements = np.zeros((n, width), np.uint8)
    while k < width:
        if frames[k]:
            frame = stored[at : at + frames[k]]
            says = zstandard.get_frame_parameters(frame)
            require(says.content_size == n and says.dict_id == 0, "what a frame holds")
            elements[:, k] = np.frombuffer(zstandard.decompress(frame), np.uint8)
            at, k = at + frames[k], k + 1
        else:
            g = 1
            while k % (2 * g) == 0 and k + 2 * g <= width and not any(frames[k : k + 2 * g]):
                g *= 2
            elements[:, k : k + g] = np.frombuffer(stored[at : at + g * n], np.uint8).reshape(n, g)
            at, k = at + g * n, k + g
    if not turned:
        return elements.tobytes()
    bits = 8 * width
    numbers = [int.from_bytes(e.tobytes(), "little") for e in elements]
    back = ((x >> 1 | (x & 1) << (bits - 1)).to_bytes(width, "little") for x in numbers)
    return b"".join(back)


class DataFile:
    """A data file, its header checked; `read` checks the blocks that a tensor lies in."""

    def __init__(self, root: Path, entry: dict[str, Any]) -> None:
        require(set(entry) == {"key", "size", "header_size", "header_digest"}, "members of a file entry")
        require(entry["key"].startswith("data/"), "a key outside data/")
        path = root / check_key(entry["key"])
        packed = path.with_name(path.name + ".zst")
        self.raw = path.read_bytes() if path.exists() else unpack(packed.read_bytes())
        require(len(self.raw) == entry["size"], "the file's size")
        size = entry["header_size"]
        require(0 < size <= entry["size"], "header_size")
        header = self.raw[:size]
        require(blake3(header).hexdigest() == entry["header_digest"], "the header's digest")
        require(8 + int.from_bytes(header[:8], "little") == size, "N")
        body = json.loads(header[8:])
        metadata = body.pop("__metadata__")
        layouts = json.loads(metadata.get("layouts", "{}"))
        self.version = {"holdfast/1": 1, "holdfast/2": 2}.get(metadata["holdfast"], 0)
        require(self.version, "an unknown version")
        self.tensors = [self._tensor(check_name(n), t, layouts.get(n, {})) for n, t in body.items()]
        position = 0
        for t in self.tensors:
            require(t.start == position, "a hole or an overlap")
            position = t.end
        require(size + position == len(self.raw), "the file's end")
        self.blocks = cut([(t.end - t.start, t.shape) for t in self.tensors], self.version)
        digests = base64.b64decode(metadata["digests"], validate=True)
        self.digests = [digests[i : i + 32] for i in range(0, len(digests), 32)]
        require(len(digests) == 32 * len(self.blocks), "the number of digests")
        require(self._only_form(metadata["digests"]) == header, "another form of the header")
        self.data = self.raw[size:]
        self.by_name = {t.name: t for t in self.tensors}

    @staticmethod
    def _tensor(name: str, entry: dict[str, Any], layout: dict[str, Any]) -> Tensor:
        require(entry["dtype"] in BY_CARRIER, "an unknown carrier")
        kind = layout.get("dtype", BY_CARRIER[entry["dtype"]])
        size, carrier, pairs, _ = TYPES[kind]
        require(carrier == entry["dtype"], "carrier and type")
        shape = list(entry["shape"])
        if pairs == 2:
            require(shape and shape.pop() == 2, "the dimension of the pairs")
        start, end = entry["data_offsets"]
        count = span = 1
        for n in shape:
            count *= n
            span *= max(n, 1)
        require(
            len(shape) <= 64 and min(shape, default=0) >= 0 and span * size <= 2**62, "bounds of the shape"
        )
        require(all(0 <= s * size <= 2**62 for s in layout.get("stride") or []), "bounds of the strides")
        require(count * size == end - start, "size and shape")
        t = Tensor(name, kind, shape, layout.get("stride"), start, end, layout.get("box"), layout.get("rows"))
        if t.box is not None:
            offsets, whole = t.box
            require(len(offsets) == len(whole) == len(shape), "the dimensions of a box")
            for o, n, w in zip(offsets, shape, whole, strict=True):
                require(o >= 0 and o + n <= w <= 2**62, "a box inside its whole")
        if t.rows is not None:
            require(t.box is not None and len(t.rows) > 1, "rows without a box, or one stretch of them")
            require(t.rows[0][0] == t.box[0][0] and t.rows[-1][1] <= t.box[1][0], "rows inside the whole")
            require(
                all(a < b for a, b in t.rows) and sum(b - a for a, b in t.rows) == shape[0], "number of rows"
            )
            require(all(t.rows[i][1] < t.rows[i + 1][0] for i in range(len(t.rows) - 1)), "rows in order")
        return t

    def _only_form(self, digests: str) -> bytes:
        magic = f"holdfast/{self.version}"
        metadata: dict[str, str] = {"format": "pt", "holdfast": magic, "digests": digests}
        layouts: dict[str, dict[str, object]] = {}
        for t in self.tensors:
            layout: dict[str, object] = {"dtype": t.type} if t.type in NAMED_IN_LAYOUT else {}
            if t.stride is not None:
                layout["stride"] = t.stride
            if t.box is not None:
                require(self.version == 2, "a part in a file of version 1")
                layout["box"] = t.box
            if t.rows is not None:
                layout["rows"] = t.rows
            if layout:
                layouts[t.name] = layout
        if layouts:
            metadata["layouts"] = compact(layouts)
        body: dict[str, object] = {"__metadata__": metadata}
        for t in self.tensors:
            _, carrier, pairs, _ = TYPES[t.type]
            shape = t.shape + ([2] if pairs == 2 else [])
            body[t.name] = {"dtype": carrier, "shape": shape, "data_offsets": [t.start, t.end]}
        text = compact(body).encode()
        size = -(-(8 + len(text)) // 4096) * 4096
        return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        t = self.by_name[name]
        for (start, end), digest in zip(self.blocks, self.digests, strict=True):
            if start < t.end and t.start < end:
                require(blake3(self.data[start:end]).digest() == digest, f"bytes of {name}")
        elements = np.frombuffer(self.data[t.start : t.end], np.dtype(TYPES[t.type][3]))
        return elements.reshape(t.shape)


class SpecRun:
    """A run in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.identity = open_sealed((root / "run.json").read_bytes())
        require(
            set(self.identity) == {"format", "run", "created"} and self.identity["format"] == 1, "run.json"
        )

    def _keys(self, prefix: str) -> list[str]:
        found = (p for p in (self.root / prefix).rglob("*") if p.is_file() and not p.name.startswith(".tmp-"))
        return sorted(p.relative_to(self.root).as_posix() for p in found)

    def manifest_keys(self) -> dict[int, str]:
        newest: dict[int, tuple[int, str]] = {}
        for key in self._keys("checkpoints"):
            if found := MANIFEST_KEY.fullmatch(key):
                step, ordinal = int(found[1]), int(found[2] or 0)
                newest[step] = max(newest.get(step, (-1, "")), (ordinal, key))
        return {step: key for step, (_, key) in sorted(newest.items())}

    def manifest(self, step: int) -> dict[str, Any]:
        content = open_sealed((self.root / self.manifest_keys()[step]).read_bytes())
        derived = any(part.get("derived") for part in content["parts"].values())
        require(content["format"] == (2 if derived else 1), "the format's number")
        require(set(content) <= MANIFEST_MEMBERS, "members of a manifest")
        require(content["step"] == step, "the step")
        return {**MANIFEST_DEFAULTS, **content}

    def trash(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """What was deleted, by key: the document, and the manifest in it."""
        found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for key in self._keys("trash"):
            raw = (self.root / key).read_bytes()
            document = open_sealed(raw)
            step, attempt, grace = TRASH_KEY.fullmatch(key).groups()  # type: ignore[union-attr]
            inner = raw if "deleted" not in document else raw[raw.index(b',"manifest":') + 12 : -78] + b"\n"
            manifest = open_sealed(inner)
            require((manifest["step"], manifest["attempt"]) == (int(step), attempt), "the key in the trash")
            require(document.get("grace_seconds", 86400) == int(grace or 86400), "the grace in the key")
            found[key] = document, manifest
        return found

    def tags(self) -> dict[str, dict[str, Any]]:
        found = {k: open_sealed((self.root / k).read_bytes()) for k in self._keys("tags")}
        require(all(k == f"tags/{t['tag']}.json" for k, t in found.items()), "the tag of the key")
        tags = list(found.values())
        steps = {s: self.manifest(s)["attempt"] for s in self.manifest_keys()}
        return {t["tag"]: t for t in tags if steps.get(t["step"]) == t["attempt"]}

    def holder(self) -> dict[str, Any]:
        return open_sealed((self.root / self._keys("lease")[-1]).read_bytes())

    def events(self) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for key in self._keys("log"):
            lines = (self.root / key).read_bytes().split(b"\n")
            out += [open_sealed(line + b"\n", 16) for line in lines[:-1]]
        return out

    def timeline(self) -> list[dict[str, Any]]:
        kept: list[dict[str, Any]] = []
        saved: dict[str, list[float]] = {}
        clock = None
        for e in self.events():
            if e["event"] == "saved":
                saved[e["attempt"]] = e["clock"]
            if e["event"] == "resumed":
                end = saved.get(e["attempt"], [e["step"], float("inf")])
                kept = [k for k in kept if not _beyond(k, end)]
                clock = None
            if e["event"] == "observed" and e["attempt"] is None:
                if clock is not None and e["clock"] <= clock:
                    continue
                clock = e["clock"]
            kept.append(e)
        return kept


def _beyond(event: dict[str, Any], end: list[float]) -> bool:
    if event["event"] == "observed":
        return bool(event["attempt"] is None and event["clock"] > end)
    return bool(event["event"] == "verdict" and event["step"] > end[0])


class SpecCheckpoint:
    """A checkpoint: its values with arrays where tensors are; of several ranks as rank 0 had it, or as `rank`."""

    def __init__(self, run: SpecRun, step: int, rank: int = 0) -> None:
        self.manifest = run.manifest(step)
        self.parts: dict[str, Any] = self.manifest["parts"]
        self._root = run.root
        self._files: dict[str, DataFile] = {}
        self.aliases: dict[str, str] = {}
        self.derived: dict[str, dict[str, Any]] = {}
        for name, part in self.parts.items():
            check_name(name)
            require(set(part) <= {"tree", "kind", "files", "aliases", "derived"}, "members of a part")
            self.derived |= part.get("derived", {})
        self._check_ranks()
        self._own: list[DataFile] = []
        self._own_names: set[str] = set()
        if f"~{rank}" in self.parts and self.manifest["world_size"] > 1:
            self._see_as(self.parts[f"~{rank}"])
        for part in self.parts.values():
            self.aliases |= part.get("aliases", {})
        require(not self.aliases.keys() & set(self.aliases.values()), "a tie to a tie")

    def _check_ranks(self) -> None:
        world = self.manifest["world_size"]
        require(world > 0, "world_size")
        for name, part in self.parts.items():
            rank = re.fullmatch(r"~([1-9][0-9]*)", name)
            own, kind = part.get("kind") in ("rank", "rank apart"), part.get("kind")
            require(not own or (rank and int(rank[1]) < world), "the name of a rank's part")
            require(own or not rank or world == 1, "a rank's part of another kind")
            if own or kind == "elsewhere":
                bare = part.get("tree") is None and not part.get("aliases")
                require(world > 1 and bare, "a rank's part with a tree or ties, or of the only rank")

    def _see_as(self, own: dict[str, Any]) -> None:
        """Take for each part what a rank had of it."""
        self._own = [DataFile(self._root, entry) for entry in own.get("files", [])]
        held = [(file, t) for file in self._own for t in file.tensors]
        seen: set[str] = set()
        gone: set[str] = set()
        for file, t in held:
            if not t.name.startswith("~/") or t.name in seen:
                continue
            seen.add(t.name)
            require(
                t.type == "uint8" and len(t.shape) == 1 and t.box is None, "values that are no row of bytes"
            )
            found = json.loads(file.read(t.name).tobytes(), object_pairs_hook=members)
            order = [m for m in ("tree", "kind", "aliases", "apart", "gone") if m in found]
            require(list(found) == order and "tree" in found, "members of a rank's values")
            gone |= set(found.pop("gone", []))
            part = check_name(t.name[2:])
            require(not part.startswith("~"), "values of a rank's part")
            self.parts[part] = {"files": self.parts.get(part, {}).get("files", []), **found}
        self._own_names = {t.name for _, t in held if not t.name.startswith("~/")} - gone

    @property
    def state(self) -> list[str]:
        """The parts of the state."""
        return [
            name for name, p in self.parts.items() if p.get("kind") not in ("rank", "rank apart", "elsewhere")
        ]

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        """Put the tensor together from the last listed file to the first, which so has the last word."""
        name = self.aliases.get(name, name)
        if name in self.derived:
            return self._derive(self.derived[name])
        files, short = self.places(name)
        first = files[0].by_name[short]
        out = np.zeros(first.whole, TYPES[first.type][3])
        given = np.zeros(first.whole, bool)
        for file in reversed(files):
            t = file.by_name[short]
            require((t.type, t.whole) == (first.type, first.whole), f"the parts of {name} fit together")
            elements, done = file.read(short), 0
            offsets = [0] * len(t.shape) if t.box is None else t.box[0]
            rows = t.rows or ([[offsets[0], offsets[0] + t.shape[0]]] if t.shape else [])
            box = tuple(slice(o, o + n) for o, n in zip(offsets, t.shape, strict=True))
            for a, b in rows or [[0, 0]]:
                at = (slice(a, b), *box[1:]) if t.shape else ()
                out[at] = elements[done : done + b - a] if t.shape else elements
                given[at] = True
                done += b - a
        require(given.all(), f"all of {name} is held")
        return out

    def _derive(self, entry: dict[str, Any]) -> np.ndarray[Any, Any]:
        members = {"source", "shape", "digest"}
        require(members <= set(entry) <= {*members, "stride"}, "members of a derived tensor")
        require(
            entry["source"] not in self.derived and entry["source"] not in self.aliases, "a stored source"
        )
        source = self.tensor(entry["source"])
        require(
            source.dtype == np.float32 and list(source.shape) == entry["shape"], "type and shape of a source"
        )
        x = source.view("<u4").astype(np.uint64)
        upper = (x + 0x7FFF + ((x >> 16) & 1)) >> 16
        made = np.where(np.isnan(source), 0x7FC0, upper).astype("<u2")
        require(blake3(made.tobytes()).hexdigest() == entry["digest"], "the digest of a derived tensor")
        return made

    def place(self, name: str) -> tuple[DataFile, str]:
        files, short = self.places(name)
        return files[0], short

    def places(self, name: str) -> tuple[list[DataFile], str]:
        """The listed files that hold the tensor or a part of it, up to the first that holds all of it."""
        name = self.aliases.get(name, name)
        if name in self._own_names:
            return self._holders(self._own, name), name
        part = name
        while part not in self.parts:
            part, cut_at, _ = part.rpartition("/")
            require(cut_at, f"{name} belongs to no part")
        short = name.removeprefix(f"{part}/")
        for entry in self.parts[part].get("files", []):
            if entry["key"] not in self._files:
                self._files[entry["key"]] = DataFile(self._root, entry)
        return self._holders([self._files[e["key"]] for e in self.parts[part].get("files", [])], short), short

    @staticmethod
    def _holders(files: list[DataFile], short: str) -> list[DataFile]:
        found = []
        for file in files:
            if short in file.by_name:
                found.append(file)
                if file.by_name[short].box is None:
                    break
        require(found, f"no file holds {short}")
        return found

    def value(self, part: str) -> Any:
        return self._value(self.parts[part].get("tree"), part)

    def _value(self, x: Any, path: str) -> Any:
        if isinstance(x, list):
            return [self._value(v, below(path, i)) for i, v in enumerate(x)]
        if not isinstance(x, dict):
            return x
        typed = [k for k in x if k.startswith("$")]
        if not typed:
            return {k: self._value(v, below(path, k)) for k, v in x.items()}
        require(len(x) == 1, "a type name beside other keys")
        key, content = typed[0], x[typed[0]]
        if key == "$tensor":
            return self.tensor(check_name(content[0]))
        if key == "$t":
            require(content in ("t", "g", "p", "f", "n", "s"), f"unknown letter {content!r}")
            return self.tensor(check_name(path))
        if key == "$typed" and content[0] == "datetime.local":
            return self._local_time(content[1], path)
        if key == "$typed":
            return (content[0], self._value(content[1], path))
        return _plain(key, content, self._value, path)

    def _local_time(self, parts: dict[str, Any], path: str) -> Any:
        time = self._value(parts["time"], path)
        if parts["zone"] is not None:
            time = time.replace(tzinfo=zoneinfo.ZoneInfo(parts["zone"]))
        return time.replace(fold=parts["fold"])


def below(path: str, key: object) -> str:
    return f"{path}/{key}" if path and key != "" else f"{path}{key}"


def _plain(key: str, x: Any, read: Any, path: str) -> Any:
    import collections
    import datetime
    import decimal
    import fractions
    import pathlib
    import struct
    import uuid

    def value(v: Any) -> Any:
        return read(v, path)

    def items(found: list[Any]) -> list[Any]:
        return [read(v, below(path, i)) for i, v in enumerate(found)]

    def pairs() -> dict[Any, Any]:
        found = []
        for k, v in x:
            of = read(k, f"{path} (key)")
            found.append((of, read(v, below(path, of) if type(of) in (str, int) else f"{path} (value)")))
        require(len({k for k, _ in found}) == len(found), "a key occurs twice")
        return dict(found)

    readers = {
        "$float": lambda: struct.unpack(">d", bytes.fromhex(x))[0],
        "$int": lambda: int(x, 16),
        "$str": lambda: base64.b64decode(x).decode("utf-8", "surrogatepass"),
        "$complex": lambda: complex(value(x[0]), value(x[1])),
        "$bytes": lambda: base64.b64decode(x),
        "$bytearray": lambda: bytearray(base64.b64decode(x)),
        "$tuple": lambda: tuple(items(x)),
        "$set": lambda: {read(v, f"{path} (element)") for v in x},
        "$frozenset": lambda: frozenset(read(v, f"{path} (element)") for v in x),
        "$range": lambda: range(*(value(v) for v in x)),
        "$slice": lambda: slice(*items(x)),
        "$dict": pairs,
        "$ordereddict": lambda: collections.OrderedDict(pairs()),
        "$counter": lambda: collections.Counter(pairs()),
        "$deque": lambda: collections.deque(items(x[0]), x[1]),
        "$datetime": lambda: datetime.datetime.fromisoformat(x),
        "$date": lambda: datetime.date.fromisoformat(x),
        "$time": lambda: datetime.time.fromisoformat(x),
        "$timedelta": lambda: datetime.timedelta(*x),
        "$decimal": lambda: decimal.Decimal(x),
        "$fraction": lambda: fractions.Fraction(value(x[0]), value(x[1])),
        "$uuid": lambda: uuid.UUID(x),
        "$path": lambda: pathlib.PurePosixPath(x),
    }
    require(key in readers, f"unknown value type {key}")
    return readers[key]()
