"""From a URL or a path to a store."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from holdfast.core.errors import StoreError
from holdfast.core.names import check_key
from holdfast.stores.address import SERVICES, parse_address, shown
from holdfast.stores.base import Served, Store
from holdfast.stores.disk import OsDisk
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from holdfast.stores.peers.address import parse_peer, parse_ring
from holdfast.stores.wrappers import Prefixed, url_below

__all__ = ["find_below", "is_reopenable", "name_of", "open_store", "place_below", "real_place"]

_memory: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()


def open_store(url: str | os.PathLike[str] | Store) -> Store:
    """Return the store that a directory path or a URL names; a Store is returned as it is.

    URLs: `file://`, `s3://` (`s3a://`), `gs://`, `az://` (`abfs://`), `peer://`, `peers://`, and `memory://`, of
    which two with the same name are the same store within a process.

    Raises:
        StoreError: there is no name, the scheme is not known, the URL holds a secret or an option that is not known, or
            one of a directory does not give its absolute path.
    """
    if not isinstance(url, (str, os.PathLike)):
        return url
    text = os.fspath(url)
    if not text:
        raise StoreError("an empty name is no place: give a directory ('.' for the present one) or a URL")
    if "://" not in text:
        return LocalStore(os.path.expanduser(text))
    parts = urlsplit(text)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise StoreError(
                f"{text!r} names no directory: write its path, or file:///ABSOLUTE/PATH with %23 for '#', %3F for '?'"
            )
        return LocalStore(unquote(parts.path))
    if parts.scheme == "memory":
        with _memory_lock:
            return _memory.setdefault(parts.netloc + parts.path, MemoryStore(parts.netloc + parts.path))
    if parts.scheme in SERVICES:
        from holdfast.stores.object import ObjectStore  # obstore is loaded by those who need it

        return ObjectStore(parse_address(text))
    if parts.scheme == "peer":
        from holdfast.stores.peers.client import PeerStore  # and what its protocol is made of

        return PeerStore(parse_peer(text))
    if parts.scheme == "peers":
        from holdfast.stores.peers.ring import RingStore

        return RingStore(parse_ring(text))
    raise StoreError(
        f"no store for {shown(text)!r}: give a directory, or a file://, s3://, gs://, az://, peer:// or memory:// URL"
    )


def name_of(url: str) -> str:
    """Return a place as a person writes it: a directory as its path, any other place as its URL."""
    return unquote(urlsplit(url).path) if url.startswith("file://") else url


def real_place(url: str) -> str:
    """Return what all URLs of one place have in common: of a directory its path behind all links."""
    return os.path.realpath(name_of(url)) if url.startswith("file://") else url


def place_below(place: str | os.PathLike[str] | Store, name: str) -> str | Store:
    """Return the place that lies under a name of another place, in the form that this one has.

    Raises:
        InvalidFormat: the name is none that a key may have.
    """
    check_key(name)
    if not isinstance(place, (str, os.PathLike)):
        return Prefixed(place, name)
    text = os.fspath(place)
    return url_below(text, name) if "://" in text else os.path.join(text, *name.split("/"))


def find_below(url: str, name: str, depth: int) -> Iterator[str] | None:
    """Return the URLs, at most `depth` levels below one, of the places in an object store that directly hold an object
    of a name; None where a URL names no object store."""
    if urlsplit(url).scheme not in SERVICES:
        return None
    from holdfast.stores.browsing import find_prefixes  # obstore is loaded by those who need it

    return (found.url for found in find_prefixes(parse_address(url), name, depth))


def is_reopenable(store: Store) -> bool:
    """Return whether `open_store(store.url)` is the same store in any process of this machine."""
    if isinstance(store, Prefixed):
        return is_reopenable(store.inner)
    return isinstance(store, Served) or (type(store) is LocalStore and type(store.disk) is OsDisk)
