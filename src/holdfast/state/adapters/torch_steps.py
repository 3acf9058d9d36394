"""torch optimizers: the one moment at which parameters and optimizer state change, and gradients are consumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from holdfast.state.adapters import torch_devices
from holdfast.state.adapters.torch_names import optimizers_in

__all__ = ["after_each_step", "before_each_step", "unused_gradients"]


def before_each_step(act: Callable[[bool], None]) -> Callable[[], None]:
    """Call `act` before any optimizer of this process steps; return what ends that.

    It is told whether such a step may come again without being announced: noted down in a CUDA graph it is replayed,
    and no hook sees that.
    """

    def hook(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        replayed = torch_devices.DEVICES.capturing()
        act(replayed or any(group.get("capturable", False) for group in optimizer.param_groups))

    return register_optimizer_step_pre_hook(hook).remove


def after_each_step(act: Callable[[object], None]) -> Callable[[], None]:
    """Call `act`, with its parameter groups, when any optimizer of this process has stepped; return what ends that."""

    def hook(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        act(optimizer.param_groups)

    return register_optimizer_step_post_hook(hook).remove


def unused_gradients(state: Mapping[str, object], stepped: Set[int]) -> bool:
    """Return whether an optimizer in `state` has gradients whose parameter groups are not, by id, among the stepped."""
    return any(
        parameter.grad is not None
        for _, value in optimizers_in(state)
        if id(value.param_groups) not in stepped
        for group in value.param_groups
        for parameter in group["params"]
    )
