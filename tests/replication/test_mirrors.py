"""A training run with mirrors: they follow behind it, never disturb it, and give back what it loses."""

from __future__ import annotations

import logging
import pathlib
import shutil

import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer, best, every, last
from holdfast.core.clock import SystemTime
from holdfast.core.errors import NotReplicated, PolicyError, StateError
from holdfast.replication import Mirror
from holdfast.replication.mirror import MirrorLike
from holdfast.stores import LocalStore, MemoryStore, Store
from holdfast.testing import Fault, FaultPlan, FaultStore
from patience import TIMEOUT, until
from replication.places import flip
from replication.runs import assert_is_copy, assert_sound, attempts, left_over, steps, tiny, train


def learn(
    store: Store | pathlib.Path,
    total: int,
    *,
    mirrors: list[MirrorLike] | None = None,
    stop_at: int | None = None,
    **options: object,
) -> dict[str, object]:
    """Train a small model on noise that comes from a captured generator; return its state."""
    held: dict[str, object] = {"w": np.zeros(500), "m": np.zeros(500), "noise": np.random.default_rng(7)}
    options = {"save": every(steps=2), "writer": "thread"} | options
    with Checkpointer(store, held, mirrors=mirrors, **options) as ckpt:  # type: ignore[arg-type]
        for step in ckpt.steps(total):
            grad = held["noise"].standard_normal(500) + 0.1 * held["w"]  # type: ignore[attr-defined, operator]
            held["m"][:] = 0.9 * held["m"] + grad  # type: ignore[index, operator]
            held["w"][:] -= 0.01 * held["m"]  # type: ignore[index, operator]
            ckpt.log(loss=float(np.abs(held["w"]).sum()))  # type: ignore[arg-type]
            if step + 1 == stop_at:
                break
    return held


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    return all(np.array_equal(one[k], other[k]) for k in "wm")  # type: ignore[arg-type]


class Line:
    """A mirror that can be cut off and reached again."""

    def __init__(self, store: Store) -> None:
        self.inner = store
        self.plan = FaultPlan()
        self.store = FaultStore(store, self.plan)

    def cut(self, kind: str = "timeout", call: str = "*") -> None:
        self.plan.faults[:] = [Fault(kind, call=call, times=None)]

    def mend(self) -> None:
        self.plan.faults.clear()


