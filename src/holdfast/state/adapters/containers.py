"""Built-in containers: captured by value, restored in place so that whoever holds them sees the content."""

from __future__ import annotations

import builtins
import collections
import datetime
import pathlib
import re
from collections.abc import Callable, Hashable, Mapping, MutableMapping, MutableSequence
from typing import cast
from zoneinfo import ZoneInfo

from holdfast.core.errors import StateError
from holdfast.core.names import join_path
from holdfast.format.values import Typed
from holdfast.state.adapter import NO_KINDS, Kinds, Outline
from holdfast.state.capturing import PLAIN, Capturing
from holdfast.state.materialize import Materializer
from holdfast.state.restoring import Build, Kept, Restoring, Stage

__all__ = ["Atoms", "Mappings", "Sequences", "Sets"]

_DICTS = (dict, collections.OrderedDict, collections.Counter, collections.defaultdict)
_FACTORIES = ("list", "dict", "set", "int", "float", "str", "bool", "tuple")
_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")  # such as America/Port-au-Prince or Etc/GMT+1


class Mappings:
    """dict, OrderedDict, Counter, defaultdict; a restored one holds just the stored keys, in stored order."""

    divisible = True

    def __init__(self) -> None:
        self.kinds: Kinds = {"defaultdict": _new_defaultdict}

    def claims(self, cls: type) -> bool:
        return cls in _DICTS

    def capture(self, value: object, path: str, into: Capturing) -> object:
        live = cast("dict[object, object]", value)
        into.note_container(path, type(value).__name__, len(live))
        items = {into.key(k, path): into.value(v, join_path(path, k)) for k, v in list(live.items())}
        if isinstance(value, collections.defaultdict):
            return Typed("defaultdict", {"factory": _factory_name(value), "items": items})
        if type(value) is collections.OrderedDict:
            return collections.OrderedDict(items)
        if type(value) is collections.Counter:
            return collections.Counter(cast("dict[Hashable, int]", items))
        return items

    def outline(self, value: object) -> Outline | None:
        live = cast("dict[object, object]", value)
        keys = list(live)
        if not PLAIN.issuperset(map(type, keys)):
            return None  # such a key may hold what changes
        facts = [_factory_name(value)] if isinstance(value, collections.defaultdict) else []
        return Outline(list(live.values()), keys, cast("list[object]", facts))

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        target = cast("MutableMapping[object, object]", live)
        stored = _stored_items(node)
        if stored is None:
            return _replace(live, node, path, ctx)
        keys: list[object] = []
        builds: list[Build] = []
        keymaker = Materializer({}, ctx.dispatch, resolve=ctx.resolve)
        for stored_key, child in stored.items():
            key = stored_key
            if type(stored_key) is not str:
                ctx.check_types(stored_key, path)
                key = keymaker.value(stored_key)
            build = self._child(target, key, child, path=path, ctx=ctx)
            if build is not None:
                keys.append(key)
                builds.append(build)
        kept = self._kept(target, set(keys), path, ctx)
        if not kept and keys == list(target) and {Kept}.issuperset(map(type, builds)):
            return Kept(live)

        def commit(values: object) -> None:
            # Item by item: Counter.update counts what it is given.
            target.clear()
            for key, value in (*zip(keys, cast("list[object]", values), strict=True), *kept.items()):
                target[key] = value

        ctx.act(Stage.VALUES, lambda m: [b(m) for b in builds], commit)
        return lambda m: live

    def _child(
        self, target: Mapping[object, object], key: object, child: object, *, path: str, ctx: Restoring
    ) -> Build | None:
        below = join_path(path, key)
        if key in target:
            return ctx.plan(target[key], child, below)
        if not ctx.selected(below):
            return None
        return ctx.fresh(child, below)

    def _kept(
        self, target: Mapping[object, object], stored: set[object], path: str, ctx: Restoring
    ) -> dict[object, object]:
        kept = {}
        for key, value in target.items():
            if key in stored:
                continue
            below = join_path(path, key)
            if not ctx.selected(below):
                kept[key] = value
            elif ctx.relaxed("missing", below):
                kept[key] = value
                ctx.report.missing.append((below, "kept the live value"))
            else:
                ctx.report.notes.append(
                    f"{below}: not in the checkpoint, removed (keep it with missing=({below!r},))"
                )
        return kept


class Sequences:
    """list, tuple, deque. A restored list holds exactly the stored elements; elements that fit are kept."""

    divisible = True
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return cls in (list, tuple, collections.deque)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        live = list(cast("list[object]", value))
        if _is_series(live):
            into.note(path, "captured", type(value).__name__, f"{len(live)} plain values")
            items = live
        else:
            items = [into.value(v, join_path(path, i)) for i, v in enumerate(live)]
        if type(value) is tuple:
            return tuple(items)
        if isinstance(value, collections.deque):
            return collections.deque(items, value.maxlen)
        return items

    def outline(self, value: object) -> Outline | None:
        live = list(cast("list[object]", value))
        if _is_series(live):
            return None
        return Outline(live, facts=[getattr(value, "maxlen", None)])

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        if type(node) not in (list, tuple, collections.deque) or (type(live) is tuple) != (
            type(node) is tuple
        ):
            return _replace(live, node, path, ctx)
        old, stored = list(cast("list[object]", live)), list(cast("list[object]", node))
        whole = ctx.selected(path)
        builds: list[Build] = []
        with ctx.loosely(type(live) is not tuple and len(old) != len(stored)):
            for i, child in enumerate(stored):
                below = join_path(path, i)
                if i < len(old):
                    builds.append(ctx.plan(old[i], child, below))
                elif whole:
                    builds.append(ctx.fresh(child, below))
        rest = [] if whole else old[len(builds) :]
        if type(live) is tuple:
            return _rebuilt(live, builds, lambda items: tuple(items + rest))
        target = cast("MutableSequence[object]", live)
        if (
            isinstance(live, collections.deque)
            and isinstance(node, collections.deque)
            and live.maxlen != node.maxlen
        ):
            ctx.report.notes.append(
                f"{path}: keeps its live maxlen {live.maxlen}; the checkpoint has {node.maxlen}"
            )

        def commit(items: object) -> None:
            target.clear()
            target.extend(cast("list[object]", items) + rest)

        ctx.act(Stage.VALUES, lambda m: [b(m) for b in builds], commit)
        return lambda m: live


