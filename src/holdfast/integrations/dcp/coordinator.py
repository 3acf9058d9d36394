"""The coordinator's side of a save: it holds the run from the plan to the commit, joins what the ranks have written
into one manifest, and then labels, prunes and mirrors.

DCP does not tell a storage object that another rank has failed: the commit is just never asked for. So a save that was
begun and not committed is given up when the next one begins in this process, or when the process ends. One that another
thread of this process is still at is waited for.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic, sleep

from torch.distributed.checkpoint.metadata import Metadata

from holdfast.core.clock import Clock, SystemTime
from holdfast.core.errors import CommitUnknown, HoldfastError, LeaseHeld, SaveFailed
from holdfast.format.manifest import Manifest
from holdfast.format.signing import SigningKey
from holdfast.integrations.dcp.joining import Joining
from holdfast.integrations.dcp.shares import Share
from holdfast.integrations.dcp.unchanged import Known, known_of
from holdfast.loop.session import SaveOrder, Session
from holdfast.policies import Rule
from holdfast.policies.best import Best
from holdfast.replication.mirror import MirrorLike
from holdfast.replication.replicas import Replicas
from holdfast.saving.image import Image
from holdfast.saving.persist import new_attempt
from holdfast.stores import Store

__all__ = ["Coordinator", "Settings", "begin"]

logger = logging.getLogger("holdfast")

PATIENCE_SECONDS = (
    60.0  # how long the commit may come behind the coordinator's own write before another save begins
)
LOOK_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user wants of each save."""

    metrics: dict[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    keep: Rule | None = None
    grace_seconds: int = 0
    mirrors: tuple[MirrorLike, ...] | None = None
    self_contained: bool = False
    key: SigningKey | None = None


@dataclass(slots=True)
class Coordinator:
    """A save that is under way. `known` is what it need not write again."""

    session: Session
    settings: Settings
    step: int
    attempt: str
    known: Known
    replicas: Replicas
    _host: Joining
    _thread: threading.Thread = field(default_factory=threading.current_thread)
    _patience: float = math.inf  # until when, on the machine's monotonic clock, the commit is waited for
    _over: bool = False

    def wrote(self, *, failed: bool = False) -> None:
        """Note that the coordinator's own share is durable, or failed to become so; the others' may be under way."""
        self._patience = -math.inf if failed else monotonic() + PATIENCE_SECONDS

    @property
    def goes_on(self) -> bool:
        """Whether another thread of this process is still at it."""
        elsewhere = self._thread is not threading.current_thread() and self._thread.is_alive()
        return elsewhere and monotonic() < self._patience

    def finish(self, metadata: Metadata, shares: Sequence[Share]) -> Manifest:
        """Commit what the ranks have made durable, then label, prune and mirror; the run is let go in any case.

        Raises:
            SaveFailed: the shares are not all of what was planned; nothing was committed.
        """
        if self._over:
            raise SaveFailed(
                f"step {self.step}: another save of this run was begun before this one was complete"
            )
        self._patience = math.inf
        try:
            manifest = self._commit(metadata, sorted(shares, key=lambda share: share.rank))
        except CommitUnknown:
            self._let_go()
            raise
        except BaseException:
            self.give_up()
            raise
        try:
            self._keep_and_copy()
        except HoldfastError as e:
            raise SaveFailed(f"step {self.step} is committed and durable, but not what follows: {e}") from e
        finally:
            self._let_go(told=True)
        return manifest

    def _commit(self, metadata: Metadata, shares: list[Share]) -> Manifest:
        self._host.join(metadata, shares, self.known.order or {}, self.step)
        order = SaveOrder(
            Clock(step=self.step), self.settings.metrics, ("asked for by DCP",), self.settings.tags,
            self_contained=self.settings.self_contained,
        )  # fmt: skip
        return self.session.complete(self.session.begin(Image({}), order, attempt=self.attempt))

    def _keep_and_copy(self) -> None:
        session, settings = self.session, self.settings
        leaves = settings.keep.leaves() if settings.keep is not None else ()
        best = next((leaf for leaf in leaves if isinstance(leaf, Best)), None)
        try:
            session.label_and_retain(best, settings.keep, settings.grace_seconds)
            session.upkeep.settle()
        finally:
            if self.replicas.keepers:
                session.log.flush()
                self.replicas.tell(session.history, session.identity.run, session.lease.generation)
                self.replicas.catch_up()
        if session.upkeep.spares:  # for the mirrors, which have it now
            session.label_and_retain(best, settings.keep, settings.grace_seconds)

    def give_up(self) -> None:
        """End a save that came to nothing, and free what was written of it. No rank is still writing."""
        with contextlib.suppress(HoldfastError):
            self.session.upkeep.collect()
        self._let_go()

    def _let_go(self, *, told: bool = False) -> None:
        self._over = True
        with contextlib.suppress(HoldfastError):  # what failed before is what is said
            self.replicas.close() if told else self.replicas.stop()
            self.session.close()
        with _lock:
            if _under_way.get(self.session.store.url) is self:
                del _under_way[self.session.store.url]


_under_way: dict[str, Coordinator] = {}
_lock = threading.Lock()
_turns: dict[str, threading.Lock] = {}


def _make_way(url: str) -> None:
    """Return when no save of a run is under way in this process: one that goes on is waited for, another given up."""
    while True:
        with _lock:
            before = _under_way.get(url)
        if before is None:
            return
        if before.goes_on:
            sleep(LOOK_SECONDS)
            continue
        logger.warning("a save of step %d was not completed; it is given up", before.step)
        before.give_up()


def begin(store: Store, step: int | None, settings: Settings) -> Coordinator:
    """Take the run up for one save of a step; None: one after the newest.

    Raises:
        LeaseHeld: another process writes the run.
    """
    with _lock:
        turn = _turns.setdefault(store.url, threading.Lock())
    with turn:
        _make_way(store.url)
        begun = _begun(store, step, settings)
        with _lock:
            _under_way[store.url] = begun
    return begun


def _begun(store: Store, step: int | None, settings: Settings) -> Coordinator:
    time = SystemTime()
    replicas = Replicas(store, settings.mirrors, time=time)
    host = Joining()
    try:
        session = Session(store, time, wait=True, host=host, key=settings.key)
    except LeaseHeld as e:
        raise LeaseHeld(
            f"{e}. With several ranks let only DCP's coordinator save: a save with no_dist=True, or each rank with a "
            "group of its own, needs a run of its own"
        ) from e
    try:
        replicas.remember(session.identity.run)
        session.upkeep.owed = lambda: replicas.owed(session.history, session.identity.run)
        steps = session.history.steps
        at = step if step is not None else (steps[-1] + 1 if steps else 0)
        known = _known(session) if not settings.self_contained else Known()
        return Coordinator(session, settings, at, new_attempt(), known, replicas, host)
    except BaseException:
        session.close()
        raise


def _known(session: Session) -> Known:
    step = session.history.newest_step
    if step is None:
        return Known()
    try:
        return known_of(session.store, session.history.manifests[step][1])
    except HoldfastError as e:
        logger.warning("step %d cannot be built on, so everything is written anew: %s", step, e)
        return Known()


@atexit.register
def _at_exit() -> None:
    for one in list(_under_way.values()):
        one._let_go()
