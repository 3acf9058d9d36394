"""What a capture leaves behind so that the next one need not walk everything: which object held what, in which order.

A traced capture returns its tree with holes: a plain value, or what is captured anew each time, stands there as a
JSON text that the encoder never writes by itself, with the number of the hole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import msgspec

from holdfast.state.adapter import Engine, Outline, Outlining
from holdfast.state.tensors import TensorSpec

__all__ = ["HOLE", "Anew", "Branch", "Hole", "Leaves", "TensorCall", "Trace", "same_keys"]

# "A" escaped: the encoder escapes only what it must, and a backslash of the user's text is doubled.
HOLE = rb'"\\u0041(\d+)"'
# How far one more object can at most move its content down in the encoded tree.
LEVELS_PER_OBJECT = 3
T = TypeVar("T")


@dataclass(slots=True)
class Hole:
    """A place in the encoded tree whose content may change: the plain `value` that was there, and its line of the
    report (-1: none, it is captured anew)."""

    path: str
    value: object
    depth: int
    line: int = -1


class TensorCall(msgspec.Struct, frozen=True, gc=False):
    """A tensor as it was registered: under the raw path `spec.name`, stored as `stored` (its own name, or that of the
    tensor whose memory it shares). `tied`: whether it has memory that can be shared; `source`: its number among the
    stored tensors, -1 where it shares one."""

    spec: TensorSpec
    kind: str
    stored: str
    tied: bool
    source: int


@dataclass(slots=True)
class Leaves:
    """The tensors of one object: by position, how they were registered, and, while the trace is written, themselves."""

    positions: list[int] = field(default_factory=list)
    calls: list[TensorCall] = field(default_factory=list)
    live: list[object] = field(default_factory=list)


@dataclass(slots=True)
class Anew:
    """A value that nobody can say of, without capturing it, whether it changed; `level` objects stand around it."""

    path: str
    hole: int
    level: int
    calls: list[TensorCall] = field(default_factory=list)


@dataclass(slots=True)
class Branch:
    """An object that can be read again quickly: what its outline was, and what its children were, by position."""

    cls: type
    adapter: Outlining
    keys: list[object]
    facts: list[object]
    count: int = 0
    plains: list[tuple[int, int]] = field(default_factory=list)
    tensors: dict[Engine, Leaves] = field(default_factory=dict)
    branches: list[tuple[int, Branch]] = field(default_factory=list)
    anew: list[tuple[int, Anew]] = field(default_factory=list)

    @classmethod
    def of(cls, value: object, adapter: Outlining, outline: Outline) -> Branch:
        return cls(type(value), adapter, outline.keys, outline.facts)

    def leaves(self) -> Iterator[tuple[Engine, Leaves]]:
        """Yield the tensors of this object, then those of the objects below."""
        yield from self.tensors.items()
        for _, below in self.branches:
            yield from below.leaves()


class _Parts:
    def outline(self, value: object) -> Outline:
        parts = cast("dict[str, object]", value)
        return Outline(list(parts.values()), list(parts))


_PARTS = _Parts()


class Trace:
    """The record of one capture, written while it runs."""

    def __init__(self) -> None:
        self.root = Branch(dict, _PARTS, [], [])
        self.holes: list[Hole] = []
        self.ties: dict[object, str] = {}
        self._open: list[Branch] = []
        self._anew: Anew | None = None

    @property
    def records(self) -> bool:
        """Whether what is captured now has a place of its own: not inside a value that is captured anew."""
        return self._anew is None and bool(self._open)

    def begin(self, state: Mapping[str, object], store: Callable[[], T]) -> T:
        """Note the state itself, whose parts `store` captures."""
        self.root.keys = list(state)
        self._open.append(self.root)
        try:
            return store()
        finally:
            self._open.pop()

    def plain(self, value: object, path: str, line: int) -> object:
        """Note a plain value and return its hole."""
        if not self.records:
            return value
        self._open[-1].plains.append((self._next(), len(self.holes)))
        return self._hole(Hole(path, value, self._depth(), line))

    def follow(
        self, value: object, path: str, adapter: Outlining | None, store: Callable[[], object]
    ) -> object:
        """Capture an object by `store`, and note how it is read again; `adapter` None: only by capturing it anew."""
        outline = adapter.outline(value) if adapter is not None else None
        if adapter is None or outline is None:
            return self.anew(path, store)
        branch = Branch.of(value, adapter, outline)
        self._open[-1].branches.append((self._next(), branch))
        self._open.append(branch)
        try:
            return store()
        finally:
            self._open.pop()

    def anew(self, path: str, store: Callable[[], object]) -> object:
        """Capture by `store` what is to be captured anew every time, and return its hole."""
        new = self._anew = Anew(path, len(self.holes), len(self._open) - 1)
        self._open[-1].anew.append((self._next(), new))
        hole = Hole(path, None, self._depth())
        try:
            raw = self._hole(hole)
            hole.value = store()  # detached: encoded with the rest, and not kept
            return raw
        finally:
            self._anew = None

    def tensor(self, live: tuple[Engine, object] | None, call: TensorCall, memory: object) -> None:
        """Note a tensor and, outside of what is captured anew, the object that its parent holds."""
        if self._anew is not None or live is None:
            assert self._anew is not None
            self._anew.calls.append(call)
            return
        engine, value = live
        leaves = self._open[-1].tensors.setdefault(engine, Leaves())
        leaves.positions.append(self._next())
        leaves.calls.append(call)
        leaves.live.append(value)
        if memory is not None:
            self.ties[memory] = call.stored

    def let_go(self) -> None:
        """Forget the live tensors, and the values that are captured anew."""
        for _, leaves in self.root.leaves():
            leaves.live.clear()
            leaves.calls.clear()
        for hole in self.holes:
            if hole.line < 0:
                hole.value = None

    def _next(self) -> int:
        branch = self._open[-1]
        branch.count += 1
        return branch.count - 1

    def _depth(self) -> int:
        return LEVELS_PER_OBJECT * len(self._open)

    def _hole(self, hole: Hole) -> msgspec.Raw:
        self.holes.append(hole)
        return msgspec.Raw(b'"\\u0041%d"' % (len(self.holes) - 1))


def same_keys(now: Sequence[object], then: Sequence[object]) -> bool:
    """Return whether these are the same keys in the same order: the same objects, or equal text."""
    if len(now) != len(then):
        return False
    if all(map(operator.is_, now, then)):
        return True
    return all(
        a is b or (type(a) is str and type(b) is str and a == b) for a, b in zip(now, then, strict=True)
    )
