"""The coordinator's side of a save: it holds the run from the plan to the commit, joins what the ranks have written
into one manifest, and then labels, prunes and mirrors.

DCP does not tell a storage object that another rank has failed: the commit is just never asked for. So a save that was
begun and not committed is given up when the next one begins in this process, or when the process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from holdfast.catalog.checkpoints import commit
from holdfast.catalog.lease import Lease
from holdfast.catalog.runlog import write_segment
from holdfast.catalog.tags import Tag, set_tag
from holdfast.core.clock import Clock, SystemTime
from holdfast.core.errors import CommitUnknown, HoldfastError, LeaseHeld, SaveFailed
from holdfast.format.manifest import FileEntry, Manifest, Part
from holdfast.format.signing import SigningKey
from holdfast.integrations.dcp.shares import Share
from holdfast.integrations.dcp.trees import Trees
from holdfast.integrations.dcp.unchanged import Known, known_of
from holdfast.loop.session import SaveOrder, Session
from holdfast.policies import Rule
from holdfast.policies.best import Best
from holdfast.replication.mirror import MirrorLike
from holdfast.replication.replicas import Replicas
from holdfast.saving.image import Image
from holdfast.saving.job import Committed, Job
from holdfast.saving.persist import new_attempt
from holdfast.stores import Store

__all__ = ["Coordinator", "Settings", "begin", "under_way"]

logger = logging.getLogger("holdfast")


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


class _Joining:
    """The host of a session whose data the ranks have written: what is left is the manifest."""

    pid = 0

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        self.new_bytes = 0
        self.world = 1
        self.environment: dict[str, str] = {}

    def start(self, store: Store, lease: Lease, key: SigningKey | None = None) -> None:
        self._store, self._lease, self._key = store, lease, key

    def begin(self, job: Job, image: Image) -> None:
        pass

    def finish(self, job: Job, image: Image) -> Committed:
        manifest = msgspec.structs.replace(
            job.manifest,
            parts=self.parts,
            new_bytes=self.new_bytes,
            world_size=self.world,
            environment=job.manifest.environment | self.environment,
        )
        write_segment(self._store, job.log_key, job.log_lines)
        entry = commit(self._store, manifest, self._lease, self._key)
        for tag in job.tags:
            set_tag(self._store, Tag(tag, manifest.step, manifest.attempt, manifest.time))
        return Committed(entry.key, entry.ordinal, {}, manifest.new_bytes, manifest)

    def close(self) -> None:
        pass


@dataclass(slots=True)
class Coordinator:
    """A save that is under way. `known` is what it need not write again."""

    session: Session
    settings: Settings
    step: int
    attempt: str
    known: Known
    replicas: Replicas
    _host: _Joining

    def finish(self, metadata: Metadata, shares: Sequence[Share]) -> Manifest:
        """Commit what the ranks have made durable, then label, prune and mirror; the run is let go in any case.

        Raises:
            SaveFailed: the shares are not all of what was planned; nothing was committed.
        """
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
            self._let_go()
        return manifest

    def _commit(self, metadata: Metadata, shares: list[Share]) -> Manifest:
        _check_complete(metadata, shares, self.step)
        values = {fqn: raw for share in shares for fqn, raw in share.values.items()}
        trees = Trees.of(metadata, values)
        host = self._host
        host.parts = {
            part: Part(tree, trees.kinds[part], self._files(part, shares))
            for part, tree in trees.encoded.items()
        }
        host.new_bytes = sum(share.new_bytes for share in shares)
        host.world = len(shares)
        host.environment = _together(shares) | trees.note
        order = SaveOrder(
            Clock(step=self.step), self.settings.metrics, ("asked for by DCP",), self.settings.tags,
            self_contained=self.settings.self_contained,
        )  # fmt: skip
        return self.session.complete(self.session.begin(Image({}), order, attempt=self.attempt))

    def _files(self, part: str, shares: Sequence[Share]) -> list[FileEntry]:
        """Return the files of a part: the first listed that has a name has the last word, so new ones come first, and
        older ones stay in the order they had."""
        new = [entry for share in shares for entry in share.new.get(part, [])]
        older = {e.key: e for share in shares for e in share.referred.get(part, [])}
        order = (self.known.order or {}).get(part, [])
        if not older.keys() <= set(order):
            raise SaveFailed(
                f"step {self.step}: a rank refers to files of {part!r} that are not the newest's"
            )
        return [*new, *(older[key] for key in order if key in older)]

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

    def _let_go(self) -> None:
        with _lock:
            _under_way.pop(self.session.store.url, None)
        self.replicas.close()
        with contextlib.suppress(HoldfastError):  # what failed before is what is said
            self.session.close()


_under_way: dict[str, Coordinator] = {}
_lock = threading.Lock()


def under_way(url: str) -> Coordinator | None:
    """Return the save of a run that this process has begun and that is not over."""
    with _lock:
        return _under_way.get(url)


def begin(store: Store, step: int | None, settings: Settings) -> Coordinator:
    """Take the run up for one save of a step; None: one after the newest.

    Raises:
        LeaseHeld: another process writes the run.
    """
    before = under_way(store.url)
    if before is not None:
        logger.warning("a save of step %d was not completed; it is given up", before.step)
        before.give_up()
    time = SystemTime()
    replicas = Replicas(store, settings.mirrors, time=time)
    host = _Joining()
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
        begun = Coordinator(session, settings, at, new_attempt(), known, replicas, host)
    except BaseException:
        session.close()
        raise
    with _lock:
        _under_way[store.url] = begun
    return begun


def _known(session: Session) -> Known:
    step = session.history.newest_step
    if step is None:
        return Known()
    try:
        return known_of(session.store, session.history.manifests[step][1])
    except HoldfastError as e:
        logger.warning("step %d cannot be built on, so everything is written anew: %s", step, e)
        return Known()


def _check_complete(metadata: Metadata, shares: Sequence[Share], step: int) -> None:
    planned = sum(
        len(stored.chunks)
        for stored in metadata.state_dict_metadata.values()
        if isinstance(stored, TensorStorageMetadata)
    )
    written = sum(share.tensors for share in shares)
    if planned != written:
        raise SaveFailed(
            f"step {step}: DCP planned {planned} pieces of tensors and the ranks wrote {written}; nothing was committed"
        )


def _together(shares: Sequence[Share]) -> dict[str, str]:
    """Return what is another on some rank than on the first, with the rank in its name."""
    first = shares[0].environment
    return {
        f"{key} (rank {share.rank})": value
        for share in shares[1:]
        for key, value in share.environment.items()
        if first.get(key) != value
    }


@atexit.register
def _at_exit() -> None:
    for one in list(_under_way.values()):
        one._let_go()