class Sets:
    """set, frozenset and bytearray: values without places inside."""

    divisible = False
    kinds: Kinds = NO_KINDS

    def claims(self, cls: type) -> bool:
        return cls in (set, frozenset, bytearray)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        into.note(path, "captured", type(value).__name__)
        if isinstance(value, bytearray):
            return bytearray(value)
        items = {into.key(v, path) for v in list(cast("set[object]", value))}
        return frozenset(items) if isinstance(value, frozenset) else items

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        if type(live) is not type(node) or isinstance(live, frozenset):
            return _replace(live, node, path, ctx)
        build = ctx.fresh(node, path)

        def commit(value: object) -> None:
            if isinstance(live, bytearray):
                live[:] = cast("bytearray", value)
            else:
                target = cast("set[object]", live)
                target.clear()
                target.update(cast("set[object]", value))

        ctx.act(Stage.VALUES, build, commit)
        return lambda m: live


class Atoms:
    """Immutable values that need a name in the file: concrete paths, slices, and times by the clocks of a zone."""

    divisible = False

    def __init__(self) -> None:
        self.kinds: Kinds = {
            "pathlib.Path": lambda m, v: pathlib.Path(str(v)),
            "datetime.local": lambda m, v: _local_time(v),
        }

    def claims(self, cls: type) -> bool:
        return cls is slice or issubclass(cls, pathlib.PurePath)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        into.note(path, "captured", type(value).__name__)
        if isinstance(value, slice):
            return slice(*(into.key(v, path) for v in (value.start, value.stop, value.step)))
        if isinstance(value, pathlib.Path):
            return Typed("pathlib.Path", str(value))
        return value

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        return ctx.fresh(node, path)


def _factory_name(value: collections.defaultdict[object, object]) -> str | None:
    name = getattr(value.default_factory, "__name__", None)
    return name if name in _FACTORIES and getattr(builtins, str(name)) is value.default_factory else None


def _is_series(values: list[object]) -> bool:
    """Return whether a sequence is stored, and reported, as one value: many plain ones and nothing else."""
    return len(values) > 8 and PLAIN.issuperset(map(type, values))


def _new_defaultdict(m: Materializer, value: object) -> object:
    parts = cast("Mapping[str, object]", value)
    name = parts.get("factory")
    factory = cast("Callable[[], object]", getattr(builtins, str(name))) if name in _FACTORIES else None
    return collections.defaultdict(factory, m.mapping(parts["items"]))


def _local_time(value: object) -> datetime.datetime | datetime.time:
    parts = cast("Mapping[str, object]", value)
    time, zone, fold = parts["time"], parts["zone"], parts["fold"]
    if not isinstance(time, (datetime.datetime, datetime.time)) or type(fold) is not int:
        raise ValueError("its time is none")
    if zone is None:
        return time.replace(fold=fold)
    if time.tzinfo is not None or not _ZONE.fullmatch(cast("str", zone)):
        raise ValueError(f"its zone is {zone!r:.80}")
    try:
        return time.replace(tzinfo=ZoneInfo(cast("str", zone)), fold=fold)
    except (LookupError, OSError) as e:
        raise StateError(
            f"a time in the zone {zone:.80} is stored, and this machine does not know that zone; "
            "install its time zone database, or run: pip install tzdata"
        ) from e


def _stored_items(node: object) -> Mapping[object, object] | None:
    if isinstance(node, Typed) and node.kind == "defaultdict" and isinstance(node.value, dict):
        node = node.value.get("items")
    return node if isinstance(node, dict) else None


def _replace(live: object, node: object, path: str, ctx: Restoring) -> Build:
    """Take a stored value of another type in place of a live container."""
    if not ctx.selected(path):
        return lambda m: live
    if "/" not in path and not isinstance(live, (tuple, frozenset)) and not ctx.relaxed("unexpected", path):
        ctx.mismatch(path, f"a {type(live).__name__}", f"a {_kind(node)}")
        return lambda m: live
    if type(live) is not type(node):
        ctx.report.notes.append(f"{path}: was a {type(live).__name__}, is now the stored {_kind(node)}")
    return ctx.fresh(node, path)


def _kind(node: object) -> str:
    return node.kind if isinstance(node, Typed) else type(node).__name__


def _rebuilt(live: object, builds: list[Build], make: Callable[[list[object]], object]) -> Build:
    """Return a build that keeps an immutable parent when all its children were restored in place."""
    old = list(cast("list[object]", live))

    def build(m: Materializer) -> object:
        items = [b(m) for b in builds]
        same = len(items) == len(old) and all(a is b for a, b in zip(items, old, strict=True))
        return live if same else make(items)

    return build
