"""`run.json`: what makes a place a run, and its identity."""

from __future__ import annotations

import uuid

import msgspec

from holdfast.catalog.bounded import read_document
from holdfast.catalog.keys import RUN
from holdfast.core.errors import AlreadyExists, NotARun, NotFound
from holdfast.format.documents import Moment, Name, decode_document
from holdfast.format.manifest import FORMAT_VERSION, check_version
from holdfast.format.sealed import seal, unseal
from holdfast.stores import Store

__all__ = ["RunIdentity", "create_run", "read_identity"]


class RunIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The identity of a run: format version, a random id, when it was made (seconds since the Unix epoch)."""

    format: int
    run: Name
    created: Moment


def read_identity(store: Store) -> RunIdentity:
    """Return the identity of the run in a store.

    Raises:
        NotARun: the store holds none.
        UnsupportedVersion: a newer holdfast made it.
    """
    try:
        raw = read_document(store, RUN)
    except NotFound:
        raise NotARun(
            f"{store.url} is not a holdfast run: it has no {RUN}. Check the path; "
            "`holdfast ls DIR` finds runs below a directory or a URL"
        ) from None
    where = f"{store.url}/{RUN}"
    body = unseal(raw, where)
    check_version(body, where)
    return decode_document(body, RunIdentity, where, "a run's identity")


def create_run(store: Store, now: float) -> RunIdentity:
    """Return the identity of the run in a store, made if there is none."""
    try:
        return read_identity(store)
    except NotARun:
        pass
    identity = RunIdentity(FORMAT_VERSION, uuid.uuid4().hex, now)
    try:
        store.create(RUN, seal(msgspec.json.encode(identity)))
    except AlreadyExists:  # a rival made it
        return read_identity(store)
    return identity
