"""Floor 1: places that hold bytes by key. A store never knows a tensor."""

from holdfast.stores.base import ObjectInfo, Store, Stream
from holdfast.stores.disk import Disk, OsDisk
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from holdfast.stores.urls import is_reopenable, open_store

__all__ = [
    "Disk",
    "LocalStore",
    "MemoryStore",
    "ObjectInfo",
    "OsDisk",
    "Store",
    "Stream",
    "is_reopenable",
    "open_store",
]
