"""The loop: what is yielded, what is saved, and what a second process sees."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer, EarlyStopping, Run, best, demote, every, last, on
from holdfast.core.errors import LeaseHeld, NoCheckpoint, PolicyError, StateError


def counting() -> dict[str, object]:
    return {"w": np.zeros(4), "counters": {"seen": 0}}


def train(held: dict[str, object]) -> None:
    held["w"] += 1
    held["counters"]["seen"] += 1


def run_to(url: pathlib.Path, total: int, **options: object) -> tuple[list[int], dict[str, object]]:
    held = counting()
    with Checkpointer(url, held, **options) as ckpt:
        steps = []
        for step in ckpt.steps(total):
            steps.append(step)
            train(held)
    return steps, held


def test_yields_every_step_and_saves_the_end(tmp_path: pathlib.Path) -> None:
    steps, _ = run_to(tmp_path, 7, save=every(steps=3))
    assert steps == list(range(7))
    assert Run(tmp_path).steps == [3, 6, 7]
    assert Run(tmp_path)[3].reasons == ("every 3 steps",)
    assert Run(tmp_path)[7].reasons == ("end of training",)


def test_resumes_and_extends(tmp_path: pathlib.Path) -> None:
    run_to(tmp_path, 5)
    steps, held = run_to(tmp_path, 5)
    assert steps == []
    assert held["counters"] == {"seen": 5}
    steps, held = run_to(tmp_path, 8)
    assert steps == [5, 6, 7]
    assert held["w"].tolist() == [8.0] * 4


def test_the_end_is_saved_once(tmp_path: pathlib.Path) -> None:
    run_to(tmp_path, 6, save=every(steps=3))
    assert Run(tmp_path).steps == [3, 6]
    assert Run(tmp_path)[6].reasons == ("every 3 steps",)
    before = Run(tmp_path)[6].manifest.attempt
    run_to(tmp_path, 6, save=every(steps=3))
    assert Run(tmp_path)[6].manifest.attempt == before


def test_epochs_alone_count_as_steps(tmp_path: pathlib.Path) -> None:
    held = counting()
    with Checkpointer(tmp_path, held, save=every(epochs=1)) as ckpt:
        assert [e for e in ckpt.epochs(3) if train(held) is None] == [0, 1, 2]
        assert ckpt.step == 3
    held = counting()
    with Checkpointer(tmp_path, held) as ckpt:
        assert [e for e in ckpt.epochs(4) if train(held) is None] == [3]
    assert held["counters"]["seen"] == 4


class Loader:
    """Four batches a pass, with a position."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self):
        while self.at < 4:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("stop", range(1, 13))
def test_nested_epochs_and_steps_resume_anywhere(tmp_path: pathlib.Path, stop: int) -> None:
    def go(url: pathlib.Path, until: int | None) -> list[tuple[int, int, int]]:
        loader = Loader()
        seen = []
        ckpt = Checkpointer(url, {"data": loader}, save=every(steps=1), writer="inline")
        for epoch in ckpt.epochs(3):
            for step, batch in ckpt.steps(data=loader):
                seen.append((epoch, step, batch))
                if step == until:
                    ckpt.close()
                    return seen
        ckpt.close()
        return seen

    whole = go(tmp_path / "whole", None)
    assert whole == [(i // 4, i, i % 4) for i in range(12)]
    first = go(tmp_path / "cut", stop) if stop < 12 else []
    assert first[:-1] + go(tmp_path / "cut", None) == whole


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8])
def test_steps_cycle_through_the_data(tmp_path: pathlib.Path, stop: int) -> None:
    loader = Loader()
    with Checkpointer(tmp_path, {"data": loader}, save=every(steps=1) | every(epochs=1)) as ckpt:
        first = [batch for _, batch in ckpt.steps(stop, data=loader)]
    loader = Loader()
    with Checkpointer(tmp_path, {"data": loader}) as ckpt:
        rest = [batch for _, batch in ckpt.steps(10, data=loader)]
        assert ckpt.clock.epoch == 2
    assert first + rest == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_a_loader_without_a_position_is_refused(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, counting()) as ckpt, pytest.raises(StateError, match="ResumableSampler"):
        next(ckpt.steps(3, data=[1, 2, 3]))


