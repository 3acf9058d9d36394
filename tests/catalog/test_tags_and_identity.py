"""Tags, run.json and the history: small sealed documents, each refused by name when it is not what it should be."""

from __future__ import annotations

import msgspec
import pytest
from manifests import data_key, manifest, put

from holdfast.catalog.checkpoints import entries
from holdfast.catalog.history import History
from holdfast.catalog.identity import create_run, read_identity
from holdfast.catalog.keys import RUN, tag_key
from holdfast.catalog.runlog import LogWriter
from holdfast.catalog.tags import Tag, delete_tag, read_tags, set_tag
from holdfast.catalog.trash import Leaving, retire
from holdfast.core.errors import (
    DigestMismatch,
    IntegrityError,
    InvalidFormat,
    NoCheckpoint,
    NotARun,
    PolicyError,
    UnsupportedVersion,
)
from holdfast.format.events import Observed, Resumed, Verified
from holdfast.format.sealed import seal
from holdfast.stores import MemoryStore
from holdfast.testing.stores import at_once


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore("tagged")


# ---- tags -----------------------------------------------------------------------------------------------------------


def test_tags_are_set_moved_and_removed(store: MemoryStore) -> None:
    assert read_tags(store) == {}
    set_tag(store, Tag("best", 3, "aa", 1.0, automatic=True))
    set_tag(store, Tag("v1.0-rc_2", 4, "bb", 2.0))
    set_tag(store, Tag("best", 5, "cc", 3.0))
    assert read_tags(store) == {
        "best": Tag("best", 5, "cc", 3.0),
        "v1.0-rc_2": Tag("v1.0-rc_2", 4, "bb", 2.0),
    }
    delete_tag(store, "best")
    delete_tag(store, "best")
    assert list(read_tags(store)) == ["v1.0-rc_2"]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "-a", "a b", "é", "a" * 129, "a\n", "../../run"])
def test_tags_with_other_names_are_refused(store: MemoryStore, name: str) -> None:
    with pytest.raises(PolicyError):
        set_tag(store, Tag(name, 3, "aa", 1.0))
    with pytest.raises(PolicyError):
        delete_tag(store, name)
    assert store.list("") == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"tag":"best"}', b'{"tag":"best","step":"3","attempt":"aa","time":1.0}',
        b'{"tag":"../x","step":3,"attempt":"aa","time":1.0}', b'{"tag":"other","step":3,"attempt":"aa","time":1.0}',
        b'{"tag":"best","step":3,"attempt":"aa","time":1.0,"more":1}', b'{"tag":"best","step":3,"attempt":"\xff","time":1.0}',
        b'{"tag":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)  # fmt: skip
def test_a_tag_file_outside_the_grammar_is_refused_by_its_key(store: MemoryStore, body: bytes) -> None:
    store.replace(tag_key("best"), seal(body))
    with pytest.raises(InvalidFormat, match=r"tags/best\.json"):
        read_tags(store)


def test_a_flipped_bit_in_a_tag_is_refused(store: MemoryStore) -> None:
    set_tag(store, Tag("best", 3, "aa", 1.0))
    store.replace(tag_key("best"), store.read(tag_key("best")).replace(b'"step":3', b'"step":2'))
    with pytest.raises(DigestMismatch):
        read_tags(store)


def test_a_tag_whose_checkpoint_was_replaced_points_to_nothing(store: MemoryStore) -> None:
    put(store, manifest(3, "aa"), manifest(4, "bb"))
    for name, step, attempt in (("right", 3, "aa"), ("replaced", 4, "aa"), ("gone", 9, "aa")):
        set_tag(store, Tag(name, step, attempt, 1.0))
    history = History(store)
    history.refresh()
    assert list(history.tags()) == ["right"]


# ---- run.json -------------------------------------------------------------------------------------------------------


def test_a_place_is_a_run_once_it_was_made_one(store: MemoryStore) -> None:
    with pytest.raises(NotARun, match=r"memory://tagged is not a holdfast run: it has no run\.json"):
        read_identity(store)
    made = create_run(store, 5.0)
    assert (made.format, made.created) == (1, 5.0)
    assert read_identity(store) == made == create_run(store, 6.0)


def test_rivals_make_one_run(store: MemoryStore) -> None:
    made = at_once([lambda: create_run(store, 1.0)] * 8)
    assert len({identity.run for identity in made}) == 1  # type: ignore[attr-defined]


