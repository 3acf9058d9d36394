"""Early stopping and best checkpoints exactly as Keras, Lightning and Hugging Face do them.

Each function takes the peer's own parameter names and reproduces its stop step and its choice of best
checkpoints on the same metric values, including rounding to single precision and what NaN does to it. Where a
peer guesses the direction of a metric from its name, the direction must be given here. Tested against the
peers themselves in `tests/policies`.
"""

from __future__ import annotations

from holdfast.core.errors import PolicyError
from holdfast.policies.arguments import Mode, metric_name, number, optimisation_mode, whole
from holdfast.policies.best import Best
from holdfast.policies.early_stopping import EarlyStopping

__all__ = ["hf_best_model", "hf_early_stopping", "keras_early_stopping", "keras_save_best"]
__all__ += ["lightning_early_stopping", "lightning_save_top_k"]


def keras_early_stopping(
    monitor: str = "val_loss",
    *,
    mode: Mode,
    min_delta: float = 0.0,
    patience: int = 0,
    baseline: float | None = None,
    start_from_epoch: int = 0,
) -> EarlyStopping:
    """Stop where `keras.callbacks.EarlyStopping` stops.

    Observe once per epoch, with `clock.epoch` counting the finished epochs. As in Keras, a first value of NaN
    is never improved on, and an epoch without the metric does not count. `restore_best_weights` is
    `ckpt.restore("best")`.
    """
    return EarlyStopping(
        monitor,
        mode=mode,
        patience=patience,
        min_delta=abs(number("min_delta", min_delta)),
        baseline=baseline,
        start_after_epoch=start_from_epoch,
        non_finite="ignore",
        like="keras",
    )


def lightning_early_stopping(
    monitor: str,
    *,
    mode: Mode,
    min_delta: float = 0.0,
    patience: int = 3,
    check_finite: bool = True,
    stopping_threshold: float | None = None,
    divergence_threshold: float | None = None,
) -> EarlyStopping:
    """Stop where `lightning.pytorch.callbacks.EarlyStopping` stops.

    Observe once per check. A check without the metric does not count, as with `strict=False`; with
    `strict=True` Lightning ends with an error there. Unlike Lightning, a resumed run follows the patience of
    the code, not the one in the checkpoint.
    """
    return EarlyStopping(
        monitor,
        mode=mode,
        patience=patience,
        min_delta=min_delta,
        target=stopping_threshold,
        diverge=divergence_threshold,
        non_finite="stop" if check_finite else "ignore",
        like="lightning",
    )


def hf_early_stopping(
    metric_for_best_model: str,
    *,
    greater_is_better: bool,
    early_stopping_patience: int = 1,
    early_stopping_threshold: float = 0.0,
) -> EarlyStopping:
    """Stop where `transformers.EarlyStoppingCallback` stops.

    Observe once per evaluation; as in the Trainer, the metric's name begins with "eval_", which is added if
    it is not there. The reference is the best value ever, so gains below the threshold use up patience. An
    evaluation without the metric does not count; the Trainer ends with an error there. Raises PolicyError for
    a patience below 1, with which the Trainer would stop at its first evaluation.
    """
    return EarlyStopping(
        _evaluated(metric_for_best_model),
        mode=_direction(metric_for_best_model, greater_is_better),
        patience=whole("early_stopping_patience", early_stopping_patience),
        min_delta=early_stopping_threshold,
        reference="best_ever",
        non_finite="ignore",
        like="hf",
    )


def keras_save_best(
    monitor: str = "val_loss", *, mode: Mode, initial_value_threshold: float | None = None
) -> Best:
    """Save when, and keep what, `keras.callbacks.ModelCheckpoint(save_best_only=True)` does.

    One difference: an epoch without the metric is not saved, where Keras warns and overwrites the best file.
    """
    threshold = (
        None
        if initial_value_threshold is None
        else number("initial_value_threshold", initial_value_threshold)
    )
    return Best(monitor, optimisation_mode(metric_name(monitor), mode), threshold=threshold, like="keras")


def lightning_save_top_k(monitor: str, *, mode: Mode, save_top_k: int = 1) -> Best:
    """Save when, and keep what, Lightning's `ModelCheckpoint(monitor=, mode=, save_top_k=)` does.

    As in Lightning, any value takes a free place, NaN as the worst of all; among equals the earliest loses
    its place first. `save_top_k=-1` is without bound. Raises PolicyError for 0, which saves nothing: leave
    the rule out.
    """
    if save_top_k == 0:
        raise PolicyError(
            "save_top_k=0 saves nothing; leave the rule out, or give -1 (all) or a number above zero"
        )
    k = None if save_top_k == -1 else whole("save_top_k", save_top_k)
    return Best(monitor, optimisation_mode(metric_name(monitor), mode), k, like="lightning")


def hf_best_model(metric_for_best_model: str, *, greater_is_better: bool) -> Best:
    """Save when the Trainer with `save_strategy="best"` does, and keep what `load_best_model_at_end` loads.

    The metric's name begins with "eval_", which is added if it is not there.
    """
    return Best(
        _evaluated(metric_for_best_model), _direction(metric_for_best_model, greater_is_better), like="hf"
    )


def _evaluated(metric: str) -> str:
    return metric if metric_name(metric).startswith("eval_") else f"eval_{metric}"


def _direction(metric: str, greater_is_better: object) -> Mode:
    if not isinstance(greater_is_better, bool):
        raise PolicyError(
            f"greater_is_better={greater_is_better!r} of {metric!r} must be True or False; it is not guessed"
        )
    return "max" if greater_is_better else "min"
