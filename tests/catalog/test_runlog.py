"""The run log: what was flushed is read, in order, once; a resume cuts off what was seen after it."""

from __future__ import annotations

import pathlib

import pytest

from holdfast.catalog import runlog
from holdfast.catalog.runlog import LogReader, LogWriter, timeline, write_segment
from holdfast.core.buffers import Buffer
from holdfast.core.errors import StoreError
from holdfast.format.events import Event, Observed, Removed, Resumed, Saved, Started, Verdicted, Verified
from holdfast.stores import LocalStore, MemoryStore, Store
from holdfast.testing import FaultyDisk


def seen(step: int, loss: float = 0.5, *, epoch: int = 0, seconds: float = 0.0) -> Observed:
    return Observed((step, epoch, 0, 0, seconds), {"loss": loss})


def late(step: int, attempt: str, score: float = 1.0) -> Observed:
    return Observed((step, 0, 0, 0, 0.0), {"score": score}, attempt)


def resumed(step: int) -> Resumed:
    return Resumed(0.0, step, "aa")


class NotAppendable(MemoryStore):
    appendable = False


@pytest.fixture(params=["appendable", "segments"])
def store(request: pytest.FixtureRequest) -> Store:
    return MemoryStore() if request.param == "appendable" else NotAppendable()


# ---- writing and reading --------------------------------------------------------------------------------------------


def test_what_was_flushed_is_read_in_order(store: Store) -> None:
    first, second = LogWriter(store, "g000000000001"), LogWriter(store, "g000000000002")
    reader, expected = LogReader(store), list[Event]()
    for turn in range(12):  # more segments than one digit can number
        first.record(seen(turn))
        first.flush()
        expected.append(seen(turn))
        assert reader.events() == expected
    second.record(resumed(5))
    assert reader.events() == expected, "what was not flushed is not there"
    second.flush()
    second.flush()
    first.record(seen(99))
    first.flush()
    assert reader.events() == [*expected, seen(99), resumed(5)], "writer by writer"
    assert LogReader(store).events() == reader.events()


def test_a_reader_waits_for_the_rest_of_a_line() -> None:
    store, reader = MemoryStore(), None
    writer = LogWriter(store, "w")
    writer.record(seen(1))
    writer.record(seen(2))
    writer.flush()
    raw = store.read("log/w-000000.jsonl")
    for cut in range(len(raw) + 1):
        store.replace("log/w-000000.jsonl", raw[:cut])
        reader = reader or LogReader(store)
        assert reader.events() == [seen(1), seen(2)][: raw[:cut].count(b"\n")]