def test_a_run_of_a_later_format_is_refused_and_left_alone(store: MemoryStore) -> None:
    raw = seal(b'{"format":2,"run":"r","created":1.0,"invented":"later"}')
    store.create(RUN, raw)
    for act in (lambda: read_identity(store), lambda: create_run(store, 1.0)):
        with pytest.raises(UnsupportedVersion, match="pip install --upgrade holdfast"):
            act()
    assert store.read(RUN) == raw


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{}", b'{"format":1}\n', seal(b'{"format":1}'), seal(b'{"run":"r","created":1.0}'),
        seal(b'{"format":1,"run":"\xff","created":1.0}'), seal(b'{"format":1,"run":"r","created":"x"}'),
        seal(b'{"format":1,"run":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ],
)  # fmt: skip
def test_a_broken_run_json_is_refused(store: MemoryStore, raw: bytes) -> None:
    store.create(RUN, raw)
    with pytest.raises(IntegrityError, match=r"run\.json"):
        read_identity(store)
    with pytest.raises(IntegrityError):
        create_run(store, 1.0)


# ---- the history ----------------------------------------------------------------------------------------------------


def test_the_history_reads_what_is_asked_for_and_follows_changes(store: MemoryStore) -> None:
    reads: list[str] = []
    read = store.read
    store.read = lambda key, *a: reads.append(key) or read(key, *a)  # type: ignore[method-assign, func-returns-value]
    put(store, manifest(1), manifest(2, "bb"))
    reads.clear()
    history = History(store)
    history.refresh()
    assert reads == []
    assert history.resolve("latest")[1] is history.resolve(2)[1]
    assert reads == ["checkpoints/000000000002.json"]
    assert [r.attempt for r in history.records()] == ["aa", "bb"]
    assert history.steps == [1, 2]
    history.records()
    assert len([r for r in reads if r.startswith("checkpoints/")]) == 3
    put(store, manifest(2, "cc"))
    history.refresh()
    assert [history.manifests[s][1].attempt for s in history.steps] == ["aa", "cc"]
    retire(store, [Leaving(entries(store)[0], "aa")], now=1.0, grace_seconds=60)
    history.refresh()
    assert history.steps == [2]


def test_a_broken_manifest_hides_nothing_and_is_not_hidden(store: MemoryStore) -> None:
    _, second = put(store, manifest(1), manifest(2, "bb"))
    store.replace(second.key, store.read(second.key)[:-5])
    history = History(store)
    history.refresh()
    assert history.steps == [1]
    assert list(history.broken) == [2]
    with pytest.raises(IntegrityError, match=second.key):
        history.resolve(2)
    assert history.resolve("latest")[1].step == 1


def test_what_is_asked_for_and_not_there_is_answered_with_what_is(store: MemoryStore) -> None:
    put(store, manifest(1), manifest(20, "bb"))
    set_tag(store, Tag("good", 1, "aa", 1.0))
    history = History(store)
    history.refresh()
    assert [history.resolve(w)[1].step for w in (20, "20", "latest", "good")] == [20, 20, 20, 1]
    with pytest.raises(NoCheckpoint, match="no checkpoint 7; its newest steps are: 1, 20"):
        history.resolve(7)
    with pytest.raises(NoCheckpoint, match="no tag 'bad'; its tags are: good"):
        history.resolve("bad")
    with pytest.raises(NoCheckpoint, match="none"):
        History(MemoryStore()).resolve("latest")


def test_records_join_what_manifests_tags_and_log_say(store: MemoryStore) -> None:
    put(store, manifest(1, metrics={"loss": 0.5, "score": 0.1}, new_bytes=7), manifest(2, "bb", demoted=True))
    set_tag(store, Tag("good", 2, "bb", 1.0))
    log = LogWriter(store, "w")
    for event in (
        Observed((1, 0, 0, 0, 0.0), {"score": 0.9, "other": "nan"}, "aa"), Observed((1, 0, 0, 0, 0.0), {"score": 0.4}, "xx"),
        Verified(1.0, 1, "aa"), Resumed(1.0, 1, "aa"), Resumed(1.0, 2, "bb"),
    ):  # fmt: skip
        log.record(event)
    log.flush()
    history = History(store)
    history.refresh()
    one, two = history.records()
    assert (one.step, one.attempt, one.new_bytes, one.stored_bytes) == (1, "aa", 7, 4096)
    assert one.metrics["loss"] == 0.5
    assert one.metrics["score"] == 0.9, "what was observed later wins"
    assert one.metrics["other"] != one.metrics["other"]
    assert (one.verified, one.resumed_from, one.demoted, one.tags) == (True, False, False, frozenset())
    assert (two.verified, two.resumed_from, two.demoted, two.tags) == (False, True, True, {"good"})
    assert msgspec.json.encode(sorted(two.metrics)) == b"[]"
    assert data_key(1, "aa") in history.manifests[1][1].file_keys
