"""Persisting an image: what is written, what is referred to, in what order, and what is left when it fails."""

from __future__ import annotations

import errno
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.catalog.content import open_file
from holdfast.core.errors import OutOfSpace
from holdfast.format.manifest import Part
from holdfast.saving import ahead as ahead_module
from holdfast.saving import known as known_module
from holdfast.saving.arena import Arena
from holdfast.saving.image import Image, PartImage
from holdfast.saving.persist import KnownTensors, new_attempt, persist_parts
from holdfast.saving.progress import Progress
from holdfast.saving.snapshot import take_snapshot
from holdfast.stores import LocalStore, MemoryStore, Store, Stream
from holdfast.testing import FaultyDisk

LARGE = 20_000  # float64: 160 kB, so that a tensor has digest blocks of its own
State = dict[str, dict[str, np.ndarray]]


def image_of(state: State) -> Image:
    return take_snapshot(state, Arena(), rng=False).image


def stored(store: Store, parts: dict[str, Part]) -> dict[str, bytes]:
    """Every tensor's bytes as the parts' files say, by "part/name"; each block verified."""
    found: dict[str, bytes] = {}
    for name, part in parts.items():
        for entry in reversed(part.files):
            file = open_file(store, entry)
            for t in file.header.tensors:
                for index in file.blocks_of(t.start, t.end):
                    file.read_block(index)
                data = bytearray(t.nbytes)
                file.read(file.header.data_start + t.start, memoryview(data))
                found[f"{name}/{t.name}"] = bytes(data)
    return found


def expected(state: State) -> dict[str, bytes]:
    return {f"{part}/{name}": a.tobytes() for part, tensors in state.items() for name, a in tensors.items()}


def written(store: Store, parts: dict[str, Part], attempt: str) -> set[str]:
    """The tensors that lie in the files of an attempt."""
    return {
        f"{name}/{t.name}"
        for name, part in parts.items()
        for entry in part.files
        if attempt in entry.key
        for t in open_file(store, entry).header.tensors
    }


def state() -> State:
    rng = np.random.default_rng(0)
    return {
        "a": {"w": rng.random(LARGE), "b": np.arange(7, dtype=np.float32), "half": rng.random(LARGE).astype(np.float16)},
        "b": {"x": rng.random(3 * LARGE), "y": rng.random(LARGE), "z": rng.random(LARGE), "none": np.zeros((0, 3))},
        "c": {"n": np.int64([1, 2])},
    }  # fmt: skip


class Told(Progress):
    """A progress that does what it is told to when it is waited for."""

    def __init__(self, wait: Callable[[int], None]) -> None:
        super().__init__(0)
        self.wait = wait  # type: ignore[method-assign]


class OnTheWay:
    """An image whose memory holds rubbish until it is waited for."""

    def __init__(self, whole: Image) -> None:
        self.waits: list[int] = []
        self._from, self._to, parts = [], [], {}
        for name, part in whole.parts.items():
            memory = memoryview(bytearray(b"\xee" * len(part.data)))
            parts[name] = PartImage(part.tree, part.kind, part.aliases, part.tensors, memory, part.offset)
            self._from.append(part)
            self._to.append(memory)
        self.image = Image(parts, Told(self.wait))

    def wait(self, end: int) -> None:
        self.waits.append(end)
        for part, memory in zip(self._from, self._to, strict=True):
            size = max(0, min(len(memory), end - part.offset))
            memory[:size] = part.data[:size]


def test_nothing_is_read_before_it_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "STRETCH_BYTES", 4096)
    store, now = MemoryStore(), state()
    way = OnTheWay(image_of(now))
    parts, known, _ = persist_parts(store, 1, new_attempt(), way.image, KnownTensors())
    assert stored(store, parts) == expected(now)
    assert way.waits[-1] == way.image.end
    assert len(way.waits) > 50, "bit by bit"
    now["b"]["x"][5] += 1
    way = OnTheWay(image_of(now))
    parts, _, _ = persist_parts(store, 2, "second", way.image, known)
    assert stored(store, parts) == expected(now)
    large = {path for path in written(store, parts, "second") if len(expected(now)[path]) >= 1 << 16}
    assert large == {"b/x"}, "what was compared was there as well"


def test_what_is_there_is_written_while_the_rest_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "STRETCH_BYTES", 1 << 16)
    taken = threading.Event()

    class Watched(MemoryStore):
        def write_streams(self, streams: Iterable[Stream]) -> None:
            super().write_streams(replace(s, body=self._watched(s)) for s in streams)

        def _watched(self, stream: Stream) -> Iterable[object]:
            for piece in stream.body:
                taken.set()
                yield piece

    def wait(end: int) -> None:
        assert end <= 1 << 16 or taken.wait(60), "the first stretch is not written before the second has come"

    store, now = Watched(), state()
    parts, _, _ = persist_parts(
        store, 1, new_attempt(), replace(image_of(now), progress=Told(wait)), KnownTensors()
    )
    assert stored(store, parts) == expected(now)


class Lost(Exception):
    pass


@pytest.mark.parametrize("make", [MemoryStore, None], ids=["memory", "local"])
def test_when_the_copy_fails_nothing_is_left(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Store] | None
) -> None:
    monkeypatch.setattr(ahead_module, "STRETCH_BYTES", 1 << 16)
    image = image_of(state())
    for fail_at in (0, 1, 1 << 16, 1 << 18, 1 << 19, image.end):
        store = make() if make else LocalStore(tmp_path)

        def wait(end: int, fail_at: int = fail_at) -> None:
            if end >= fail_at:
                raise Lost

        with pytest.raises(Lost):
            persist_parts(store, 1, new_attempt(), replace(image, progress=Told(wait)), KnownTensors())
        assert store.list("") == []
        assert no_thread()
    assert not make or not (tmp_path / "data").exists()


