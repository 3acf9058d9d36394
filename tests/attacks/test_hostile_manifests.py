"""Manifests, value trees and small documents that a hostile writer sealed."""

from __future__ import annotations

import msgspec
import pytest
from forge import (
    MANIFESTS,
    body_of,
    bounded,
    check_only_ours,
    check_refused,
    edit,
    every_way_to_read,
    file_entry,
    put,
    reseal,
    run,
    with_tree,
)

import holdfast
from holdfast.catalog.history import History
from holdfast.core.errors import (
    DigestMismatch,
    HoldfastError,
    IntegrityError,
    InvalidFormat,
    StateError,
    UnsupportedVersion,
)
from holdfast.format.sealed import seal
from holdfast.stores import MemoryStore

KEY = MANIFESTS[2]
DEEP = b"[" * 100_000 + b"]" * 100_000


# ---- where files may lie --------------------------------------------------------------------------------------------

ELSEWHERE = [
    "../secret", "data/../../secret", "data/../run.json", "/etc/passwd", "//etc/passwd", "file:///etc/passwd", "run.json",
    "checkpoints/000000000001.json", "lease/000000000001.json", "data", "data/", "data//x", "data/./x", "data\\..\\x",
    "data/a\u0000b", "data/a\nb", "data/ x", "data/~", "data/.ssh", "data/" + "x" * 300, "DATA/x", "data/\u202e",
]  # fmt: skip


@pytest.mark.parametrize("key", ELSEWHERE)
def test_a_manifest_may_not_lead_out_of_the_data(key: str) -> None:
    store = run()
    reads: list[str] = []
    read, read_into = store.read, store.read_into
    store.read = lambda k, *a: reads.append(k) or read(k, *a)  # type: ignore[func-returns-value, method-assign]
    store.read_into = lambda k, *a: reads.append(k) or read_into(k, *a)  # type: ignore[func-returns-value, method-assign]
    edit(store, KEY, lambda d: file_entry(d, "a").update(key=key))
    check_refused(store, InvalidFormat)
    assert key not in [r for r in reads if not r.startswith(("run.json", "checkpoints/", "lease/", "tags/", "log/"))]


FILES = {
    "a header of no bytes": {"header_size": 0},
    "a header that is longer than the file": {"header_size": 10**6},
    "a header of an exabyte": {"header_size": 2**60, "size": 2**61},
    "a negative size": {"size": -1},
    "a file of an exabyte": {"size": 2**60},
    "a file of an unthinkable size": {"size": 10**100},
    "another header size": {"header_size": 4095},
    "a digest that is none": {"header_digest": "x" * 64},
    "a digest of another length": {"header_digest": "00"},
    "a wrong digest": {"header_digest": "00" * 32},
}


@pytest.mark.parametrize("attack", FILES)
def test_a_file_entry_that_lies_is_refused(attack: str) -> None:
    store = run()
    edit(store, KEY, lambda d: file_entry(d, "a").update(FILES[attack]))
    check_refused(store, IntegrityError)


# ---- the document ---------------------------------------------------------------------------------------------------

