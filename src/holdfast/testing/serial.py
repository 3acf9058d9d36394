"""Calls of several threads, one at a time: what a call does and what is noted of it belong together."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["one_at_a_time"]

Class = TypeVar("Class", bound=type)


def one_at_a_time(cls: Class) -> Class:
    """Let no two threads be in methods of the same object at once, of those that override one of the class before."""
    for name, method in list(vars(cls).items()):
        if callable(method) and not name.startswith("_") and hasattr(cls.__base__, name):
            setattr(cls, name, _locked(method))
    return cls


def _locked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # setdefault is one step, whichever threads come first.
        with self.__dict__.setdefault("_one_at_a_time", threading.RLock()):
            return method(self, *args, **kwargs)

    return call
