"""What must hold whatever goes wrong, each promise as a function that raises `Broken`, naming promise and object.

`INVARIANTS` says what each id promises. A *truth* maps each step to the state that was saved as that step, whether the
save was acknowledged or not; *acknowledged* is the part of it whose saves returned before the fault.
"""

from __future__ import annotations

import os
import pathlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from holdfast.catalog.content import open_file
from holdfast.catalog.history import History
from holdfast.catalog.summary import read_summary
from holdfast.catalog.trash import BROKEN, list_trash, read_trash
from holdfast.core.errors import CommitConflict, CommitUnknown, HoldfastError
from holdfast.format.manifest import decode_manifest
from holdfast.functional import load, save
from holdfast.policies import Rule, plan
from holdfast.run import Run
from holdfast.stores import Store, open_store

__all__ = [
    "INVARIANTS",
    "Broken",
    "Truth",
    "bounded_resources",
    "commits_once",
    "good_never_overwritten",
    "honest_outcome",
    "left_over",
    "needed_exists",
    "no_half_commit",
    "no_silent_corruption",
    "old_stays_readable",
    "policy_is_pure",
    "promises",
    "recovers",
    "replicas_agree",
    "resources",
    "same",
]

Truth = Mapping[int, Mapping[str, object]]

INVARIANTS = {
    "I1": "every checkpoint acknowledged before the fault restores bit-identically",
    "I2": "what is listed restores whole, or refuses by name",
    "I3": "what was acknowledged survives power loss; what was not is whole or invisible",
    "I4": "any changed byte is reported, and a wrong value never restored",
    "I5": "everything that a checkpoint needs exists, be it listed or in the trash",
    "I6": "once the fault is gone the next save works without manual steps, and what a crash left is freed",
    "I7": "two writers never both believe that they committed the same place of the history",
    "I8": "under a deadline the process ends in time, with the new checkpoint or the old one, and says which",
    "I9": "threads, descriptors and temporary files return to what they were",
    "I10": "no error means that it is there; an unknown outcome is called unknown",
    "I11": "retention is a pure function, and never drops the newest checkpoint",
    "I12": "a bad object is never copied over a good one; replicas are byte-identical where they hold the same object",
}


class Broken(AssertionError):
    """A promise does not hold."""

    def __init__(self, id: str, found: str) -> None:
        super().__init__(f"{id} ({INVARIANTS[id]}): {found}")
        self.id = id


def same(found: object, expected: object) -> bool:
    """Return whether two nested values are equal, arrays and tensors to the bit."""
    if isinstance(expected, Mapping):
        alike = isinstance(found, Mapping) and list(found) == list(expected)
        return alike and all(same(found[k], v) for k, v in expected.items())  # type: ignore[index]
    if isinstance(expected, (list, tuple)):
        return (
            type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
        )
    if hasattr(expected, "shape"):
        a, b = np.asarray(found), np.asarray(expected)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(found) is type(expected) and (found == expected or (found != found and expected != expected))


def old_stays_readable(store: str | os.PathLike[str] | Store, acknowledged: Truth, *, id: str = "I1") -> None:
    """I1, and I3 on what a power cut left: each acknowledged checkpoint restores, bit by bit."""
    run = Run(store) if acknowledged else None
    for step, state in acknowledged.items():
        try:
            assert run is not None
            found = load(run.store, step=step, as_="numpy")
        except HoldfastError as e:
            raise Broken(id, f"step {step} was acknowledged and does not restore: {e}") from e
        if not same(found, state):
            raise Broken(id, f"step {step} was acknowledged and restores other values")


