"""`proofs.json`: when each data file of a run was last read in full, and whether every byte was right.

It is a cache for those who decide what to read next, and never a reason not to look: a restore, a repair and a copy
verify what they read whatever it says. A proof is of one object, told by its size and time of last change; whatever
takes that object's place is unproven. What was found bad stays bad until it is proven intact.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field

import msgspec

from holdfast.catalog.keys import PROOFS
from holdfast.core.errors import (
    HoldfastError,
    InvalidFormat,
    NotFound,
    OutOfSpace,
    PermissionDenied,
    UnsupportedVersion,
)
from holdfast.format.manifest import FORMAT_VERSION, check_version
from holdfast.format.sealed import seal, unseal
from holdfast.stores import ObjectInfo, Store

__all__ = ["Proof", "Proofs", "check_proofs"]

logger = logging.getLogger("holdfast")

SKEW_SECONDS = 3600.0  # a proof from further in the future is of a clock that was wrong


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """What was found when an object was last read in full: `problem` says what was wrong, empty when nothing was.

    `size` and `modified` are the object's, as the store listed it before it was read.
    """

    time: float
    size: int
    modified: float
    problem: str = ""


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`began` and `ended` are of the last scrub that was to read everything; one under way has no `ended`."""

    format: int
    run: str
    began: float
    ended: float | None
    objects: dict[str, Proof]


@dataclass(slots=True)
class Proofs:
    """The proofs of a run, as a store has them and as they are added to. Times are seconds since the Unix epoch."""

    run: str
    began: float = 0.0
    ended: float | None = 0.0
    objects: dict[str, Proof] = field(default_factory=dict)

    @staticmethod
    def of(store: Store, run: str) -> Proofs:
        """Return what a store has; nothing where that does not verify or is of another run."""
        try:
            found = _read(store)
        except NotFound:
            return Proofs(run)
        except HoldfastError as e:
            logger.warning("%s: what was proven before is unknown: %s", store.url, e)
            return Proofs(run)
        if found.run != run:
            return Proofs(run)
        return Proofs(run, found.began, found.ended, found.objects)

    def proven(self, found: ObjectInfo, now: float) -> float | None:
        """Return when an object, as it is listed now, was last proven intact; None where it was not."""
        proof = self.objects.get(found.key)
        if proof is None or proof.problem or (proof.size, proof.modified) != (found.size, found.modified):
            return None
        return proof.time if proof.time <= now + SKEW_SECONDS else None

    @property
    def bad(self) -> dict[str, str]:
        """What was wrong with each object that was not proven intact since."""
        return {key: proof.problem for key, proof in sorted(self.objects.items()) if proof.problem}

    def note(self, found: ObjectInfo, now: float, problem: str = "") -> None:
        """Take in that an object was read, and what was wrong with it."""
        self.objects[found.key] = Proof(now, found.size, found.modified, problem)

    def keep(self, keys: Collection[str]) -> None:
        """Forget all other objects: they are gone, or nothing needs them any more."""
        self.objects = {key: proof for key, proof in self.objects.items() if key in keys}

    def save(self, store: Store, needed: Collection[str] | None = None) -> bool:
        """Store the proofs, joined with those that someone else stored meanwhile; with `needed`, of these keys alone.

        Return False where nothing may or can be written.
        """
        for key, proof in Proofs.of(store, self.run).objects.items():
            mine = self.objects.get(key)
            if mine is None or mine.time < proof.time:
                self.objects[key] = proof
        if needed is not None:
            self.keep(needed)
        document = _Document(FORMAT_VERSION, self.run, self.began, self.ended, self.objects)
        try:
            store.replace(PROOFS, seal(msgspec.json.encode(document)))
        except (PermissionDenied, OutOfSpace) as e:
            logger.warning("what was proven is not recorded: %s", e)
            return False
        return True


def check_proofs(store: Store) -> None:
    """Raise IntegrityError when there are proofs that do not verify."""
    try:
        _read(store)
    except (NotFound, UnsupportedVersion):
        pass


def _read(store: Store) -> _Document:
    body = unseal(store.read(PROOFS), PROOFS)
    check_version(body, PROOFS)
    try:
        return msgspec.json.decode(body, type=_Document)
    except (ValueError, RecursionError) as e:
        raise InvalidFormat(f"{PROOFS}: does not hold proofs: {e}") from e
