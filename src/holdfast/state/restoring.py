"""The plan of one restore: what fits, what does not, and what is to be done once every byte is at hand."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

import msgspec

from holdfast.core.names import matches
from holdfast.format.boxes import Box
from holdfast.format.values import TensorLeaf, Typed, tensor_leaves
from holdfast.state.adapter import Adapter, Dispatch, Engine
from holdfast.state.codecs import codec_for, codec_named
from holdfast.state.materialize import Materializer
from holdfast.state.reports import RestoreOptions, RestoreReport
from holdfast.state.tensors import HostTensor, TensorSpec

__all__ = [
    "Act",
    "BoxWanted",
    "Build",
    "Kept",
    "Restoring",
    "Stage",
    "find_class",
    "host_bytes_equal",
    "typed_nodes",
]

Build = Callable[[Materializer], object]
Relaxation = Literal["missing", "unexpected", "cast"]
Claim = Literal["new", "again", "taken"]

COMPARED_BYTES = 1 << 20  # at once
_PLAIN = (str, int, float, bool, type(None))


class BoxWanted(NamedTuple):
    """A box of a stored tensor: its name, where in the whole the box begins and the whole's shape, and its shape."""

    name: str
    box: Box
    shape: tuple[int, ...]


class Stage(IntEnum):
    """The order in which live objects are changed: code that may refuse comes first."""

    OBJECTS = 0  # load_state_dict of objects we do not look into
    VALUES = 1  # containers, hyperparameters, generators (tensor bytes go first of these)
    HOOKS = 2  # set_extra_state and load hooks, which may look at the weights


class Kept(msgspec.Struct, frozen=True, gc=False):
    """The build of what stays the same object: its parent need not change for it."""

    live: object

    def __call__(self, m: Materializer) -> object:
        return self.live


@dataclass(frozen=True, slots=True)
class Act:
    """One change to live objects: `build` makes what it needs and `commit` changes them."""

    stage: Stage
    build: Build
    commit: Callable[[object], None]


