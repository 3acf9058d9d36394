"""Names: what a checkpoint id says of the step, and where an entry of a DCP state dict stands in a checkpoint.

DCP flattens {"model": {"layer.weight": ...}} to "model.layer.weight" and remembers the keys that lead there, its path.
The first key is the part, the others lead on in its tree; what stands at the top of the state dict itself is in the
part "state". So the tensor above is "model/layer.weight", as a Checkpointer has it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from holdfast.core.errors import InvalidFormat, PolicyError, StateError
from holdfast.core.names import check_path, join_path
from holdfast.format.datafile import METADATA
from holdfast.format.values import TensorLeaf
from holdfast.state.capturing import tensor_name

__all__ = [
    "NOTE",
    "ROOT",
    "Entry",
    "Path",
    "Place",
    "entries_of",
    "note_of",
    "paths_in",
    "place_of",
    "required_step",
    "step_of",
]

Path = tuple[str | int, ...]

ROOT = "state"
NOTE = "torch.distributed.checkpoint"  # the key of the note in a manifest's environment
_STEP = re.compile(r"step[^0-9a-z]{0,3}(\d+)", re.IGNORECASE)


class Place(NamedTuple):
    """Where an entry stands: its part, the keys below it, the tree path of both, by which it is told apart, and DCP's
    path of it."""

    part: str
    below: Path
    position: str
    path: Path

    @property
    def tensor(self) -> str:
        """The full name that a tensor which stands here is stored under."""
        return tensor_name(self.position)


class Entry(NamedTuple):
    """An entry of a state dict as it is stored: DCP's key and path, and the node of the value tree."""

    fqn: str
    path: Path
    node: object


class _Noted(msgspec.Struct, forbid_unknown_fields=True):
    """Where entries stand that the trees alone do not tell: by position, DCP's key and path."""

    entries: dict[str, tuple[str, list[str | int]]] = {}


def step_of(checkpoint_id: str | os.PathLike[str]) -> int | None:
    """Return the step that a checkpoint id names, None if it names none.

    That is the number behind "step" in its last component ("epoch=3-step=1000.ckpt"), or else the only number there.
    """
    last = re.split(r"[/\\]", os.fspath(checkpoint_id).rstrip("/\\"))[-1]
    found = _STEP.findall(last) or re.findall(r"\d+", last)
    return int(found[0]) if len(found) == 1 else None


def required_step(checkpoint_id: str | os.PathLike[str]) -> int:
    """Return the step that a checkpoint id names. Raises PolicyError if it names none, or several numbers."""
    step = step_of(checkpoint_id)
    if step is None:
        raise PolicyError(
            f"checkpoint_id={os.fspath(checkpoint_id)!r} does not say which step it is; end it with one number, such "
            'as "step-1000", or give HoldfastWriter step= and leave checkpoint_id out'
        )
    return step


def place_of(fqn: str, path: object) -> Place:
    """Return where an entry with DCP's key `fqn` and this path stands.

    Raises:
        StateError: it cannot have a place of its own.
    """
    keys = tuple(path) if isinstance(path, (tuple, list)) and path else (fqn,)
    if any(type(k) is not str and type(k) is not int for k in keys) or type(keys[0]) is not str:
        keys = (fqn,)
    part, below = (keys[0], keys[1:]) if len(keys) > 1 else (ROOT, keys)
    if part.startswith("~") or not part:
        raise StateError(f"{fqn}: no top-level key of a state may be empty or begin with '~'; rename it")
    position = join_path(part, *below)
    if position == part or position.removeprefix(f"{part}/") == METADATA:
        raise StateError(f"{fqn}: its last key is empty or {METADATA!r}, which data files reserve; rename it")
    check_path(part)
    return Place(part, below, position, keys)


def paths_in(planner_data: object) -> Mapping[str, object]:
    """Return the paths that a planner noted, by key; none where it notes something else."""
    return planner_data if isinstance(planner_data, dict) else {}


# ---- reading --------------------------------------------------------------------------------------------------------


def _is_terminal(value: list[object]) -> bool:
    """Return whether DCP takes a list as one value: it holds no tensor and no mapping, at no depth of lists."""
    return all(
        not isinstance(v, (dict, TensorLeaf)) and (not isinstance(v, list) or _is_terminal(v)) for v in value
    )


def _leaves(position: str, path: Path, node: object) -> Iterator[tuple[str, Path, object]]:
    """Yield what DCP would make entries of, with position and path."""
    if type(node) is dict and node and all(type(k) is str for k in node):
        for key, value in node.items():
            yield from _leaves(join_path(position, key), (*path, key), value)
    elif type(node) is list and not _is_terminal(node):
        for index, value in enumerate(node):
            yield from _leaves(join_path(position, index), (*path, index), value)
    else:
        yield position, path, node


def _nodes(position: str, node: object) -> Iterator[tuple[str, object]]:
    yield position, node
    if type(node) is dict:
        for key, value in node.items():
            yield from _nodes(join_path(position, key), value)
    elif type(node) is list:
        for index, value in enumerate(node):
            yield from _nodes(join_path(position, index), value)


def _derived(trees: Mapping[str, object]) -> Iterator[tuple[str, Entry]]:
    for part, tree in trees.items():
        for position, path, node in _leaves(part, (part,), tree):
            keys = path[1:] if part == ROOT and len(path) == 2 else path
            yield position, Entry(".".join(map(str, keys)), keys, node)


def entries_of(trees: Mapping[str, object], environment: Mapping[str, str]) -> dict[str, Entry]:
    """Return the entries of a checkpoint's decoded trees by DCP's keys; it need not have been saved by DCP.

    Raises:
        InvalidFormat: the note of the checkpoint does not fit its trees.
        StateError: two entries have one key.
    """
    try:
        noted = msgspec.json.decode(environment.get(NOTE, "{}"), type=_Noted).entries
    except msgspec.DecodeError as e:
        raise InvalidFormat(f"the checkpoint's note {NOTE!r} is malformed: {e}") from e
    if noted:
        nodes = {position: node for part, tree in trees.items() for position, node in _nodes(part, tree)}
        if missing := sorted(noted.keys() - nodes.keys()):
            raise InvalidFormat(
                f"the checkpoint's note {NOTE!r} speaks of {missing[0]!r}, which is not there"
            )
        found = [Entry(fqn, tuple(path), nodes[position]) for position, (fqn, path) in noted.items()]
    else:
        found = [entry for _, entry in _derived(trees)]
    entries = {entry.fqn: entry for entry in found}
    if len(entries) < len(found):
        twice = next(e.fqn for i, e in enumerate(found) if e.fqn in {o.fqn for o in found[:i]})
        raise StateError(
            f"{twice}: two places of the checkpoint have this key in a DCP state dict; rename one"
        )
    return entries


def note_of(trees: Mapping[str, object], entries: Mapping[str, tuple[str, Path]]) -> dict[str, str]:
    """Return the note, for the manifest's environment, with which `entries_of` finds these entries again: what they
    are by position. It is empty where the trees alone say it all."""
    derived = {position: (entry.fqn, entry.path) for position, entry in _derived(trees)}
    if derived == dict(entries):
        return {}
    noted = _Noted({position: (fqn, list(path)) for position, (fqn, path) in entries.items()})
    return {NOTE: msgspec.json.encode(noted).decode()}