def no_thread() -> bool:
    return not [t for t in threading.enumerate() if t.name == "holdfast-digest"]


def test_when_the_disk_fails_the_rest_is_not_waited_for(tmp_path: pathlib.Path) -> None:
    waits: list[int] = []
    disk = FaultyDisk(4, errno.ENOSPC, sticky=True)
    image = replace(image_of(state()), progress=Told(waits.append))
    with pytest.raises(OutOfSpace):
        persist_parts(LocalStore(tmp_path / "run", disk), 1, new_attempt(), image, KnownTensors())
    assert disk.fired
    assert no_thread(), "the image's memory is used again"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["a/w", "a/half", "b/x", "b/y", "b/z"]), st.integers(0, 50), st.booleans())),
        min_size=1, max_size=4,
    ),
    st.booleans(),
)  # fmt: skip
def test_just_what_changed_is_written(changes: list[list[tuple[str, int, bool]]], restarted: bool) -> None:
    """A change of one element, seen by the sample or not, and the change back; a process that knows only the files."""
    store, now = MemoryStore(), state()
    parts, known, _ = persist_parts(store, 0, new_attempt(), image_of(now), KnownTensors())
    for step, made in enumerate(changes, 1):
        before = expected(now)
        for path, at, back in made:
            part, _, name = path.partition("/")
            now[part][name][at] = 0 if back else step
        if restarted:
            known = KnownTensors.of(store, _Manifest(parts))  # type: ignore[arg-type]
        attempt = new_attempt()
        parts, known, size = persist_parts(store, step, attempt, image_of(now), known)
        assert stored(store, parts) == expected(now)
        changed = {path for path, data in expected(now).items() if data != before[path]}
        small = {path for path, data in before.items() if len(data) < 1 << 16}
        assert written(store, parts, attempt) == changed | small
        assert size == sum(o.size for o in store.list("data") if attempt in o.key)


class _Manifest:
    def __init__(self, parts: dict[str, Part]) -> None:
        self.parts = parts


def test_a_self_contained_checkpoint_refers_to_nothing() -> None:
    store, now, attempts = MemoryStore(), state(), ["one", "two", "three"]
    known = KnownTensors()
    parts, known, full = persist_parts(store, 1, attempts[0], image_of(now), known)
    parts, known, again = persist_parts(store, 2, attempts[1], image_of(now), known, self_contained=True)
    assert again == full
    assert all(attempts[1] in f.key for part in parts.values() for f in part.files)
    assert stored(store, parts) == expected(now)
    parts, known, little = persist_parts(store, 3, attempts[2], image_of(now), known)
    assert little < full / 10
    needed = {f.key for part in parts.values() for f in part.files}
    assert not [key for key in needed if attempts[0] in key], "what is known is the newest"


def test_digests_are_taken_first_only_where_a_tensor_may_be_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    real = known_module.digest
    monkeypatch.setattr(known_module, "digest", lambda data: taken.append(len(data)) or real(data))
    store, now = MemoryStore(), state()
    _, known, _ = persist_parts(store, 1, new_attempt(), image_of(now), KnownTensors())
    assert not taken
    for part in now.values():
        for a in part.values():
            a += 1
    _, known, _ = persist_parts(store, 2, new_attempt(), image_of(now), known)
    assert not taken, "every sample differs"
    now["b"]["y"] += 1
    persist_parts(store, 3, new_attempt(), image_of(now), known)
    assert sum(taken) == sum(
        now[p][n].nbytes for p, n in (("a", "w"), ("b", "x"), ("b", "z"))
    )  # half is below 64 KiB


def test_a_sample_is_of_the_whole_tensor() -> None:
    for size in (8, 9, 100, 65_536, 65_541, 10**6):
        data = memoryview(bytearray(size))
        zero = known_module.sample(data)
        for third in range(3):
            changed = memoryview(bytearray(data))
            changed[size * third // 3 : size * (third + 1) // 3 + 8] = b"\1" * len(
                changed[size * third // 3 : size * (third + 1) // 3 + 8]
            )
            assert known_module.sample(changed) != zero


def test_it_works_where_no_thread_starts_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the interpreter's end."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    store, now = MemoryStore(), state()
    parts, _, _ = persist_parts(store, 1, new_attempt(), image_of(now), KnownTensors())
    assert stored(store, parts) == expected(now)


def test_a_state_without_tensors_writes_no_file(tmp_path: pathlib.Path) -> None:
    waits: list[int] = []
    image = take_snapshot({"a": {"n": 1}, "b": [2.0]}, Arena(), rng=False).image
    image = replace(image, progress=Told(waits.append))
    parts, _, size = persist_parts(LocalStore(tmp_path), 1, new_attempt(), image, KnownTensors())
    assert (list(parts), size, waits) == (["a", "b"], 0, [0])
    assert parts["a"].values("a") == {"n": 1}
    assert list(tmp_path.iterdir()) == []


def test_persisting_needs_no_framework() -> None:
    """It runs in a process of its own, which must be up at once."""
    code = "import sys, holdfast.saving.persist; print({'numpy', 'torch', 'jax', 'safetensors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
