"""Gradients that no optimizer step has consumed yet: in the middle of an accumulation window they are state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from holdfast.state.registry import optimizers

__all__ = ["PendingGradients"]


class _Handle(Protocol):
    def remove(self) -> None: ...


class PendingGradients:
    """Notices, by a post-step hook on each optimizer of the state, whether a step consumed the gradients."""

    def __init__(self, state: Mapping[str, object]) -> None:
        self._stepped = False
        self._left = True  # the step that ended last was without an optimizer step
        self._handles: list[_Handle] = []
        self._watching = False
        found = {id(value): value for value in (*state.values(), *optimizers(state).values())}
        for value in found.values():
            # Asked of the class: an object that answers to every name, such as nnx.Rngs, is no optimizer.
            if callable(getattr(type(value), "register_step_post_hook", None)):
                register = cast("Any", value).register_step_post_hook
                self._handles.append(cast("_Handle", register(self._note)))
                self._watching = True

    def _note(self, *_: object) -> None:
        self._stepped = True

    def end_step(self) -> None:
        """End a step, and begin to watch the next one."""
        self._left, self._stepped = not self._stepped, False

    def found(self) -> bool:
        """Return whether no optimizer stepped in the step that ended last, nor since: then gradients must be saved."""
        return self._watching and self._left and not self._stepped

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._watching = False
