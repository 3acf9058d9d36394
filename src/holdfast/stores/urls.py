"""From a URL or a path to a store."""

from __future__ import annotations

import os
import threading
from urllib.parse import unquote, urlsplit

from holdfast.core.errors import StoreError
from holdfast.stores.base import Store
from holdfast.stores.disk import OsDisk
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore

__all__ = ["is_reopenable", "open_store"]

_memory: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()


def open_store(url: str | os.PathLike[str] | Store) -> Store:
    """Return the store that a directory path, a `file://` or a `memory://` URL names; a Store is returned as it is.

    Two `memory://` URLs with the same name are the same store within a process.

    Raises:
        StoreError: the scheme is not known.
    """
    if not isinstance(url, (str, os.PathLike)):
        return url
    text = os.fspath(url)
    if "://" not in text:
        return LocalStore(os.path.expanduser(text))
    parts = urlsplit(text)
    if parts.scheme == "file":
        return LocalStore(unquote(parts.path))
    if parts.scheme == "memory":
        with _memory_lock:
            return _memory.setdefault(parts.netloc + parts.path, MemoryStore(parts.netloc + parts.path))
    raise StoreError(f"no store for {text!r}: give a directory, a file:// or a memory:// URL")


def is_reopenable(store: Store) -> bool:
    """Return whether `open_store(store.url)` is the same store in any process of this machine."""
    return type(store) is LocalStore and type(store.disk) is OsDisk
