"""The Hugging Face presets, evaluation by evaluation against the installed transformers."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from transformers import (
        EarlyStoppingCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

from holdfast.core.clock import Clock
from holdfast.core.errors import PolicyError
from holdfast.core.records import CheckpointRecord, Moment, Observation
from holdfast.policies import EarlyStopping, Rule, decide
from holdfast.policies.presets import hf_best_model, hf_early_stopping

Trace = list[float | None]


def arguments(folder: Path, greater: bool, **more: object) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="score",
        greater_is_better=greater,
        report_to="none",
        use_cpu=True,
        **more,
    )


@pytest.fixture(scope="module", params=[False, True], ids=["lower is better", "greater is better"])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainingArguments:
    return arguments(tmp_path_factory.mktemp("run"), request.param, save_strategy="best")


def evaluations(args: TrainingArguments, callback: EarlyStoppingCallback | None, trace: Trace):
    """Yield (count, stop, new best) per evaluation, as the Trainer goes: callback first, then best metric."""
    state, control = TrainerState(), TrainerControl()
    trainer = SimpleNamespace(args=args, state=state)
    for step, value in enumerate(trace, start=1):
        state.global_step = step
        metrics = {} if value is None else {"eval_score": value}
        if callback is not None:
            callback.on_evaluate(args, state, control, metrics)
        new_best = Trainer._determine_best_metric(trainer, metrics, None)
        count = callback.early_stopping_patience_counter if callback else 0
        yield count, control.should_training_stop, new_best
        if control.should_training_stop:
            return


def our_waits(rule: EarlyStopping, trace: Trace) -> list[tuple[int, bool]]:
    fold, seen = rule.start(), []
    for step, value in enumerate(trace, start=1):
        verdict = fold.observe(Observation("eval_score", value, Clock(step=step)))
        seen.append((verdict.waited, verdict.action == "stop"))
        if verdict.action == "stop":
            break
    return seen


def present(trace: Trace) -> Trace:
    """Return the trace without gaps: the Trainer ends with an error at an evaluation without the metric."""
    return [value for value in trace if value is not None]


def test_early_stopping(trace: Trace, given: TrainingArguments) -> None:
    values = present(trace)
    for patience, threshold in itertools.product((1, 2, 3, 5), (0.0, 0.01, 0.1)):
        ours = hf_early_stopping(
            "score",
            greater_is_better=given.greater_is_better,
            early_stopping_patience=patience,
            early_stopping_threshold=threshold,
        )
        theirs = [each[:2] for each in evaluations(given, EarlyStoppingCallback(patience, threshold), values)]
        assert our_waits(ours, values) == theirs, (patience, threshold)


def test_the_reference_is_the_best_ever(given: TrainingArguments) -> None:
    sign = 1 if given.greater_is_better else -1
    drift: Trace = [sign * 0.009 * i for i in range(40)]
    rule = hf_early_stopping(
        "score",
        greater_is_better=given.greater_is_better,
        early_stopping_patience=3,
        early_stopping_threshold=0.01,
    )
    assert len(our_waits(rule, drift)) == 4  # a reference of the last significant value never stops here


def test_a_missing_metric_ends_the_trainer(given: TrainingArguments) -> None:
    with pytest.raises(KeyError, match="eval_score"):
        list(evaluations(given, EarlyStoppingCallback(1), [0.9, None]))


def test_patience_zero_is_refused() -> None:
    with pytest.raises(PolicyError, match="early_stopping_patience=0 must be"):
        hf_early_stopping("score", greater_is_better=True, early_stopping_patience=0)


def our_best(rule: Rule, trace: Trace) -> tuple[list[int], set[int]]:
    history: list[Observation] = []
    records: list[CheckpointRecord] = []
    saved = []
    for step, value in enumerate(trace, start=1):
        now, observed = Clock(step=step), {"eval_score": value}
        if decide(rule, Moment(Clock(step=step - 1), now, observed=observed, history=tuple(history))):
            saved.append(step)
            records.append(CheckpointRecord(step, "a", 60.0 * step, now, observed))
            records = [r for r in records if (r.step, "a") in rule.keeps(records, 0.0)]
        history.append(Observation("eval_score", value, now))
    return saved, {record.step for record in records}


def test_best_model(trace: Trace, given: TrainingArguments) -> None:
    values = present(trace)
    theirs = [step for step, each in enumerate(evaluations(given, None, values), start=1) if each[2]]
    rule = hf_best_model("score", greater_is_better=given.greater_is_better)
    assert our_best(rule, values) == (theirs, set(theirs[-1:]))


class Net(torch.nn.Module):
    """One weight, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(x)
        return {"loss": (logits - labels).pow(2).mean(), "logits": logits}


class Saves(TrainerCallback):
    """Notes the steps at which the Trainer saves."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        self.steps.append(state.global_step)


@pytest.mark.filterwarnings("ignore")
def test_a_real_training_stops_and_saves_the_same(tmp_path: Path) -> None:
    values: Trace = [0.9, 0.8, 0.85, 0.81, 0.7, 0.7, 0.75, 0.71, 0.1, 0.05]
    script = iter(values)
    saves = Saves()
    data = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 2
    trainer = Trainer(
        Net(),
        arguments(tmp_path, False, save_strategy="best", max_steps=len(values), disable_tqdm=True),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda _: {"score": next(script)},
        callbacks=[EarlyStoppingCallback(3), saves],
    )
    trainer.train()
    rule = hf_early_stopping("score", greater_is_better=False, early_stopping_patience=3)
    assert trainer.state.global_step == len(our_waits(rule, values)) == 8
    ours, left = our_best(hf_best_model("score", greater_is_better=False), values[:8])
    assert [step for step in saves.steps if step <= 8] == ours
    assert {trainer.state.best_global_step} == left
