"""Bring back from mirrors what a primary has lost: the newest checkpoint when a run is taken up, an object that a
restore finds bad. Nothing is taken that does not verify, and nothing good is written over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.catalog.checkpoints import newest_states
from holdfast.catalog.content import DataFile, open_file
from holdfast.catalog.history import History
from holdfast.catalog.identity import read_identity
from holdfast.catalog.keys import CHECKPOINTS
from holdfast.catalog.lease import acquire
from holdfast.catalog.runlog import LogReader
from holdfast.catalog.tags import read_tags
from holdfast.core.clock import TimeSource
from holdfast.core.errors import HoldfastError, IntegrityError, NotARun, StateError, StoreError
from holdfast.format.manifest import FileEntry, Manifest
from holdfast.replication.answers import ask_all
from holdfast.replication.copying import (
    copy_checkpoint,
    copy_identity,
    copy_tags,
    read_manifest,
    send_blocks,
)
from holdfast.replication.desired import Held, Location, Past
from holdfast.replication.looking import Source, look, past_of
from holdfast.replication.segments import copy_log
from holdfast.replication.witnesses import may_replace, was_given_up
from holdfast.stores import Store

__all__ = ["bring_back", "mend", "worth_bringing"]

logger = logging.getLogger("holdfast")

ANSWER_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class _Glance:
    """What names alone tell of a place: which run it holds, and its newest step."""

    run: str | None
    newest: int


def _glance(store: Store) -> _Glance:
    try:
        run = read_identity(store).run
    except NotARun:
        run = None
    return _Glance(run, max(newest_states(store.names(CHECKPOINTS)), default=-1))


def nearest_first(stores: Sequence[Store]) -> list[Store]:
    """Return stores in the order in which to read from them: what is on this machine before what is not."""
    return sorted(stores, key=lambda s: "://" in s.url and not s.url.startswith(("file://", "memory://")))


def bring_back(primary: Store, mirrors: Sequence[Store], time: TimeSource) -> dict[int, str]:
    """Bring the primary what it lacks of the newest that its mirrors hold; return the steps with where each came from.

    That is the newest whole checkpoint, if the primary holds none as new and its log does not say that it was given up,
    with what carries a tag there, the log and the tags. A mirror that does not answer is passed over with a warning.

    Raises:
        StateError: a mirror holds another run.
        LeaseHeld: another process writes the primary.
    """
    asked = ask_all({s.url: _asking(s) for s in mirrors}, ANSWER_SECONDS)
    seen: dict[str, _Glance] = {}
    for url, answer in asked.items():
        if answer.found is not None:
            seen[url] = answer.found
        else:
            logger.warning(
                "the mirror %s cannot be read (%s); what it holds is not considered", url, answer.error
            )
    mine = _glance_at_primary(primary)
    _refuse_strangers(primary, mine, seen)
    lost = mine.run is None
    worth = [
        s
        for s in nearest_first(mirrors)
        if (there := seen.get(s.url)) is not None
        and there.run is not None
        and (lost or there.newest > mine.newest)
    ]
    return _bring(primary, worth, time) if worth else {}


def _asking(store: Store) -> Callable[[], _Glance]:
    return lambda: _glance(store)


def _glance_at_primary(primary: Store) -> _Glance:
    try:
        return _glance(primary)
    except IntegrityError as e:
        raise type(e)(f"{e}. If a mirror of this run is whole, `holdfast repair` mends it") from e


def _refuse_strangers(primary: Store, mine: _Glance, seen: dict[str, _Glance]) -> None:
    runs = {primary.url: mine.run} | {url: there.run for url, there in seen.items()}
    held = {url: run for url, run in runs.items() if run is not None}
    if len(set(held.values())) > 1:
        first, run = next(iter(held.items()))
        other, theirs = next((u, r) for u, r in held.items() if r != run)
        raise StateError(
            f"{other} holds the run {theirs}, and {first} the run {run}: the mirrors of a run go to places of their "
            "own. Give another place, or empty that one if nobody needs what it holds"
        )


def _bring(primary: Store, mirrors: Sequence[Store], time: TimeSource) -> dict[int, str]:
    sources: list[Source] = []
    for store in mirrors:
        try:
            sources.append(look(History(store, run := read_identity(store).run), run))
        except HoldfastError as e:
            logger.warning("the mirror %s cannot be read: %s", store.url, e)
    try:
        mine = look(History(primary, run := read_identity(primary).run), run)
    except NotARun:
        mine = Source(primary, "", 0, Location(), Past(), ({}, History(primary).marks()[1], frozenset()))
    found = [(h, s) for s in sources for h in worth_bringing(mine, s)]
    found.sort(key=lambda pair: pair[0].step, reverse=True)  # stable: of equal ones the nearest
    if not found and mine.run:
        return {}
    lease = None
    brought: dict[int, str] = {}
    try:
        for source in sources:
            copy_identity(source.store, primary)
        above = max((s.generation for s in sources), default=0)
        lease = acquire(primary, time, wait=True, above=max(above, mine.generation))
        for source in sources:
            copy_log(source.store, primary)
        for held, source in found:
            if _fetch(primary, held, source):
                brought[held.step] = source.store.url
                break
        for source in sources:
            brought |= _fetch_tagged(primary, source, mine, max(brought, default=-1))
            copy_tags(source.store, primary)
    finally:
        if lease is not None:
            lease.release()
    return brought


def worth_bringing(mine: Source, theirs: Source) -> list[Held]:
    """Return what a mirror holds that is newer than all that the primary holds and was not given up, newest first."""
    past = mine.past.joined(theirs.past)
    newest = mine.location.newest_whole
    found = [
        held
        for step, held in theirs.location.held.items()
        if step not in mine.location.held
        and (newest is None or step > newest.step)
        and not held.record.demoted
        and not past.left_behind(step, held.record.attempt, held.generation, held.record.time)
        and not _given_up(held, past, has_another=newest is not None)
    ]
    return sorted(found, key=lambda h: h.step, reverse=True)


def _given_up(held: Held, past: Past, *, has_another: bool) -> bool:
    """Return whether the log says that a checkpoint was given up. One that only a retention rule let go is still better
    than none."""
    word = past.departed.get(held.record.attempt)
    return word is not None and (word != "removed" or has_another)


def _fetch(primary: Store, held: Held, source: Source) -> bool:
    """Copy a checkpoint to the primary; return whether it is there now."""
    try:
        copy_checkpoint(source.store, primary, held.entry.key)
    except (IntegrityError, StoreError) as e:
        logger.warning("step %d cannot be brought back from %s: %s", held.step, source.store.url, e)
        return False
    logger.warning("step %d was brought back from the mirror %s", held.step, source.store.url)
    return True


def _fetch_tagged(primary: Store, source: Source, mine: Source, newest: int) -> dict[int, str]:
    """Bring back what carries a tag at a mirror and is older than what was brought back from it."""
    brought: dict[int, str] = {}
    past = mine.past.joined(source.past)
    for tag in read_tags(source.store, lambda e: None).values():
        held = source.location.held.get(tag.step)
        if held is None or tag.step in mine.location.held or tag.step >= newest or tag.step in brought:
            continue
        kept = held.record.attempt == tag.attempt and not _given_up(held, past, has_another=True)
        if kept and _fetch(primary, held, source):
            brought[tag.step] = source.store.url
    return brought


# ---- mending --------------------------------------------------------------------------------------------------------


def mend(primary: Store, key: str, mirrors: Sequence[Store]) -> list[str]:
    """Mend a checkpoint of the primary, whose manifest belongs at `key`, from mirrors; return what was done, in words.

    Each bad or missing data file is written anew from blocks that verify, its own included. The holder of the primary's
    lease calls this. What no mirror has whole stays as it is, and the restore that asked will say so.
    """
    done: list[str] = []
    near = nearest_first(mirrors)
    try:
        _, manifest = read_manifest(primary, key)
    except IntegrityError as e:
        found = _whole_manifest(primary, key, near)
        if found is None:
            return []
        store, manifest = found
        copy_checkpoint(store, primary, key)
        done.append(f"{key} was mended from {store.url} ({e})")
    files = {f.key: f for part in manifest.parts.values() for f in part.files}
    for entry in files.values():
        why = _what_is_wrong(primary, entry)
        if why is not None:
            helped = _mend_file(primary, entry, near)
            if helped:
                done.append(f"{entry.key} was mended from {', '.join(helped)} ({why})")
    return done


def _whole_manifest(primary: Store, key: str, mirrors: Sequence[Store]) -> tuple[Store, Manifest] | None:
    """Return the first mirror that has the manifest which belongs at a key, with it.

    Keys are used again: a mirror that is behind may hold there what training has given up since. That never takes the
    place of what is damaged, which may still be mended from elsewhere, and whose data nothing else refers to.
    """
    run = read_identity(primary).run
    past = past_of(LogReader(primary).turns(), primary)
    for store in mirrors:
        try:
            _, manifest = read_manifest(store, key)
        except (IntegrityError, StoreError):
            continue
        if manifest.run == run and not was_given_up(past, manifest) and may_replace(primary, key, manifest):
            return store, manifest
    return None


def _what_is_wrong(store: Store, entry: FileEntry) -> str | None:
    """Read all of a data file; return the first thing that is wrong with it."""
    try:
        file = open_file(store, entry)
        for index in range(len(file.header.blocks)):
            file.read_block(index)
    except (IntegrityError, StoreError) as e:
        return str(e)
    return None


def _mend_file(primary: Store, entry: FileEntry, mirrors: Sequence[Store]) -> list[str]:
    """Write a data file anew; return the mirrors that have it, none if they could not help."""
    copies: list[DataFile] = []
    for store in (primary, *mirrors):
        try:
            copies.append(open_file(store, entry))
        except (IntegrityError, StoreError):
            continue
    if not any(c.store is not primary for c in copies):
        return []
    try:
        send_blocks(copies, primary)
    except (IntegrityError, StoreError) as e:
        logger.warning("%s cannot be mended: %s", entry.key, e)
        return []
    return [c.store.url for c in copies if c.store is not primary]
