"""Working ahead of the disk: what must be known of an image before and while its bytes are written.

A thread goes through the image once, from the front: it waits for the bytes, decides what of a part is new, lays out
its file, and digests it. The writer follows behind and writes each stretch as soon as it is there, so that a save takes
as long as the slower of the two and not as long as both.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from holdfast.format.datafile import OpenHeader, StoredTensor, lay_out, open_header
from holdfast.format.digest import BlockDigests, digest
from holdfast.format.manifest import FileEntry
from holdfast.saving.image import Image, PartImage
from holdfast.saving.known import KnownTensor, KnownTensors, is_large, look_at, sample
from holdfast.stores import Stream

__all__ = ["Ahead", "Planned"]

STRETCH_BYTES = 8 << 20


class _Stopped(Exception):
    """The writer gave up; nobody waits for the rest."""


@dataclass(slots=True)
class Planned:
    """What becomes of a part: `kept` tensors are referred to, the others written to a file unless there are none."""

    name: str
    part: PartImage
    kept: dict[str, KnownTensor]
    changed: list[StoredTensor]
    known: dict[str, KnownTensor] = field(default_factory=dict)
    entry: FileEntry | None = None
    # Digests of tensors that might have been kept and turned out changed.
    taken: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    # Which of the part's bytes are written, in order, and how many of these are there to be taken.
    spans: list[tuple[int, int]] = field(default_factory=list)
    there: int = 0
    header: OpenHeader | None = None
    head: bytes = b""


class Ahead:
    """Goes through an image on a thread of its own while `streams` is being written; a context manager.

    `keys` are the data files' by part. Nothing touches the image's memory any more once the context was left.
    """

    def __init__(self, image: Image, keys: Mapping[str, str], known: KnownTensors) -> None:
        self.planned: list[Planned] = []
        self._image = image
        self._keys = keys
        self._known = known
        self._changed = threading.Condition()
        self._done = False
        self._stopped = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="holdfast-digest", daemon=True)

    def __enter__(self) -> Ahead:
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter ends, and no thread starts any more
            self._run()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        if self._thread.ident is not None:
            self._thread.join()

    def streams(self) -> Iterator[Stream]:
        """Yield the files to write; return when every part was gone through. Raises what made the copy fail."""
        for index in itertools.count():
            self._until(functools.partial(self._has, index))
            if index == len(self.planned):
                return
            plan = self.planned[index]
            if plan.header is not None:
                head = functools.partial(self._head, plan)
                yield Stream(self._keys[plan.name], plan.header.size, self._body(plan), head)

    def _body(self, plan: Planned) -> Iterator[memoryview]:
        taken = 0
        for start, end in plan.spans:
            taken += end - start
            self._until(functools.partial(_is_there, plan, taken))
            yield plan.part.data[start:end]

    def _has(self, index: int) -> bool:
        return self._done or index < len(self.planned)

    def _head(self, plan: Planned) -> bytes:
        self._until(lambda: bool(plan.head))
        return plan.head

    def _until(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or holds())
            if self._failure is not None:
                raise self._failure

    # ---- on the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for name, part in self._image.parts.items():
                plan = self._plan(name, part)
                with self._tell():
                    self.planned.append(plan)
                if plan.header is not None:
                    self._digest(plan, plan.header)
            self._image.wait(self._image.end)
            with self._tell():
                self._done = True
        except BaseException as e:  # noqa: BLE001 - raised where the writer waits
            with self._tell():
                self._failure = e

    def _wait(self, end: int) -> None:
        if self._stopped:
            raise _Stopped
        self._image.wait(end)

    def _plan(self, name: str, part: PartImage) -> Planned:
        """Decide which tensors of a part are new. Nothing is waited for where nothing can be unchanged."""
        before = self._known.parts.get(name, {})
        plan = Planned(name, part, {}, [])
        for t in part.tensors:
            known = before.get(t.name) if before and is_large(t) else None
            if known is not None:
                self._wait(part.offset + t.end)
                unchanged, digests = look_at(t, part.data[t.start : t.end], known)
                if unchanged is not None:
                    plan.kept[t.name] = unchanged
                    continue
                if digests:
                    plan.taken[t.name] = digests
            plan.changed.append(t)
        if plan.changed:
            plan.header = open_header(lay_out(plan.changed) if plan.kept else part.tensors)
            plan.spans = _spans(plan.changed)
        return plan

    def _digest(self, plan: Planned, header: OpenHeader) -> None:
        """Let a file's bytes pass to the writer as they come, and digest them."""
        part = plan.part
        owners = [plan.changed[b.first] for b in header.blocks]
        passing = BlockDigests(header.blocks, _given(owners, plan.taken))
        for start, end in plan.spans:
            self._wait(part.offset + end)
            with self._tell():
                plan.there += end - start
            passing.update(part.data[start:end])
        head = header.close(passing.digests)
        size = header.size + plan.there
        plan.entry = FileEntry(self._keys[plan.name], size, header.size, digest(head).hex())
        with self._tell():
            plan.head = head
        _remember(plan, plan.entry, zip(owners, passing.digests, strict=True))

    @contextlib.contextmanager
    def _tell(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify_all()


def _remember(plan: Planned, entry: FileEntry, blocks: Iterable[tuple[StoredTensor, bytes]]) -> None:
    """Note what the next save wants to know of a file's large tensors; `blocks` are their owners and digests."""
    own: dict[str, list[bytes]] = {}
    for t, found in blocks:
        if is_large(t):
            own.setdefault(t.name, []).append(found)
    for t in plan.changed:
        if t.name in own:
            seen = sample(plan.part.data[t.start : t.end])
            plan.known[t.name] = KnownTensor(t.dtype, t.shape, t.stride, tuple(own[t.name]), entry, seen)


def _is_there(plan: Planned, size: int) -> bool:
    return plan.there >= size


def _spans(tensors: Sequence[StoredTensor]) -> list[tuple[int, int]]:
    """Return where the bytes of tensors lie, in order, in stretches that are passed on one by one."""
    runs: list[tuple[int, int]] = []
    for t in tensors:
        if runs and runs[-1][1] == t.start:
            runs[-1] = (runs[-1][0], t.end)
        else:
            runs.append((t.start, t.end))
    return [
        (at, min(end, at + STRETCH_BYTES)) for start, end in runs for at in range(start, end, STRETCH_BYTES)
    ]


def _given(owners: Sequence[StoredTensor], taken: Mapping[str, tuple[bytes, ...]]) -> dict[int, bytes]:
    """Return the digests that were taken already, by index of block; `owners` are the blocks' first tensors."""
    given: dict[int, bytes] = {}
    rest = {name: iter(digests) for name, digests in taken.items()}
    for index, t in enumerate(owners):
        if t.name in rest:
            given[index] = next(rest[t.name])
    return given
