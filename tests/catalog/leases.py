"""Leases as other processes leave them, for the tests of this directory."""

from __future__ import annotations

import msgspec

from holdfast.catalog.keys import lease_key
from holdfast.catalog.lease import LEASE_SECONDS, LeaseDoc
from holdfast.format.sealed import seal
from holdfast.stores import Store
from holdfast.testing import MockClock


def put(store: Store, **changes: object) -> LeaseDoc:
    """Write a lease as some other process would have left it."""
    clock = MockClock()
    doc = LeaseDoc(
        1, "elsewhere", 12345, "777", "another:namespace", clock.now(), clock.now() + LEASE_SECONDS
    )
    doc = msgspec.structs.replace(doc, **changes)
    store.replace(lease_key(doc.generation), seal(msgspec.json.encode(doc)))
    return doc
