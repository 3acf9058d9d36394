"""Plain values, containers and records: exact, detached from the live ones, restored in place."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import math
import pathlib
import uuid
import zoneinfo
from typing import NamedTuple

import numpy as np
import pytest
import torch

from holdfast.core.errors import InvalidFormat, StateError, UnsupportedValue
from holdfast.format.values import Typed
from holdfast.state.codecs import register_codec
from holdfast.state.materialize import Materializer
from holdfast.state.records import EnumMember, Record
from holdfast.state.registry import dispatch

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Mode(enum.IntFlag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: float
    y: object


@dataclasses.dataclass
class Counters:
    step: int = 0
    best: float | None = None
    history: list[float] = dataclasses.field(default_factory=list)
    hidden: object = dataclasses.field(default=None, init=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float
    tags: list[str]
    colour: Colour = Colour.RED


@dataclasses.dataclass(slots=True)
class Slotted:
    a: int
    w: torch.Tensor


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents


PLAIN = {
    "none": None,
    "bools": [True, False],
    "ints": [0, -1, 2**62, 2**100, -(2**200)],
    "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf],
    "complex": 1e-300 + 2j,
    "text": ["", "ü", "\x00", "a/b", "$x", "\ud800"],
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"ab"),
    "tuple": (1, (2, [3])),
    "set": {1, "a", (2, 3), frozenset({4})},
    "keys": {1: "a", (1, 2): "b", None: "c", "$t": "d", True and 2.5: "e", b"k": "f", Colour.RED: "g"},
    "ordered": collections.OrderedDict(b=1, a=2),
    "counter": collections.Counter("abca"),
    "deque": collections.deque([1, 2, 3], maxlen=5),
    "range": range(1, 10, 3),
    "slice": slice(1, None, 2),
    "dates": [
        datetime.datetime(2020, 1, 2, 3, 4, 5, 6),
        datetime.timedelta(1, 2, 3),
        datetime.date(2020, 1, 1),
    ],
    "zones": [
        datetime.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN),
        datetime.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1),
        datetime.datetime(2024, 10, 27, 2, 30, fold=1),
        datetime.datetime(2024, 10, 27, 2, 30, tzinfo=datetime.timezone(datetime.timedelta(hours=5)), fold=1),
        datetime.time(2, 30, tzinfo=BERLIN),
        datetime.time(2, 30, fold=1),
        datetime.time(2, 30, tzinfo=datetime.UTC),
        datetime.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("Etc/GMT+1")),
    ],
    "zone in a key": {datetime.datetime(2024, 7, 1, tzinfo=BERLIN): 1},
    "numbers": [decimal.Decimal("1.10"), fractions.Fraction(1, 3)],
    "uuid": uuid.UUID(int=5),
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("c")],
    "torch": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), torch.strided, torch.channels_last],
    "numpy": [np.dtype("float32"), np.dtype(">i2")],
    "scalars": [np.float64(0.1), np.int8(-3), np.bool_(True), np.float16(2)],
    "enum": [Colour.BLUE, Mode.A | Mode.B],
    "point": Point(1.5, (2,)),
    "set of enums": {Colour.RED, Colour.BLUE},
    "numpy keys": {np.int64(3): "x"},
}


def same(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (a == b or (math.isnan(a) and math.isnan(b)))
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return len(a) == len(b) and all(same(k, m) and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    if isinstance(a, (datetime.datetime, datetime.time)):
        return repr(a) == repr(b)  # equal moments may differ in zone and fold
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return bool(a == b)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_plain_values_come_back(name, save):
    saved = save({"v": PLAIN[name], "box": {"v": PLAIN[name]}})
    box: dict[str, object] = {"v": None}
    plan = saved.into({"v": None, "box": box})
    assert same(plan.replaced.get("v"), PLAIN[name])
    assert same(box["v"], PLAIN[name])


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"enum", "point", "set of enums", "keys"}))
def test_plain_values_load_without_live_objects(name, save):
    assert same(save({"v": PLAIN[name]}).load()["v"], PLAIN[name])


class Solar(datetime.tzinfo):
    """A zone without a name, as other packages have them."""

    def utcoffset(self, when):
        return None if when is None else datetime.timedelta(minutes=34)

    def dst(self, when):
        return None


def test_of_a_zone_without_a_name_the_moment_is_kept_and_a_time_of_day_refused(save):
    moment = datetime.datetime(2024, 7, 1, 12, tzinfo=Solar())
    loaded = save({"v": [moment]}).load()["v"][0]
    assert loaded.isoformat() == moment.isoformat() == "2024-07-01T12:00:00+00:34"
    with pytest.raises(UnsupportedValue, match=r"v/at: the zone of .* has neither a name nor"):
        save({"v": {"at": datetime.time(12, tzinfo=Solar())}})


def test_a_zone_that_the_machine_does_not_know_is_named_and_nothing_is_changed(save, monkeypatch):
    saved = save({"v": {"n": 1, "at": datetime.time(2, 30, tzinfo=BERLIN)}})

    def unknown(key):
        raise zoneinfo.ZoneInfoNotFoundError(key)

    monkeypatch.setattr("holdfast.state.adapters.containers.ZoneInfo", unknown)
    box = {"n": 0, "at": None}
    with pytest.raises(StateError, match="zone Europe/Berlin is stored, and this machine does not know"):
        saved.into({"v": box})
    assert box == {"n": 0, "at": None}


@pytest.mark.parametrize(
    "parts",
    [
        {"time": datetime.time(1), "zone": "../../etc/passwd", "fold": 0},
        {"time": datetime.time(1), "zone": "/etc/passwd", "fold": 0},
        {"time": datetime.time(1), "zone": 5, "fold": 0},
        {"time": datetime.time(1), "zone": None, "fold": 2},
        {"time": datetime.time(1), "zone": None},
        {"time": datetime.time(1, tzinfo=datetime.UTC), "zone": "Europe/Berlin", "fold": 0},
        {"time": datetime.date(2024, 1, 1), "zone": "Europe/Berlin", "fold": 0},
        [],
    ],
)
def test_a_malformed_time_of_a_zone_is_refused(parts):
    with pytest.raises(InvalidFormat, match=r"datetime\.local is malformed"):
        Materializer({}, dispatch()).value(Typed("datetime.local", parts))


def test_captured_tree_shares_nothing(save):
    live = {
        "list": [1, [2]],
        "dict": {"a": {"b": 1}},
        "bytes": bytearray(b"x"),
        "deque": collections.deque([[1]]),
    }
    live["object"] = Stateful([1, 2])
    saved = save({"v": live})
    from holdfast.state.capture import capture

    tree = capture({"v": live}).tree
    live["list"][1].append(3)
    live["dict"]["a"]["b"] = 9
    live["bytes"][:] = b"y"
    live["deque"][0].append(2)
    live["object"].items.append(3)
    assert tree == saved.tree


class Stateful:
    def __init__(self, items: list[object]) -> None:
        self.items = items
        self.loaded = 0

    def state_dict(self) -> dict[str, object]:
        return {"items": self.items, "array": np.arange(3)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.items[:] = state["items"]
        self.loaded += 1


def test_containers_keep_their_identity(save):
    inner = [1, 2]
    live = {
        "list": [inner, {"k": 1}],
        "dict": {"a": 1, "gone": 2},
        "set": {1, 2},
        "deque": collections.deque([1], maxlen=3),
        "dd": collections.defaultdict(list, {"x": [1]}),
        "counter": collections.Counter("aab"),
        "bytes": bytearray(b"abc"),
        "tuple": (inner, 5),
    }
    saved = save({"v": live})
    parts = dict(live)
    inner.extend([7, 8])
    live["list"].append("extra")
    live["dict"].update(new=1, a=5)
    live["set"].add(9)
    live["deque"].extend([4, 5])
    live["dd"]["y"].append(2)
    live["counter"].update("zz")
    live["bytes"].extend(b"def")
    plan = saved.into({"v": live})
    assert plan.replaced == {}
    assert all(live[k] is parts[k] for k in live)
    assert live["list"][0] is inner
    assert live["list"] == [[1, 2], {"k": 1}]
    assert live["dict"] == {"a": 1, "gone": 2}
    assert live["set"] == {1, 2}
    assert live["deque"] == collections.deque([1])
    assert live["deque"].maxlen == 3
    assert live["dd"] == {"x": [1]}
    assert live["dd"]["fresh"] == []
    assert live["counter"] == collections.Counter("aab")
    assert live["bytes"] == b"abc"
    assert live["tuple"] is parts["tuple"]


def test_dict_order_is_restored(save):
    saved = save({"v": {"a": 1, "b": 2, "c": 3}})
    live = {"c": 0, "a": 0, "b": 0}
    saved.into({"v": live})
    assert list(live.items()) == [("a", 1), ("b", 2), ("c", 3)]


def test_keys_that_print_alike_keep_their_tensors(save):
    saved = save({"v": {1: np.ones(2), "1": np.zeros(2), "a/b": np.ones(1), "a": {"b": np.zeros(1)}}})
    back = saved.load()["v"]
    assert back[1].tolist() == [1, 1]
    assert back["1"].tolist() == [0, 0]
    assert back["a/b"].tolist() == [1]
    assert back["a"]["b"].tolist() == [0]


@pytest.mark.parametrize("key", ["a\nb", "e\u0301", "x" * 3000, "\ud800", "日本" * 600])
def test_names_are_made_storable(key, save):
    from holdfast.core.names import check_path

    saved = save({"v": {key: np.arange(3)}})
    assert check_path(saved.captured.tensors[0].spec.name)
    assert saved.load()["v"][key].tolist() == [0, 1, 2]


def test_defaultdict_of_a_known_factory_loads_as_one(save):
    back = save(
        {"a": collections.defaultdict(list, {1: [2]}), "b": collections.defaultdict(lambda: 3, {1: 2})}
    ).load()
    assert back["a"]["new"] == []
    assert dict(back["b"]) == {1: 2}
    with pytest.raises(KeyError):
        back["b"]["new"]


def test_dataclasses_are_restored_in_place(save):
    saved = save(
        {"c": Counters(3, 0.5, [1.0]), "f": Config(0.1, ["a"], Colour.BLUE), "s": Slotted(1, torch.ones(2))}
    )
    history: list[float] = [9.0, 9.0]
    live = {"c": Counters(0, None, history), "f": Config(0.2, []), "s": Slotted(0, torch.zeros(2))}
    before = dict(live)
    weight = live["s"].w
    plan = saved.into(live)
    assert live["c"] is before["c"]
    assert (live["c"].step, live["c"].best) == (3, 0.5)
    assert live["c"].history is history
    assert history == [1.0]
    assert plan.replaced["f"] == Config(0.1, ["a"], Colour.BLUE)
    assert live["s"].w is weight
    assert weight.tolist() == [1, 1]
    assert "c" not in plan.replaced


def test_frozen_dataclass_keeps_its_identity_when_its_parts_do(save):
    live = Config(0.1, ["a"])
    saved = save({"box": {"f": live}})
    box = {"f": live}
    live.tags.append("b")
    saved.into({"box": box})
    assert box["f"].tags == ["a"]
    assert box["f"].tags is live.tags


def test_dataclass_fields_are_checked(save):
    saved = save({"c": Counters(3)})
    saved.tree["c"].value["fields"]["other"] = 1
    del saved.tree["c"].value["fields"]["best"]
    live = Counters(7, 0.25)
    with pytest.raises(StateError) as e:
        saved.into({"c": live})
    assert "c/best: missing" in str(e.value)
    assert "c/other: unexpected" in str(e.value)
    plan = saved.into({"c": live}, missing=("c/best",), unexpected=("c/other",))
    assert live == Counters(3, 0.25)
    assert [p for p, _ in plan.report.missing] == ["c/best"]
    assert [p for p, _ in plan.report.unexpected] == ["c/other"]


def test_records_of_unknown_classes(save):
    back = save(
        {"c": Counters(3, None, [1.0]), "e": Colour.BLUE, "p": Point(1.0, 2), "s": {Colour.RED}}
    ).load()
    name = f"{__name__}.Counters"
    assert isinstance(back["c"], Record)
    assert back["c"].type.endswith("Counters"), name
    assert back["c"]["step"] == 3
    assert back["e"] == EnumMember(back["e"].type, "BLUE", "b")
    assert back["p"].fields == {"x": 1.0, "y": 2}
    assert next(iter(back["s"])).member == "RED"


def test_a_class_that_the_program_lacks_is_a_problem_before_anything_changes(save):
    @dataclasses.dataclass
    class Local:
        a: int = 1

    saved = save({"n": 5, "v": [Local()]})
    live = {"n": {"a": 1}, "v": [None]}
    with pytest.raises(StateError, match=r"v/0: a dataclass of class .*Local is stored"):
        saved.into({"n": 1, "v": live["v"]})
    saved.into({"n": 1, "v": [Local(7)]})


def test_enum_member_that_is_gone(save):
    saved = save({"e": Colour.RED})
    saved.tree["e"].value["member"] = "GREEN"
    with pytest.raises(StateError, match=r"e: expected a member of .*Colour.*'GREEN'"):
        saved.into({"e": Colour.BLUE})


def test_codec(save):
    register_codec(
        Money,
        "money",
        encode=lambda m: {"cents": m.cents, "a": np.arange(2)},
        decode=lambda v: Money(v["cents"]),
    )
    saved = save({"m": Money(5), "box": [Money(7)]})
    box: list[object] = [Money(1)]
    plan = saved.into({"m": Money(0), "box": box})
    assert plan.replaced["m"].cents == 5
    assert box[0].cents == 7
    assert saved.load()["m"].cents == 5
    with pytest.raises(StateError, match="money"):
        register_codec(Point, "money", encode=lambda p: p.x, decode=lambda v: Point(v, 0))


def test_codec_that_is_not_registered(save):
    class Other:
        pass

    register_codec(Other, "other", encode=lambda m: 1, decode=lambda v: Other())
    saved = save({"m": Other()})
    from holdfast.state import codecs

    codecs._by_class.pop(Other)
    codecs._by_name.pop("other")
    with pytest.raises(StateError, match="m: stored with the codec 'other', which is not registered"):
        saved.into({"m": None})
    assert saved.load()["m"] == Record("codec:other", {"value": 1})


def test_objects_with_state_dict(save):
    live = Stateful([1, {"a": 2}])
    saved = save({"o": live, "nested": {"x": [live]}})
    live.items.append(5)
    saved.into({"o": live, "nested": {"x": [live]}})
    assert live.items == [1, {"a": 2}]
    assert live.loaded == 2


def test_numpy_arrays_in_place(save):
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    big_endian = np.arange(4, dtype=">i2")
    saved = save({"v": {"a": a, "t": a.T, "rev": a[::-1], "be": big_endian, "empty": np.zeros((0, 2))}})
    live = {
        "a": np.zeros((2, 3), np.float32),
        "t": np.zeros((3, 2), np.float32),
        "rev": np.zeros((4, 3), np.float32)[::2],
        "be": np.zeros(4, ">i2"),
        "empty": np.zeros((0, 2)),
    }
    parts = dict(live)
    saved.into({"v": live})
    for name, want in (("a", a), ("t", a.T), ("rev", a[::-1]), ("be", big_endian)):
        assert live[name] is parts[name]
        assert live[name].tolist() == want.tolist()
    back = saved.load("numpy")["v"]
    assert back["t"].strides == a.T.strides
    assert back["rev"].tolist() == a[::-1].tolist()


def test_array_of_another_shape(save):
    saved = save({"v": {"a": np.arange(5.0)}, "l": [np.ones(2), np.ones(3)]})
    with pytest.raises(StateError, match=r"v/a: expected float64\[3\].*found float64\[5\].*unexpected="):
        saved.into({"v": {"a": np.zeros(3)}, "l": []})
    live = {"a": np.zeros(3)}
    saved.into({"v": live, "l": []}, unexpected=("v/a",))
    assert live["a"].tolist() == [0, 1, 2, 3, 4]
    live, grown = {"a": np.zeros(0)}, [np.zeros(7)]
    saved.into({"v": live, "l": grown})  # an empty array is a placeholder; a list of another length is data
    assert live["a"].size == 5
    assert [g.size for g in grown] == [2, 3]


def test_object_arrays_and_friends_are_refused(save):
    for bad in (
        np.array([None]),
        np.array(["a"]),
        np.array(["2020"], "M8[D]"),
        np.zeros(2, "i4,i4"),
        np.str_("x"),
    ):
        with pytest.raises(UnsupportedValue, match=r"^v/a: .*numpy"):
            save({"v": {"a": bad}})


def test_memory_shared_by_two_stored_arrays_gets_new_memory(save):
    saved = save({"v": [np.ones(2), np.zeros(2)]})
    shared = np.full(2, 7.0)
    live = [shared, shared]
    saved.into({"v": live})
    assert [a.tolist() for a in live] == [[1, 1], [0, 0]]
