"""Checkpoints of several ranks that a hostile writer sealed: parts of ranks that are none, values that are no values,
boxes that do not make a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import pytest
from forge import MANIFESTS, bounded, edit

import holdfast
from distributed.side_by_side import side_by_side, values
from holdfast import every
from holdfast.catalog.ranks import view_of
from holdfast.core.errors import HoldfastError, IntegrityError, InvalidFormat
from holdfast.format.datafile import StoredTensor, lay_out
from holdfast.format.manifest import Manifest, decode_manifest
from holdfast.restoring.reader import Reader
from holdfast.saving.image import Image, PartImage
from holdfast.saving.persist import KnownTensors, persist_parts
from holdfast.stores import MemoryStore

KEY = MANIFESTS[2]
NOTHING = msgspec.Raw(b"null")
W = np.arange(12, dtype=np.float64).reshape(4, 3)


def run() -> MemoryStore:
    """A sound run of two ranks: `m` is the same on both, `o` is each one's own."""
    store = MemoryStore("hostile")

    def body(rank: int) -> None:
        state = {"m": {"w": W.copy()}, "o": {"u": np.full(3, float(rank)), "rank": rank}}
        with holdfast.Checkpointer(
            store, state, ranks=(rank, 2, 30), replicated=["m/**"], writer="thread", save=every(steps=1)
        ) as ckpt:
            for _ in ckpt.steps(2):
                pass

    values(side_by_side(2, body))
    return store


SOUND = run()


def copied() -> MemoryStore:
    store = MemoryStore("hostile")
    for o in (entry for prefix in ("checkpoints", "data", "log") for entry in SOUND.list(prefix)):
        store.write(o.key, [SOUND.read(o.key)])
    store.write("run.json", [SOUND.read("run.json")])
    return store


def manifest_of(store: MemoryStore) -> Manifest:
    return decode_manifest(store.read(KEY), KEY)


def seen_by(store: MemoryStore, rank: int, world: int) -> dict[str, bytes]:
    """Everything that a rank of so many finds."""
    view = view_of(store, manifest_of(store), rank, world)
    reader = Reader(store, view.manifest, own=view.own)
    return {name: bytes(t.data) for name, t in reader.read(list(reader.specs)).items()}


WAYS = {
    "rank 0": lambda store: seen_by(store, 0, 2),
    "rank 1": lambda store: seen_by(store, 1, 2),
    "rank 2 of 3": lambda store: seen_by(store, 2, 3),
    "alone": lambda store: holdfast.load(store, step=2, as_="numpy"),
    "verify": lambda store: [problem.message for problem in holdfast.open(store, 2).verify()],
}


def refused_by(store: MemoryStore, ways: Sequence[str] = tuple(WAYS)) -> dict[str, str]:
    """Return what says no, and how. Nothing but our own errors comes out, and step 1 is as sound as before."""
    said: dict[str, str] = {}
    with bounded():
        for way in ways:
            try:
                found = WAYS[way](store)
                if way == "verify" and found:
                    said[way] = "; ".join(found)
                elif way != "verify":
                    w = found["m"]["w"].tobytes() if way == "alone" else found["m/w"]
                    assert w == W.tobytes()
            except HoldfastError as e:
                said[way] = str(e)
        assert holdfast.load(store, step=1, as_="numpy")["m"]["w"].tobytes() == W.tobytes()
    return said


def with_own(
    store: MemoryStore, held: Mapping[str, bytes], *, kind: str = "rank", dtype: str = "uint8"
) -> None:
    """Put a file with these tensors in the place of what rank 1 has for itself."""
    tensors = [StoredTensor(name, dtype, (len(raw),), None, 0, 0) for name, raw in held.items()]
    image = Image(
        {"~1": PartImage(NOTHING, "rank", {}, lay_out(tensors), memoryview(b"".join(held.values())), 0)}
    )
    files = persist_parts(store, 2, "beef", image, KnownTensors())[0]["~1"].files
    edit(store, KEY, lambda d: d["parts"]["~1"].update(files=msgspec.to_builtins(files), kind=kind))


def test_the_run_is_sound_before() -> None:
    assert refused_by(copied()) == {}
    assert seen_by(SOUND, 1, 2)["o/u"] == np.full(3, 1.0).tobytes()


