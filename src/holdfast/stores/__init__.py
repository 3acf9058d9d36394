"""Floor 1: places that hold bytes by key. A store never knows a tensor."""

from holdfast.stores.base import ObjectInfo, Served, Store, Stream
from holdfast.stores.disk import Disk, OsDisk
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from holdfast.stores.probe import prove_create
from holdfast.stores.urls import find_below, is_reopenable, name_of, open_store, place_below, real_place
from holdfast.stores.wrappers import Cached, Delegating, Prefixed, Retrying, Throttled

__all__ = [
    "Cached",
    "Delegating",
    "Disk",
    "LocalStore",
    "MemoryStore",
    "ObjectInfo",
    "OsDisk",
    "Prefixed",
    "Retrying",
    "Served",
    "Store",
    "Stream",
    "Throttled",
    "find_below",
    "is_reopenable",
    "name_of",
    "open_store",
    "place_below",
    "prove_create",
    "real_place",
]
