"""What is stored and was taken by no rank of a restore, from what each says that nothing of it took."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Set

from holdfast.catalog.ranks import view_of
from holdfast.core.names import join_path
from holdfast.distributed.words import Restoring
from holdfast.format.manifest import Manifest, Part
from holdfast.format.ranks import RANK_APART, own_part
from holdfast.format.values import TensorLeaf, Typed
from holdfast.stores import Store

__all__ = ["taken_by_nobody"]

NESTED = (TensorLeaf, Typed, dict, list, tuple, deque)


def taken_by_nobody(store: Store, manifest: Manifest, words: Mapping[int, Restoring]) -> list[str]:
    """Return what no rank took, as ranks named it in their `words`: those who looked at it have no place for it.

    Raises:
        IntegrityError, StoreError: what ranks had for themselves cannot be read.
    """
    if not (words[0].unused or any(word.own or word.wide for word in words.values())):
        return []  # what some left is as rank 0 had it, which took it
    named = Counter(path for word in words.values() for path in set(word.unused))
    if not named:
        return []
    if manifest.world_size != len(words):  # all have looked at the same
        return sorted(path for path in named if _times(named, path) == len(words))
    lookers = _lookers(store, manifest, words, {path.partition("/")[0] for path in named})
    left = [path for path, count in lookers.items() if _times(named, path) == count]
    return sorted({next(head for head in _heads(path) if head in named) for path in left})


def _lookers(
    store: Store, manifest: Manifest, words: Mapping[int, Restoring], keys: Set[str]
) -> dict[str, int]:
    """Return how many ranks looked at each value and tensor below some keys of the state.

    Each looked at what it had itself; who is laid out otherwise also at what rank 0 had, and who was apart from it."""
    holders: dict[int, tuple[str, Part, list[int]]] = {}  # of each tree: that of rank 0 is many ranks' own
    for rank in words:
        for key, part in view_of(store, manifest, rank, len(words)).manifest.parts.items():
            if key in keys:
                holders.setdefault(id(part), (key, part, []))[2].append(rank)
    apart = {0} | {r for r in words if (own := manifest.parts.get(own_part(r))) and own.kind == RANK_APART}
    wide = {rank for rank, word in words.items() if word.wide}
    found, of_wide, shown = Counter[str](), Counter[str](), set[str]()
    for key, part, ranks in holders.values():
        paths = set(_leaves(part.values(key), key))
        found.update(dict.fromkeys(paths, len(ranks)))
        of_wide.update(dict.fromkeys(paths, len(wide.intersection(ranks))))
        if not apart.isdisjoint(ranks):
            shown |= paths
    return {
        path: count + (len(wide) - of_wide[path] if path in shown else 0) for path, count in found.items()
    }


def _leaves(value: object, path: str) -> Iterator[str]:
    """Yield the paths of tensors and plain values, of a list of plain ones its own."""
    if isinstance(value, TensorLeaf):
        yield value.name
    elif isinstance(value, Typed):
        fields = value.value.get("fields") if isinstance(value.value, dict) else None
        yield from _leaves(value.value if fields is None else fields, path)
    elif isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, join_path(path, key))
    elif isinstance(value, (list, tuple, deque)) and any(isinstance(inner, NESTED) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, join_path(path, index))
    else:
        yield path


def _times(named: Mapping[str, int], path: str) -> int:
    """Return how many ranks named a path, or what it lies in."""
    return sum(named.get(head, 0) for head in _heads(path))


def _heads(path: str) -> Iterator[str]:
    """Yield a path and those that it lies in, longest first."""
    while path:
        yield path
        path = path.rpartition("/")[0]
