"""Operations between two places: the store that things go wrong in is the one that is written."""

from __future__ import annotations

import functools

import holdfast
from crash.operations import Operation, state, truth, two_checkpoints
from holdfast import Run
from holdfast.catalog.keys import CHECKPOINTS
from holdfast.core.clock import SystemTime
from holdfast.format.signing import SigningKey
from holdfast.replication.copying import copy_beside, copy_checkpoint
from holdfast.replication.looking import look
from holdfast.replication.reconcile import Goal, Reconciler
from holdfast.replication.scrub import scrub
from holdfast.stores import MemoryStore, Store
from holdfast.testing import invariants
from holdfast.testing.invariants import Broken


@functools.cache
def primaries() -> tuple[MemoryStore, MemoryStore]:
    """A run with two checkpoints, and the same with four and a tag."""
    early, late = MemoryStore("early"), MemoryStore("late")
    two_checkpoints(early)
    for key in early.names(""):
        late.create(key, early.read(key))
    for step in (3, 4):
        holdfast.save(late, state(step), step=step, tag=f"t{step}")
    return early, late


def mirror(primary: Store, target: Store) -> None:
    run = Run(primary)
    outcome = Reconciler(target, Goal(), SystemTime()).run(look(run.history, run.id))
    if outcome.failed:
        raise holdfast.HoldfastError(str(outcome.failed))


def copy(primary: Store, target: Store) -> None:
    copy_beside(primary, target)
    for key in primary.names(CHECKPOINTS):
        copy_checkpoint(primary, target, key)


def is_all_there(target: Store) -> None:
    _, late = primaries()
    if Run(target).steps != [1, 2, 3, 4]:
        raise Broken("I12", f"the copy holds {Run(target).steps}")
    invariants.replicas_agree(late, target)
    invariants.old_stays_readable(target, truth(1, 2, 3, 4))


def sign(store: Store) -> None:
    Run(store).sign(2, key())


@functools.cache
def key() -> SigningKey:
    return SigningKey.generate()


def is_signed(store: Store) -> None:
    if list(Run(store).signers(2)) != [key().public.id]:
        raise Broken("I6", f"it is signed by {Run(store).signers(2)}")


def is_proven(store: Store) -> None:
    report = scrub(store)
    if report.problems or not report.recorded:
        raise Broken("I4", f"a sound run is scrubbed, and found: {report}")


COPIES = [
    Operation(
        "mirror", lambda s: mirror(primaries()[1], s), truth(1, 2), truth(1, 2, 3, 4),
        prepare=lambda s: mirror(primaries()[0], s), uploads=True, temporary=4, settled=is_all_there,
    ),
    Operation(
        "cp", lambda s: copy(primaries()[1], s), truth(1, 2), truth(1, 2, 3, 4),
        prepare=lambda s: copy(primaries()[0], s), uploads=True, temporary=4, settled=is_all_there,
    ),
    Operation("scrub", scrub, truth(1, 2), truth(1, 2), settled=is_proven),
    Operation("sign", sign, truth(1, 2), truth(1, 2), settled=is_signed),
]  # fmt: skip