class Restoring:
    """Collect the acts, needed tensors and problems of a restore; `plan` pairs a live value with a node."""

    def __init__(
        self,
        dispatch: Dispatch,
        specs: Mapping[str, TensorSpec],
        aliases: Mapping[str, str],
        *,
        options: RestoreOptions,
        parameters: Mapping[int, str],
    ) -> None:
        self.options = options
        self.parameters = parameters
        self.report = RestoreReport()
        self.problems: list[str] = []
        self.acts: list[Act] = []
        self.copies: list[tuple[Engine, object, str]] = []
        self.must_equal: list[tuple[str, str, str]] = []
        self.needed: set[str] = set()
        self.kept: set[str] = set()  # of these, what new values are made of
        self.parts: dict[str, BoxWanted] = {}  # by key: of what is needed in part only
        self.dispatch = dispatch
        self.specs = specs
        self.aliases = aliases
        self._claimed: dict[Hashable, str] = {}
        self._written: dict[str, str] = {}
        self._adapters: dict[type, Adapter | None] = {}
        self._loose = False

    # -- pairing ----------------------------------------------------------------------------------------

    def plan(self, live: object, node: object, path: str) -> Build:
        """Pair `live` with the stored `node` and return what yields the restored object.

        The result is `live` itself when it is changed in place; otherwise the caller puts the result into
        the parent.
        """
        cls = type(live)
        try:
            adapter = self._adapters[cls]
        except KeyError:
            adapter = self._adapters[cls] = self.adapter(live)
        if self.options.only and not (adapter and adapter.divisible) and not self.selected(path):
            return Kept(live)
        if adapter is None:
            return self.fresh(node, path)
        return adapter.plan(live, node, path, self)

    def adapter(self, live: object) -> Adapter | None:
        """Return the adapter of a live value; None for plain values and for classes with a codec."""
        cls = type(live)
        return None if codec_for(cls) else self.dispatch.find(cls)

    def fresh(self, node: object, path: str) -> Build:
        """Return what builds a new value for `node`, registering the tensors it needs."""
        if type(node) is TensorLeaf:
            self._need_new(node, path)
        elif type(node) not in _PLAIN:
            for leaf in tensor_leaves(node):
                self._need_new(leaf, path)
            self.check_types(node, path)
        self.report.restored.append((path, ""))
        return lambda m: m.value(node)

    def need(self, leaf: TensorLeaf, path: str) -> TensorSpec | None:
        """Return the spec of the stored tensor of `leaf` and register that it must be read."""
        spec = self._readable(leaf, path)
        if spec is not None:
            self.needed.add(spec.name)
        return spec

    def _need_new(self, leaf: TensorLeaf, path: str) -> None:
        self._need_framework(leaf, path)
        spec = self.need(leaf, path)
        if spec is not None:
            self.kept.add(spec.name)

    def _readable(self, leaf: TensorLeaf, path: str) -> TensorSpec | None:
        spec = self.spec(leaf)
        if spec is None:
            self.problems.append(
                f"{path}: the checkpoint's tree names the tensor {leaf.name!r}, which no file holds"
            )
        return spec

    def _need_framework(self, leaf: TensorLeaf, path: str) -> None:
        """Report that a new tensor is wanted of a framework that the program does not use."""
        for family, what in (("torch", "a torch tensor"), ("jax", "a jax array")):
            if leaf.kind.startswith(f"{family}.") and family not in self.dispatch.engines:
                self.problems.append(
                    f"{path}: {what} is stored here and {family} is not imported; import {family} first"
                )

    def need_part(self, leaf: TensorLeaf, box: Box, shape: tuple[int, ...], path: str) -> str:
        """Register that a part of the stored tensor of `leaf` must be read; return the key under which it will be among
        the tensors, for `copy` and for builds. Of one tensor several parts may be needed."""
        self._readable(leaf, path)
        name = self.stored_name(leaf)
        key = f"{name} {list(box[0])}+{list(shape)}"
        self.parts[key] = BoxWanted(name, box, shape)
        return key

    def claim(self, memory: Hashable | None, name: str, path: str) -> Claim:
        """Say who fills the live memory of `path`.

        This stored tensor ("new"), this one already ("again"), or another ("taken"); `memory` None: no ties.
        """
        if memory is not None:
            holder = self._claimed.get(memory)
            if holder is not None:
                return "again" if holder == name else "taken"
            self._claimed[memory] = name
        first = self._written.setdefault(name, path)
        if first != path:
            self.report.notes.append(
                f"{path}: untied; shares a stored tensor with {first}, both get its value"
            )
        return "new"

    def is_given(self, name: str) -> bool:
        """Return whether something live gets this stored tensor already."""
        return name in self._written

    def copy(self, engine: Engine, live: object, name: str) -> None:
        """Register an in-place copy of the stored tensor `name`, or of the part with this key, into `live`."""
        self.copies.append((engine, live, name))

    def stored_name(self, leaf: TensorLeaf) -> str:
        """Return the name under which the bytes of `leaf` are stored."""
        return self.aliases.get(leaf.name, leaf.name)

    def spec(self, leaf: TensorLeaf) -> TensorSpec | None:
        """Return the spec of the stored tensor of `leaf`."""
        return self.specs.get(self.stored_name(leaf))

    def holder(self, memory: Hashable) -> str | None:
        """Return the stored tensor that fills this live memory."""
        return self._claimed.get(memory)

    # -- what was asked for -----------------------------------------------------------------------------

    def selected(self, path: str) -> bool:
        """Return whether `path` is to be restored at all."""
        return not self.options.only or _covers(self.options.only, path)

    def relaxed(self, how: Relaxation, path: str) -> bool:
        """Return whether the caller allowed this deviation at `path`."""
        globs: tuple[str, ...] = getattr(self.options, how)
        return bool(globs) and _covers(globs, path)

    @property
    def loose(self) -> bool:
        """Whether a tensor that does not fit its live counterpart is simply replaced here."""
        return self._loose

    @contextlib.contextmanager
    def loosely(self, loose: bool) -> Iterator[None]:
        """Treat what is planned inside as elements without a fixed place, such as those of a grown list."""
        outer, self._loose = self._loose, self._loose or loose
        try:
            yield
        finally:
            self._loose = outer

    # -- deviations -------------------------------------------------------------------------------------

    def missing(self, path: str, live: str) -> None:
        """Record that the live state wants `path` and the checkpoint lacks it."""
        if not self.selected(path):
            return
        if self.relaxed("missing", path):
            self.report.missing.append((path, f"kept the live {live}"))
        else:
            self.problems.append(
                f"{path}: missing from the checkpoint; the live state has {live}. "
                f"To keep the live value pass missing=({path!r},)"
            )

    def unexpected(self, path: str, stored: str) -> None:
        """Record that the checkpoint holds `path` and no live object takes it."""
        if not self.selected(path):
            return
        if self.relaxed("unexpected", path):
            self.report.unexpected.append((path, f"ignored the stored {stored}"))
        elif self.options.shared:
            self.report.elsewhere.append(path)
        else:
            self.problems.append(
                f"{path}: unexpected; the checkpoint has {stored}, the live state has nothing there. "
                f"To ignore it pass unexpected=({path!r},)"
            )

    def mismatch(self, path: str, live: str, stored: str, *, remedy: str = "") -> None:
        """Record that the two do not fit; with `missing` relaxed at `path` the live value is kept."""
        if not self.selected(path):
            return
        if self.relaxed("missing", path):
            self.report.mismatched.append((path, f"kept the live {live}; the checkpoint has {stored}"))
        else:
            self.problems.append(
                f"{path}: expected {live} (live), found {stored} (checkpoint). "
                f"{remedy or 'To keep the live value pass missing=(' + repr(path) + ',)'}"
            )

    def unfit(
        self, live: object, node: TensorLeaf, path: str, *, live_is: str, empty: bool, castable: bool = False
    ) -> Build:
        """Decide about a tensor or array that does not fit its live counterpart in a plain container.

        An empty live one is a placeholder and elements of a grown list have no fixed place: both are
        replaced. Everywhere else a misfit is a problem, because somebody may hold the live object.
        """
        stored = self.need(node, path)
        stored_is = stored.describe() if stored else "nothing"
        if self._loose or empty or self.relaxed("unexpected", path):
            self.report.notes.append(f"{path}: {live_is} replaced by a new {stored_is}")
            return self.fresh(node, path)
        if castable:
            self.mismatch(path, live_is, stored_is, remedy=f"To convert it pass cast=({path!r},)")
        else:
            self.mismatch(
                path,
                live_is,
                stored_is,
                remedy=f"To keep the live one pass missing=({path!r},), to put the stored one in its place "
                f"pass unexpected=({path!r},)",
            )
        return lambda m: live

    def act(self, stage: Stage, build: Build, commit: Callable[[object], None]) -> None:
        """Register a change to live objects."""
        self.acts.append(Act(stage, build, commit))

    def resolve(self, name: str) -> type | None:
        """Return the class with this full name if the program has imported it; import and call nothing."""
        return find_class(name)

    def check_types(self, node: object, path: str) -> None:
        """Report every type in `node` that this program cannot rebuild."""
        for typed in typed_nodes(node):
            if typed.kind in ("enum", "dataclass", "namedtuple") and isinstance(typed.value, dict):
                name = str(typed.value.get("type"))
                if self.resolve(name) is None:
                    self.problems.append(
                        f"{path}: a {typed.kind} of class {name} is stored, the program has no such class; "
                        "import its module before restoring, or register a codec"
                    )
            elif typed.kind.startswith("codec:") and codec_named(typed.kind[6:]) is None:
                self.problems.append(
                    f"{path}: stored with the codec {typed.kind[6:]!r}, which is not registered; "
                    "call register_codec first"
                )