class Hopeless(SystemTime):
    """A clock by which the time that mirrors are given is over as soon as nothing more can come of it, and not before."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._over = 0.0
        self.ckpt: Checkpointer | None = None

    def monotonic(self) -> float:
        return super().monotonic() + self._over

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        if self.ckpt is not None and self._line.plan.faults:
            *others, cut = self.ckpt.mirrors
            if cut.error is not None and all(other.newest == self.ckpt.step for other in others):
                self._over += TIMEOUT


@pytest.fixture
def line() -> Line:
    return Line(MemoryStore("line"))


# ---- following ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["process", "thread", "inline"])
def test_mirrors_hold_what_the_run_holds_when_it_has_ended(tmp_path: pathlib.Path, writer: str) -> None:
    near, far = LocalStore(tmp_path / "near"), MemoryStore("far")
    learn(tmp_path / "run", 10, mirrors=[str(tmp_path / "near"), far], keep=last(2), writer=writer)
    primary = LocalStore(tmp_path / "run")
    assert_is_copy(near, primary)
    assert_is_copy(far, primary)
    assert not left_over(near)


def test_each_mirror_has_rule_and_form_of_its_own(tmp_path: pathlib.Path) -> None:
    primary, packed = LocalStore(tmp_path / "run"), MemoryStore("packed")
    rule = every(steps=4) | best("loss", mode="min")
    mirror = Mirror(packed, keep=rule, compress=True, bandwidth="500MB", verify=True)
    learn(primary, 10, mirrors=[mirror], keep=last(1), ack="all", save=every(steps=2))
    assert {4, 8, 10} <= {*steps(packed)}
    assert steps(primary) == [10] or 10 in steps(primary)
    assert all(key.endswith(".zst") for key in packed.names("data"))
    assert_sound(packed)


def test_statuses_say_how_each_stands(tmp_path: pathlib.Path, line: Line) -> None:
    held, clock = tiny(0), Hopeless(line)
    line.cut()
    ckpt = clock.ckpt = Checkpointer(
        tmp_path / "run", held, mirrors=[line.store], ack="all", mirror_seconds=TIMEOUT, time=clock
    )
    ckpt.save()
    with pytest.raises(NotReplicated, match=r"memory://line.*planned fault"):
        ckpt.wait()
    (status,) = ckpt.mirrors
    assert (status.url, status.state, status.newest) == ("memory://line", "unreachable", None)
    assert "planned fault" in str(status.error)
    assert status.since is not None
    line.mend()
    ckpt.wait()
    until(lambda: ckpt.mirrors[0].error is None, "the pass to end")
    assert ckpt.mirrors[0].newest == 0
    ckpt.close()
    assert ckpt.mirrors[0].state == "ok"


def test_a_full_mirror_is_degraded_and_says_what_is_missing(tmp_path: pathlib.Path, line: Line) -> None:
    held, clock = tiny(0), Hopeless(line)
    line.cut("ENOSPC", "write_streams")
    ckpt = clock.ckpt = Checkpointer(
        tmp_path / "run", held, mirrors=[line.store], ack=2, mirror_seconds=TIMEOUT, time=clock
    )
    ckpt.save()
    with pytest.raises(NotReplicated, match="memory://line"):
        ckpt.wait()
    (status,) = ckpt.mirrors
    assert (status.state, status.missing, status.newest) == ("degraded", (0,), None)
    assert status.missing_bytes > 0
    line.mend()
    ckpt.wait()
    ckpt.close()
    assert_is_copy(line.inner, LocalStore(tmp_path / "run"))


def test_a_mirror_never_fails_training_and_catches_up(
    tmp_path: pathlib.Path, line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = learn(tmp_path / "other", 12)
    line.cut()
    learn(tmp_path / "run", 6, mirrors=[line.store], mirror_seconds=0.2)
    assert "memory://line" in caplog.text
    assert steps(LocalStore(tmp_path / "run")) == [2, 4, 6]
    line.mend()
    final = learn(tmp_path / "run", 12, mirrors=[line.store])
    assert same(final, undisturbed)
    assert_is_copy(line.inner, LocalStore(tmp_path / "run"))


def test_a_failure_is_logged_once(
    tmp_path: pathlib.Path, line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    line.cut("EIO", "create")
    with caplog.at_level(logging.WARNING):
        learn(tmp_path / "run", 20, mirrors=[line.store], save=every(steps=1), mirror_seconds=0.1)
    told = [r for r in caplog.records if "is not up to date" in r.getMessage()]
    assert len({r.getMessage() for r in told}) == len(told)


# ---- acknowledgement ------------------------------------------------------------------------------------------------


def test_all_means_that_every_mirror_holds_it_when_wait_returns(tmp_path: pathlib.Path) -> None:
    mirrors = [MemoryStore("one"), MemoryStore("two")]
    held = tiny(0)
    ckpt = Checkpointer(tmp_path / "run", held, mirrors=[*mirrors], ack="all")
    for _ in range(5):
        held["count"]["seen"] += 1  # type: ignore[index, operator]
        ckpt.save()
        ckpt.wait()
        for mirror in mirrors:
            found = holdfast.load(mirror, as_="numpy")
            assert found["count"]["seen"] == held["count"]["seen"]  # type: ignore[index]
    ckpt.close()


def test_a_number_is_reached_without_those_that_are_away(tmp_path: pathlib.Path, line: Line) -> None:
    line.cut()
    held = tiny(0)
    with Checkpointer(tmp_path / "run", held, mirrors=[MemoryStore("here"), line.store], ack=2) as ckpt:
        ckpt.save()
        ckpt.wait()
    clock = Hopeless(line)
    ckpt = clock.ckpt = Checkpointer(
        tmp_path / "x",
        held,
        mirrors=[MemoryStore("h"), line.store],
        ack="all",
        mirror_seconds=TIMEOUT,
        time=clock,
    )
    with pytest.raises(NotReplicated, match=r"2 of the 3 locations.*memory://line"):
        for _ in ckpt.steps(2):
            pass
    with pytest.raises(NotReplicated):
        ckpt.close()
    assert steps(LocalStore(tmp_path / "x")) == [2]


@pytest.mark.parametrize("ack", [0, 3, -1, True, "both", 1.5])
def test_an_acknowledgement_that_nobody_can_give_is_refused(tmp_path: pathlib.Path, ack: object) -> None:
    with pytest.raises(PolicyError, match="ack="):
        Checkpointer(tmp_path / "run", {}, mirrors=[MemoryStore("m")], ack=ack)  # type: ignore[arg-type]


def test_mirrors_that_make_no_sense_are_refused(tmp_path: pathlib.Path) -> None:
    for mirrors in ([tmp_path / "run"], [MemoryStore("a"), MemoryStore("a")]):
        with pytest.raises(PolicyError, match="twice"):
            Checkpointer(tmp_path / "run", {}, mirrors=[*mirrors])
    with pytest.raises(PolicyError, match="demote"):
        Mirror("x", keep=last(1) | holdfast.demote(every(steps=1)))
    with pytest.raises(PolicyError, match="bandwidth"):
        Mirror("x", bandwidth=0)
    with pytest.raises(PolicyError):
        Mirror("x", keep=holdfast.on("end"))


# ---- coming back ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mirrored(tmp_path: pathlib.Path) -> tuple[pathlib.Path, MemoryStore]:
    """A run that was broken off at step 7, with a mirror."""
    mirror = MemoryStore("far")
    learn(tmp_path / "run", 20, mirrors=[mirror], stop_at=7)
    return tmp_path / "run", mirror


def test_a_run_whose_primary_is_gone_goes_on_bit_for_bit(
    tmp_path: pathlib.Path, mirrored: tuple[pathlib.Path, MemoryStore], caplog: pytest.LogCaptureFixture
) -> None:
    run, mirror = mirrored
    undisturbed = learn(tmp_path / "other", 20)
    identity = holdfast.Run(run).id
    shutil.rmtree(run)
    final = learn(run, 20, mirrors=[mirror])
    assert same(final, undisturbed)
    assert holdfast.Run(run).id == identity
    assert "step 6 was brought back from the mirror memory://far" in caplog.text
    assert_sound(LocalStore(run))
    assert {*steps(LocalStore(run))} >= {6, 8, 20}
    assert {*steps(mirror)} == {2, 4, 6, 8, 10, 12, 14, 16, 18, 20}  # nothing was taken from the mirror


def test_tags_come_back_with_what_they_point_to(mirrored: tuple[pathlib.Path, MemoryStore]) -> None:
    run, mirror = mirrored
    holdfast.Run(run).tag("good", 2)
    learn(run, 20, mirrors=[mirror], stop_at=7)
    shutil.rmtree(run)
    with Checkpointer(run, tiny(0), mirrors=[mirror]):
        assert holdfast.Run(run).tags == {"good": 2}
    assert_sound(LocalStore(run))


def test_the_restore_report_names_the_mirror(mirrored: tuple[pathlib.Path, MemoryStore]) -> None:
    run, mirror = mirrored
    shutil.rmtree(run)
    held: dict[str, object] = {"w": np.zeros(500), "m": np.zeros(500), "noise": np.random.default_rng(7)}
    with Checkpointer(run, held, mirrors=[mirror]) as ckpt:
        report = ckpt.restore()
    assert any("brought back from the mirror memory://far" in note for note in report.notes)


def test_a_newest_checkpoint_that_the_primary_lost_comes_back(
    tmp_path: pathlib.Path, mirrored: tuple[pathlib.Path, MemoryStore]
) -> None:
    run, mirror = mirrored
    (run / "checkpoints" / "000000000006.json").unlink()
    shutil.rmtree(next((run / "data").glob("000000000006-*")))
    assert same(learn(run, 20, mirrors=[mirror]), learn(tmp_path / "other", 20))


def test_what_was_given_up_does_not_come_back(mirrored: tuple[pathlib.Path, MemoryStore]) -> None:
    run, mirror = mirrored
    holdfast.Run(run).remove([6])
    with Checkpointer(run, {}, mirrors=[]):
        pass
    held: dict[str, object] = {"w": np.zeros(500), "m": np.zeros(500), "noise": np.random.default_rng(7)}
    with Checkpointer(run, held, mirrors=[mirror]) as ckpt:
        ckpt.restore()
        assert ckpt.step == 4
    assert steps(mirror) == [2, 4]


def test_what_a_rollback_left_does_not_come_back(mirrored: tuple[pathlib.Path, MemoryStore]) -> None:
    run, mirror = mirrored
    held: dict[str, object] = {"w": np.zeros(500), "m": np.zeros(500), "noise": np.random.default_rng(7)}
    with Checkpointer(run, held, mirrors=None, save=every(steps=2), writer="inline") as ckpt:
        ckpt.restore(2)
        for _ in ckpt.steps(3):
            pass
    assert steps(LocalStore(run)) == [2, 3]
    with Checkpointer(run, held, mirrors=[mirror]) as ckpt:
        ckpt.restore()
        assert ckpt.step == 3
    assert_is_copy(mirror, LocalStore(run))


def test_what_was_brought_back_from_the_trash_is_mended_and_comes_back(
    mirrored: tuple[pathlib.Path, MemoryStore],
) -> None:
    run, mirror = mirrored
    held: dict[str, object] = {"w": np.zeros(500), "m": np.zeros(500), "noise": np.random.default_rng(7)}
    with Checkpointer(run, held, mirrors=[mirror], save=every(steps=2), writer="inline") as ckpt:
        ckpt.restore(2)
        for _ in ckpt.steps(3):
            pass
    holdfast.Run(run).undelete(6)  # to go back was wrong after all
    store = LocalStore(run)
    with Checkpointer(run, held, mirrors=[mirror]):
        pass
    assert steps(mirror) == [2, 3, 6]
    flip(store, "checkpoints/000000000006.json", 50)
    with Checkpointer(run, held, mirrors=[mirror]) as ckpt:
        ckpt.restore()
        assert ckpt.step == 6
    assert_is_copy(mirror, store)
    store.delete(["checkpoints/000000000006.json"])
    with Checkpointer(run, held, mirrors=[mirror]) as ckpt:
        ckpt.restore()
        assert ckpt.step == 6


def test_a_bad_object_is_mended_from_a_good_copy(
    tmp_path: pathlib.Path, mirrored: tuple[pathlib.Path, MemoryStore]
) -> None:
    run, mirror = mirrored
    store = LocalStore(run)
    (key,) = [k for k in store.names("data") if "000000000006" in k and "/w." in k]
    whole = store.read(key)
    for damage in ("flip", "truncate", "delete", "manifest"):
        if damage == "flip":
            flip(store, key, len(whole) - 9)
        elif damage == "truncate":
            store.replace(key, whole[:-100])
        elif damage == "delete":
            store.delete([key])
        else:
            flip(store, "checkpoints/000000000006.json", 50)
        held: dict[str, object] = {"w": np.zeros(500), "m": np.zeros(500), "noise": np.random.default_rng(7)}
        with Checkpointer(run, held, mirrors=[mirror]) as ckpt:
            report = ckpt.restore()
            assert ckpt.step == 6, damage
        assert any("mended from memory://far" in note for note in report.notes), damage
        assert store.read(key) == whole
        assert_sound(store)


def test_a_bad_copy_is_never_put_over_a_good_one(mirrored: tuple[pathlib.Path, MemoryStore]) -> None:
    run, mirror = mirrored
    store = LocalStore(run)
    before = {o.key: store.read(o.key) for o in store.list("data")}
    for key in mirror.names("data"):
        flip(mirror, key, mirror.info(key).size - 9)
    (key,) = [k for k in store.names("data") if "000000000006" in k and "/w." in k]
    flip(store, key, len(before[key]) - 9)
    held: dict[str, object] = {"w": np.zeros(500), "m": np.zeros(500), "noise": np.random.default_rng(7)}
    with Checkpointer(run, held, mirrors=[mirror]) as ckpt:
        ckpt.restore()
        assert ckpt.step == 4, "neither has it whole: the one before it"
    after = {o.key: store.read(o.key) for o in store.list("data")}
    assert {k for k in before if after.get(k) != before[k]} == {key}


def test_blocks_of_both_make_one_whole(mirrored: tuple[pathlib.Path, MemoryStore]) -> None:
    """Two files of one checkpoint are bad in different places; between them all is there."""
    run, mirror = mirrored
    store = LocalStore(run)
    keys = [k for k in store.names("data") if "000000000006" in k]
    ours, theirs = next(k for k in keys if "/w." in k), next(k for k in keys if "/m." in k)
    flip(store, ours, store.info(ours).size - 9)
    flip(mirror, theirs, mirror.info(theirs).size - 9)
    held: dict[str, object] = {"w": np.zeros(500), "m": np.zeros(500), "noise": np.random.default_rng(7)}
    with Checkpointer(run, held, mirrors=[mirror]) as ckpt:
        ckpt.restore()
        assert ckpt.step == 6


def test_a_mirror_that_is_away_when_a_run_starts_is_only_warned_of(
    mirrored: tuple[pathlib.Path, MemoryStore], line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = mirrored
    line.cut()
    learn(run, 8, mirrors=[line.store], mirror_seconds=0.2)
    assert "memory://line cannot be read" in caplog.text
    assert 8 in steps(LocalStore(run))


def test_a_mirror_of_another_run_is_refused_by_name(
    tmp_path: pathlib.Path, mirrored: tuple[pathlib.Path, MemoryStore]
) -> None:
    _, mirror = mirrored
    train(LocalStore(tmp_path / "another"), 2)
    before = attempts(mirror)
    with pytest.raises(StateError, match="memory://far"):
        Checkpointer(tmp_path / "another", {}, mirrors=[mirror])
    assert attempts(mirror) == before
    with Checkpointer(tmp_path / "another", {}):  # the lease was not left behind
        pass
