"""The one pass over the live state: names tensors, finds ties, refuses what cannot be stored."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import functools
import hashlib
import types
import unicodedata
import uuid
from collections.abc import Hashable, Mapping, Sequence, Set

import msgspec

from holdfast.core.errors import UnsupportedValue
from holdfast.core.names import MAX_PATH_BYTES
from holdfast.core.units import format_count
from holdfast.format.values import MAX_DEPTH, TensorLeaf, Typed
from holdfast.state.adapter import Adapter, Dispatch, Engine
from holdfast.state.codecs import Codec, codec_for
from holdfast.state.reports import CaptureEntry, CaptureReport
from holdfast.state.tensors import HeldBox, Shard, TensorSource, TensorSpec
from holdfast.state.trace import TensorCall, Trace

__all__ = ["BUILT_IN", "PLAIN", "Capturing", "tensor_name"]

PLAIN: frozenset[type] = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, range, datetime.datetime, datetime.date,
        datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction, uuid.UUID,
    }
)  # fmt: skip
BUILT_IN = (dict, list, tuple, set, frozenset, collections.deque, str, bytes, bytearray, int, float, complex)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_REMEDY = "give it state_dict() and load_state_dict(), use plain values, or call holdfast.register_codec"


class Capturing:
    """What a capture has found so far. `value` turns any live value into its detached storable form."""

    def __init__(
        self,
        dispatch: Dispatch,
        parameters: Mapping[int, str],
        updated: Set[int],
        *,
        gradients: bool,
        trace: Trace | None = None,
    ) -> None:
        self.tensors: list[TensorSource] = []
        self.aliases: dict[str, str] = {}
        self.report = CaptureReport()
        self.parameters = parameters
        self.updated = updated
        self.gradients = gradients
        self.trace = trace
        self._dispatch = dispatch
        self._names: set[str] = set()
        self._ties: dict[Hashable, str] = {}
        self._open: set[int] = set()
        self.in_key = False

    def value(self, value: object, path: str) -> object:
        """Return the detached form of `value`.

        Raises:
            UnsupportedValue: something below `path` cannot be stored; the message names it and the remedy.
        """
        cls = type(value)
        if cls in PLAIN:
            if self.in_key:
                return value
            self.report.entries.append(CaptureEntry(path, "captured", cls.__name__))
            return (
                value if self.trace is None else self.trace.plain(value, path, len(self.report.entries) - 1)
            )
        if id(value) in self._open or len(self._open) >= MAX_DEPTH - 10:
            raise UnsupportedValue(
                f"{path}: refers to itself, or is nested deeper than {MAX_DEPTH - 10} levels; flatten it"
            )
        codec = codec_for(cls)
        adapter = None if codec else self._dispatch.find(cls)
        if codec is None and adapter is None:
            raise UnsupportedValue(f"{path}: {_why_not(value)}")
        self._open.add(id(value))
        try:
            untraced = self.trace is None or self.in_key or not self.trace.records
            if self.trace is None or untraced or adapter in self._dispatch.holders:
                return self._store(value, path, codec, adapter)
            store = functools.partial(self._store, value, path, codec, adapter)
            return self.trace.follow(value, path, self._dispatch.outlining(adapter), store)
        finally:
            self._open.discard(id(value))

    def anew(self, value: object, path: str) -> object:
        """Return the detached form of a value that is made for this capture, so that it cannot be read again."""
        if self.trace is None or not self.trace.records:
            return self.value(value, path)
        return self.trace.anew(path, functools.partial(self.value, value, path))

    def _store(self, value: object, path: str, codec: Codec | None, adapter: Adapter | None) -> object:
        if codec is not None:
            self.note(path, "captured", type(value).__name__, f"codec {codec.name}")
            return Typed(f"codec:{codec.name}", self.value(codec.encode(value), path))
        assert adapter is not None
        return adapter.capture(value, path, self)

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
        """Register the tensor `value` under `spec.name` (a raw tree path) and return its leaf.

        Tensors with equal `memory` (None: never tied) share one stored tensor. `value` is an alias of `live`,
        the object that its parent holds; None: it was made for this capture.
        """
        path = spec.name
        if self.in_key:
            raise UnsupportedValue(
                f"{path}: a key or set element holds a tensor or array; use plain keys, a list for tensors"
            )
        name = self._unique(tensor_name(path))
        stored = self._ties.get(memory) if memory is not None else None
        if self.trace is not None:
            number = len(self.tensors) if stored is None else -1
            call = TensorCall(spec, kind, stored or name, memory is not None, number)
            self.trace.tensor(live, call, memory)
        if stored is not None:
            self.aliases[name] = stored
            self.report.entries.append(CaptureEntry(path, "alias", kind, f"same memory as {stored}"))
            return TensorLeaf(stored, kind)
        if memory is not None:
            self._ties[memory] = name
        if name != path:
            spec = TensorSpec(name, spec.dtype, spec.shape, spec.stride, spec.shard)
        self.tensors.append(TensorSource(spec, value, volatile))
        self.report.entries.append(CaptureEntry(path, "captured", kind, spec))
        return TensorLeaf(name, kind)

    def spread(
        self,
        path: str,
        dtype: str,
        whole_shape: tuple[int, ...],
        boxes: Sequence[HeldBox],
        *,
        group: str,
        kind: str,
        memory: Hashable,
        volatile: bool = True,
        live: tuple[Engine, object] | None = None,
    ) -> TensorLeaf:
        """Register the boxes that this process holds of a tensor that is spread over several, and return its leaf.

        As `tensor`; one source for each box, all of the same name. Without a box only the leaf is there.
        """
        if not boxes:
            name = self._unique(tensor_name(path))
            self.report.entries.append(CaptureEntry(path, "captured", kind, "held by other processes"))
            return TensorLeaf(name, kind)
        if len(boxes) > 1 and self.trace is not None:
            raise UnsupportedValue(f"{path}: a tensor held in several boxes is captured from the start")
        specs = [
            TensorSpec(
                path, dtype, b.shape, None, Shard((b.offsets, whole_shape), b.replica, b.replicas, group)
            )
            for b in boxes
        ]
        leaf = self.tensor(boxes[0].value, specs[0], kind=kind, memory=memory, volatile=volatile, live=live)
        if self.aliases.get(leaf.name) is None and self.tensors and self.tensors[-1].spec.name == leaf.name:
            for box, spec in zip(boxes[1:], specs[1:], strict=True):
                named = msgspec.structs.replace(spec, name=leaf.name)
                self.tensors.append(TensorSource(named, box.value, volatile))
        return leaf

    def note(self, path: str, what: str, kind: str, note: str = "") -> None:
        """Add a line to the report."""
        self.report.entries.append(CaptureEntry(path, what, kind, note))

    def note_container(self, path: str, kind: str, size: int) -> None:
        """Add a line for a container, unless the object that it is the state of has one."""
        if not self.in_key and (not self.report.entries or self.report.entries[-1].path != path):
            self.note(path, "captured", kind, format_count(size, "entry", "entries"))

    def key(self, key: object, path: str) -> object:
        """Return the detached form of a dict key or set element, which may hold no tensor."""
        if type(key) is str:
            return key
        outer, self.in_key = self.in_key, True
        try:
            return self.value(key, f"{path} (key {key!r:.40})")
        finally:
            self.in_key = outer

    def _unique(self, name: str) -> str:
        if name in self._names:
            # Two keys may print alike, such as 1 and "1".
            n = 2
            while f"{name}~{n}" in self._names:
                n += 1
            name = f"{name}~{n}"
        self._names.add(name)
        return name


def tensor_name(path: str) -> str:
    """Return `path` as a name that `core.names.check_path` accepts; most paths are such names already."""
    if path.isascii() and path.isprintable() and len(path) <= MAX_PATH_BYTES - 32:
        return path
    text = unicodedata.normalize("NFC", path.encode("utf-8", "replace").decode())
    text = "".join(f"%{ord(c):02X}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    raw = text.encode()
    if len(raw) <= MAX_PATH_BYTES - 32:
        return text
    digest = hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return raw[: MAX_PATH_BYTES - 64].decode("utf-8", "ignore") + "~" + digest


def _why_not(value: object) -> str:
    cls = type(value)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if isinstance(value, types.ModuleType):
        return f"an imported module ({value.__name__}) is code; keep it in the program"
    if isinstance(value, type):
        return f"the class {value.__qualname__} is code; store its name or an Enum member instead"
    if cls in _FUNCTIONS:
        return f"the function {getattr(value, '__qualname__', name)} is code; store what it needs instead"
    if hasattr(value, "fileno") and hasattr(value, "read"):
        return f"an open file ({name}) cannot be stored; store its path and position"
    if hasattr(value, "acquire") and hasattr(value, "release"):
        return f"a lock ({name}) cannot be stored; create it anew in the program"
    if any(base.__name__ == "DataLoader" for base in cls.__mro__):
        return f"a {name} knows no position; use holdfast.ResumableSampler or torchdata's StatefulDataLoader"
    if hasattr(cls, "state_dict") or hasattr(cls, "load_state_dict"):
        return f"a {name} has only one of state_dict() and load_state_dict(); give it both"
    if issubclass(cls, BUILT_IN):
        return f"a {name} is a subclass of a built-in type and would come back as the built-in; {_REMEDY}"
    return f"a {name} cannot be stored without running code at load; {_REMEDY}"
