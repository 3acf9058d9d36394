"""The Keras presets, epoch by epoch against the callbacks of the installed Keras."""

from __future__ import annotations

import itertools
import os
import warnings

import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
    import numpy as np

from holdfast.core.clock import Clock
from holdfast.core.records import CheckpointRecord, Moment, Observation
from holdfast.policies import EarlyStopping, Rule, decide, plan
from holdfast.policies.presets import keras_early_stopping, keras_save_best

Trace = list[float | None]
MODES = ("min", "max")
pytestmark = pytest.mark.filterwarnings("ignore:.*(Early stopping conditioned|Can save best).*:UserWarning")


class Model:
    """What a callback needs of a model: a flag to stop it, and a way to save it."""

    def __init__(self) -> None:
        self.stop_training = False
        self.saves = 0

    def save(self, path: str, overwrite: bool) -> None:
        self.saves += 1


def logs_of(value: float | None) -> dict[str, float]:
    return {} if value is None else {"val_loss": value}


def keras_waits(callback: keras.callbacks.EarlyStopping, trace: Trace) -> list[tuple[int, bool]]:
    """Return the count and the decision after each epoch, until the callback stops."""
    model, seen = Model(), []
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, value in enumerate(trace):
        callback.on_epoch_end(epoch, logs_of(value))
        seen.append((callback.wait, model.stop_training))
        if model.stop_training:
            break
    return seen


def our_waits(rule: EarlyStopping, trace: Trace) -> list[tuple[int, bool]]:
    fold, seen = rule.start(), []
    for epoch, value in enumerate(trace):
        stop = False
        if value is not None:
            verdict = fold.observe(Observation("val_loss", value, Clock(step=epoch + 1, epoch=epoch + 1)))
            stop = verdict.action == "stop"
        seen.append((fold.verdict.waited, stop))
        if stop:
            break
    return seen


@pytest.mark.parametrize("mode", MODES)
def test_early_stopping(trace: Trace, mode: str) -> None:
    settings = itertools.product((0, 1, 2, 3, 5), (0, 0.01, 0.1, -0.01), (None, 0.55), (0, 1, 4))
    for patience, min_delta, baseline, start in settings:
        given = {"mode": mode, "patience": patience, "min_delta": min_delta, "baseline": baseline}
        theirs = keras.callbacks.EarlyStopping("val_loss", start_from_epoch=start, **given)
        ours = keras_early_stopping("val_loss", start_from_epoch=start, **given)
        assert our_waits(ours, trace) == keras_waits(theirs, trace), given | {"start_from_epoch": start}


def keras_saves(callback: keras.callbacks.ModelCheckpoint, trace: Trace) -> list[int]:
    model, saved = Model(), []
    callback.set_model(model)
    for epoch, value in enumerate(trace):
        before = model.saves
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch, logs_of(value))
        saved += [epoch + 1] if model.saves > before else []
    return saved


def our_saves(rule: Rule, trace: Trace) -> tuple[list[int], set[int]]:
    """Return the epochs saved and those left in the end, dropping after each save what is not kept."""
    history: list[Observation] = []
    records: list[CheckpointRecord] = []
    saved = []
    for epoch, value in enumerate(trace, start=1):
        previous, now = Clock(step=epoch - 1), Clock(step=epoch)
        if decide(rule, Moment(previous, now, observed=logs_of(value), history=tuple(history))):
            saved.append(epoch)
            records.append(CheckpointRecord(epoch, "a", 60.0 * epoch, now, logs_of(value)))
            records = [r for r in records if (r.step, "a") in rule.keeps(records, 0.0)]
        if value is not None:
            history.append(Observation("val_loss", value, now))
    return saved, {record.step for record in records}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [None, 0.55, -1.0])
def test_save_best_only(trace: Trace, mode: str, threshold: float | None) -> None:
    callback = keras.callbacks.ModelCheckpoint(
        "best.keras", "val_loss", save_best_only=True, mode=mode, initial_value_threshold=threshold
    )
    theirs = keras_saves(callback, trace)
    missing = {epoch for epoch, value in enumerate(trace, start=1) if value is None}
    assert missing <= set(theirs), "Keras saves when the metric is missing: the one documented difference"
    wanted = [epoch for epoch in theirs if epoch not in missing]

    saved, left = our_saves(keras_save_best("val_loss", mode=mode, initial_value_threshold=threshold), trace)
    assert saved == wanted
    assert left == set(wanted[-1:])


def test_a_plan_by_the_preset_keeps_what_keras_has_on_disk() -> None:
    rule = keras_save_best("val_loss", mode="min")
    values = [0.9, 0.5, 0.7, 0.6]
    records = [CheckpointRecord(step, "a", step, metrics={"val_loss": v}) for step, v in enumerate(values)]
    actions = [decision.action for decision in plan(records, rule, now=10.0)]
    assert actions == ["drop", "keep", "drop", "keep"]  # the last one is the newest, which is guarded


class Scripted(keras.callbacks.Callback):
    """Puts the trace in the place of the validation loss, ahead of the callbacks that read it."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        logs |= logs_of(self.trace[epoch])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("patience", [1, 3])
def test_a_real_fit_stops_at_the_same_epoch(patience: int) -> None:
    values: Trace = [0.9, 0.8, None, 0.85, 0.81, 0.7, 0.7, 0.7, 0.7, 0.7]
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse", optimizer="sgd")
    stopper = keras.callbacks.EarlyStopping("val_loss", mode="min", patience=patience)
    data = np.ones((2, 1), dtype="float32")
    fitted = model.fit(data, data, epochs=len(values), verbose=0, callbacks=[Scripted(values), stopper])
    ours = our_waits(keras_early_stopping(mode="min", patience=patience), values)
    assert len(fitted.epoch) == len(ours) < len(values)
