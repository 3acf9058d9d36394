"""The places of torch that decide that something becomes files: changed for who stands in, and put back.

- The classes `FileSystemWriter` and `FileSystemReader`, whoever has imported them and under whatever name: calling them
  makes something else. That is done by a metaclass. (A `__new__` set on a class cannot be taken back: CPython keeps its
  slot.)
- `_storage_setup`, which chooses a storage for a bare `checkpoint_id`, in every module of DCP that has imported it.
- The executors of `async_save`, which leave that choice to their thread or process: it is made before they begin.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from holdfast.core.errors import MissingDependency

__all__ = ["Choose", "chosen_by_torch", "install"]

# Given whether it is to read, and the arguments that DCP's own would get, "path" among them: the storage object that
# stands in, or None for DCP's own.
Choose: TypeAlias = Callable[[bool, Mapping[str, Any]], object | None]

_DCP = "torch.distributed.checkpoint"
_SETUP = "_storage_setup"
_EXECUTORS = ("_ThreadBasedAsyncCheckpointExecutor", "_ProcessBasedAsyncCheckpointExecutor")


def install(choose: Choose) -> Callable[[], None]:
    """Have `choose` asked wherever torch makes DCP's file storage; return what puts all back.

    Raises:
        MissingDependency: a place is not there, or not as it was when this was written; nothing was changed.
    """
    _check()
    undo: list[Callable[[], None]] = []

    def put_back() -> None:
        while undo:
            undo.pop()()

    try:
        for kind in (FileSystemWriter, FileSystemReader):
            undo.append(_change(kind, "__class__", _metaclass(kind, choose)))
        original = getattr(state_dict_saver, _SETUP)
        setup = _setup(original, choose)
        for module in _modules_with(original):
            undo.append(_change(module, _SETUP, setup))
        for name in _EXECUTORS:
            if hasattr(state_dict_saver, name):
                executor = _executor(getattr(state_dict_saver, name), choose)
                undo.append(_change(state_dict_saver, name, executor))
    except BaseException:
        put_back()
        raise
    return put_back


def chosen_by_torch(path: str) -> object:
    """Return the reader that `_storage_setup` gives for a path."""
    return getattr(state_dict_loader, _SETUP)(None, path, reader=True)


def _change(of: object, name: str, new: object) -> Callable[[], None]:
    before = getattr(of, name)

    def undo() -> None:
        if getattr(of, name) is new:  # what somebody has put over it since goes on to what was there
            setattr(of, name, before)

    setattr(of, name, new)
    return undo


def _check() -> None:
    """Raises MissingDependency: a place is not there, or not as it was when this was written."""
    wanted = {
        f"{_DCP}.{kind.__name__}(path, ...)": "path" in _parameters(_init_of(kind))
        for kind in (FileSystemWriter, FileSystemReader)
    }
    for module in (state_dict_saver, state_dict_loader):
        setup = getattr(module, _SETUP, None)
        name = f"{module.__name__}.{_SETUP}(storage, checkpoint_id, reader)"
        wanted[name] = setup is not None and _parameters(setup) == ["storage", "checkpoint_id", "reader"]
    saves = inspect.unwrap(state_dict_saver.async_save).__code__.co_names
    for name in _EXECUTORS:
        execute = getattr(getattr(state_dict_saver, name, None), "execute_save", None)
        takes = _parameters(execute) if execute is not None else []
        fits = {"checkpoint_id", "storage_writer"} <= set(takes) and name in saves
        wanted[f"{state_dict_saver.__name__}.{name}.execute_save(checkpoint_id, storage_writer)"] = (
            fits or _SETUP in saves  # older ones choose the storage in async_save itself
        )
    missing = [name for name, there in wanted.items() if not there]
    if missing:
        raise MissingDependency(
            f"torch {torch.__version__} has no {missing[0]}, so that something might be stored as files unnoticed; "
            "nothing was changed. Install torch==2.13.0, or pass HoldfastWriter and HoldfastReader yourself"
        )


def _init_of(kind: Any) -> Any:
    return kind.__init__


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _modules_with(setup: object) -> list[object]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(_DCP) and getattr(module, "__dict__", {}).get(_SETUP) is setup
    ]


def _metaclass(kind: type, choose: Choose) -> type:
    """Return a metaclass for a class with which calling that class, but no subclass of it, makes what is chosen."""
    before: Any = type(kind)
    signature = inspect.signature(_init_of(kind))

    def call(cls: type, *args: Any, **kwargs: Any) -> object:
        chosen = None
        if cls is kind:
            chosen = choose(kind is FileSystemReader, signature.bind(None, *args, **kwargs).arguments)
        return before.__call__(cls, *args, **kwargs) if chosen is None else chosen

    return type(f"{before.__name__}StoodInFor", (before,), {"__call__": call})


def _setup(original: Callable[..., Any], choose: Choose) -> Callable[..., Any]:
    def storage_setup(storage: Any, checkpoint_id: Any, reader: bool = False) -> Any:
        chosen = choose(reader, {"path": checkpoint_id}) if checkpoint_id and not storage else None
        return original(storage, checkpoint_id, reader) if chosen is None else chosen

    return storage_setup


def _executor(original: type, choose: Choose) -> type:
    def execute_save(self: Any, staged: Any, **given: Any) -> Any:
        if given.get("checkpoint_id") and not given.get("storage_writer"):
            given["storage_writer"] = choose(False, {"path": given["checkpoint_id"]})
        return original.execute_save(self, staged, **given)  # type: ignore[attr-defined]

    return type(original)(original.__name__, (original,), {"execute_save": execute_save})
