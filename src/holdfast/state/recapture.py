"""Capture a state again at the cost of a look: compare it with the trace of the last capture, store what differs.

A recapture gives what a capture would give, or nothing. What has the same outline, the same plain values and the
tensors in the same memory is taken over; plain values that changed are encoded again, each in its place; what cannot
be compared is captured anew, and must hold the same tensors. From one capture to the next no more than small tensors
is kept alive.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Set
from dataclasses import dataclass, field

import msgspec

from holdfast.core.errors import HoldfastError
from holdfast.format.values import TensorLeaf, encode_value
from holdfast.state.adapter import Engine
from holdfast.state.capture import capture
from holdfast.state.capturing import PLAIN, Capturing
from holdfast.state.codecs import codecs_in_use
from holdfast.state.registry import dispatch, parameters
from holdfast.state.tensors import TensorSource, TensorSpec
from holdfast.state.trace import HOLE, Anew, Branch, TensorCall, Trace, same_keys

__all__ = ["Recapture"]


class _Moved(Exception):
    """The state is not what it was; it must be captured as if for the first time."""


@dataclass(slots=True)
class _Found:
    """What a walk along a trace has come by: tensors by engine, plain values by hole, values to capture anew."""

    tensors: dict[Engine, list[object]] = field(default_factory=dict)
    plains: list[tuple[int, object]] = field(default_factory=list)
    anew: list[tuple[Anew, object]] = field(default_factory=list)


class Recapture:
    """A capture that can be repeated.

    `trees` holds the encoded value of each part, as it is now; `lasting` says of each tensor whether `renew`
    always returns the same alias.

    `anew` are the keys of the state whose values are made for each capture.

    Raises:
        UnsupportedValue, StateError: see `capture`.
    """

    def __init__(self, state: Mapping[str, object], *, anew: Collection[str] = ()) -> None:
        self._trace = Trace()
        captured = capture(state, anew=anew, trace=self._trace)
        self.aliases, self.report = captured.aliases, captured.report
        self._first: list[TensorSource] | None = captured.tensors
        texts = [_encoded(hole.value, hole.path, hole.depth) for hole in self._trace.holes]
        self._trees = {part: _Tree(node, part, texts) for part, node in captured.tree.items()}
        self.trees = {part: tree.text() for part, tree in self._trees.items()}
        self._dispatch, self._codecs = dispatch(), codecs_in_use()
        self._names, self._updated = captured.survey
        self.lasting = [True] * len(captured.tensors)
        self._repeatable = self._prepare(state, captured.tensors)
        self._trace.let_go()

    def _prepare(self, state: Mapping[str, object], sources: list[TensorSource]) -> bool:
        """Note what the next capture is compared with; return False if even this one cannot be repeated."""
        root = self._trace.root
        try:
            found = _walk(root, dict(state), self._trace)
        except _Moved:
            return False
        self._prints = {e: [list(c) for c in e.fingerprint(v)] for e, v in found.tensors.items()}
        self._surveys = [parameters({a.path: value}) for a, value in found.anew]
        self._specs = [source.spec for source in sources]
        self._volatile = [source.volatile for source in sources]
        self._kept: list[TensorSource | None] = [None] * len(sources)
        self._loose: dict[Engine, list[tuple[int, int]]] = {}
        shared: set[str] = set()
        seen = dict.fromkeys(found.tensors, 0)
        for engine, leaves in root.leaves():
            first = seen[engine]
            seen[engine] += len(leaves.calls)
            if not all(map(operator.is_, leaves.live, found.tensors[engine][first : seen[engine]])):
                return False
            shared.update([call.stored for call in leaves.calls])
            for i, call in enumerate(leaves.calls, first):
                if call.source < 0:
                    continue
                source = sources[call.source]
                if engine.keeps(source.value, source.spec):
                    self._kept[call.source] = source
                else:
                    self._loose.setdefault(engine, []).append((i, call.source))
        self._shared: Set[str] = shared
        self.lasting = [source is not None for source in self._kept]
        return not found.plains

    def first(self) -> list[TensorSource]:
        """Return the tensors of the capture that this one was made with; once only."""
        assert self._first is not None
        found, self._first = self._first, None
        return found

    def renew(self, state: Mapping[str, object]) -> list[TensorSource] | None:
        """Bring `trees` up to date and return the tensors, in the order of `first`; None: capture from the start.

        Whoever keeps them keeps the memory of the live tensors.
        """
        if not self._repeatable:
            return None
        try:
            return self._renewed(dict(state))
        except (_Moved, HoldfastError):
            # Whatever is wrong with the state, a capture from the start says it with its path.
            self._repeatable = False
            return None

    def _renewed(self, state: dict[str, object]) -> list[TensorSource]:
        if dispatch() is not self._dispatch or codecs_in_use() != self._codecs:
            raise _Moved
        found = _walk(self._trace.root, state, self._trace)
        for engine, values in found.tensors.items():
            now = engine.fingerprint(values)
            if not all(map(operator.eq, now, self._prints[engine])):
                raise _Moved
        if [parameters({a.path: value}) for a, value in found.anew] != self._surveys:
            raise _Moved
        sources = self._kept.copy()
        again = _Recapturing(self, sources)
        changed = {a.hole: again.text(a, value) for a, value in found.anew}
        changed.update({hole: self._plain(hole, value) for hole, value in found.plains})
        for engine, loose in self._loose.items():
            values = found.tensors[engine]
            for (_, number), alias in zip(loose, engine.aliases([values[i] for i, _ in loose]), strict=True):
                sources[number] = TensorSource(self._specs[number], alias, self._volatile[number])
        for part, tree in self._trees.items():
            if tree.update(changed):
                self.trees[part] = tree.text()
        for hole, value in found.plains:
            self._trace.holes[hole].value = value
        return [source for source in sources if source is not None]

    def _plain(self, number: int, value: object) -> bytes:
        hole = self._trace.holes[number]
        if type(value) not in PLAIN:
            raise _Moved
        entry = self.report.entries[hole.line]
        self.report.entries[hole.line] = entry._replace(kind=type(value).__name__)
        return _encoded(value, hole.path, hole.depth)


def _walk(branch: Branch, live: object, trace: Trace, found: _Found | None = None) -> _Found:
    """Follow the trace through the live objects and gather what it leads to.

    Raises:
        _Moved: an object's outline is not what it was.
    """
    found = _Found() if found is None else found
    now = branch.adapter.outline(live) if type(live) is branch.cls else None
    if (
        now is None
        or len(now.children) != branch.count
        or now.facts != branch.facts
        or not same_keys(now.keys, branch.keys)
    ):
        raise _Moved
    children = now.children
    for engine, leaves in branch.tensors.items():
        some = found.tensors.setdefault(engine, [])
        if len(leaves.positions) == len(children):
            some += children
        else:
            some += map(children.__getitem__, leaves.positions)
    for position, hole in branch.plains:
        if children[position] is not trace.holes[hole].value:
            found.plains.append((hole, children[position]))
    found.anew += [(anew, children[position]) for position, anew in branch.anew]
    for position, below in branch.branches:
        _walk(below, children[position], trace, found)
    return found


class _Recapturing(Capturing):
    """Captures single values anew, and checks that their tensors are registered as they were."""

    def __init__(self, of: Recapture, sources: list[TensorSource | None]) -> None:
        super().__init__(of._dispatch, of._names, of._updated, gradients=False)
        self._of, self._sources = of, sources
        self._calls: Iterator[TensorCall] = iter(())
        self._new: dict[Hashable, str] = {}

    def text(self, anew: Anew, value: object) -> bytes:
        """Return the encoded form of the value."""
        self._calls = iter(anew.calls)
        self._open = set(range(-anew.level, 0))  # as deep as it stands in the state
        detached = self.value(value, anew.path)
        if next(self._calls, None) is not None:
            raise _Moved
        return _encoded(detached, anew.path, self._of._trace.holes[anew.hole].depth)

    def tensor(
        self,
        value: object,
        spec: TensorSpec,
        *,
        kind: str,
        memory: Hashable,
        volatile: bool = True,
        live: tuple[Engine, object] | None = None,
    ) -> TensorLeaf:
        call = next(self._calls, None)
        if call is None or (call.spec, call.kind, call.tied) != (spec, kind, memory is not None):
            raise _Moved
        if memory is not None:
            self._check_tie(memory, call.stored)
        if call.source >= 0:
            self._sources[call.source] = TensorSource(self._of._specs[call.source], value, volatile)
        return TensorLeaf(call.stored, kind)

    def _check_tie(self, memory: Hashable, stored: str) -> None:
        """Tensors that shared memory must share it still, and the others must not."""
        owner = self._of._trace.ties.get(memory) or self._new.get(memory)
        if owner is None:
            if stored in self._of._shared or stored in self._new.values():
                raise _Moved
            self._new[memory] = stored
        elif owner != stored:
            raise _Moved


class _Tree:
    """The encoded value of one part, with its holes filled."""

    def __init__(self, node: object, part: str, texts: list[bytes]) -> None:
        # The pattern has one group: every second piece is the number of a hole.
        self._pieces: list[bytes] = re.split(HOLE, msgspec.json.encode(encode_value(node, part)))
        self._places = {int(self._pieces[i]): i for i in range(1, len(self._pieces), 2)}
        self.update(dict(enumerate(texts)))

    def update(self, texts: Mapping[int, bytes]) -> bool:
        """Fill holes anew; return whether this tree changed."""
        changed = False
        for number, text in texts.items():
            place = self._places.get(number)
            if place is not None and self._pieces[place] != text:
                self._pieces[place] = text
                changed = True
        return changed

    def text(self) -> msgspec.Raw:
        return msgspec.Raw(b"".join(self._pieces))


def _encoded(value: object, path: str, depth: int) -> bytes:
    return msgspec.json.encode(encode_value(value, path, depth))