DOCUMENTS = {
    "the step of another": lambda b: b.replace(b'"step":2', b'"step":1'),
    "a step twice": lambda b: b.replace(b'"step":2', b'"step":1,"step":2'),
    "a part twice": lambda b: b.replace(b'"parts":{"a":{', b'"parts":{"a":{},"a":{'),
    "parts twice": lambda b: b.replace(b'"parts":{', b'"parts":{},"parts":{'),
    "an unknown field": lambda b: b[:-1] + b',"exec":"import os"}',
    "nesting": lambda b: b.replace(b'"metrics":{', b'"metrics":{"deep":' + DEEP + b","),
    "nesting of parts": lambda b: b.replace(b'"parts":{', b'"parts":{"deep":' + DEEP + b","),
    "not a number": lambda b: b.replace(b'"loss":0.5', b'"loss":NaN'),
    "infinity": lambda b: b.replace(b'"loss":0.5', b'"loss":Infinity'),
    "beyond infinity": lambda b: b.replace(b'"loss":0.5', b'"loss":1e999'),
    "a huge number": lambda b: b.replace(b'"step":2', b'"step":' + b"9" * 100_000),
    "bytes that are no text": lambda b: b.replace(b'"loss"', b'"l\xffss"'),
    "bytes that are no text in a tree": lambda b: b.replace(b'"hello"', b'"\xff\xfe"'),
    "a part with a control character": lambda b: b.replace(b'"b":{"tree"', b'"b\\u0000":{"tree"'),
    "a part without a name": lambda b: b.replace(b'"b":{"tree"', b'"":{"tree"'),
    "an array": lambda b: b"[1]",
    "cut off": lambda b: b[:-2],
    "parts that are none": lambda b: b.replace(b'"parts":{', b'"parts":[],"x":{'),
    "a clock of three": lambda b: b.replace(b'"clock":[2,0,0,0,0.0]', b'"clock":[2,0,0]'),
    "a string for a list": lambda b: b.replace(b'"reasons":["asked for"]', b'"reasons":"asked for"'),
}


@pytest.mark.parametrize("attack", DOCUMENTS)
def test_a_hostile_manifest_is_refused(attack: str) -> None:
    store = run()
    before = body_of(store, KEY)
    after = DOCUMENTS[attack](before)
    assert after != before
    put(store, KEY, raw_seal(after))
    check_refused(store, InvalidFormat)


def raw_seal(body: bytes) -> bytes:
    """Seal what `seal` would refuse to seal."""
    import blake3

    head = body[:-1]
    return head + b',"digest":"' + blake3.blake3(head).hexdigest().encode() + b'"}\n'


@pytest.mark.parametrize("version", [0, 2, 10**50])
def test_a_manifest_of_another_version_is_refused_whatever_else_it_says(version: int) -> None:
    store = run()
    edit(store, KEY, lambda d: d.update(format=version, parts="something else"))
    check_refused(store, UnsupportedVersion)


def test_the_sound_document_resealed_is_sound() -> None:
    store = run()
    reseal(store, KEY, lambda b: b)
    edit(store, KEY, lambda d: None)
    assert check_only_ours(store) == 0


# ---- values ---------------------------------------------------------------------------------------------------------

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


