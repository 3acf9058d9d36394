"""Dataclass instances, named tuples and enum members: stored by full class name and fields, never by code."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import cast

from holdfast.core.names import join_path
from holdfast.format.values import Typed
from holdfast.state.adapter import Kinds, Outline
from holdfast.state.capturing import BUILT_IN, PLAIN, Capturing
from holdfast.state.materialize import Materializer
from holdfast.state.records import EnumMember, Record
from holdfast.state.restoring import Build, Restoring, Stage

__all__ = ["Dataclasses", "Enums", "NamedTuples"]


def class_name(cls: type) -> str:
    """Return the full name under which a class is stored."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _same_class(cls: type, name: str) -> bool:
    # A script's classes are in __main__ when it runs and in its module when it is imported.
    return class_name(cls) == name or (
        name.endswith("." + cls.__qualname__) and "__main__" in (cls.__module__, name.split(".")[0])
    )


def _moved_class(cls: type, name: str) -> bool:
    """Return whether a class is the one of this name, or one that another release has in another module."""
    return _same_class(cls, name) or name.rpartition(".")[2] == cls.__qualname__


def _parts(node: object, kind: str) -> tuple[str, Mapping[str, object]] | None:
    if not isinstance(node, Typed) or node.kind != kind or not isinstance(node.value, dict):
        return None
    fields = node.value.get("fields")
    return (str(node.value.get("type")), fields) if isinstance(fields, dict) else None


class Dataclasses:
    """Dataclass instances. Mutable ones are restored in place, field by field; `__init__` is not called."""

    divisible = True

    def __init__(self) -> None:
        self.kinds: Kinds = {"dataclass": _new_dataclass}

    def claims(self, cls: type) -> bool:
        # One that is a container, or a number, as well holds more than its fields.
        return dataclasses.is_dataclass(cls) and not issubclass(cls, BUILT_IN)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        names = [f.name for f in dataclasses.fields(cast("type", value))]
        extra = sorted(set(getattr(value, "__dict__", ())) - set(names))
        for name in extra:
            into.note(join_path(path, name), "ignored", "attribute", "not a dataclass field")
        stored = {n: into.value(getattr(value, n), join_path(path, n)) for n in names if hasattr(value, n)}
        return Typed("dataclass", {"type": class_name(type(value)), "fields": stored})

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        parts = _parts(node, "dataclass")
        if parts is None or not _same_class(type(live), parts[0]):
            return ctx.fresh(node, path) if ctx.selected(path) else lambda m: live
        stored = dict(parts[1])
        builds: dict[str, Build] = {}
        for f in dataclasses.fields(cast("type", live)):
            below = join_path(path, f.name)
            if f.name in stored:
                builds[f.name] = ctx.plan(getattr(live, f.name, None), stored.pop(f.name), below)
            elif hasattr(live, f.name):
                ctx.missing(below, f"a field of {class_name(type(live))}")
        for name in stored:
            ctx.unexpected(join_path(path, name), f"a field that {class_name(type(live))} does not have")
        if type(live).__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return lambda m: _frozen_with(live, {n: b(m) for n, b in builds.items()})

        def commit(values: object) -> None:
            for name, value in cast("dict[str, object]", values).items():
                object.__setattr__(live, name, value)

        ctx.act(Stage.VALUES, lambda m: {n: b(m) for n, b in builds.items()}, commit)
        return lambda m: live


def _frozen_with(live: object, values: Mapping[str, object]) -> object:
    if all(getattr(live, n, None) is v for n, v in values.items()):
        return live
    new = object.__new__(type(live))
    for name in (f.name for f in dataclasses.fields(cast("type", live))):
        if name in values or hasattr(live, name):
            object.__setattr__(new, name, values.get(name, getattr(live, name, None)))
    return new


