"""Verify what lies beside the checkpoints: identity, tags, log, signatures, and the documents that only save work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from holdfast.catalog.bounded import read_document
from holdfast.catalog.identity import read_identity
from holdfast.catalog.index import check_index
from holdfast.catalog.keys import INDEX, LOG, PROOFS, RUN, SIGNATURES, TAGS, TIDY
from holdfast.catalog.proofs import check_proofs
from holdfast.catalog.runlog import check_segment
from holdfast.catalog.signatures import check_signatures
from holdfast.catalog.tags import decode_tag
from holdfast.catalog.tidiness import check_mark
from holdfast.catalog.verify import Problem
from holdfast.core.errors import IntegrityError, NotFound, StoreError
from holdfast.stores import Store

__all__ = ["CACHES", "verify_beside"]

CACHES: dict[str, Callable[[Store], None]] = {INDEX: check_index, TIDY: check_mark, PROOFS: check_proofs}


def verify_beside(store: Store) -> Iterator[Problem]:
    """Yield what is wrong, by the key of the object. What is removed meanwhile is not wrong."""
    checks: list[tuple[str, Callable[[Store], object]]] = [(RUN, read_identity)]
    checks += [(found.key, partial(_read_tag, found.key)) for found in store.list(TAGS)]
    checks += [(found.key, partial(_read_segment, found.key)) for found in store.list(LOG)]
    checks += [(found.key, partial(_read_signatures, found.key)) for found in store.list(SIGNATURES)]
    checks += CACHES.items()
    for key, check in checks:
        try:
            check(store)
        except NotFound:
            continue
        except (IntegrityError, StoreError) as e:  # what cannot be read is as bad as what is wrong
            yield Problem(key, str(e))


def _read_tag(key: str, store: Store) -> object:
    return decode_tag(read_document(store, key), key)


def _read_segment(key: str, store: Store) -> None:
    check_segment(store.read(key), key)


def _read_signatures(key: str, store: Store) -> object:
    return check_signatures(store, key)
