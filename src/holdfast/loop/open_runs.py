"""Runs that are still open when the interpreter ends: what was saved becomes durable, a failure is an exit code."""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from typing import Protocol

from holdfast.core.errors import HoldfastError
from holdfast.saving.writer import at_work

__all__ = ["forget_open", "note_open"]


class _Closable(Protocol):
    def _close_at_exit(self) -> None: ...


_open: weakref.WeakSet[_Closable] = weakref.WeakSet()


def note_open(run: _Closable) -> None:
    """Close this one at the end, unless it is forgotten before."""
    _open.add(run)


def forget_open(run: _Closable) -> None:
    """Leave this one alone from now on."""
    _open.discard(run)


@atexit.register
def _close_all() -> None:
    """Make every open run durable before the interpreter ends, and what was saved of one that the program dropped; a
    failed save is an exit code that is not zero."""
    failed = False
    for end in [run._close_at_exit for run in list(_open)] + [writer.wait for writer in list(at_work)]:
        try:
            end()
        except HoldfastError as e:
            print(f"holdfast: {e}", file=sys.stderr)
            failed = True
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
