"""How a run and its copies stand, seen from outside: from what lies in its places, without a lease."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from holdfast.catalog.history import History
from holdfast.catalog.identity import read_identity
from holdfast.catalog.lease import LeaseDoc, writer_of
from holdfast.core.clock import TimeSource
from holdfast.core.errors import HoldfastError, IntegrityError, NotARun, PolicyError
from holdfast.core.units import format_steps
from holdfast.policies import Rule, last
from holdfast.replication.answers import ask_all
from holdfast.replication.desired import Location, plan_mirror
from holdfast.replication.keeper import MirrorStatus
from holdfast.replication.looking import Source, location_of, look
from holdfast.replication.reconcile import Outcome
from holdfast.replication.record import RememberedMirror, read_mirrors
from holdfast.stores import Store, open_store

__all__ = ["RunStatus", "mirror_status", "run_status"]

ANSWER_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run, who writes it, its newest checkpoint with its time, and each place that holds it, its own first."""

    url: str
    run: str
    writer: LeaseDoc | None
    newest: int | None
    newest_time: float | None
    checkpoints: int
    locations: tuple[MirrorStatus, ...]

    @property
    def is_well(self) -> bool:
        """Whether everything is where it must be."""
        return all(place.state == "ok" for place in self.locations)


def run_status(store: Store, time: TimeSource) -> RunStatus:
    """Return how a run stands. A mirror that does not answer is "unreachable", one whose list is gone is not known.

    Raises:
        NotARun: there is no run.
    """
    identity = read_identity(store)
    history = History(store, identity.run)
    source = look(history, identity.run)
    writer = writer_of(store, time.now())
    newest = source.location.newest_whole
    own = MirrorStatus(
        store.url,
        "degraded" if source.location.broken else "ok",
        None if newest is None else newest.step,
        missing=tuple(sorted(source.location.broken)),
        error=_broken(source),
    )
    try:
        mirrors = read_mirrors(store, identity.run)
    except HoldfastError as e:
        mirrors, own = [], replace(own, state="degraded", error=str(e))
    places = (own, *_mirrors(mirrors, source, time))
    newest_time = None if newest is None else newest.record.time
    return RunStatus(
        store.url, identity.run, writer, own.newest, newest_time, len(source.location.held), places
    )


def _broken(source: Source) -> str | None:
    return _unverified(source.location) if source.location.broken else None


def _unverified(location: Location, where: str = "") -> str:
    whose = f"{format_steps(sorted(location.broken))}{where}"
    one = len(location.broken) == 1
    return f"the manifest of {whose} does not verify" if one else f"the manifests of {whose} do not verify"


def _mirrors(mirrors: Sequence[RememberedMirror], source: Source, time: TimeSource) -> list[MirrorStatus]:
    asked = ask_all({m.url: _Question(m, source, time) for m in mirrors}, ANSWER_SECONDS)
    return [
        answer.found or MirrorStatus(url, "unreachable", error=answer.error) for url, answer in asked.items()
    ]


@dataclass(frozen=True, slots=True)
class _Question:
    remembered: RememberedMirror
    source: Source
    time: TimeSource

    def __call__(self) -> MirrorStatus:
        return mirror_status(self.remembered, open_store(self.remembered.url), self.source, self.time)


def mirror_status(
    remembered: RememberedMirror, store: Store, source: Source, time: TimeSource
) -> MirrorStatus:
    """Return how a mirror stands. Of one whose rule is not known only the newest checkpoint is judged."""
    rule, note = _rule_of(remembered)
    try:
        found = read_identity(store)
    except NotARun:
        found = None
    except IntegrityError as e:
        return MirrorStatus(store.url, "degraded", error=str(e))
    if found is not None and found.run != source.run:
        error = f"it holds another run, {found.run}"
        return MirrorStatus(store.url, "degraded", error=error)
    there = source.marked(location_of(History(store, source.run), source.marks))
    outcome = Outcome(plan_mirror(source.location, there, source.past, rule, now=time.now()), there)
    missing = tuple(h.step for h in outcome.missing)
    if there.broken:
        note = _unverified(there, " there")
    return MirrorStatus(
        store.url,
        "degraded" if there.broken else "behind" if missing else "ok",
        outcome.newest,
        missing,
        outcome.missing_bytes,
        outcome.plan.only_here,
        note,
    )


def _rule_of(remembered: RememberedMirror) -> tuple[Rule | None, str | None]:
    """Return a mirror's rule, or what stands for it with what is to be said of that."""
    if not remembered.told:
        return last(1), "its rule is a function that only the program knows: only the newest is judged"
    try:
        return remembered.mirror().keep, None
    except PolicyError as e:
        return last(1), f"its rule is not understood ({e}): only the newest is judged"
