"""The typed, code-free JSON encoding of non-tensor values.

JSON's own types mean themselves: null, booleans, integers, finite floats (always with a point or an exponent),
strings, arrays (Python lists) and objects (dicts with string keys that do not start with `$`). Every other value is
an object with one key that starts with `$` and names its type. Nothing in a file can name code to run.

Every value of a tree has a path, made of the keys and positions that lead to it (`docs/format.md` has the rules). A
tensor that is stored under the path it stands at says only its kind, in one letter: no name is written twice.
"""

from __future__ import annotations

import base64
import collections
import datetime
import decimal
import fractions
import math
import pathlib
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from holdfast.core.errors import InvalidFormat, UnsupportedValue
from holdfast.core.names import MAX_PATH_BYTES, check_path, join_path

__all__ = ["Json", "TensorLeaf", "Typed", "decode_value", "encode_value", "tensor_leaves"]

Json = object  # null | bool | int | float | str | list[Json] | dict[str, Json]

MAX_DEPTH = 100
_INT64 = 2**63


# The kinds of tensors that have a letter; any other is written in full, with the tensor's name.
_LETTERS = {
    "torch.Tensor": "t",
    "torch.Tensor:grad": "g",
    "torch.Parameter": "p",
    "torch.Parameter:frozen": "f",
    "numpy.ndarray": "n",
    "numpy.scalar": "s",
}
_KINDS = {letter: kind for kind, letter in _LETTERS.items()}
_NESTED = (dict, list)


class TensorLeaf(msgspec.Struct, frozen=True, gc=False):
    """The place of a tensor in a value tree: the tensor's bytes are stored under `name`.

    `kind` says what to give back: "torch.Tensor", "torch.Parameter", "numpy.ndarray", "numpy.scalar", "jax.Array".
    """

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Typed:
    """A value of a type the grammar knows only by name: `kind` is the name, `value` a storable value.

    Kinds: "torch.Size", "torch.dtype", "torch.device", "torch.layout", "torch.memory_format", "numpy.dtype",
    "enum" (value: {"type", "member"}), "dataclass" and "namedtuple" (value: {"type", "fields"}),
    "datetime.local" (value: {"time", "zone", "fold"}), "codec:<name>" (a codec registered by the user).
    """

    kind: str
    value: object

    def __hash__(self) -> int:
        # Enum members and frozen dataclasses are dict keys and set elements; their parts are dicts.
        return hash(self.kind)


def _float(value: float) -> Json:
    if math.isfinite(value):
        return value
    return {"$float": struct.pack(">d", value).hex()}