def no_half_commit(
    store: str | os.PathLike[str] | Store, truth: Truth, *, loaded: Collection[int] = ()
) -> None:
    """I2: each listed checkpoint loads as what was saved, and none is listed that does not; no fault here changes bytes
    that were committed. Steps that have just been `loaded`, and were what was saved, are not loaded again."""
    place = open_store(store)
    run = Run(place)
    if run.broken:
        raise Broken("I2", f"listed and broken: {run.broken}")
    for step in run.steps:
        if step not in truth:
            raise Broken("I2", f"step {step} is listed, and nobody saved it")
        if step in loaded:
            continue
        try:
            found = load(place, step=step, as_="numpy")
        except HoldfastError as e:
            raise Broken("I2", f"step {step} is listed and half: {e}") from e
        if not same(found, truth[step]):
            raise Broken("I2", f"step {step} holds other values than were saved")


def no_silent_corruption(
    store: str | os.PathLike[str] | Store, truth: Truth, damaged: Collection[str]
) -> None:
    """I4: with the objects of these keys damaged (or gone), each checkpoint restores what was saved or raises, and each
    that needs one of them names it."""
    place = open_store(store)
    run = Run(place)
    named = {step: {problem.key for problem in found} for step, found in run.verify().items()}
    for step in named:
        try:
            found = load(place, step=step, as_="numpy")
        except HoldfastError:
            if not named[step]:
                raise Broken(
                    "I4", f"step {step} does not restore, and verify finds nothing wrong with it"
                ) from None
            continue
        if not same(found, truth.get(step)):
            raise Broken("I4", f"step {step} restores wrong values, and says nothing")
    wrong = {key for keys in named.values() for key in keys} - set(damaged)
    if wrong:
        raise Broken("I4", f"said to be damaged, and is not: {sorted(wrong)}; damaged is {sorted(damaged)}")


def needed_exists(store: str | os.PathLike[str] | Store) -> None:
    """I5: each file of each checkpoint, listed or in the trash, is there, with the length and the header that were
    committed."""
    place = open_store(store)
    history = History(place)
    manifests = [(f"step {step}", history.manifests[step][1]) for step in history.steps]
    for trashed in list_trash(place):
        if trashed.attempt != BROKEN:
            manifests.append((f"step {trashed.step} in the trash", read_trash(place, trashed)[0]))
    for what, manifest in manifests:
        for entry in (file for part in manifest.parts.values() for file in part.files):
            try:
                open_file(place, entry)
            except HoldfastError as e:
                raise Broken("I5", f"{what} needs {entry.key}: {e}") from e


def left_over(store: str | os.PathLike[str] | Store) -> set[str]:
    """Return the keys of data that no checkpoint needs, listed or in the trash, and files that were never finished."""
    place = open_store(store)
    manifests = [*place.names("checkpoints"), *place.names("trash")]
    needed: set[str] = set()
    for key in manifests:
        if key.endswith(".json"):
            needed |= {k for f in read_summary(place, key).sizes() for k in (f, f"{f}.zst")}
    return set(place.names("data")) - needed


def recovers(
    store: str | os.PathLike[str] | Store,
    step: int,
    state: Mapping[str, object],
    *,
    temporary_at_most: int | None = None,
) -> None:
    """I6: saving works at once, its checkpoint restores, and nothing that a dead writer left stays behind (but young
    temporary files, at most so many)."""
    place = open_store(store)
    try:
        save(place, state, step=step)
    except HoldfastError as e:
        raise Broken("I6", f"the next save fails: {type(e).__name__}: {e}") from e
    old_stays_readable(place, {step: state}, id="I6")
    left = left_over(place)
    if left:
        raise Broken("I6", f"what a dead writer left is not freed: {sorted(left)}")
    root = getattr(place, "root", None)
    if temporary_at_most is not None and root is not None:
        files = [p.name for p in pathlib.Path(root).rglob(".tmp-*")]
        if len(files) > temporary_at_most:
            raise Broken("I9", f"temporary files stay behind: {files}")