def test_huge_but_honest_values_stay_what_they_are() -> None:
    """A range is not rolled out, a decimal is not written out, a large integer takes the room it needs."""
    store = run()
    with_tree(
        store,
        b'{"r":{"$range":[0,{"$int":"0x' + b"f" * 400 + b'"},1]},"d":{"$decimal":"1E+999999"},'
        b'"i":{"$int":"0x' + b"f" * 100_000 + b'"},"s":{"$slice":[null,{"$int":"0xfffffffffffffffff"},null]}}',
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
        try:
            holdfast.load(store, step=2, as_=as_)  # type: ignore[call-overload]
        except HoldfastError as e:
            assert isinstance(e, (IntegrityError, StateError))


# ---- ties -----------------------------------------------------------------------------------------------------------

ALIASES = {
    "to nothing": {"a/w": "a/ghost"},
    "to itself": {"a/w": "a/w"},
    "in a circle": {"a/w": "a/x", "a/x": "a/w"},
    "to another part": {"a/w": "b/large"},
    "out of every part": {"a/w": "zzz"},
    "of a name that does not occur": {"a/ghost": "a/w"},
    "to a path": {"a/w": "../x"},
}


@pytest.mark.parametrize("attack", ALIASES)
def test_strange_ties_end(attack: str) -> None:
    store = run()
    edit(store, KEY, lambda d: d["parts"]["a"].update(aliases=ALIASES[attack]))
    failed = check_only_ours(store)
    if "circle" in attack or "itself" in attack or "nothing" in attack or "every part" in attack:
        assert failed


def test_a_tie_may_not_lead_to_another_tie_of_another_part() -> None:
    store = run()
    edit(store, KEY, lambda d: [d["parts"][p].update(aliases=a) for p, a in (("a", {"a/w": "b/t"}), ("b", {"b/t": "a/x"}))])
    check_refused(store, InvalidFormat)


# ---- other documents ------------------------------------------------------------------------------------------------

SEALED = {
    "deep": b'{"a":' + DEEP + b"}", "no text": b'{"a":"\xff"}', "numbers": b'{"format":1,"run":5,"step":"x"}', "other": b'{"a":1}',
}  # fmt: skip
SMALL = {"lease": "lease/000000000002.json", "run.json": "run.json"}


@pytest.mark.parametrize("content", SEALED)
@pytest.mark.parametrize("document", SMALL)
def test_a_hostile_small_document_is_refused(document: str, content: str) -> None:
    store = run()
    for info in store.list("lease"):
        store.delete([info.key])
    put(store, SMALL[document], seal(SEALED[content]))
    with bounded(), pytest.raises(IntegrityError):
        run_of = holdfast.Run(store)
        run_of.records()
        _ = run_of.writer


@pytest.mark.parametrize("content", SEALED)
def test_a_hostile_tag_is_left_out_and_remembered(content: str) -> None:
    store = run()
    put(store, "tags/t1.json", seal(SEALED[content]))
    history = History(store)
    history.refresh()
    with bounded():
        assert list(history.tags()) == ["t2"]
    assert "tags/t1.json" in history.broken_tags[0]


@pytest.mark.parametrize("content", SEALED)
def test_a_hostile_line_of_the_log_is_left_out_and_said_so(content: str, caplog: pytest.LogCaptureFixture) -> None:
    store = run()
    before = holdfast.Run(store).events()
    put(store, "log/evil-000000.jsonl", seal(SEALED[content], 16))
    with bounded():
        assert holdfast.Run(store).events() == before
    assert "log/evil-000000.jsonl, line 1" in caplog.text


# ---- bytes that were moved ------------------------------------------------------------------------------------------


def data_keys(store: MemoryStore, step: int) -> list[str]:
    document = msgspec.json.decode(body_of(store, MANIFESTS[step]))
    return [file_entry(document, part)["key"] for part in ("a", "b")]


def test_data_files_swapped_between_checkpoints_are_refused() -> None:
    store = run()
    for one, two in zip(data_keys(store, 1), data_keys(store, 2), strict=True):
        raw = store.read(one), store.read(two)
        put(store, one, raw[1])
        put(store, two, raw[0])
    for step in (1, 2):
        for act in ("load", "look", "into"):
            with pytest.raises(DigestMismatch):
                every_way_to_read(store, step)[act]()


def test_data_files_swapped_within_a_checkpoint_are_refused() -> None:
    store = run()
    one, two = data_keys(store, 2)
    raw = store.read(one), store.read(two)
    put(store, one, raw[1])
    put(store, two, raw[0])
    check_refused(store, IntegrityError)


def test_swapped_manifests_are_refused_and_old_ones_do_not_pass_for_new() -> None:
    store = run()
    raw = store.read(MANIFESTS[1]), store.read(MANIFESTS[2])
    put(store, MANIFESTS[2], raw[0])  # the older one, replayed under the newer name
    check_refused(store, InvalidFormat)
    put(store, MANIFESTS[1], raw[1])
    assert set(holdfast.Run(store).broken) == {1, 2}


def test_an_older_file_replayed_under_a_newer_name_is_refused() -> None:
    store = run()
    old, new = data_keys(store, 1)[1], data_keys(store, 2)[1]
    assert store.info(old).size == store.info(new).size
    put(store, new, store.read(old))
    check_refused(store, DigestMismatch)


def test_blocks_swapped_between_files_are_refused() -> None:
    store = run()
    old, new = data_keys(store, 1)[1], data_keys(store, 2)[1]
    raw = store.read(new)
    put(store, new, raw[:4096] + store.read(old)[4096:])
    check_refused(store, DigestMismatch)