def _covers(globs: tuple[str, ...], path: str) -> bool:
    end = len(path)
    while end > 0:
        head = path[:end]
        if matches(head, globs) or matches(head + "/", globs):
            return True
        end = path.rfind("/", 0, end)
    return False


def typed_nodes(node: object) -> list[Typed]:
    """Return every `Typed` below `node`, keys included."""
    found: list[Typed] = []
    stack = [node]
    while stack:
        v = stack.pop()
        if isinstance(v, Typed):
            found.append(v)
            stack.append(v.value)
        elif isinstance(v, dict):
            stack.extend(k for k in v if isinstance(k, (Typed, tuple, frozenset)))
            stack.extend(v.values())
        elif isinstance(v, (list, tuple, set, frozenset)) or hasattr(v, "appendleft"):
            stack.extend(v)  # type: ignore[arg-type]
    return found


def find_class(name: str) -> type | None:
    """Return the class called `name` ("module.Class.Inner") from the modules that are already imported."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:cut]))
        if module is None:
            continue
        found: object = module
        for part in parts[cut:]:
            found = vars(found).get(part) if isinstance(found, type) or found is module else None
        if isinstance(found, type) and f"{found.__module__}.{found.__qualname__}" == name:
            return found
    return None


def host_bytes_equal(a: HostTensor, b: HostTensor) -> bool:
    """Return whether two stored tensors are the same to the byte."""
    if a.spec.dtype != b.spec.dtype or a.spec.shape != b.spec.shape:
        return False
    ones, others = a.data, b.data  # views are compared element by element, bytes at once
    return all(
        bytes(ones[i : i + COMPARED_BYTES]) == bytes(others[i : i + COMPARED_BYTES])
        for i in range(0, len(ones), COMPARED_BYTES)
    )