def _is_unicode(text: str) -> bool:
    """Return whether `text` can be written as UTF-8: it holds no lone surrogate."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _below(path: str, key: object) -> str:
    """Return the path of what stands at a text key or a position.

    What is too long to name a tensor grows no further: else a small hostile tree could ask for endless copies of it.
    """
    return path if len(path) > MAX_PATH_BYTES else join_path(path, key)


def _beside(path: str, what: str) -> str:
    return path if len(path) > MAX_PATH_BYTES else f"{path} ({what})"


def _under(path: str, key: object) -> str:
    """Return the path of what a mapping holds under any key: of all types only these two print alike for ever."""
    return _below(path, key) if type(key) is str or type(key) is int else _beside(path, "value")


def _pairs(value: dict[object, object], path: str, depth: int) -> list[Json]:
    return [
        [encode_value(k, _beside(path, "key"), depth + 1), encode_value(v, _under(path, k), depth + 1)]
        for k, v in value.items()
    ]


def _items(values: object, path: str, depth: int) -> list[Json]:
    return [encode_value(v, _below(path, i), depth + 1) for i, v in enumerate(values)]  # type: ignore[arg-type, var-annotated]


def _dict(value: dict[object, object], path: str, depth: int) -> Json:
    if all(type(k) is str and not k.startswith("$") and _is_unicode(k) for k in value):
        return {str(k): encode_value(v, _below(path, k), depth + 1) for k, v in value.items()}
    return {"$dict": _pairs(value, path, depth)}


def _set(value: set[object] | frozenset[object], path: str, depth: int) -> list[Json]:
    # A set has no order; sort by the encoding so that equal sets have equal bytes.
    return sorted((encode_value(v, _beside(path, "element"), depth + 1) for v in value), key=repr)


def _time(key: str, value: datetime.datetime | datetime.time, path: str) -> Json:
    """Return the form of a time: ISO 8601, and beside it what that has no place for.

    Of a zone without a name the offset at that moment is kept, which a time of day alone does not have.
    """
    zone = _zone(value.tzinfo)
    if zone is None and value.tzinfo is not None and value.utcoffset() is None:
        raise UnsupportedValue(
            f"{path or 'the state'}: the zone of {value!r} has neither a name nor, without a date, an offset; "
            "give it a zoneinfo.ZoneInfo or a datetime.timezone"
        )
    plain = value if zone is None else value.replace(tzinfo=None)
    text: Json = {key: plain.isoformat()}
    if zone is None and not value.fold:
        return text
    return {"$typed": ["datetime.local", {"time": text, "zone": zone, "fold": value.fold}]}


def _zone(of: datetime.tzinfo | None) -> str | None:
    """Return the name of an IANA time zone."""
    return of.key if type(of) is ZoneInfo else None


def _leaf(leaf: TensorLeaf, path: str) -> Json:
    letter = _LETTERS.get(leaf.kind) if leaf.name == path else None
    return {"$tensor": [leaf.name, leaf.kind]} if letter is None else {"$t": letter}


_ENCODERS: dict[type, Callable[..., Json]] = {
    complex: lambda v, p, d: {"$complex": [_float(v.real), _float(v.imag)]},
    bytes: lambda v, p, d: {"$bytes": base64.b64encode(v).decode()},
    bytearray: lambda v, p, d: {"$bytearray": base64.b64encode(v).decode()},
    tuple: lambda v, p, d: {"$tuple": _items(v, p, d)},
    set: lambda v, p, d: {"$set": _set(v, p, d)},
    frozenset: lambda v, p, d: {"$frozenset": _set(v, p, d)},
    range: lambda v, p, d: {"$range": [_int(v.start), _int(v.stop), _int(v.step)]},
    slice: lambda v, p, d: {"$slice": _items((v.start, v.stop, v.step), p, d)},
    collections.OrderedDict: lambda v, p, d: {"$ordereddict": _pairs(v, p, d)},
    collections.Counter: lambda v, p, d: {"$counter": _pairs(v, p, d)},
    collections.deque: lambda v, p, d: {"$deque": [_items(v, p, d), v.maxlen]},
    datetime.datetime: lambda v, p, d: _time("$datetime", v, p),
    datetime.date: lambda v, p, d: {"$date": v.isoformat()},
    datetime.time: lambda v, p, d: _time("$time", v, p),
    datetime.timedelta: lambda v, p, d: {"$timedelta": [v.days, v.seconds, v.microseconds]},
    decimal.Decimal: lambda v, p, d: {"$decimal": str(v)},
    fractions.Fraction: lambda v, p, d: {"$fraction": [_int(v.numerator), _int(v.denominator)]},
    uuid.UUID: lambda v, p, d: {"$uuid": v.hex},
    msgspec.Raw: lambda v, p, d: v,  # encoded before
}


def _str(value: str) -> Json:
    return (
        value
        if _is_unicode(value)
        else {"$str": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode()}
    )


def _int(value: int) -> Json:
    return value if -_INT64 <= value < _INT64 else {"$int": hex(value)}


def encode_value(value: object, path: str = "", depth: int = 0) -> Json:
    """Return the JSON form of `value`.

    Raises:
        UnsupportedValue: a type outside the grammar; the message carries the tree path.
    """
    if depth > MAX_DEPTH:
        raise UnsupportedValue(
            f"{path or 'the state'}: nested deeper than {MAX_DEPTH} levels (or refers to itself)"
        )
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return _str(value)  # type: ignore[arg-type]
    if kind is int:
        return _int(value)  # type: ignore[arg-type]
    if kind is float:
        return _float(value)  # type: ignore[arg-type]
    if kind is list:
        return _items(value, path, depth)
    if kind is dict:
        return _dict(value, path, depth)  # type: ignore[arg-type]
    if kind is TensorLeaf:
        return _leaf(value, path)  # type: ignore[arg-type]
    if kind is Typed:
        return {"$typed": [value.kind, encode_value(value.value, path, depth + 1)]}  # type: ignore[attr-defined]
    if kind in _ENCODERS:
        return _ENCODERS[kind](value, path, depth)
    if isinstance(value, pathlib.PurePath):
        return {"$path": _str(str(value))}
    raise UnsupportedValue(
        f"{path or 'the state'}: a {kind.__module__}.{kind.__qualname__} cannot be stored without running code "
        "at load; give it state_dict()/load_state_dict(), keep its parts as plain values, or call "
        "holdfast.register_codec"
    )


def _decode_float(x: Json) -> float:
    raw = bytes.fromhex(str(x))
    if len(raw) != 8:
        raise ValueError(f"a $float has {len(raw)} bytes; expected 8")
    return float(struct.unpack(">d", raw)[0])


def _decode_items(x: Json, path: str, depth: int) -> list[object]:
    return [
        decode_value(v, _below(path, i), depth + 1) if type(v) in _NESTED else v
        for i, v in enumerate(_as_list(x))
    ]


def _decode_pairs(x: Json, path: str, depth: int) -> dict[object, object]:
    out: dict[object, object] = {}
    for pair in _as_list(x):
        k, v = _as_list(pair)
        key = decode_value(k, _beside(path, "key"), depth + 1)
        if key in out:
            raise ValueError(f"key {key!r} occurs twice")
        out[key] = decode_value(v, _under(path, key), depth + 1)
    return out


def _as_list(x: Json) -> list[Json]:
    if not isinstance(x, list):
        raise ValueError(f"expected an array, found {type(x).__name__}")
    return x


def _numbers(x: Json, kind: type, count: int, depth: int) -> list[Any]:
    """Return `count` decoded numbers of exactly one type: a constructor may read other things differently."""
    items = _decode_items(x, "", depth)
    if len(items) != count or any(type(v) is not kind for v in items):
        raise ValueError(f"expected {count} of type {kind.__name__}")
    return items


def _decode_set(x: Json, path: str, depth: int) -> set[object]:
    items = [decode_value(v, _beside(path, "element"), depth + 1) for v in _as_list(x)]
    if len(found := set(items)) != len(items):
        raise ValueError("an element occurs twice")
    return found


def _text(x: Json) -> str:
    if not isinstance(x, str):
        raise ValueError(f"expected a string, found {type(x).__name__}")
    return x


def _decode_deque(x: Json, path: str, depth: int) -> object:
    items, maxlen = _as_list(x)
    if maxlen is not None and (type(maxlen) is not int or maxlen < len(_as_list(items))):
        raise ValueError(f"a deque of {len(_as_list(items))} elements has the bound {maxlen!r:.40}")
    return collections.deque(_decode_items(items, path, depth), maxlen)


def _decode_slice(x: Json, path: str, depth: int) -> slice:
    start, stop, step = _decode_items(x, path, depth)
    return slice(start, stop, step)


def _decode_tensor(x: Json, path: str, depth: int) -> TensorLeaf:
    name, kind = _as_list(x)
    return TensorLeaf(check_path(_text(name)), _text(kind))


def _decode_short(x: Json, path: str, depth: int) -> TensorLeaf:
    kind = _KINDS.get(_text(x))
    if kind is None:
        raise ValueError(f"no kind of tensor has the letter {x!r:.40}")
    return TensorLeaf(check_path(path), kind)


def _decode_typed(x: Json, path: str, depth: int) -> Typed:
    kind, value = _as_list(x)
    return Typed(_text(kind), decode_value(value, path, depth + 1))


_DECODERS: dict[str, Callable[[Json, str, int], object]] = {
    "$float": lambda x, p, d: _decode_float(x),
    "$int": lambda x, p, d: int(_text(x), 16),
    "$str": lambda x, p, d: base64.b64decode(_text(x), validate=True).decode("utf-8", "surrogatepass"),
    "$complex": lambda x, p, d: complex(*_numbers(x, float, 2, d)),
    "$bytes": lambda x, p, d: base64.b64decode(_text(x), validate=True),
    "$bytearray": lambda x, p, d: bytearray(base64.b64decode(_text(x), validate=True)),
    "$tuple": lambda x, p, d: tuple(_decode_items(x, p, d)),
    "$set": _decode_set,
    "$frozenset": lambda x, p, d: frozenset(_decode_set(x, p, d)),
    "$range": lambda x, p, d: range(*_numbers(x, int, 3, d)),
    "$slice": _decode_slice,
    "$dict": _decode_pairs,
    "$ordereddict": lambda x, p, d: collections.OrderedDict(_decode_pairs(x, p, d)),
    "$counter": lambda x, p, d: collections.Counter(_decode_pairs(x, p, d)),
    "$deque": _decode_deque,
    "$datetime": lambda x, p, d: datetime.datetime.fromisoformat(_text(x)),
    "$date": lambda x, p, d: datetime.date.fromisoformat(_text(x)),
    "$time": lambda x, p, d: datetime.time.fromisoformat(_text(x)),
    "$timedelta": lambda x, p, d: datetime.timedelta(*_numbers(x, int, 3, d)),
    "$decimal": lambda x, p, d: decimal.Decimal(_text(x)),
    "$fraction": lambda x, p, d: fractions.Fraction(*_numbers(x, int, 2, d)),
    "$uuid": lambda x, p, d: uuid.UUID(_text(x)),
    "$path": lambda x, p, d: pathlib.PurePosixPath(_text(decode_value(x, p, d + 1))),
    "$t": _decode_short,
    "$tensor": _decode_tensor,
    "$typed": _decode_typed,
}


def decode_value(x: Json, path: str = "", depth: int = 0) -> object:
    """Return the value that a JSON form stands for; tensors stay `TensorLeaf`, named types stay `Typed`.

    `path` is the value's own, as it was given to `encode_value`.

    Raises:
        InvalidFormat: the JSON is outside the grammar.
    """
    if depth > 2 * MAX_DEPTH:
        raise InvalidFormat(f"values are nested deeper than {2 * MAX_DEPTH} levels")
    if isinstance(x, list):
        return _decode_items(x, path, depth)
    if not isinstance(x, dict):
        return x
    if len(x) == 1:
        ((key, inner),) = x.items()
        if key == "$t" and type(inner) is str and inner in _KINDS:  # most values of a large tree
            return TensorLeaf(check_path(path), _KINDS[inner])
        if key.startswith("$"):
            decoder = _DECODERS.get(key)
            if decoder is None:
                raise InvalidFormat(f"unknown value type {key[:40]!r}; was it written by a newer holdfast?")
            try:
                return decoder(inner, path, depth)
            except (ValueError, TypeError, OverflowError, ArithmeticError) as e:
                raise InvalidFormat(f"a value of type {key} is malformed: {e}") from e
    if any(k.startswith("$") for k in x):
        raise InvalidFormat("an object mixes a type name that starts with '$' with other keys")
    return {k: decode_value(v, _below(path, k), depth + 1) if type(v) in _NESTED else v for k, v in x.items()}


def tensor_leaves(value: object) -> list[TensorLeaf]:
    """Return every `TensorLeaf` of a decoded value tree, in order."""
    found: list[TensorLeaf] = []
    stack = [value]
    while stack:
        v = stack.pop()
        if isinstance(v, TensorLeaf):
            found.append(v)
        elif isinstance(v, Typed):
            stack.append(v.value)
        elif isinstance(v, dict):
            stack.extend(reversed(v.values()))
        elif isinstance(v, (list, tuple, set, frozenset, collections.deque)):
            stack.extend(reversed(list(v)))
    return found
