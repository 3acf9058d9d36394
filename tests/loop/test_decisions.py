"""What a rule decides follows from the run alone: one that was killed, wherever it was, saves, labels and stops as one that
was not."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest

from holdfast import Checkpointer, EarlyStopping, Run, best, every
from holdfast.core.errors import PolicyError
from holdfast.core.records import CheckpointRecord
from holdfast.policies import Rule, Verdict, on
from holdfast.policies.presets import keras_early_stopping, lightning_save_top_k
from holdfast.stores import MemoryStore, Store
from holdfast.testing import Crash, Fault, FaultPlan, FaultStore, MockClock, every_call, forget_this_process

NAN = float("nan")
LENGTHS = (2, 1, 3)  # steps of each epoch
LOSS = (5.0, NAN, 4.0, 4.0, 6.0, 3.0)
SCORE = (1.0, 1.0, 0.5)
PATIENT = EarlyStopping("score", mode="max", patience=2)


class Outcome(NamedTuple):
    records: list[CheckpointRecord]
    verdict: Verdict | None
    stopped_at: int


def train(store: Store, save: Rule, stop: EarlyStopping) -> Outcome:
    """Train for some epochs that are validated when they are over, each with its own number of steps."""
    time = MockClock()
    ckpt = Checkpointer(store, {"n": {"n": 0}}, save=save, stop=stop, writer="inline", time=time)
    for epoch in ckpt.epochs(len(LENGTHS)):
        for step in ckpt.steps(sum(LENGTHS[: epoch + 1])):
            time.advance(60)
            ckpt.log(loss=LOSS[step])
        ckpt.log(score=SCORE[epoch])
    ckpt.close()
    verdict, step = ckpt._engine.tracker.verdict, ckpt.step
    # Who the run was resumed from, when, and as which attempt, is what a kill may change.
    plain = [
        replace(r, attempt="", time=0.0, verified=False, resumed_from=False, stored_bytes=0, new_bytes=0)
        for r in Run(store).records()
    ]
    return Outcome(plain, verdict, step)


@pytest.mark.parametrize(
    ("save", "stop"),
    [
        (every(steps=3), PATIENT),
        (every(minutes=4).after(step=2), replace(PATIENT, patience=4)),
        (best("loss", mode="min") | every(epochs=2), keras_early_stopping("score", mode="max", patience=2)),
        (lightning_save_top_k("loss", mode="min", save_top_k=1).at_most(per=every(steps=2)), PATIENT),
        (on("improved", "stop") & ~every(epochs=3), replace(PATIENT, start_after_epoch=1, patience=1)),
    ],
    ids=["steps", "minutes", "best", "lightning", "improved"],
)
def test_a_run_that_was_killed_decides_as_one_that_was_not(save: Rule, stop: EarlyStopping) -> None:
    whole = train(MemoryStore(), save, stop)
    assert len(whole.records) > 1
    killed = 0
    for plan in every_call("kill"):
        store = MemoryStore()
        try:
            train(FaultStore(store, plan), save, stop)
        except Crash:
            killed += 1
            forget_this_process()
        assert repr(train(store, save, stop)) == repr(whole), plan.fired  # of nan as well
    assert killed > 10


def test_a_rollback_to_the_last_step_of_an_epoch_goes_back_behind_its_validation() -> None:
    store = MemoryStore()
    with Checkpointer(store, {"n": {"n": 0}}, save=every(steps=2), stop=PATIENT, writer="inline") as ckpt:
        for epoch in ckpt.epochs(2):
            for _ in ckpt.steps(2 * (epoch + 1)):
                pass
            ckpt.log(score=1.0 - epoch)
        ckpt.restore(2)
        assert (ckpt.clock.epoch, ckpt._engine.tracker.verdict) == (0, None)
        for epoch in ckpt.epochs(2):
            ckpt.log(score=5.0 - epoch)
    assert [(o.clock.step, o.clock.epoch, o.value) for o in Run(store).observations()] == [
        (2, 1, 5.0),
        (2, 2, 4.0),
    ]


def test_the_last_save_is_labelled_by_the_next_start_where_its_trainer_was_killed_before_it_could() -> None:
    store, rule = MemoryStore(), best("loss", mode="min")

    def go(place: Store) -> None:
        ckpt = Checkpointer(place, {"n": {"n": 0}}, save=rule, keep=rule, writer="inline")
        for step in ckpt.steps(3):
            ckpt.log(loss=3.0 - step)
        ckpt.close()

    with pytest.raises(Crash):
        go(FaultStore(store, FaultPlan(Fault("kill", 3, key="tags/*"))))
    forget_this_process()
    assert (Run(store).steps, Run(store).tags) == ([2, 3], {"best": 2})
    go(store)  # has nothing left to train
    assert (Run(store).steps, Run(store).tags) == ([3], {"best": 3})


@pytest.mark.parametrize(
    "stop", [5, best("loss", mode="min"), EarlyStopping], ids=["number", "rule", "class"]
)
def test_what_is_no_early_stopping_is_refused_by_name(stop: object) -> None:
    with pytest.raises(PolicyError, match=r"stop=.* expected EarlyStopping\("):
        Checkpointer(MemoryStore(), {}, stop=stop)  # type: ignore[arg-type]


@pytest.mark.parametrize("event", ["improved", "stop", "eval_end"])
def test_a_rule_that_waits_for_nothing_that_can_come_is_refused(event: str) -> None:
    store, loss = MemoryStore(), best("loss", mode="min")
    for save in (on(event), on(event).after(step=3) | on("improved"), on(event) & on("stop")):
        with pytest.raises(PolicyError, match=rf"never fires on '{event}', which"):
            Checkpointer(store, {"n": {"n": 0}}, save=save, keep=loss, writer="inline")
    assert list(store.list("")) == []
    Checkpointer(store, {"n": {"n": 0}}, save=on(event), stop=PATIENT, writer="inline").close()


def test_an_event_that_cannot_come_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    def told(save: Rule, stop: EarlyStopping | None = None) -> list[str]:
        caplog.clear()
        with Checkpointer(MemoryStore(), {"n": {"n": 0}}, save=save, stop=stop, writer="inline") as ckpt:
            for _ in ckpt.steps(2):
                ckpt.log(loss=1.0, score=1.0)
        return [r.getMessage() for r in caplog.records]

    (one,) = told(every(steps=1) | on("eval_end", "epoch_end"))
    assert one.startswith(
        "on('eval_end', 'epoch_end') never fires on 'eval_end', which comes with a metric that"
    )
    assert len(told(~on("improved"))) == 1
    assert len(told(best("loss", mode="min") | on("improved", "stop", "eval_end"))) == 2
    assert told(on("improved", "stop", "eval_end"), PATIENT) == []
    assert told(best("loss", mode="min") & on("eval_end")) == []
    assert told(on("start", "end", "epoch_end", "preempt", "exception")) == []
