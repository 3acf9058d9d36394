"""torch optimizers: the one moment at which parameters and optimizer state change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from holdfast.state.adapters import torch_devices

__all__ = ["before_each_step"]


def before_each_step(act: Callable[[bool], None]) -> Callable[[], None]:
    """Call `act` before any optimizer of this process steps; return what ends that.

    It is told whether such a step may come again without being announced: noted down in a CUDA graph it is replayed,
    and no hook sees that.
    """

    def hook(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        replayed = torch_devices.DEVICES.capturing()
        act(replayed or any(group.get("capturable", False) for group in optimizer.param_groups))

    return register_optimizer_step_pre_hook(hook).remove
