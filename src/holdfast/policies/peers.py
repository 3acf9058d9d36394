"""When Keras, Lightning and Hugging Face call a value better, to the last bit.

The presets must stop and save where the peer does, so they compare as the peer does: in single precision
where the peer's tensors are single precision, with a difference where the peer takes a difference, and with
the peer's own treatment of NaN and infinity. Sources: `MonitorCallback._is_improvement` (keras 3),
`EarlyStopping` and `ModelCheckpoint.check_monitor_top_k` (lightning 2),
`EarlyStoppingCallback.check_metric_value` and `Trainer._determine_best_metric` (transformers 5).
"""

from __future__ import annotations

import math
import struct
from typing import Literal

from holdfast.policies.arguments import Mode
from holdfast.policies.metrics import improves

__all__ = ["PEERS", "Peer", "better", "improves_like", "single", "worst"]

Peer = Literal["holdfast", "keras", "lightning", "hf"]
PEERS: tuple[Peer, ...] = ("holdfast", "keras", "lightning", "hf")


def single(value: float) -> float:
    """Return `value` rounded to IEEE single precision; what is too large becomes infinite."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def worst(mode: Mode) -> float:
    """Return the value that any finite value is better than."""
    return math.inf if mode == "min" else -math.inf


def better(value: float, other: float, mode: Mode) -> bool:
    """Return whether `value` is strictly better as plain floats compare; false when either is NaN."""
    return value < other if mode == "min" else value > other


def improves_like(
    peer: Peer, value: float, reference: float | None, mode: Mode, min_delta: float = 0.0
) -> bool:
    """Return whether `peer` says that `value` improves on `reference`; None means no value before."""
    if peer == "keras":
        return _keras(value, reference, mode, min_delta)
    if peer == "lightning":
        return _lightning(value, reference, mode, min_delta)
    if peer == "hf":
        return _hugging_face(value, reference, mode, min_delta)
    return improves(value, reference, mode, min_delta)


def _keras(value: float, reference: float | None, mode: Mode, min_delta: float) -> bool:
    # `keras.ops.less` makes tensors of Python floats, in single precision unless `floatx` is set otherwise.
    # The first value of all is taken unseen; if it is NaN, nothing improves on it ever after.
    if reference is None:
        return True
    shifted = value + min_delta if mode == "min" else value - min_delta
    return better(single(shifted), single(reference), mode)


def _lightning(value: float, reference: float | None, mode: Mode, min_delta: float) -> bool:
    # Logged metrics are single-precision tensors, and so is the difference. The reference starts at infinity.
    start = worst(mode) if reference is None else single(reference)
    delta = single(min_delta)
    shifted = single(value) + delta if mode == "min" else single(value) - delta
    return better(single(shifted), start, mode)


def _hugging_face(value: float, reference: float | None, mode: Mode, min_delta: float) -> bool:
    if reference is None:
        return True
    return better(value, reference, mode) and abs(value - reference) > min_delta
