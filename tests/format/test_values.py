"""The values grammar: what goes in comes out, to the bit; what is outside is refused by name."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import math
import pathlib
import struct
import uuid
import zoneinfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import InvalidFormat, UnsupportedValue
from holdfast.format.values import MAX_DEPTH, TensorLeaf, Typed, decode_value, encode_value, tensor_leaves

ORDERED = (list, tuple, collections.deque)
UNORDERED = (set, frozenset)


def through_json(value: object, path: str = "") -> object:
    return decode_value(msgspec.json.decode(msgspec.json.encode(encode_value(value, path))), path)


def bits(x: float) -> bytes:
    return struct.pack(">d", x)


def same(a: object, b: object) -> bool:
    """Equal in type, order and every bit; NaN equals the same NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return bits(a) == bits(b)
    if isinstance(a, complex):
        return bits(a.real) == bits(b.real) and bits(a.imag) == bits(b.imag)
    if isinstance(a, decimal.Decimal):
        return a.as_tuple() == b.as_tuple()
    if isinstance(a, datetime.datetime):
        return a.isoformat() == b.isoformat()
    if isinstance(a, collections.deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, ORDERED):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, UNORDERED):
        return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a.items(), b.items(), strict=True))
    if isinstance(a, slice):
        return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, Typed):
        return a.kind == b.kind and same(a.value, b.value)
    return a == b


any_bits = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack(">d", n.to_bytes(8, "big"))[0])
floats = st.floats() | any_bits
integers = (
    st.integers() | st.integers(-(2**70), 2**70) | st.integers(0, 5).map(lambda n: 7**3000 * (-1) ** n + n)
)
text = st.text(st.characters(exclude_categories=()) | st.sampled_from("$\ud800\udfff\0\x7f"), max_size=8)
zones = st.none() | st.integers(-86_399, 86_399).map(
    lambda s: datetime.timezone(datetime.timedelta(seconds=s))
)
names = st.text("abc/._", min_size=1, max_size=6)

atoms = st.one_of(
    st.none(), st.booleans(), integers, floats, st.builds(complex, floats, floats), text, st.binary(max_size=12),
    st.builds(range, integers, integers, st.sampled_from([1, -3, 2**66])),
    st.builds(datetime.datetime, *[st.integers(1, 12)] * 3, *[st.integers(0, 23)] * 3, tzinfo=zones),
    st.dates(), st.times().map(lambda t: t.replace(fold=0)), st.timedeltas(), st.decimals(), st.just(decimal.Decimal("sNaN12")), st.fractions(),
    st.uuids(), text.map(pathlib.PurePosixPath), st.builds(TensorLeaf, names, names | st.sampled_from(["torch.Tensor", "numpy.ndarray"])),
)  # fmt: skip
keys = st.recursive(
    atoms.filter(lambda v: not (isinstance(v, decimal.Decimal) and v.is_snan())),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.frozensets(inner, max_size=3),
        st.builds(Typed, names, inner),
    ),
    max_leaves=4,
)


