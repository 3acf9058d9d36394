"""Value trees that a hostile writer sealed: nothing runs, nothing grows, nothing nests without an end."""

from __future__ import annotations

import contextlib

import pytest
from forge import bounded, check_refused, run, with_tree

import holdfast
from holdfast.core.errors import IntegrityError, StateError

DEEP = b"[" * 100_000 + b"]" * 100_000

TREES = {
    "nesting": DEEP,
    "nesting of objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "nesting beyond what is written": b"[" * 250 + b"]" * 250,
    "nesting of tuples": b'{"$tuple":[' * 250 + b"]}" * 250,
    "a key twice": b'{"w":1,"w":{"$tensor":["a/w","numpy.ndarray"]}}',
    "an unknown type": b'{"w":{"$pickle":"gASVIAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAhlY2hvIHB3bpSFlFKULg=="}}',
    "a type that is mixed with data": b'{"$tensor":["a/w","numpy.ndarray"],"b":1}',
    "a tensor outside its part": b'{"w":{"$tensor":["nowhere/w","numpy.ndarray"]}}',
    "a tensor that no file holds": b'{"w":{"$tensor":["a/nothing","numpy.ndarray"]}}',
    "a tensor with a control character": b'{"w":{"$tensor":["a/w\\u0000","numpy.ndarray"]}}',
    "a tensor that is a path": b'{"w":{"$tensor":["../../etc/passwd","numpy.ndarray"]}}',
    "a short leaf that no file holds": b'{"nothing":{"$t":"n"}}',
    "a short leaf of an unknown kind": b'{"w":{"$t":"z"}}',
    "a short leaf whose kind is in full": b'{"w":{"$t":"numpy.ndarray"}}',
    "a short leaf that is no text": b'{"w":{"$t":["n"]}}',
    "a short leaf with a name": b'{"w":{"$t":"n","name":"a/w"}}',
    "a short leaf at a path with a control character": b'{"w\\u0000":{"$t":"n"}}',
    "a short leaf at a path in another normal form": '{"e\N{COMBINING ACUTE ACCENT}":{"$t":"n"}}'.encode(),
    "a short leaf at an endless path": b'{"' + b"w" * 2000 + b'":{"$t":"n"}}',
    "a short leaf in a set": b'{"w":{"$set":[{"$t":"n"}]}}',
    "a fraction of a billion digits": b'{"w":{"$fraction":["1e1000000000"]}}',
    "a fraction of a huge decimal": b'{"w":{"$fraction":[{"$decimal":"1e999999"},1]}}',
    "a decimal with an endless exponent": b'{"w":{"$decimal":"1e' + b"9" * 50 + b'"}}',
    "a division by zero": b'{"w":{"$fraction":[1,0]}}',
    "an integer of words": b'{"w":{"$int":"__import__"}}',
    "a date that is none": b'{"w":{"$datetime":"2024-13-45T99:99:99"}}',
    "a time span out of range": b'{"w":{"$timedelta":[99999999999999,0,0]}}',
    "a set of lists": b'{"w":{"$set":[[1],[2]]}}',
    "keys that cannot be keys": b'{"w":{"$dict":[[{"$set":[1]},2]]}}',
    "a huge number": b'{"w":' + b"7" * 100_000 + b"}",
    "not a number": b'{"w":NaN}',
    "half a pair": b'{"w":{"$dict":[[1]]}}',
    "a deque shorter than what it holds": b'{"w":{"$deque":[[1,2,3],1]}}',
}


@pytest.mark.parametrize("attack", TREES)
def test_a_hostile_value_tree_is_refused(attack: str) -> None:
    store = run()
    with_tree(store, TREES[attack])
    check_refused(store, IntegrityError)


def test_a_long_path_is_not_copied_for_each_of_many_values() -> None:
    store = run()
    with_tree(store, b'{"' + b"w" * 2_000_000 + b'":[' + b"[]," * 500_000 + b"1]}")
    with bounded():
        assert len(holdfast.load(store, step=2, as_="numpy")["a"]["w" * 2_000_000]) == 500_001


def test_huge_but_honest_values_stay_what_they_are() -> None:
    """A range is not rolled out, a decimal is not written out, a large integer takes the room it needs."""
    store = run()
    with_tree(
        store,
        b'{"r":{"$range":[0,{"$int":"0x' + b"f" * 400 + b'"},1]},"d":{"$decimal":"1E+999999"},'
        b'"i":{"$int":"0x'
        + b"f" * 100_000
        + b'"},"s":{"$slice":[null,{"$int":"0xfffffffffffffffff"},null]}}',
    )
    with bounded():
        values = holdfast.load(store, step=2, as_="numpy")["a"]
    assert values["r"][-1] == int("f" * 400, 16) - 1  # type: ignore[index]
    assert values["i"].bit_length() == 400_000  # type: ignore[index]
    assert values["d"].adjusted() == 999_999  # type: ignore[index]


ODD_TYPES = [
    b'["torch.dtype","__class__"]', b'["torch.dtype",5]', b'["torch.device","nowhere:99"]', b'["torch.Size",[-1,"x"]]',
    b'["torch.layout",{"a":1}]', b'["numpy.dtype","O"]', b'["numpy.dtype","garbage"]', b'["numpy.dtype",[1]]',
    b'["numpy.scalar",["float32",{"$bytes":"AA=="}]]', b'["numpy.scalar",5]', b'["enum",{"type":"os.system","member":"x"}]',
    b'["enum",7]', b'["dataclass",{"type":"subprocess.Popen","fields":{"args":"echo"}}]', b'["dataclass",[]]',
    b'["namedtuple",{"type":"os.stat_result"}]', b'["codec:evil",1]', b'["builtins.eval","1"]', b'["defaultdict",{}]',
    b'["defaultdict",{"factory":"eval","items":{}}]', b'["pathlib.Path",5]', b'["numpy.Generator",{}]', b'["",null]',
    b'["random.Random",{}]', b'["torch.Generator",{}]', b'["numpy.RandomState",{"state":1}]',
]  # fmt: skip


@pytest.mark.parametrize("typed", ODD_TYPES)
@pytest.mark.parametrize("as_", ["numpy", "torch"])
def test_a_named_type_with_a_strange_value_runs_nothing(typed: bytes, as_: str) -> None:
    """It comes back as a plain record, or is refused; either way by no foreign exception."""
    store = run()
    with_tree(store, b'{"w":{"$typed":' + typed + b"}}")
    with bounded():
        with contextlib.suppress(IntegrityError, StateError):
            holdfast.load(store, step=2, as_=as_)  # type: ignore[call-overload]
