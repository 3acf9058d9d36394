"""Readers that are at it: a small object each, so that nobody frees what a long read still needs.

A reader says what it needs before it looks whether that is there; who deletes takes names away before it looks who
reads. So one of the two sees the other. A reader that died counts until its time is over; ages are told by the store's
own clock, so the clocks of readers do not matter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from holdfast.catalog.keys import LEASES, READERS, reader_key
from holdfast.core.errors import HoldfastError, InvalidFormat, NotFound, StoreError
from holdfast.format.manifest import FORMAT_VERSION, Manifest, check_version
from holdfast.format.sealed import seal, unseal
from holdfast.stores import Store

__all__ = ["READER_SECONDS", "ReaderDoc", "Readers", "find_readers", "reading"]

logger = logging.getLogger("holdfast")

READER_SECONDS = 600.0


class ReaderDoc(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who reads a checkpoint, and the data files that it needs."""

    format: int
    host: str
    pid: int
    why: str
    step: int
    attempt: str
    files: list[str]


@dataclass(frozen=True, slots=True)
class Readers:
    """What readers need: attempts and data files. `unknown`: there is a reader that does not say what it needs."""

    attempts: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    unknown: bool = False
    ended: Sequence[str] = ()  # keys of those whose time is over


def find_readers(store: Store) -> Readers:
    """Return what the readers of a run need now."""
    listed = store.list(READERS)
    if not listed:
        return Readers()
    # The newest lease is renewed three times a minute: so late it is at least, by the clock that dates the readers.
    now = max((o.modified for o in store.list(LEASES)), default=0.0)
    docs: list[ReaderDoc] = []
    ended: list[str] = []
    unknown = False
    for found in listed:
        if found.modified + READER_SECONDS < now:
            ended.append(found.key)
            continue
        try:
            docs.append(_decode(store.read(found.key), found.key))
        except NotFound:  # it has just finished
            continue
        except HoldfastError as e:
            logger.warning("%s; no data is freed until that reader has ended", e)
            unknown = True
    files = frozenset(key for doc in docs for key in doc.files)
    return Readers(frozenset(doc.attempt for doc in docs), files, unknown, ended)


@contextlib.contextmanager
def reading(store: Store, manifest: Manifest, why: str) -> Iterator[None]:
    """Keep what a checkpoint needs from being freed for as long as the context lasts, retention and removal included.

    Where the store may not be written to, the read goes unprotected, as any short one does.
    """
    key = reader_key(secrets.token_hex(6))
    files = sorted(manifest.file_keys)
    doc = ReaderDoc(
        FORMAT_VERSION, socket.gethostname(), os.getpid(), why, manifest.step, manifest.attempt, files
    )
    raw = seal(msgspec.json.encode(doc))
    try:
        store.create(key, raw)
    except StoreError as e:
        logger.debug("%s is read without protection: %s", store.url, e)
        yield
        return
    ended = threading.Event()
    beat = threading.Thread(target=_renew, args=(store, key, raw, ended), name="holdfast-reader", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with contextlib.suppress(StoreError):  # it ends by itself
            store.delete([key])


def _renew(store: Store, key: str, raw: bytes, ended: threading.Event) -> None:
    while not ended.wait(READER_SECONDS / 3):
        with contextlib.suppress(StoreError):  # a store that is away: the read will say so
            store.replace(key, raw)


def _decode(raw: bytes, key: str) -> ReaderDoc:
    body = unseal(raw, key)
    check_version(body, key)
    try:
        return msgspec.json.decode(body, type=ReaderDoc)
    except (ValueError, RecursionError) as e:
        raise InvalidFormat(f"{key}: is not the lease of a reader: {e}") from e