def test_data_without_a_batch_ends_the_loop(tmp_path: pathlib.Path) -> None:
    class Short:
        rest = [1]

        def __iter__(self) -> Iterator[int]:
            while self.rest:
                yield self.rest.pop()

        def state_dict(self) -> dict[str, object]:
            return {}

    seen = []
    with pytest.raises(StateError, match="Short that has no batch"), Checkpointer(tmp_path, {}) as ckpt:
        for _, batch in ckpt.steps(3, data=Short()):
            seen.append(batch)
    assert seen == [1]


def test_step_end_in_a_foreign_loop(tmp_path: pathlib.Path) -> None:
    held = counting()
    ckpt = Checkpointer(tmp_path, held, save=every(steps=2))
    for number in range(1, 6):
        train(held)
        ckpt.step_end(number, {"loss": 1 / number})
    with pytest.raises(PolicyError, match="goes back"):
        ckpt.step_end(3)
    ckpt.close()
    assert Run(tmp_path).steps == [2, 4, 5]  # closing saves the end
    assert Run(tmp_path)[4].metrics == {"loss": 0.25}


def test_counts_may_be_integers_of_numpy(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, {}) as ckpt:
        ckpt.count(samples=np.int64(8), tokens=np.uint32(100))
        ckpt.step_end(np.int64(3))
        with pytest.raises(PolicyError, match="whole number"):
            ckpt.step_end(3.5)
    clock = Run(tmp_path).latest.clock
    assert (clock.step, clock.samples, clock.tokens) == (3, 8, 100)


def test_a_save_inside_the_loop_waits_for_the_end_of_the_step(tmp_path: pathlib.Path) -> None:
    held = counting()
    with Checkpointer(tmp_path, held) as ckpt:
        for step in ckpt.steps(5):
            if step == 2:
                ckpt.save(tag="asked")
            train(held)
    assert Run(tmp_path).tags == {"asked": 3}
    assert holdfast.load(tmp_path, step="asked")["counters"] == {"seen": 3}


