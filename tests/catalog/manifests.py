"""Small manifests and stores in trouble, for the tests of this directory."""

from __future__ import annotations

from collections.abc import Callable

from holdfast.catalog.checkpoints import Entry, commit, entries, read_entry
from holdfast.catalog.lease import acquire
from holdfast.catalog.summary import Summaries, summarize
from holdfast.core.buffers import Buffer
from holdfast.core.errors import StoreError
from holdfast.format.manifest import FORMAT_VERSION, FileEntry, Manifest, Part
from holdfast.format.trash import decode_trash
from holdfast.stores import MemoryStore, Store
from holdfast.testing import MockClock


def data_key(step: int, attempt: str) -> str:
    return f"data/{step:012d}-{attempt}/m.safetensors"


def manifest(step: int, attempt: str = "aa", *, files: tuple[str, ...] = (), **fields: object) -> Manifest:
    """A manifest that refers to `files` (its own data file by default)."""
    entries = [FileEntry(key, 4096, 4096, "00" * 32) for key in files or (data_key(step, attempt),)]
    common = {
        "format": FORMAT_VERSION,
        "run": "r",
        "generation": 1,
        "time": 1.0,
        "clock": (step, 0, 0, 0, 0.0),
    }
    return Manifest(**(common | fields), step=step, attempt=attempt, parts={"model": Part(files=entries)})  # type: ignore[arg-type]


def put(store: Store, *manifests: Manifest) -> list[Entry]:
    """Commit manifests, with something at each data key they refer to that is free."""
    held = acquire(store, MockClock(), heartbeat=False)
    made = []
    present = {o.key for o in store.list("data")}
    for m in manifests:
        for key in sorted(m.file_keys - present):
            store.write(key, [b"x" * 10])
            present.add(key)
        made.append(commit(store, m, held))
    held.release()
    return made


def known(*manifests: tuple[Entry, Manifest]) -> Summaries:
    return Summaries({entry.key: summarize(m) for entry, m in manifests})


def set_aside(store: Store) -> list[Manifest]:
    return [decode_trash(store.read(o.key), o.key)[0] for o in store.list("trash")]


def attempts(store: Store) -> list[tuple[int, str]]:
    return [(e.step, read_entry(store, e).attempt) for e in entries(store)]


class Interrupted(MemoryStore):
    """Runs `before` and `after` around the next creation of a manifest; either may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[str], None] = lambda key: None
        self.after: Callable[[str], None] = lambda key: None

    def create(self, key: str, data: Buffer) -> None:
        if not key.startswith("checkpoints/"):
            return super().create(key, data)
        before, self.before = self.before, lambda key: None
        after, self.after = self.after, lambda key: None
        before(key)
        super().create(key, data)
        after(key)
        return None


def fail(key: str) -> None:
    raise StoreError(5, f"could not create {key}: Input/output error")
