"""What changed among the plain values of two checkpoints."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from holdfast.core.names import join_path
from holdfast.format.values import TensorLeaf, Typed

__all__ = ["ABSENT", "Absent", "ValueChange", "changed_values", "short"]

LONG = 16
SEQUENCES = (list, tuple, collections.deque)


class Absent:
    """The value of a path that is not there."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = Absent()


@dataclass(frozen=True, slots=True)
class ValueChange:
    """A plain value that is not the same in both; `ABSENT` stands for one that is not there."""

    path: str
    before: object
    after: object


def changed_values(before: object, after: object, path: str) -> Iterator[ValueChange]:
    """Yield every difference between two decoded value trees, tensors left out.

    Long sequences of plain values are one value, so that a generator's state is one change and not six
    hundred.
    """
    before, after = _without_tensor(before), _without_tensor(after)
    if isinstance(before, Typed) and isinstance(after, Typed) and before.kind == after.kind:
        yield from changed_values(before.value, after.value, path)
    elif isinstance(before, (dict, Absent)) and isinstance(after, (dict, Absent)) and (before or after):
        yield from _in_mapping(_items(before), _items(after), path)
    elif _is_sequence(before) and type(before) is type(after) and _worth_entering(before, after):
        for i, (a, b) in enumerate(zip(before, after, strict=True)):  # type: ignore[call-overload]
            yield from changed_values(a, b, join_path(path, i))
    elif not _same(before, after):
        yield ValueChange(path, before, after)


def short(value: object, limit: int = 40) -> str:
    """Return a few words for a value: itself where it is short, else what it is and how long."""
    if isinstance(value, TensorLeaf):
        return "tensor"
    if isinstance(value, Typed):
        text = f"{value.kind}({short(value.value, limit)})"
    elif isinstance(value, float):
        text = f"{value:.6g}"
    elif (
        isinstance(value, (dict, list, tuple, set, frozenset, collections.deque, bytes, bytearray))
        and len(value) > LONG
    ):
        return f"{type(value).__name__} of {len(value)}"
    else:
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _in_mapping(
    before: Mapping[object, object], after: Mapping[object, object], path: str
) -> Iterator[ValueChange]:
    for key in [*before, *(k for k in after if k not in before)]:
        yield from changed_values(before.get(key, ABSENT), after.get(key, ABSENT), join_path(path, key))


def _is_sequence(value: object) -> bool:
    return isinstance(value, SEQUENCES)


def _worth_entering(before: object, after: object) -> bool:
    size = len(before)  # type: ignore[arg-type]
    if size != len(after):  # type: ignore[arg-type]
        return False
    return size <= LONG or any(isinstance(v, (dict, list, tuple, Typed, TensorLeaf)) for v in before)  # type: ignore[attr-defined]


def _without_tensor(value: object) -> object:
    """Return the value, or ABSENT for a tensor: what becomes of those is told elsewhere."""
    return ABSENT if isinstance(value, TensorLeaf) else value


def _items(value: dict[object, object] | Absent) -> Mapping[object, object]:
    return {} if isinstance(value, Absent) else value


def _same(before: object, after: object) -> bool:
    if type(before) is not type(after):
        return False
    if isinstance(before, SEQUENCES) and isinstance(after, SEQUENCES):
        return len(before) == len(after) and all(map(_same, before, after))
    # NaN is not equal to itself, and 0.0 equals -0.0; their texts say what they are.
    return repr(before) == repr(after) if isinstance(before, (float, complex)) else before == after