def test_damage_in_a_segment_is_reported_with_its_name(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    writer = LogWriter(store, "w")
    for step in (1, 2):
        writer.record(seen(step))
    writer.flush()
    (segment,) = store.list("log")
    store.replace(segment.key, store.read(segment.key).replace(b"0.5", b"0.4", 1))
    assert LogReader(store).events() == [seen(2)]  # no line needs another
    assert f"{segment.key}, line 1" in caplog.text


def test_a_damaged_line_is_called_by_its_number_whoever_reads_the_log(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = LogReader(store), LogWriter(store, "w")
    writer.record(seen(1))
    writer.flush()
    reads = (reader.events, reader.facts, reader.turns)
    for read in reads:
        read()
    writer.record(seen(2))
    writer.record(Removed(1.0, 1, "aa", "removed", []))
    writer.flush()
    (segment,) = store.list("log")
    lines = store.read(segment.key).split(b"\n")
    lines[2] = lines[2].replace(b'"aa"', b'"ab"')
    store.replace(segment.key, b"\n".join(lines))
    for read in (reader.events, reader.turns):
        caplog.clear()
        read()
        assert f"{store.url}/{segment.key}, line 3" in caplog.text


class Torn(MemoryStore):
    """An append that fails, after `keep` of its bytes were written."""

    def __init__(self) -> None:
        super().__init__()
        self.keep: int | None = None

    def append(self, key: str, data: Buffer) -> None:
        if self.keep is None:
            return super().append(key, data)
        keep, self.keep = self.keep, None
        super().append(key, bytes(data)[:keep])
        raise StoreError(28, "No space left on device")


def test_nothing_is_lost_or_doubled_when_a_flush_fails_wherever_it_stopped() -> None:
    events: list[Event] = [
        Started(0.0, 1, "h", 1),
        seen(1),
        seen(2),
        Saved(0.0, (2, 0, 0, 0, 0.0), "aa", []),
        seen(3),
        seen(4),
    ]
    size = 0
    for stop in range(1000):
        store = Torn()
        writer = LogWriter(store, "w")
        writer.record(Verified(0.0, 0, "zz"))
        writer.flush()
        for event in events:
            writer.record(event)
        store.keep = stop
        with pytest.raises(StoreError):
            writer.flush()
        size = size or sum(len(store.read(o.key)) for o in store.list("log"))
        writer.record(seen(5))
        writer.flush()
        writer.record(seen(6))
        writer.flush()
        found = [e for e in timeline(LogReader(store).events()) if isinstance(e, Observed)]
        assert found == [seen(step) for step in range(1, 7)]
        if stop > 900:
            break


def test_a_segment_whose_write_failed_is_never_touched_again(tmp_path: pathlib.Path) -> None:
    for n in range(1, 20):
        root = tmp_path / str(n)
        disk = FaultyDisk(n)
        writer = LogWriter(LocalStore(root, disk), "w")
        writer.record(seen(1))
        try:
            writer.flush()
        except StoreError:
            before = {o.key: o for o in LocalStore(root).list("log")}
            writer.record(seen(2))
            writer.flush()
            after = {o.key: o for o in LocalStore(root).list("log")}
            assert before.items() <= after.items()
            assert timeline(LogReader(LocalStore(root)).events()) == [seen(1), seen(2)]
        else:
            break
    assert n > 4


# ---- the timeline ---------------------------------------------------------------------------------------------------


def test_a_resume_cuts_off_what_was_seen_after_its_step() -> None:
    events = [seen(1), seen(2), seen(3), resumed(2), seen(3, 0.9), seen(4), resumed(1), seen(2, 0.7)]
    assert timeline(events) == [seen(1), resumed(2), resumed(1), seen(2, 0.7)]


def test_what_is_seen_again_at_the_same_clock_after_a_resume_counts() -> None:
    events = [seen(1), seen(2, 0.9), resumed(1), seen(2, 0.1)]
    assert timeline(events) == [seen(1), resumed(1), seen(2, 0.1)]
    assert timeline([seen(1), seen(2), resumed(0), seen(1), seen(2)]) == [resumed(0), seen(1), seen(2)]


def test_a_resume_at_the_newest_step_cuts_nothing() -> None:
    events = [seen(1), Verdicted(2, "stop", "x"), seen(2), resumed(2), seen(3)]
    assert timeline(events) == events


def test_what_was_seen_at_the_same_step_after_the_save_is_cut_off_too() -> None:
    save = Saved(0.0, (2, 0, 0, 0, 0.0), "aa", ["x"])
    events = [seen(1), seen(2), save, seen(2, epoch=1), seen(3, epoch=1)]
    assert timeline([*events, resumed(2)]) == [seen(1), seen(2), save, resumed(2)]
    end = Saved(0.0, (2, 1, 0, 0, 0.0), "aa", ["x"])
    assert timeline([*events, end, resumed(2)]) == [*events[:-1], end, resumed(2)]
    unknown = Resumed(0.0, 2, "bb")
    assert timeline([*events, unknown]) == [*events[:-1], unknown]


def test_verdicts_are_cut_with_the_branch_they_ended() -> None:
    assert timeline([seen(5), Verdicted(5, "stop", "x"), resumed(4)]) == [resumed(4)]


def test_late_observations_speak_of_a_checkpoint_and_stay() -> None:
    events = [seen(1), seen(2), late(2, "aa"), resumed(1), late(2, "aa", 2.0), seen(2)]
    assert timeline(events) == [seen(1), late(2, "aa"), resumed(1), late(2, "aa", 2.0), seen(2)]


def test_late_observations_at_one_clock_are_all_kept() -> None:
    events = [seen(3), late(3, "aa"), late(3, "aa"), late(3, "bb")]
    assert timeline(events) == events


def test_what_was_flushed_twice_counts_once() -> None:
    assert timeline([seen(1), seen(1), seen(2)]) == [seen(1), seen(2)]
    assert timeline([seen(1), seen(2), seen(3), seen(1), seen(2), seen(3), seen(4)]) == [
        seen(s) for s in (1, 2, 3, 4)
    ]


def test_two_safe_points_of_one_step_are_two() -> None:
    events = [seen(5), seen(5, epoch=1), seen(6, epoch=1, seconds=0.1)]
    assert timeline(events) == events


def test_other_events_pass_through() -> None:
    others = [
        Started(0.0, 1, "h", 1),
        Saved(0.0, (9, 0, 0, 0, 0.0), "aa", ["x"]),
        Removed(0.0, 9, "aa", "removed", []),
    ]
    assert timeline([*others, resumed(3)]) == [*others, resumed(3)]
    assert timeline([]) == []


# ---- segments that grow by being replaced ----------------------------------------------------------------------------


def test_a_long_log_is_few_objects_where_a_store_cannot_append(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "SEGMENT_BYTES", 2000)
    store = NotAppendable()
    writer, reader = LogWriter(store, "w"), LogReader(store)
    for step in range(100):
        writer.record(seen(step))
        writer.flush()
        writer.flush()  # nothing
        assert reader.events()[-1] == seen(step)
    assert reader.events() == LogReader(store).events() == [seen(step) for step in range(100)]
    sizes = [o.size for o in store.list("log")]
    assert sum(sizes) / 2000 - 1 < len(sizes) < sum(sizes) / 1800 + 2
    assert max(sizes) < 2000 + 200


@pytest.mark.parametrize("order", ["in order", "out of order", "first fails", "second fails"])
def test_what_two_take_at_once_is_all_kept(order: str) -> None:
    store = NotAppendable()
    writer = LogWriter(store, "w")
    writer.record(seen(0))
    writer.flush()
    writer.record(seen(1))
    first = writer.take()
    writer.record(seen(2))
    second = writer.take()
    for turn in (second, first) if order == "out of order" else (first, second):
        if (turn is first and order == "first fails") or (turn is second and order == "second fails"):
            writer.give_back(*turn)
        else:
            write_segment(store, *turn)
            writer.wrote(*turn)
    writer.record(seen(3))
    writer.flush()
    found = LogReader(store).events()
    assert sorted(found, key=repr) == sorted([seen(step) for step in range(4)], key=repr)