VALUES = {
    "nothing": b"",
    "null": b"null",
    "an array": b"[]",
    "no tree": b"{}",
    "no text": b'{"tree":"\xff\xfe"}',
    "an unknown member": b'{"tree":null,"exec":"import os"}',
    "a member twice": b'{"tree":null,"tree":{"w":1}}',
    "ties twice": b'{"tree":null,"aliases":{"m/a":"m/w"},"aliases":{"m/b":"m/w"}}',
    "spaces": b'{"tree": null}',
    "what follows": b'{"tree":null} {}',
    "a number for a flag": b'{"tree":null,"apart":1}',
    "nesting": b'{"tree":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a key twice in the tree": b'{"tree":{"w":1,"w":2}}',
    "an unknown type in the tree": b'{"tree":{"$exec":"import os"}}',
    "a tensor of nobody": b'{"tree":{"x":{"$tensor":["m/nobody","numpy.ndarray"]}}}',
    "a tensor of no part": b'{"tree":{"x":{"$tensor":["elsewhere/w","numpy.ndarray"]}}}',
    "a tensor of a rank": b'{"tree":{"x":{"$tensor":["~1/m/w","numpy.ndarray"]}}}',
    "itself": b'{"tree":{"x":{"$tensor":["~/m","numpy.ndarray"]}}}',
    "a tie to itself": b'{"tree":{"w":{"$t":"n"}},"aliases":{"m/w":"m/w"}}',
    "ties in a circle": b'{"tree":{"w":{"$t":"n"}},"aliases":{"m/w":"m/v","m/v":"m/w"}}',
}


@pytest.mark.parametrize("attack", VALUES)
def test_values_of_a_rank_that_are_none_are_refused(attack: str) -> None:
    store = copied()
    with_own(store, {"~/m": VALUES[attack]})
    said = refused_by(store, ("rank 0", "rank 1", "alone", "verify"))
    assert "rank 1" in said
    assert "alone" not in said  # who does not look at them need not care
    if attack not in ("a tie to itself", "ties in a circle"):
        assert "verify" in said


def test_ties_in_a_circle_over_several_parts_are_refused() -> None:
    store = copied()
    with_own(store, {
        "~/m": b'{"tree":{"w":{"$t":"n"}},"aliases":{"m/w":"o/u"}}',
        "~/o": b'{"tree":{"u":{"$t":"n"}},"aliases":{"o/u":"m/w"}}',
    })  # fmt: skip
    assert "tied" in refused_by(store)["rank 1"]


NAMES = {"no part": "~/", "a rank's part": "~/~1", "a control character": "~/a\u0085"}


@pytest.mark.parametrize("attack", NAMES)
def test_values_under_a_name_that_is_none_are_refused(attack: str) -> None:
    store = copied()
    try:
        with_own(store, {NAMES[attack]: b'{"tree":null}'})
    except InvalidFormat:  # not even a hostile writer can make the file with our own hands
        return
    assert "rank 1" in refused_by(store)


def test_values_that_are_not_a_row_of_bytes_are_refused() -> None:
    store = copied()
    with_own(store, {"~/m": b'{"tree":null}   '[:13]}, dtype="bool")
    assert "row of bytes" in refused_by(store)["rank 1"]


def test_values_of_parts_of_others_name_their_tensors_and_no_more() -> None:
    """Whatever tree a rank has, what it names is what is stored under that name."""
    store = copied()
    with_own(store, {"~/m": b'{"tree":{"w":{"$t":"n"},"x":{"$tensor":["o/u","numpy.ndarray"]}}}'})
    found = seen_by(store, 1, 2)
    assert found["m/w"] == W.tobytes()
    assert found["o/u"] == np.full(3, 0.0).tobytes()  # rank 0's: rank 1's own is gone with its file


def test_what_is_gone_is_looked_for_where_all_have_it() -> None:
    store = copied()
    with_own(store, {"m/w": bytes(range(96)), "~/m": b'{"tree":{"w":{"$t":"n"}},"gone":["m/w","x/y",""]}'})
    assert refused_by(store) == {}


def _part(d: dict, name: str, **what: object) -> None:
    d["parts"][name] = {"tree": None, **what}


PARTS = {
    "a rank beyond the world": lambda d: _part(d, "~2", kind="rank"),
    "a giant rank": lambda d: _part(d, "~99999999999", kind="rank apart"),
    "a rank of a thousand digits": lambda d: _part(d, "~" + "9" * 1000, kind="rank apart"),
    "rank 0": lambda d: _part(d, "~0", kind="rank"),
    "another form of rank 1": lambda d: _part(d, "~01", kind="rank"),
    "rank 1 in other digits": lambda d: _part(d, "~\uff11", kind="rank"),
    "a part of the state": lambda d: d["parts"]["m"].update(kind="rank"),
    "a part of the state apart": lambda d: d["parts"]["m"].update(kind="rank apart"),
    "values for a rank": lambda d: d["parts"]["~1"].update(kind="values"),
    "a tree": lambda d: d["parts"]["~1"].update(tree={"x": 1}),
    "ties": lambda d: d["parts"]["~1"].update(aliases={"m/x": "m/w"}),
    "elsewhere with a tree": lambda d: _part(d, "e", kind="elsewhere", tree={"x": 1}),
    "elsewhere with ties": lambda d: _part(d, "e", kind="elsewhere", aliases={"e/x": "m/w"}),
    "one rank": lambda d: d.update(world_size=1),
    "no rank": lambda d: d.update(world_size=0),
}


