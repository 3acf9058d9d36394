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
from holdfast.replication.repair import repair
from holdfast.replication.scrub import scrub
from holdfast.stores import MemoryStore, Store
from holdfast.testing import invariants
from holdfast.testing.invariants import Broken, Truth


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


@functools.cache
def damaged_run() -> tuple[dict[str, bytes], str]:
    """What a run holds of which one data file, that of step 2 alone, has a flipped bit; and its key."""
    early, _ = primaries()
    objects = {k: early.read(k) for k in early.names("")}
    victim = next(k for k in sorted(objects) if k.startswith("data/000000000002"))
    raw = bytearray(objects[victim])
    raw[-1] ^= 1
    return {**objects, victim: bytes(raw)}, victim


def with_damage(store: Store) -> None:
    for key, data in damaged_run()[0].items():
        store.create(key, data)


def mending(store: Store, acknowledged: Truth, allowed: Truth) -> list[int]:
    """What holds while a run is mended: what was good stays as it is, what was bad is bad, mended or gone, never other."""
    objects, victim = damaged_run()
    committed = {k: v for k, v in objects.items() if k.startswith(("data/", "checkpoints/", "run.json"))}
    invariants.good_never_overwritten(committed, store, lambda key: key != victim)
    if victim in store.names("data") and store.read(victim) not in (
        objects[victim],
        primaries()[0].read(victim),
    ):
        raise Broken("I12", f"{victim} is neither what it was nor what it ought to be")
    invariants.no_silent_corruption(store, allowed, {victim})
    invariants.old_stays_readable(store, acknowledged)
    return Run(store).steps


def is_mended(store: Store) -> None:
    invariants.promises(store, truth(1, 2), truth(1, 2))


COPIES = [
    Operation(
        "mirror", lambda s: mirror(primaries()[1], s), truth(1, 2), truth(1, 2, 3, 4),
        prepare=lambda s: mirror(primaries()[0], s), uploads=True, temporary=4, settled=is_all_there,
    ),
    Operation(
        "cp", lambda s: copy(primaries()[1], s), truth(1, 2), truth(1, 2, 3, 4),
        prepare=lambda s: copy(primaries()[0], s), uploads=True, temporary=4, settled=is_all_there,
    ),
    Operation(
        "repair", lambda s: repair(s, [primaries()[0]]), truth(1), truth(1, 2),
        prepare=with_damage, uploads=True, temporary=4, promises=mending, settled=is_mended,
    ),
    Operation("scrub", scrub, truth(1, 2), truth(1, 2), settled=is_proven),
    Operation("sign", sign, truth(1, 2), truth(1, 2), settled=is_signed),
]  # fmt: skip
