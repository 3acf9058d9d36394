"""The Lightning presets, check by check against the callbacks of the installed Lightning."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import EarlyStopping as TheirStopping
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.trainer.states import TrainerFn

from holdfast.core.clock import Clock
from holdfast.core.errors import PolicyError
from holdfast.core.records import CheckpointRecord, Moment, Observation
from holdfast.policies import EarlyStopping, Rule, decide
from holdfast.policies.presets import lightning_early_stopping, lightning_save_top_k

Trace = list[float | None]
MODES = ("min", "max")
pytestmark = pytest.mark.filterwarnings("ignore:.*could not find the monitored key.*")


class Strategy:
    """A single process: every decision is unanimous, and removed files are noted."""

    def __init__(self, files: set[str]) -> None:
        self.files = files

    def broadcast(self, value: object, src: int = 0) -> object:
        return value

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision

    def remove_checkpoint(self, path: str) -> None:
        self.files.remove(path)


def trainer_of(files: set[str]) -> SimpleNamespace:
    """Return what the callbacks read of a Trainer that validates once per epoch."""
    return SimpleNamespace(
        callback_metrics={},
        fast_dev_run=False,
        sanity_checking=False,
        should_stop=False,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        strategy=Strategy(files),
        val_check_interval=1.0,
        check_val_every_n_epoch=1,
        num_val_batches=[1],
        current_epoch=0,
        global_step=0,
        is_global_zero=True,
        loggers=[],
        ckpt_path=None,
        save_checkpoint=lambda path, weights_only: files.add(path),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(val_loop=SimpleNamespace(_has_run=False))),
    )


def metrics_of(value: float | None) -> dict[str, torch.Tensor]:
    return {} if value is None else {"val_loss": torch.tensor(float(value))}


def their_waits(callback: TheirStopping, trace: Trace) -> list[tuple[int, bool]]:
    trainer, seen = trainer_of(set()), []
    callback.setup(trainer, None, "fit")
    for epoch, value in enumerate(trace):
        trainer.current_epoch, trainer.callback_metrics = epoch, metrics_of(value)
        callback.on_train_epoch_end(trainer, None)
        seen.append((callback.wait_count, trainer.should_stop))
        if trainer.should_stop:
            break
    return seen


def our_waits(rule: EarlyStopping, trace: Trace) -> list[tuple[int, bool]]:
    fold, seen = rule.start(), []
    for epoch, value in enumerate(trace):
        stop = False
        if value is not None:
            stop = fold.observe(Observation("val_loss", value, Clock(step=epoch + 1))).action == "stop"
        seen.append((fold.verdict.waited, stop))
        if stop:
            break
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("finite", [True, False])
def test_early_stopping(trace: Trace, mode: str, finite: bool) -> None:
    bounds = (
        ((None, None), (0.3, None), (None, 0.9), (0.3, 0.9)) if mode == "min" else ((0.9, 0.3), (None, 0.3))
    )
    for patience, delta, (target, diverge) in itertools.product((0, 1, 2, 3, 5), (0.0, 0.01, 0.1), bounds):
        given = {"mode": mode, "patience": patience, "min_delta": delta, "check_finite": finite}
        given |= {"stopping_threshold": target, "divergence_threshold": diverge}
        theirs = TheirStopping("val_loss", strict=False, **given)
        assert our_waits(lightning_early_stopping("val_loss", **given), trace) == their_waits(
            theirs, trace
        ), given


def test_lightning_raises_where_a_strict_metric_is_missing() -> None:
    with pytest.raises(RuntimeError, match="not available"):
        their_waits(TheirStopping("val_loss", mode="min"), [0.9, None])


def their_checkpoints(callback: ModelCheckpoint, trace: Trace) -> tuple[list[int], set[int]]:
    """Return the epochs saved, and those whose files are left in the end."""
    files: set[str] = set()
    trainer, saved = trainer_of(files), []
    callback.setup(trainer, None, "fit")
    for epoch, value in enumerate(trace, start=1):
        trainer.current_epoch, trainer.global_step = epoch, epoch
        trainer.callback_metrics = metrics_of(value)
        callback.on_train_epoch_end(trainer, None)
        saved += [epoch] if callback._last_global_step_saved == epoch else []
    assert files == set(callback.best_k_models)
    return saved, {int(Path(path).stem.rpartition("=")[2]) for path in files}


def our_checkpoints(rule: Rule, trace: Trace) -> tuple[list[int], set[int]]:
    history: list[Observation] = []
    records: list[CheckpointRecord] = []
    saved = []
    for epoch, value in enumerate(trace, start=1):
        previous, now = Clock(step=epoch - 1), Clock(step=epoch)
        observed = {} if value is None else {"val_loss": value}
        if decide(rule, Moment(previous, now, observed=observed, history=tuple(history))):
            saved.append(epoch)
            records.append(CheckpointRecord(epoch, "a", 60.0 * epoch, now, observed))
            records = [r for r in records if (r.step, "a") in rule.keeps(records, 0.0)]
        history += [Observation("val_loss", v, now) for v in observed.values()]
    return saved, {record.step for record in records}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [-1, 1, 2, 3, 5])
def test_save_top_k(trace: Trace, mode: str, k: int, tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", mode=mode, save_top_k=k)
    ours = our_checkpoints(lightning_save_top_k("val_loss", mode=mode, save_top_k=k), trace)
    assert ours == their_checkpoints(callback, trace)


def test_save_top_0_is_refused() -> None:
    with pytest.raises(PolicyError, match="save_top_k=0 saves nothing"):
        lightning_save_top_k("val_loss", mode="min", save_top_k=0)


class Scripted(pl.LightningModule):
    """Logs the trace as its validation loss."""

    def __init__(self, trace: list[float]) -> None:
        super().__init__()
        self.trace = trace
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def on_train_epoch_end(self) -> None:
        self.log("val_loss", self.trace[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore")
def test_a_real_fit_stops_and_keeps_the_same(tmp_path: Path) -> None:
    values: list[float] = [0.9, 0.8, 0.85, 0.81, 0.7, 0.7, 0.75, 0.71, 0.1, math.nan]
    stopper = TheirStopping("val_loss", mode="min", patience=3)
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", mode="min", save_top_k=2)
    trainer = pl.Trainer(
        max_epochs=len(values),
        accelerator="cpu",
        callbacks=[stopper, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Scripted(values), torch.utils.data.DataLoader(torch.ones(1, 1)))
    ours = our_waits(lightning_early_stopping("val_loss", mode="min", patience=3), values)
    assert stopper.stopped_epoch + 1 == len(ours) == 8
    _, left = our_checkpoints(lightning_save_top_k("val_loss", mode="min", save_top_k=2), values[: len(ours)])
    assert {int(path.stem.rpartition("=")[2]) for path in tmp_path.glob("*.ckpt")} == left
