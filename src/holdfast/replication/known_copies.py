"""The copies that a run knows of."""

from __future__ import annotations

import logging

from holdfast.catalog.identity import read_identity
from holdfast.core.errors import HoldfastError, StateError
from holdfast.replication.record import read_mirrors
from holdfast.stores import Store, open_store

__all__ = ["known_copies"]

logger = logging.getLogger("holdfast")


def known_copies(store: Store) -> list[Store]:
    """Return the mirrors that a run remembers and that can be read now; others are reported and left out.

    Raises:
        StateError: there is none.
    """
    run = read_identity(store).run
    remembered = read_mirrors(store, run)
    found: list[Store] = []
    for mirror in remembered:
        try:
            place = open_store(mirror.url)
            theirs = read_identity(place).run
        except HoldfastError as e:
            logger.warning("the mirror %s is left out: %s", mirror.url, e)
            continue
        if theirs == run:
            found.append(place)
        else:
            logger.warning("the mirror %s is left out: it holds another run, %s", mirror.url, theirs)
    if not found:
        raise StateError(
            f"{store.url} knows of no copy that can be read now"
            f"{'' if remembered else ', for it has no mirrors'}; name one (--from)"
        )
    return found
