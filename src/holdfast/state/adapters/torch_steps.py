"""torch optimizers: the one moment at which parameters and optimizer state change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["before_each_step"]


def before_each_step(act: Callable[[], None]) -> Callable[[], None]:
    """Call `act` before any optimizer of this process steps; return what ends that."""

    def hook(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        act()

    return register_optimizer_step_pre_hook(hook).remove
