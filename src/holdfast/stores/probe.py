"""Does a server keep its word on `create`? Everything that keeps two writers apart stands on it.

Some servers that speak S3 accept the condition "only if absent" and overwrite all the same. That is found out before
the first byte of a run is written there.
"""

from __future__ import annotations

import contextlib
import secrets
import threading

from holdfast.core.errors import AlreadyExists, StoreError
from holdfast.stores.address import shown
from holdfast.stores.base import Served, Store
from holdfast.stores.wrappers import Delegating

__all__ = ["PROBES", "prove_create"]

PROBES = "probe"  # what a prober that died left there is swept

_proven: set[str] = set()
_lock = threading.Lock()


class _Overwrote(Exception):
    pass


def prove_create(store: Store) -> str:
    """Return "" when `create` of a store never overwrites, and a note for the record when the user vouches instead
    that nobody else writes there (`?single_writer=1`).

    A server is asked once in the life of a process, and nothing stays of it. Stores of this machine need no proof.

    Raises:
        StoreError: the server overwrites, or does not know the condition; the message says what to do. Or it cannot
            be written to at all.
    """
    served = _served(store)
    if served is None:
        return ""
    if served.single_writer:
        return "vouched for by the user: conditional puts are not relied on"
    with _lock:
        if served.url not in _proven:
            _probe(store, served.url)
            _proven.add(served.url)
    return ""


def _served(store: Store) -> Served | None:
    """Return the server behind a store, through what is wrapped around it."""
    while isinstance(store, Delegating):
        store = store.inner
    return store if isinstance(store, Served) else None


def _probe(store: Store, url: str) -> None:
    key = f"{PROBES}/{secrets.token_hex(8)}"
    try:
        store.create(key, b"first")
        with contextlib.suppress(AlreadyExists):
            store.create(key, b"second")
            raise _Overwrote
    except _Overwrote:
        raise StoreError(
            f"{shown(url)}: the server silently overwrote an object that was to be created only if absent, so two "
            f"writers could destroy each other's checkpoints. {_remedy(url)}"
        ) from None
    finally:
        with contextlib.suppress(StoreError):  # what says no to this is told already
            store.delete([key])


def _remedy(url: str) -> str:
    separator = "&" if "?" in url else "?"
    return (
        "Use a server that honours If-None-Match; or, if never more than one process writes there, vouch for it: "
        f"{url}{separator}single_writer=1"
    )