def containers(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    lists = st.lists(inner, max_size=4)
    dicts = st.dictionaries(text | keys, inner, max_size=4)
    return st.one_of(
        lists, lists.map(tuple), st.sets(keys, max_size=4), st.frozensets(keys, max_size=4), dicts,
        st.dictionaries(text, inner, max_size=4), dicts.map(collections.OrderedDict), dicts.map(collections.Counter),
        st.builds(collections.deque, lists, st.none() | st.integers(0, 9)),
        st.builds(slice, keys, keys, keys), st.builds(Typed, names, inner),
        st.binary(max_size=8).map(bytearray),
    )  # fmt: skip


values = st.recursive(atoms, containers, max_leaves=12)


@settings(max_examples=600)
@given(values)
def test_every_value_comes_back_as_it_was(value: object) -> None:
    assert same(through_json(value), value)


@settings(max_examples=300)
@given(values)
def test_encoding_again_gives_the_same_bytes(value: object) -> None:
    once = msgspec.json.encode(encode_value(value))
    assert msgspec.json.encode(encode_value(decode_value(msgspec.json.decode(once)))) == once


@pytest.mark.parametrize(
    "pattern",
    [
        0x8000000000000000, 0x0000000000000001, 0x800FFFFFFFFFFFFF, 0x7FEFFFFFFFFFFFFF, 0x0010000000000000,
        0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000, 0xFFF8000000000000, 0x7FF0000000000001,
        0x7FF8DEADBEEF0001, 0xFFFFFFFFFFFFFFFF, 0x3FB999999999999A, 0x4340000000000001,
    ],
)  # fmt: skip
def test_floats_keep_every_bit(pattern: int) -> None:
    (value,) = struct.unpack(">d", pattern.to_bytes(8, "big"))
    found = through_json([value, complex(value, -value)])
    assert bits(found[0]) == pattern.to_bytes(8, "big")
    assert (bits(found[1].real), bits(found[1].imag)) == (bits(value), bits(-value))


@pytest.mark.parametrize("value", [0.0, 1.0, -1e16, 2.0**53, 1e22, 1e300])
def test_a_whole_float_stays_a_float(value: float) -> None:
    assert type(through_json(value)) is float


@pytest.mark.parametrize("exponent", [31, 53, 62, 63, 64, 65, 1000, 20_000])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_integers_of_any_size_are_exact(exponent: int, offset: int) -> None:
    n = 2**exponent + offset
    for value in (n, -n, [n], {5: n}, range(n, n + 3), fractions.Fraction(n, 3)):
        assert same(through_json(value), value)


def test_lone_surrogates_survive_wherever_text_may_stand() -> None:
    odd = "a\udc80\ud800b"
    for value in (odd, {odd: 1}, {"$" + odd: odd}, pathlib.PurePosixPath(odd), {odd, "x"}, Typed("k", odd)):
        assert same(through_json(value), value)


def test_keys_that_look_like_type_names_are_data() -> None:
    for value in (
        {"$tensor": ["x", "y"]},
        {"$float": 1, "b": 2},
        {"$": {"$dict": []}},
        {"a": {"$int": "0x1"}},
    ):
        assert same(through_json(value), value)


def test_dicts_keep_their_order_and_sets_do_not_depend_on_theirs() -> None:
    assert list(through_json({"b": 1, "a": 2, 3: 0, (1, "x"): 0})) == ["b", "a", 3, (1, "x")]
    several = [{f"k{i}" for i in order} for order in (range(40), reversed(range(40)))]
    assert encode_value(several[0]) == encode_value(several[1])


class Color(enum.Enum):
    RED = 1


class Shout(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [object(), Color.RED, Shout("a"), len, {1, 2}.__iter__(), math, ValueError("x"), memoryview(b"a")],
)
def test_what_would_need_code_is_refused_with_its_path(value: object) -> None:
    with pytest.raises(UnsupportedValue, match=r"^state/a/1: "):
        encode_value({"a": [0, value]}, "state")


def test_nesting_is_bounded_on_the_way_in_and_out() -> None:
    deepest: object = 1
    for _ in range(MAX_DEPTH):
        deepest = [deepest]
    assert same(through_json(deepest), deepest)
    with pytest.raises(UnsupportedValue, match="nested deeper"):
        encode_value([deepest])
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(UnsupportedValue, match="refers to itself"):
        encode_value({"loop": loop})


def test_tensor_leaves_are_found_in_every_container() -> None:
    leaf = [TensorLeaf(f"t{i}", "numpy.ndarray") for i in range(6)]
    tree = {"a": [leaf[0], (leaf[1],)], 5: Typed("k", {"x": leaf[2]}), "d": collections.deque([leaf[3]])}
    tree["o"] = collections.OrderedDict(z=leaf[4], y={leaf[5]})
    assert tensor_leaves(tree) == leaf


LETTERS = {
    "t": "torch.Tensor", "g": "torch.Tensor:grad", "p": "torch.Parameter", "f": "torch.Parameter:frozen",
    "n": "numpy.ndarray", "s": "numpy.scalar",
}  # fmt: skip


def placed(path: str = "m") -> dict[object, object]:
    """A leaf at every kind of place, each with the path of that place as its name."""

    def leaf(at: str) -> TensorLeaf:
        return TensorLeaf(f"{path}{at}", "torch.Tensor")

    return {
        "a": leaf("/a"), "": {"": leaf("")}, "l": [leaf("/l/0"), (leaf("/l/1/0"),)], 5: leaf("/5"), True: leaf(" (value)"),
        (1,): [leaf(" (value)/0")], "$x": {"$y": leaf("/$x/$y")}, "t": Typed("k", {"z": leaf("/t/z")}),
        "o": collections.OrderedDict({7: leaf("/o/7"), "q": leaf("/o/q")}), "d": collections.deque([leaf("/d/0")]),
        "s": {leaf("/s (element)")}, "k": {leaf("/k (key)"): 1, frozenset({leaf("/k (key) (element)")}): leaf("/k (value)")},
    }  # fmt: skip


def test_a_leaf_that_stands_where_its_tensor_is_stored_says_only_its_kind() -> None:
    json = msgspec.json.encode(encode_value(placed(), "m"))
    assert b"$tensor" not in json
    assert json.count(b'{"$t":"t"}') == 16
    assert same(decode_value(msgspec.json.decode(json), "m"), placed())
    elsewhere = msgspec.json.encode(encode_value(placed(), "n"))
    assert b'$t"' not in elsewhere
    assert same(decode_value(msgspec.json.decode(elsewhere), "n"), placed())
    for letter, kind in LETTERS.items():
        assert encode_value([TensorLeaf("m/0", kind)], "m") == [{"$t": letter}]
        assert encode_value([TensorLeaf("m/1", kind)], "m") == [{"$tensor": ["m/1", kind]}]
    assert encode_value(TensorLeaf("m", "jax.Array"), "m") == {"$tensor": ["m", "jax.Array"]}


def test_leaves_in_full_are_read_wherever_they_stand() -> None:
    for path in ("m", "elsewhere"):
        found = decode_value({"a": {"$tensor": ["m/a", "torch.Tensor"]}}, path)
        assert found == {"a": TensorLeaf("m/a", "torch.Tensor")}


@settings(max_examples=300)
@given(values, names)
def test_every_value_comes_back_whatever_its_path(value: object, path: str) -> None:
    assert same(through_json(value, path), value)


def test_text_and_mappings_that_look_like_a_short_leaf_are_data() -> None:
    for value in ("$t", {"$t": "t"}, {"a": "t"}, {"a": {"$t": "p"}}, ["$t", "t"], {"$": 1}):
        assert same(through_json(value, "m"), value)


def test_the_encoding_of_one_value_of_each_kind_is_fixed() -> None:
    """The bytes on disk: changing any of these breaks every file that exists."""
    table = {
        "null": None, "true": True, "-7": -7, "1.5": 1.5, '"é"': "é", '[1,"a"]': [1, "a"], '{"a":1}': {"a": 1},
        '{"$float":"fff0000000000000"}': -math.inf, '{"$int":"0x8000000000000000"}': 2**63,
        '{"$str":"7aCA"}': "\ud800", '{"$complex":[1.0,-0.0]}': complex(1, -0.0), '{"$bytes":"AP8="}': b"\x00\xff",
        '{"$bytearray":"AQ=="}': bytearray(b"\x01"), '{"$tuple":[1]}': (1,), '{"$set":[1,2]}': {2, 1},
        '{"$frozenset":[]}': frozenset(), '{"$range":[0,4,2]}': range(0, 4, 2), '{"$slice":[null,3,null]}': slice(3),
        '{"$dict":[[1,"a"],["b",2]]}': {1: "a", "b": 2}, '{"$ordereddict":[["a",1]]}': collections.OrderedDict(a=1),
        '{"$counter":[["a",2]]}': collections.Counter("aa"), '{"$deque":[[1],3]}': collections.deque([1], 3),
        '{"$datetime":"2024-02-29T01:02:03+01:00"}': datetime.datetime.fromisoformat("2024-02-29T01:02:03+01:00"),
        '{"$date":"2024-02-29"}': datetime.date(2024, 2, 29), '{"$time":"01:02:03.000004"}': datetime.time(1, 2, 3, 4),
        '{"$timedelta":[-1,1,2]}': datetime.timedelta(-1, 1, 2), '{"$decimal":"1.10"}': decimal.Decimal("1.10"),
        '{"$fraction":[-1,3]}': fractions.Fraction(-1, 3), '{"$uuid":"00000000000000000000000000000001"}': uuid.UUID(int=1),
        '{"$path":"a/b"}': pathlib.PurePosixPath("a/b"), '{"$tensor":["a","numpy.ndarray"]}': TensorLeaf("a", "numpy.ndarray"),
        '{"$typed":["torch.Size",[1]]}': Typed("torch.Size", [1]),
    }  # fmt: skip
    for json, value in table.items():
        assert msgspec.json.encode(encode_value(value)).decode() == json
        assert same(decode_value(msgspec.json.decode(json)), value)


def test_the_encoding_of_times_by_the_clocks_of_a_zone_is_fixed() -> None:
    """Named types stay `Typed`: to decode a tree takes no time zone database."""
    berlin = zoneinfo.ZoneInfo("Europe/Berlin")
    table = {
        '{"time":{"$datetime":"2024-10-27T02:30:00"},"zone":"Europe/Berlin","fold":1}': datetime.datetime(2024, 10, 27, 2, 30, tzinfo=berlin, fold=1),
        '{"time":{"$time":"02:30:00"},"zone":"Europe/Berlin","fold":0}': datetime.time(2, 30, tzinfo=berlin),
        '{"time":{"$time":"02:30:00+00:00"},"zone":null,"fold":1}': datetime.time(2, 30, tzinfo=datetime.UTC, fold=1),
    }  # fmt: skip
    for json, value in table.items():
        text = msgspec.json.encode(encode_value(value)).decode()
        assert text == f'{{"$typed":["datetime.local",{json}]}}'
        assert encode_value(decode_value(msgspec.json.decode(text))) == msgspec.json.decode(text)


MALFORMED = [
    '{"$t":"x"}', '{"$t":""}', '{"$t":"torch.Tensor"}', '{"$t":1}', '{"$t":["t"]}', '{"$t":{}}', '{"$t":"t","x":1}', '{"a\\u0000":{"$t":"t"}}',
    '{"$unknown":1}', '{"$float":"00"}', '{"$float":7}', '{"$int":5}', '{"$int":"zz"}', '{"$str":"*"}', '{"$str":"/w=="}',
    '{"$bytes":"A"}', '{"$bytes":"AA==\\n"}', '{"$complex":[1.0]}', '{"$complex":["1e5",1.0]}', '{"$complex":[1.0,1.0,1.0]}',
    '{"$tuple":{}}', '{"$set":[[1]]}', '{"$set":[1,1]}', '{"$frozenset":"ab"}', '{"$range":[1]}', '{"$range":[0,1,0]}',
    '{"$range":[0,1.5,1]}', '{"$slice":[1]}', '{"$dict":[[1,2],[1,3]]}', '{"$dict":[[1]]}', '{"$dict":{"a":1}}',
    '{"$dict":[[[1],2]]}', '{"$counter":[["a"]]}', '{"$deque":[1,2]}', '{"$deque":[[1],-1]}', '{"$deque":[[1],"3"]}',
    '{"$deque":[[1,2,3],2]}', '{"$datetime":"soon"}', '{"$date":"2024-02-30"}', '{"$time":5}', '{"$timedelta":[1,2]}',
    '{"$timedelta":[999999999999,0,0]}', '{"$timedelta":[0.5,0,0]}', '{"$decimal":"ten"}', '{"$fraction":[1,0]}',
    '{"$fraction":["1e999999999"]}', '{"$fraction":[0.5,1]}', '{"$uuid":"1"}', '{"$path":5}', '{"$path":[]}',
    '{"$tensor":["a"]}', '{"$tensor":["a\\u0000","k"]}', '{"$tensor":["",""]}', '{"$typed":["a"]}', '{"$typed":[1,2]}',
    '{"$tuple":[],"x":1}', '{"a":1,"$x":2}',
]  # fmt: skip


@pytest.mark.parametrize("json", MALFORMED)
def test_malformed_values_are_refused(json: str) -> None:
    with pytest.raises(InvalidFormat):
        decode_value(msgspec.json.decode(json))
    with pytest.raises(InvalidFormat):
        decode_value(msgspec.json.decode(f'[{{"deeper":[{json}]}}]'))
