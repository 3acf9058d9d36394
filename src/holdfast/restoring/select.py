"""Keep only a part of a value tree, by globs over paths."""

from __future__ import annotations

from holdfast.core.names import join_path, matches

__all__ = ["NOTHING", "select"]

NOTHING = object()


def select(tree: object, path: str, only: tuple[str, ...]) -> object:
    """Return what of `tree` lies at or below a path that matches, or NOTHING. Dictionaries are cut, other values are
    taken or left as wholes."""
    if matches(path, only):
        return tree
    if not isinstance(tree, dict):
        return NOTHING
    kept = {key: select(value, join_path(path, key), only) for key, value in tree.items()}
    kept = {key: value for key, value in kept.items() if value is not NOTHING}
    return type(tree)(kept) if kept else NOTHING
