"""What changed between two checkpoints: tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from holdfast.analysis.blocks import Blocks, abreast
from holdfast.analysis.numbers import Numbers, as_numbers, changed_elements, chunks, stored_elements
from holdfast.analysis.values import ABSENT, ValueChange, changed_values
from holdfast.checkpoint import Checkpoint
from holdfast.core.errors import NoCheckpoint
from holdfast.state.tensors import TensorSpec

__all__ = ["Difference", "Kind", "TensorChange", "compare"]

Kind: TypeAlias = Literal["added", "removed", "shape", "dtype", "changed"]


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A tensor that is not the same in both checkpoints.

    The numbers are there for `kind` "changed" only. They speak of the elements that are finite in both:
    `max_delta` is the largest absolute difference, `relative` the L2 norm of the difference over that of the
    tensor before (infinite when that was zero), `cosine` the cosine between the two (NaN when either is
    zero). `fraction` is the share of all elements that differ in any bit; `lost_finite` counts elements that
    were finite and no longer are.
    """

    name: str
    part: str
    kind: Kind
    before: TensorSpec | None
    after: TensorSpec | None
    max_delta: float = math.nan
    relative: float = math.nan
    fraction: float = math.nan
    cosine: float = math.nan
    lost_finite: int = 0


@dataclass(frozen=True, slots=True)
class Difference:
    """What changed. `tensors` holds the most changed first, those added, removed or of another shape at the
    front; `same` counts the equal ones, `read_bytes` what had to be read of both checkpoints to tell.
    """

    tensors: tuple[TensorChange, ...]
    values: tuple[ValueChange, ...]
    same: int
    read_bytes: int


def compare(
    before: Checkpoint,
    after: Checkpoint,
    *,
    part: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Difference:
    """Return what changed from one checkpoint to another, of one part or of all.

    Tensors whose stored digests agree are equal and are not read. `progress` is told the number of bytes
    dealt with since its last call; in all that is the size of the tensors that both checkpoints have.

    Raises:
        NoCheckpoint: neither checkpoint has this part.
        IntegrityError: bytes are not what was committed.
    """
    if part is not None and part not in before.parts and part not in after.parts:
        known = ", ".join(after.parts)
        raise NoCheckpoint(f"no part {part!r} in step {before.step} or step {after.step}; parts are: {known}")
    comparison = _Comparison(before, after)
    changes = list(comparison.changes(part, progress))
    kinds: tuple[Kind, ...] = ("removed", "added", "shape", "dtype", "changed")
    changes.sort(key=lambda c: (kinds.index(c.kind), -_weight(c.relative), c.name))
    values = [
        c
        for name in _parts(before, after, part)
        for c in changed_values(_tree(before, name), _tree(after, name), name)
    ]
    return Difference(tuple(changes), tuple(values), comparison.same, comparison.read_bytes)


def _weight(relative: float) -> float:
    return math.inf if math.isnan(relative) else relative


def _parts(before: Checkpoint, after: Checkpoint, part: str | None) -> list[str]:
    return list(dict.fromkeys([*before.parts, *after.parts])) if part is None else [part]


def _tree(checkpoint: Checkpoint, part: str) -> object:
    return checkpoint.tree.get(part, ABSENT)


class _Comparison:
    """The work of comparing the tensors of two checkpoints."""

    def __init__(self, before: Checkpoint, after: Checkpoint) -> None:
        self.before, self.after = before, after
        self.same = 0
        self.read_bytes = 0
        self._old, self._new = Blocks(before.reader), Blocks(after.reader)

    def changes(self, part: str | None, progress: Callable[[int], None]) -> Iterator[TensorChange]:
        """Yield every change, in the order in which the tensors lie in the newer checkpoint's files."""
        old, new = self._names(self.before, part), self._names(self.after, part)
        for name in sorted(old.keys() - new.keys()):
            yield TensorChange(name, old[name], "removed", self.before.reader.spec(name), None)
        for name in sorted(new.keys() - old.keys()):
            yield TensorChange(name, new[name], "added", None, self.after.reader.spec(name))
        for name in sorted(old.keys() & new.keys(), key=self._new.order):
            if self._tied_alike(name):
                continue
            found = self._change(name, new[name], progress)
            if found is None:
                self.same += 1
            else:
                yield found

    def _names(self, checkpoint: Checkpoint, part: str | None) -> dict[str, str]:
        """Return the part that each tensor belongs to, by name."""
        owner = {name: checkpoint.seen.part_of(name) for name in checkpoint.tensors}
        return {name: of for name, of in owner.items() if part is None or of == part}

    def _tied_alike(self, name: str) -> bool:
        """Return whether a name is tied to the same tensor on both sides, and so is compared there."""
        old, new = self.before.reader.aliases.get(name), self.after.reader.aliases.get(name)
        return old is not None and old == new

    def _change(self, name: str, part: str, progress: Callable[[int], None]) -> TensorChange | None:
        old, new = self.before.reader.spec(name), self.after.reader.spec(name)
        if old.shape != new.shape or old.dtype != new.dtype:
            progress(new.nbytes)
            return TensorChange(name, part, "shape" if old.shape != new.shape else "dtype", old, new)
        if self._old.fingerprint(name) == self._new.fingerprint(name):
            progress(new.nbytes)
            return None
        sums = _Sums()
        for a, b in abreast(self._old.pieces(name), self._new.pieces(name)):
            sums.add(a, b, new.dtype)
            self.read_bytes += len(a) + len(b)
            progress(len(b))
        if not sums.changed:
            return None
        relative, cosine = sums.ratios()
        fraction = sums.changed / stored_elements(new.nbytes, new.dtype)
        return TensorChange(
            name, part, "changed", old, new, sums.largest, relative, fraction, cosine, sums.lost
        )


@dataclass(slots=True)
class _Sums:
    """What a comparison of two tensors adds up."""

    changed: int = 0
    lost: int = 0
    largest: float = 0.0
    delta_squares: float = 0.0
    old_squares: float = 0.0
    new_squares: float = 0.0
    product: float = 0.0

    def add(self, old: memoryview, new: memoryview, dtype: str) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            for a, b in zip(chunks(old, dtype), chunks(new, dtype), strict=True):
                changed = changed_elements(a, b, dtype)
                self.changed += changed
                before = as_numbers(a, dtype)
                self._add(before, as_numbers(b, dtype) if changed else before)

    def _add(self, a: Numbers, b: Numbers) -> None:
        finite_before = np.isfinite(a)
        both = finite_before & np.isfinite(b)
        self.lost += int(np.count_nonzero(finite_before & ~both))
        if not both.all():
            a, b = (a[both], b[both]) if a is not b else (a[both],) * 2
        if not a.size:
            return
        squares = float(np.vdot(a, a).real)
        self.old_squares += squares
        self.new_squares += squares if a is b else float(np.vdot(b, b).real)
        self.product += squares if a is b else float(np.vdot(a, b).real)
        if a is not b:
            delta = b - a
            self.largest = max(self.largest, float(np.abs(delta).max()))
            self.delta_squares += float(np.vdot(delta, delta).real)

    def ratios(self) -> tuple[float, float]:
        """Return the relative norm of the change and the cosine."""
        norm = math.sqrt(self.old_squares)
        delta = math.sqrt(self.delta_squares)
        relative = delta / norm if norm else (math.inf if delta else 0.0)
        lengths = norm * math.sqrt(self.new_squares)
        cosine = (
            max(-1.0, min(1.0, self.product / lengths)) if lengths and math.isfinite(lengths) else math.nan
        )
        return relative, cosine