def commits_once(believed: Mapping[str, Sequence[tuple[str, str]]], store: Store) -> None:
    """I7: of what rivals believe to have committed (by rival: manifest's key and attempt), no place has two winners,
    and what is there is the winner's, or is gone with a later state.
    """
    winners: dict[str, tuple[str, str]] = {}
    for rival, commits in believed.items():
        for key, attempt in commits:
            if key in winners and winners[key][1] != attempt:
                raise Broken("I7", f"{key}: both {winners[key][0]} and {rival} believe to have committed it")
            winners[key] = (rival, attempt)
    for key in store.names("checkpoints"):
        found = decode_manifest(store.read(key), key)
        if key in winners and winners[key][1] != found.attempt:
            raise Broken("I7", f"{key}: {winners[key][0]} was told that it committed, another's is there")


def resources() -> tuple[int, int]:
    """Return how many descriptors and threads this process has."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0, threading.active_count()


def bounded_resources(before: tuple[int, int], *, slack: int = 2) -> None:
    """I9: descriptors and threads are as many as they were, give or take a few that end by themselves."""
    now = resources()
    for what, was, present in zip(("descriptors", "threads"), before, now, strict=True):
        if present > was + slack:
            raise Broken("I9", f"there are {present} {what}; there were {was}")


def honest_outcome(error: BaseException | None, *, committed: bool, answer_lost: bool) -> None:
    """I10: what a save said fits what it did. `answer_lost`: the commit was carried out, and its answer lost."""
    if error is None:
        if not committed:
            raise Broken("I10", "no error was raised, and the checkpoint is not there")
        return
    said: BaseException | None = error
    chain = []
    while said is not None:
        chain.append(said)
        said = said.__cause__
    unknown = any(isinstance(e, CommitUnknown) for e in chain)
    if any(isinstance(e, CommitConflict) for e in chain):
        raise Broken("I10", f"a conflict was reported where there was no rival: {error}")
    if unknown and not answer_lost:
        raise Broken("I10", f"an outcome that was known is called unknown: {error}")
    if answer_lost and not unknown:
        raise Broken("I10", f"the commit's answer was lost, and the error does not say so: {error!r}")


def policy_is_pure(store: str | os.PathLike[str] | Store, keep: Rule) -> None:
    """I11: the same history gives the same decisions, and the newest checkpoint is kept."""
    records = Run(store).records()
    now = max((r.time for r in records), default=0.0)
    first, again = (tuple(plan(records, keep, now=now)) for _ in range(2))
    if first != again:
        raise Broken("I11", "two looks at the same history decide differently")
    if records and max(first, key=lambda d: d.step).action == "drop":
        raise Broken("I11", "the newest checkpoint is dropped")


def good_never_overwritten(before: Mapping[str, bytes], store: Store, good: Callable[[str], bool]) -> None:
    """I12: each object that was good (`good(key)`) is there with the same bytes."""
    for key, content in before.items():
        if good(key) and (key not in store.names("") or store.read(key) != content):
            raise Broken("I12", f"{key} was good and was changed")


def replicas_agree(primary: Store, *mirrors: Store) -> None:
    """I12: a manifest that two replicas hold is byte-identical in both, and each replica is a whole run."""
    for mirror in mirrors:
        for key in set(primary.names("checkpoints")) & set(mirror.names("checkpoints")):
            if primary.read(key) != mirror.read(key):
                raise Broken("I12", f"{key} differs between {primary.url} and {mirror.url}")
        needed_exists(mirror)


def promises(store: str | os.PathLike[str] | Store, acknowledged: Truth, truth: Truth) -> list[int]:
    """Assert what must hold right after a fault that changed no committed byte: I1, I2, I5, and that nothing is found
    wrong. Return the steps that are listed.
    """
    place = open_store(store)
    if not acknowledged and not place.names("checkpoints"):
        return []
    old_stays_readable(place, acknowledged)
    no_half_commit(place, truth, loaded=acknowledged)
    needed_exists(place)
    run = Run(place)
    problems = {step: found for step, found in run.verify().items() if found}
    if problems or run.verify_beside():
        raise Broken("I4", f"something is said to be wrong: {problems or run.verify_beside()}")
    return run.steps
