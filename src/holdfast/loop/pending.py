"""Gradients that no optimizer step has consumed yet: in the middle of an accumulation window they are state."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.state.registry import after_each_step, unused_gradients

__all__ = ["PendingGradients"]


class PendingGradients:
    """Notices which optimizers step, wherever they stand in the state, and so whose gradients were consumed.

    One that wraps another has its parameter groups: these say who stepped.
    """

    def __init__(self, state: Mapping[str, object]) -> None:
        self._state = state
        self._stepped: set[int] = set()
        self._stepped_before: set[int] = set()  # in the step that ended last
        self._unhook = after_each_step(self._note)

    def _note(self, groups: object) -> None:
        self._stepped.add(id(groups))

    def end_step(self, *, counted: bool) -> None:
        """Come to a safe point, and begin to watch what comes next. Where no step is `counted`, as at the end of an
        epoch, who stepped before it still did."""
        self._stepped_before = self._stepped if counted else self._stepped_before | self._stepped
        self._stepped = set()

    def found(self) -> bool:
        """Return whether an optimizer that did not step in the step that ended last, nor since, has gradients: then
        these must be saved."""
        return self._unhook is not None and unused_gradients(
            self._state, self._stepped | self._stepped_before
        )

    def remove(self) -> None:
        """Watch no more."""
        if self._unhook is not None:
            self._unhook()
            self._unhook = None
