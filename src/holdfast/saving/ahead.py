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
from dataclasses import dataclass, field, replace
from types import TracebackType

from holdfast.format.datafile import OpenHeader, StoredTensor, lay_out, open_header
from holdfast.format.digest import BlockDigests, digest
from holdfast.format.manifest import Derived, FileEntry
from holdfast.saving.changes import Change, settle
from holdfast.saving.deriving import Derivation
from holdfast.saving.image import Image, PartImage
from holdfast.saving.known import KnownTensor, KnownTensors, is_large, look_at, sample, whole_blocks
from holdfast.stores import Stream

__all__ = ["Ahead", "Planned"]

STRETCH_BYTES = 8 << 20


class _Stopped(Exception):
    """The writer gave up; nobody waits for the rest."""


@dataclass(slots=True)
class Planned:
    """What becomes of a part: `changed` tensors are written to a file unless there are none, the others referred to.

    `compared` has the tensors, by name, that the checkpoint before knows; of those that changed some only in part.
    """

    name: str
    part: PartImage
    changed: list[StoredTensor]
    compared: dict[str, Change]
    known: dict[str, KnownTensor] = field(default_factory=dict)  # to the next save
    derived: dict[str, Derived] = field(default_factory=dict)  # by the name in the file
    entry: FileEntry | None = None
    # Which of the part's bytes are written, in order, and how many of these are there to be taken.
    spans: list[tuple[int, int]] = field(default_factory=list)
    there: int = 0
    header: OpenHeader | None = None
    head: bytes = b""

    @property
    def needed(self) -> set[str]:
        """The keys of the older files that are referred to."""
        return {key for change in self.compared.values() for key, _, _ in change.held()}


class Ahead:
    """Goes through an image on a thread of its own while `streams` is being written; a context manager.

    `keys` are the data files' by part; with `derive` what follows from another tensor is left out of them. Nothing
    touches the image's memory any more once the context was left.
    """

    def __init__(
        self, image: Image, keys: Mapping[str, str], known: KnownTensors, *, derive: bool = False
    ) -> None:
        self.planned: list[Planned] = []
        self._image = image
        self._keys = keys
        self._known = known
        self._derivation = Derivation(image) if derive else None
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
            for name, part in self._parts():
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

    def _parts(self) -> list[tuple[str, PartImage]]:
        """Return the parts by name, last those that must wait until all of the image is there."""
        parts = list(self._image.parts.items())
        found = self._derivation
        return parts if found is None else sorted(parts, key=lambda part: part[0] in found.candidates)

    def _wait(self, end: int) -> None:
        if self._stopped:
            raise _Stopped
        self._image.wait(end)

    def _plan(self, name: str, part: PartImage) -> Planned:
        """Decide what of a part is new. Nothing is waited for where nothing can be unchanged."""
        derived = self._derive(name)
        tensors = [t for t in part.tensors if t.name not in derived] if derived else part.tensors
        before = self._known.parts.get(name, {})
        compared: dict[str, Change] = {}
        for t in tensors if before else ():
            known = before.get(t.name) if is_large(t) else None
            if known is not None:
                self._wait(part.offset + t.end)
                look = look_at(t, part.data[t.start : t.end], known)
                if look is not None:
                    compared[t.name] = Change(t, look)
        changes = list(compared.values())
        sizes = [t.nbytes for t in tensors] if changes else []
        settle(changes, sum(sizes), sum(sizes) - sum(c.tensor.nbytes for c in changes))
        kept = {t for t, change in compared.items() if not change.look.changed}
        plan = Planned(name, part, [t for t in tensors if t.name not in kept], compared, derived=derived)
        looks = {t: compared[t].look for t in kept}
        plan.known = {t: replace(look.known, samples=look.samples) for t, look in looks.items()}
        if plan.changed:
            plan.header = open_header(lay_out(_stored(plan)) if changes or derived else part.tensors)
            plan.spans = _spans(_runs(plan))
        return plan

    def _derive(self, name: str) -> dict[str, Derived]:
        """Return what of a part follows from other tensors, by the name in its file; to see that, all is waited for."""
        if self._derivation is None or name not in self._derivation.candidates:
            return {}
        self._wait(self._image.end)
        return self._derivation.find(name)

    def _digest(self, plan: Planned, header: OpenHeader) -> None:
        """Let a file's bytes pass to the writer as they come, and digest them."""
        part = plan.part
        owners = [plan.changed[b.first] for b in header.blocks]
        passing = BlockDigests(header.blocks, _given(owners, plan.compared))
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


def _stored(plan: Planned) -> list[StoredTensor]:
    """Return what the file of a part is to hold."""
    return [plan.compared[t.name].stored() if t.name in plan.compared else t for t in plan.changed]


def _runs(plan: Planned) -> Iterator[tuple[int, int]]:
    """Yield where in the part's bytes that lies, in order."""
    for t in plan.changed:
        change = plan.compared.get(t.name)
        if change is None or change.whole:
            yield t.start, t.end
        else:
            yield from ((t.start + start, t.start + end) for start, end in change.stretches())


def _remember(plan: Planned, entry: FileEntry, blocks: Iterable[tuple[StoredTensor, bytes]]) -> None:
    """Note what the next save wants to know of a file's large tensors; `blocks` are their owners and digests."""
    own: dict[str, list[bytes]] = {}
    for t, found in blocks:
        if is_large(t):
            own.setdefault(t.name, []).append(found)
    for t in plan.changed:
        if t.name in own:
            change = plan.compared.get(t.name)
            plan.known[t.name] = (
                _known_whole(t, plan.part.data[t.start : t.end], entry, own[t.name])
                if change is None
                else change.known(entry, own[t.name])
            )


def _known_whole(
    t: StoredTensor, data: memoryview, entry: FileEntry, digests: Sequence[bytes]
) -> KnownTensor:
    samples = tuple(sample(data[b.start : b.end]) for b in whole_blocks(len(data), t.shape))
    return KnownTensor(t.dtype, t.shape, t.stride, tuple(digests), (entry,) * len(digests), samples, t.box)


def _is_there(plan: Planned, size: int) -> bool:
    return plan.there >= size


def _spans(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return places in a part's bytes, in order, as stretches that are passed on one by one."""
    runs: list[tuple[int, int]] = []
    for start, end in places:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return [
        (at, min(end, at + STRETCH_BYTES)) for start, end in runs for at in range(start, end, STRETCH_BYTES)
    ]


def _given(owners: Sequence[StoredTensor], compared: Mapping[str, Change]) -> dict[int, bytes]:
    """Return the digests that were taken already, by index of block; `owners` are the blocks' first tensors."""
    given: dict[int, bytes] = {}
    rest = {name: iter(change.digests) for name, change in compared.items()}
    for index, t in enumerate(owners):
        taken = next(rest[t.name]) if t.name in rest else None
        if taken is not None:
            given[index] = taken
    return given