@pytest.mark.parametrize("attack", PARTS)
def test_parts_that_do_not_match_the_number_of_ranks_are_refused(attack: str) -> None:
    store = copied()
    edit(store, KEY, PARTS[attack])
    assert set(refused_by(store)) == set(WAYS)


def test_a_giant_world_costs_nothing() -> None:
    store = copied()
    edit(store, KEY, lambda d: d.update(world_size=10**15))
    assert refused_by(store) == {}


def test_a_part_elsewhere_alone_is_no_part_of_the_state() -> None:
    store = copied()
    edit(store, KEY, lambda d: _part(d, "e", kind="elsewhere"))
    assert refused_by(store) == {}
    assert "e" not in holdfast.load(store, step=2, as_="numpy")


def test_a_key_that_looks_like_a_rank_is_a_key_in_one_process_and_refused_in_several() -> None:
    store = MemoryStore("keys")
    holdfast.save(store, {"~1": {"x": np.ones(2)}, "~": 3}, step=1)
    found = holdfast.load(store, as_="numpy")
    assert found["~"] == 3
    assert found["~1"]["x"].tolist() == [1, 1]
    assert list(holdfast.Run(store).latest.verify()) == []

    def body(rank: int) -> None:
        with holdfast.Checkpointer(
            MemoryStore("several") if rank else store,
            {"~1": {"x": np.ones(2)}},
            ranks=(rank, 2, 1),
            writer="inline",
        ) as ckpt:
            ckpt.save()

    assert all(isinstance(end.error, HoldfastError) for end in side_by_side(2, body))


# ---- boxes ----------------------------------------------------------------------------------------------------------


def with_boxes(
    store: MemoryStore, *boxes: tuple[Sequence[int], Sequence[int], Sequence[int], float, str]
) -> None:
    """Put files with (offsets, shape, whole shape, value, type) in the place of those of `m`, in this order."""
    files = []
    for number, (offsets, shape, whole, value, dtype) in enumerate(boxes):
        data = np.full(shape, value, dtype).tobytes()
        t = StoredTensor("w", dtype, tuple(shape), None, 0, 0, (tuple(offsets), tuple(whole)))
        image = Image({"m": PartImage(NOTHING, "values", {}, lay_out([t]), memoryview(data), 0)})
        written = persist_parts(store, 2, f"b0{number}", image, KnownTensors(), mark=f"-{number}")
        files += msgspec.to_builtins(written[0]["m"].files)
    edit(store, KEY, lambda d: d["parts"]["m"].update(files=files))


BOXES = {
    "a gap": [((0, 0), (2, 3), (4, 3), 1, "float64"), ((3, 0), (1, 3), (4, 3), 2, "float64")],
    "a corner is missing": [((0, 0), (4, 2), (4, 3), 1, "float64"), ((1, 2), (3, 1), (4, 3), 2, "float64")],
    "nothing but an empty one": [((0, 0), (0, 3), (4, 3), 1, "float64")],
    "other wholes": [((0, 0), (2, 3), (4, 3), 1, "float64"), ((2, 0), (2, 3), (5, 3), 2, "float64")],
    "another whole of equal size": [
        ((0, 0), (2, 3), (4, 3), 1, "float64"),
        ((0, 2), (3, 2), (3, 4), 2, "float64"),
    ],
    "other types": [((0, 0), (2, 3), (4, 3), 1, "float64"), ((2, 0), (2, 3), (4, 3), 2, "int64")],
}


@pytest.mark.parametrize("attack", BOXES)
def test_boxes_that_make_no_tensor_are_refused(attack: str) -> None:
    store = copied()
    with_boxes(store, *BOXES[attack])
    said = refused_by(store)
    assert set(said) == set(WAYS)
    assert all("m/w" in words for words in said.values())


def test_of_boxes_that_overlap_the_first_listed_has_the_last_word() -> None:
    store = copied()
    with_boxes(
        store,
        ((1, 0), (2, 3), (4, 3), 1, "float64"),
        ((0, 1), (4, 2), (4, 3), 2, "float64"),
        ((0, 0), (4, 3), (4, 3), 3, "float64"),
    )
    expected = np.full((4, 3), 3.0)
    expected[0:4, 1:3] = 2
    expected[1:3, 0:3] = 1
    for rank in (0, 1):
        assert seen_by(store, rank, 2)["m/w"] == expected.tobytes()
    assert holdfast.load(store, step=2, as_="numpy")["m"]["w"].tolist() == expected.tolist()
    assert list(holdfast.open(store, 2).verify()) == []


def test_a_box_lies_in_its_whole() -> None:
    store = copied()
    with_boxes(store, ((3, 0), (2, 3), (4, 3), 1, "float64"))
    with pytest.raises(IntegrityError):
        seen_by(store, 0, 2)