def test_a_save_asked_for_in_a_step_that_does_not_end_is_spoken_of(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(tmp_path, counting(), save=every(steps=100)) as ckpt:
        for step in ckpt.steps(10):
            if step == 3:
                ckpt.save("good")
                break
        assert "the save asked for in step 3 was not made" in caplog.text
        for _ in ckpt.steps(6):
            pass  # and the tag does not go to a state that it was not meant for
    assert Run(tmp_path).tags == {}
    assert Run(tmp_path).steps == [6]


def test_a_later_state_of_the_same_step_takes_its_place(tmp_path: pathlib.Path) -> None:
    loader = Loader()
    with Checkpointer(tmp_path, {"data": loader}, save=every(steps=4) | every(epochs=1)) as ckpt:
        for _ in ckpt.epochs(1):
            for _ in ckpt.steps(data=loader):
                pass
            ckpt.log(val_loss=0.5)
    run = Run(tmp_path)
    assert run.steps == [4]
    assert run[4].clock.epoch == 1
    assert run[4].metrics == {"val_loss": 0.5}
    assert len(run.store.list("checkpoints")) == 1


def test_rollback_sets_newer_checkpoints_aside(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_to(tmp_path, 6, save=every(steps=2))
    held = counting()
    with Checkpointer(tmp_path, held, save=every(steps=2)) as ckpt:
        ckpt.restore(2)
        assert Run(tmp_path).steps == [2, 4, 6]  # looking changes nothing
        for _ in ckpt.steps(3):
            train(held)
    assert "set aside" in caplog.text
    assert Run(tmp_path).steps == [2, 3]
    assert len(Run(tmp_path).store.list("trash")) == 2
    steps, _ = run_to(tmp_path, 5)
    assert steps == [3, 4]


def test_rollback_inside_the_loop(tmp_path: pathlib.Path) -> None:
    held = counting()
    visited = []
    with Checkpointer(tmp_path, held, save=every(steps=1)) as ckpt:
        for step in ckpt.steps(5):
            visited.append(step)
            train(held)
            if step == 3 and visited.count(3) == 1:
                ckpt.restore(2)
    assert visited == [0, 1, 2, 3, 2, 3, 4]
    assert held["counters"]["seen"] == 5


def test_best_is_tagged_kept_and_handed_back(tmp_path: pathlib.Path) -> None:
    held = counting()
    values = [0.9, 0.4, 0.6, 0.5, 0.7, 0.8]
    with Checkpointer(tmp_path, held, save=every(steps=1) | best("val", mode="min"), keep=last(1)) as ckpt:
        for step in ckpt.steps(6):
            train(held)
            ckpt.log(val=values[step])
        assert held["counters"]["seen"] == 6
        report = ckpt.restore("best")
        assert report.exact
        assert (ckpt.step, held["counters"]["seen"]) == (2, 2)
    assert Run(tmp_path).steps == [2, 6]
    assert Run(tmp_path).best("val", mode="min").step == 2
    assert Run(tmp_path).best("val", mode="max").step == 6


def test_early_stopping_survives_resumes(tmp_path: pathlib.Path) -> None:
    values = [0.9, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]

    def go(total: int, patience: int) -> tuple[int, str | None]:
        held = counting()
        stop = EarlyStopping("val", mode="min", patience=patience)
        with Checkpointer(tmp_path, held, save=every(steps=1), stop=stop) as ckpt:
            for step in ckpt.steps(total):
                train(held)
                ckpt.log(val=values[step])
            return ckpt.step, ckpt.stopped.reason if ckpt.stopped else None

    assert go(4, patience=4) == (4, None)  # two of four are used up
    at, reason = go(8, patience=4)
    assert at == 6
    assert "4 of 4" in reason
    assert go(8, patience=4)[0] == 6  # a stopped run stays stopped
    assert go(8, patience=6)[0] == 8  # but the code's patience wins


def test_nan_is_recorded_and_never_wins(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    held = counting()
    with Checkpointer(tmp_path, held, save=best("val", mode="min")) as ckpt:
        for step in ckpt.steps(3):
            ckpt.log(val=[0.5, float("nan"), 0.7][step])
    assert "'val' is nan at step 2" in caplog.text
    assert Run(tmp_path).tags == {"best": 1}
    assert [str(o.value) for o in Run(tmp_path).observations()] == ["0.5", "nan", "0.7"]


@pytest.mark.parametrize("value", ["0.5", None, True, [1.0], np.zeros(2)], ids=repr)
def test_a_metric_that_is_no_number_is_refused(tmp_path: pathlib.Path, value: object) -> None:
    with Checkpointer(tmp_path, counting()) as ckpt, pytest.raises(PolicyError, match="'val'"):
        ckpt.log(val=value)


def test_start_and_exception_events(tmp_path: pathlib.Path) -> None:
    held = counting()
    with pytest.raises(ZeroDivisionError):
        with Checkpointer(tmp_path, held, save=on("start", "exception")) as ckpt:
            for step in ckpt.steps(5):
                train(held)
                1 / (3 - step)
    run = Run(tmp_path)
    assert run.steps == [0, 3]
    assert run[3].manifest.exact is False
    assert "ZeroDivisionError" in run[3].reasons[0]
    report = holdfast.load(tmp_path, into=counting())
    assert any("not bit-exact" in note for note in report.notes)


def test_an_exception_saves_nothing_unasked(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with Checkpointer(tmp_path, counting(), save=every(steps=2)) as ckpt:
            for step in ckpt.steps(9):
                1 / (5 - step)
    assert Run(tmp_path).steps == [2, 4]


def test_demoted_checkpoints_keep_their_weights(tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    held = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path, held, save=every(steps=1), keep=last(1) | demote(every(steps=1))) as ckpt:
        for _ in ckpt.steps(4):
            optimizer.zero_grad()
            model(torch.ones(300)).sum().backward()
            optimizer.step()
    run = Run(tmp_path)
    assert run.steps == [1, 2, 3, 4]
    assert [run[s].parts for s in (1, 4)] == [["model"], ["model", "optimizer", "rng"]]
    assert not any(run.verify().values())
    with Checkpointer(tmp_path, held) as ckpt:
        with pytest.raises(StateError, match="demoted"):
            ckpt.restore(2)
        ckpt.restore(2, only=["model"])


def test_unchanged_tensors_are_not_written_again(tmp_path: pathlib.Path) -> None:
    held = {"frozen": np.arange(100_000.0), "head": np.zeros(10_000)}
    with Checkpointer(tmp_path, held, save=every(steps=1), keep=last(2)) as ckpt:
        for _ in ckpt.steps(10):
            held["head"] += 1
    run = Run(tmp_path)
    assert run.steps == [9, 10]
    assert sum(o.size for o in run.store.list("data")) < 800_000 + 2 * 80_000 + 60_000
    assert run[10]["frozen"][-1] == 99_999.0
    assert not any(run.verify().values())


def test_falls_back_to_an_older_checkpoint(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    run_to(tmp_path, 6, save=every(steps=2))
    newest = next((tmp_path / "data").glob("000000000006-*/w.safetensors"))
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 1
    newest.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        steps, held = run_to(tmp_path, 7, save=every(steps=2))
    assert steps == [4, 5, 6]
    assert held["counters"]["seen"] == 7
    assert "step 6 does not verify" in caplog.text
    assert str(newest.name) in caplog.text
    assert not any(Run(tmp_path).verify().values())


def test_two_checkpointers_of_one_process(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, counting()):
        with pytest.raises(LeaseHeld, match="of this process"):
            Checkpointer(tmp_path, counting())
    Checkpointer(tmp_path, counting()).close()


class Late:
    """Has no state before its first step."""

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_what_has_no_state_before_the_first_step(tmp_path: pathlib.Path) -> None:
    late = Late()
    with Checkpointer(tmp_path, {"late": late}) as ckpt:
        for step in ckpt.steps(2):
            late.count = step
    with pytest.raises(AttributeError):  # and a save says what its state_dict() says
        Checkpointer(tmp_path / "other", {"late": Late()}).save()
    late = Late()
    with Checkpointer(tmp_path, {"late": late}) as ckpt:
        ckpt.restore()
    assert late.count == 1


def test_restore_without_a_checkpoint(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, counting()) as ckpt:
        with pytest.raises(NoCheckpoint):
            ckpt.restore()
        with pytest.raises(NoCheckpoint, match="newest steps are: none"):
            ckpt.restore(7)
        with pytest.raises(NoCheckpoint, match="its tags are: none"):
            ckpt.restore("best")


def test_a_closed_checkpointer_says_so(tmp_path: pathlib.Path) -> None:
    ckpt = Checkpointer(tmp_path, counting())
    ckpt.close()
    ckpt.close()
    for act in (ckpt.save, lambda: next(ckpt.steps(3)), ckpt.step_end):
        with pytest.raises(PolicyError, match="is closed"):
            act()


def test_immutable_values_come_back_through_state(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, {"epoch_length": 10, "name": "a"}) as ckpt:
        ckpt.save()
    with Checkpointer(tmp_path, {"epoch_length": 3, "name": "b"}) as ckpt:
        ckpt.restore()
        assert ckpt.state == {"epoch_length": 10, "name": "a"}


def test_late_metrics_from_elsewhere_count(tmp_path: pathlib.Path) -> None:
    run_to(tmp_path, 4, save=every(steps=1))
    run = Run(tmp_path)
    run.observe(2, "mmlu", 0.61)
    run.observe(3, "mmlu", 0.55)
    assert Run(tmp_path).best("mmlu", mode="max").step == 2
    decisions = {d.step: d.action for d in Run(tmp_path).plan(best("mmlu", mode="max"))}
    assert decisions == {1: "drop", 2: "keep", 3: "drop", 4: "keep"}
    Run(tmp_path).prune(best("mmlu", mode="max"))
    assert Run(tmp_path).steps == [2, 4]