def _new_dataclass(m: Materializer, value: object) -> object:
    parts = _parts(Typed("dataclass", value), "dataclass")
    if parts is None:
        return Record("dataclass", {"value": m.value(value)})
    cls = m.resolve(parts[0])
    fields = {str(k): m.value(v) for k, v in parts[1].items()}
    if cls is None or not dataclasses.is_dataclass(cls):
        return Record(parts[0], fields)
    new = object.__new__(cls)
    for f in dataclasses.fields(cls):
        if f.name in fields:
            object.__setattr__(new, f.name, fields[f.name])
    return new


class NamedTuples:
    """Named tuples: immutable, so a changed one is rebuilt and put into the parent."""

    divisible = False

    def __init__(self) -> None:
        self.kinds: Kinds = {"namedtuple": _new_namedtuple}

    def claims(self, cls: type) -> bool:
        return issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        names = cast("tuple[str, ...]", type(value)._fields)  # type: ignore[attr-defined]
        fields = {
            n: into.value(v, join_path(path, n))
            for n, v in zip(names, cast("tuple[object]", value), strict=True)
        }
        return Typed("namedtuple", {"type": class_name(type(value)), "fields": fields})

    def outline(self, value: object) -> Outline | None:
        return Outline(list(cast("tuple[object, ...]", value)))

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        parts = _parts(node, "namedtuple")
        names = cast("tuple[str, ...]", type(live)._fields)  # type: ignore[attr-defined]
        if parts is None or not _moved_class(type(live), parts[0]) or set(parts[1]) != set(names):
            return ctx.fresh(node, path)
        old = list(cast("tuple[object]", live))
        builds = [ctx.plan(v, parts[1][n], join_path(path, n)) for n, v in zip(names, old, strict=True)]

        def build(m: Materializer) -> object:
            items = [b(m) for b in builds]
            if all(a is b for a, b in zip(items, old, strict=True)):
                return live
            return tuple.__new__(cast("type[tuple[object, ...]]", type(live)), items)

        return build


def _new_namedtuple(m: Materializer, value: object) -> object:
    parts = _parts(Typed("namedtuple", value), "namedtuple")
    if parts is None:
        return Record("namedtuple", {"value": m.value(value)})
    cls = m.resolve(parts[0])
    fields = {str(k): m.value(v) for k, v in parts[1].items()}
    if cls is None or not issubclass(cls, tuple) or set(getattr(cls, "_fields", ())) != set(fields):
        return Record(parts[0], fields)
    return tuple.__new__(cls, [fields[n] for n in cls._fields])  # type: ignore[attr-defined]


class Enums:
    """Enum members, by member name; flags without a name of their own by value."""

    divisible = False

    def __init__(self) -> None:
        self.kinds: Kinds = {"enum": _new_enum}

    def claims(self, cls: type) -> bool:
        return issubclass(cls, enum.Enum)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        member = cast("enum.Enum", value)
        into.note(path, "captured", "enum", str(member))
        plain = member.value if type(member.value) in PLAIN else None
        return Typed("enum", {"type": class_name(type(value)), "member": member.name or "", "value": plain})

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        if isinstance(node, Typed) and node.kind == "enum" and isinstance(node.value, dict):
            found = (
                _member(type(live), node.value)
                if _same_class(type(live), str(node.value.get("type")))
                else None
            )
            if found is not None:
                ctx.report.restored.append((path, ""))
                return lambda m: found
            if _same_class(type(live), str(node.value.get("type"))):
                ctx.mismatch(
                    path, f"a member of {class_name(type(live))}", f"the member {node.value.get('member')!r}"
                )
                return lambda m: live
        return ctx.fresh(node, path)


def _member(cls: type, parts: Mapping[str, object]) -> object:
    if not issubclass(cls, enum.Enum):
        return None
    found = cls.__members__.get(str(parts.get("member")))
    if found is None and issubclass(cls, enum.Flag):
        with_value = parts.get("value")
        return cls(with_value) if isinstance(with_value, int) else None
    return found


def _new_enum(m: Materializer, value: object) -> object:
    parts = cast("Mapping[str, object]", value)
    name = str(parts.get("type"))
    cls = m.resolve(name)
    found = _member(cls, parts) if cls is not None else None
    return EnumMember(name, str(parts.get("member")), parts.get("value")) if found is None else found
