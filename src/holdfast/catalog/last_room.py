"""The first object that whoever frees space has to write, in a store that has no space."""

from __future__ import annotations

import errno

from holdfast.catalog.keys import INDEX, PROOFS, TIDY
from holdfast.core.errors import AlreadyExists, OutOfSpace
from holdfast.stores import Store

__all__ = ["create_in_last_room"]


def create_in_last_room(store: Store, key: str, raw: bytes) -> None:
    """Create an object; in a full store in the place of what only saves work, which anybody may remove at any time.

    Raises:
        AlreadyExists: as `Store.create`.
        OutOfSpace: there is no room even so; the message says what to do.
    """
    try:
        store.create(key, raw)
    except OutOfSpace as e:
        store.delete([INDEX, TIDY, PROOFS])
        try:
            store.create(key, raw)
        except (
            AlreadyExists,
            OutOfSpace,
        ):  # the former: a rival, or it is there although the store said otherwise
            raise OutOfSpace(
                errno.ENOSPC,
                f"{store.url}: is so full that the run cannot even be taken for writing ({e}). Delete some other file "
                "there, of 100 kB or more; then `holdfast prune --now` and `holdfast collect --grace 0s` have room to "
                "work in",
            ) from e
