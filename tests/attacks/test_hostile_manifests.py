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
    raw_seal,
    reseal,
    run,
)

import holdfast
from holdfast.catalog.history import History
from holdfast.core.errors import (
    DigestMismatch,
    IntegrityError,
    InvalidFormat,
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
    assert key not in [
        r for r in reads if not r.startswith(("run.json", "checkpoints/", "lease/", "tags/", "log/"))
    ]


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


@pytest.mark.parametrize("version", [0, 3, 10**50])
def test_a_manifest_of_another_version_is_refused_whatever_else_it_says(version: int) -> None:
    store = run()
    edit(store, KEY, lambda d: d.update(format=version, parts="something else"))
    check_refused(store, UnsupportedVersion)


def test_the_sound_document_resealed_is_sound() -> None:
    store = run()
    reseal(store, KEY, lambda b: b)
    edit(store, KEY, lambda d: None)
    assert check_only_ours(store) == 0


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
    edit(
        store,
        KEY,
        lambda d: [
            d["parts"][p].update(aliases=a) for p, a in (("a", {"a/w": "b/t"}), ("b", {"b/t": "a/x"}))
        ],
    )
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
def test_a_hostile_line_of_the_log_is_left_out_and_said_so(
    content: str, caplog: pytest.LogCaptureFixture
) -> None:
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
