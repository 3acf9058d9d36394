"""Forging runs: whatever a hostile writer can do who knows the format and seals what it writes."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import blake3
import msgspec
import numpy as np
import pytest

import holdfast
from holdfast.core.errors import HoldfastError, IntegrityError, UnsupportedVersion
from holdfast.format.digest import digest
from holdfast.format.sealed import seal, unseal
from holdfast.stores import MemoryStore, Store

ALIGNMENT = 4096
MANIFESTS = {1: "checkpoints/000000000001.json", 2: "checkpoints/000000000002.json"}
HEADROOM_BYTES = 512 << 20
CPU_SECONDS = 30.0


class TooMuch(BaseException):
    """An attack made us work without an end in sight."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Let the block use half a gigabyte more than the process has, and half a minute of processor time."""

    def stop(number: int, frame: object) -> None:
        raise TooMuch

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM_BYTES, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def state(step: int) -> dict[str, object]:
    return {
        "a": {
            "w": np.arange(12, dtype=np.float32).reshape(3, 4) + step,
            "x": np.full(3, step, np.int64),
            "n": [step, 0.5],
        },
        "b": {"large": np.full(10_000, step, np.float64), "text": "hello"},
    }


def run() -> MemoryStore:
    """A sound run with the steps 1 and 2, which share nothing."""
    store = MemoryStore("hostile")
    for step in (1, 2):
        holdfast.save(store, state(step), step=step, metrics={"loss": 0.5}, tag=f"t{step}")
    return store


def put(store: Store, key: str, data: bytes) -> None:
    store.delete([key])
    store.write(key, [data])


# ---- manifests ------------------------------------------------------------------------------------------------------


def body_of(store: Store, key: str) -> bytes:
    return unseal(store.read(key), key)


def raw_seal(body: bytes, chars: int = 64) -> bytes:
    """Seal what `seal` would refuse to seal."""
    head = body[:-1]
    return head + b',"digest":"' + blake3.blake3(head).hexdigest()[:chars].encode() + b'"}\n'


def reseal(store: Store, key: str, change: Callable[[bytes], bytes]) -> None:
    """Put another body under a key, with the right digest."""
    before = body_of(store, key)
    after = change(before)
    put(store, key, seal(after))


def edit(store: Store, key: str, change: Callable[[dict], object]) -> None:
    """Change the decoded document under a key, and seal it again."""

    def changed(body: bytes) -> bytes:
        document = msgspec.json.decode(body)
        change(document)
        return msgspec.json.encode(document)

    reseal(store, key, changed)


def with_tree(store: Store, tree: bytes, step: int = 2) -> None:
    """Put a value tree, as it is, in place of that of part "a"."""

    def changed(body: bytes) -> bytes:
        document = msgspec.json.decode(body)
        document["parts"]["a"]["tree"] = msgspec.Raw(tree)
        return msgspec.json.encode(document)

    reseal(store, MANIFESTS[step], changed)


# ---- data files -----------------------------------------------------------------------------------------------------


def padded(json: bytes) -> bytes:
    size = -(-(8 + len(json)) // ALIGNMENT) * ALIGNMENT
    return (size - 8).to_bytes(8, "little") + json.ljust(size - 8)


def file_entry(document: dict, part: str) -> dict:
    return document["parts"][part]["files"][0]


def header_of(store: Store, part: str = "a", step: int = 2) -> tuple[str, bytes, bytes]:
    """Return the key of a part's data file, the JSON of its header, and its data."""
    entry = file_entry(msgspec.json.decode(body_of(store, MANIFESTS[step])), part)
    raw = store.read(entry["key"])
    return entry["key"], raw[8 : entry["header_size"]].rstrip(), raw[entry["header_size"] :]


def with_header(store: Store, header: bytes, data: bytes | None = None, *, size: int | None = None) -> None:
    """Give the file of part "a" of step 2 another header, and the manifest its size and digest."""
    key, _, old = header_of(store)
    raw = header + (old if data is None else data)
    put(store, key, raw)

    def changed(document: dict) -> None:
        file_entry(document, "a").update(
            size=len(raw) if size is None else size,
            header_size=len(header),
            header_digest=digest(header).hex(),
        )

    edit(store, MANIFESTS[2], changed)


# ---- what must come of it -------------------------------------------------------------------------------------------


def every_way_to_read(store: Store, step: int = 2) -> dict[str, Callable[[], object]]:
    """The ways in which a checkpoint is looked at; each works on a sound one."""

    def look() -> object:
        found = holdfast.open(store, step)
        return [(t.name, t.shape, t.read().tobytes()) for t in found.tensors.values()]

    return {
        "load": lambda: holdfast.load(store, step=step, as_="numpy"),
        "look": look,
        "verify": lambda: problems_or_raise(store, step),
        "list": lambda: (holdfast.Run(store).records(), holdfast.Run(store).broken),
        "into": lambda: holdfast.load(store, into=state(0), step=step),
    }


class Found(IntegrityError):
    """What `verify` reports instead of raising."""


def problems_or_raise(store: Store, step: int) -> None:
    found = holdfast.Run(store).verify([step])[step]
    if found:
        raise Found("; ".join(p.message for p in found))


def check_refused(
    store: Store,
    *kinds: type[HoldfastError],
    ways: tuple[str, ...] = ("load", "look", "into"),
) -> None:
    """Step 2 is refused within bounds in each of these ways, by an error of one of `kinds` (any IntegrityError) and not
    by what it would lead to; verifying finds it too; listing goes on; step 1 is as sound as before."""
    acts = every_way_to_read(store)
    with bounded():
        for way in ways:
            with pytest.raises(kinds or (IntegrityError, UnsupportedVersion)) as raised:
                acts[way]()
            assert str(raised.value), way
        with pytest.raises((IntegrityError, UnsupportedVersion)):
            acts["verify"]()
        acts["list"]()
        values = holdfast.load(store, step=1, as_="numpy")
    assert values["b"]["large"].tobytes() == state(1)["b"]["large"].tobytes()  # type: ignore[index]


def check_only_ours(store: Store) -> int:
    """Whatever is wrong, nothing but our own errors comes out; return how many of the ways failed."""
    failed = 0
    with bounded():
        for act in every_way_to_read(store).values():
            try:
                act()
            except HoldfastError:
                failed += 1
    return failed
