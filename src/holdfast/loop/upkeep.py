"""What the holder of a run does besides saving: labels, retention, the trash, and freeing what nothing needs."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import msgspec

from holdfast.catalog.checkpoints import Entry, commit, entries, read_entry
from holdfast.catalog.deletion import Ages, Freed, collect, expired
from holdfast.catalog.history import History
from holdfast.catalog.keys import CHECKPOINTS, TRASH, TRASH_SECONDS
from holdfast.catalog.lease import Lease
from holdfast.catalog.runlog import LogWriter
from holdfast.catalog.signatures import read_signatures
from holdfast.catalog.tags import Tag, delete_tag, set_tag
from holdfast.catalog.tidiness import HALF_MADE_SECONDS, Tidiness
from holdfast.catalog.trash import BROKEN, Leaving, Trashed, list_trash, retire
from holdfast.catalog.trust import Trust, TrustedKey
from holdfast.core.clock import TimeSource
from holdfast.core.errors import HoldfastError, OutOfSpace, Untrusted
from holdfast.core.records import CheckpointRecord
from holdfast.core.units import format_count
from holdfast.format.events import Removed
from holdfast.format.manifest import Manifest
from holdfast.format.ranks import ELSEWHERE, is_ranks
from holdfast.format.signing import SigningKey
from holdfast.policies import Decision, Rule, best_of, plan
from holdfast.policies.best import Best
from holdfast.policies.plan import guards
from holdfast.saving.writer import Writer

__all__ = ["Upkeep"]

logger = logging.getLogger("holdfast")

WEIGHTS = "module"
ATTEMPT_SECONDS = 3600.0


class Upkeep:
    """Keeps a run as its rules want it. Its methods are called by one thread at a time, with the lease held.

    With `behind`, data that nothing needs any more is deleted on a thread of its own, which nobody waits for but
    `settle`.
    """

    def __init__(
        self,
        history: History,
        lease: Lease,
        log: LogWriter,
        tidiness: Tidiness,
        time: TimeSource,
        *,
        key: SigningKey | None = None,
        behind: bool = False,
    ) -> None:
        self.freed = Freed()  # of what was found when the run was taken up
        self.owed: Callable[[], frozenset[str]] = frozenset  # attempts that a copy is still to be made of
        self.spares = False  # whether retention has just spared something for that
        self.deleted = 0  # how often data has been deleted
        self._trash_due = math.inf  # when something in the trash may be freed
        self._present: frozenset[str] = frozenset()  # the manifests that were there when the run was taken up
        self.store, self.history, self.lease, self.log, self.time = history.store, history, lease, log, time
        self._tidiness = tidiness
        self._key = key
        self._deletions = Writer(background=behind)
        history.free = self._free

    def _free(self, keys: Sequence[str]) -> None:
        """Delete data that nothing needs: to delete large files takes as long as to write some."""
        if not keys:
            return

        def delete() -> None:
            self.store.delete(keys)
            self._tidiness.end(keys)
            self.deleted += 1

        self._tidiness.begin(keys := tuple(keys))
        self._deletions.submit(delete)

    def settle(self) -> None:
        """Return when everything that was given up is deleted. Raises StoreError when something could not be."""
        self._deletions.wait()

    def label_and_retain(self, best: Best | None, keep: Rule | None, grace_seconds: int = 0) -> None:
        """Point the tag "best" at the best checkpoint, then delete and demote what the retention rule lets go."""
        self._deletions.raise_failure()
        self._set_late_aside()
        if best is not None or keep is not None:
            self.log.flush()
            tags = self.history.tags()
            records = self.history.records(tags)
            if best is not None and self._publish_best(best, tags, records):
                records = self.history.records(tags)
            if keep is not None:
                self._retain(keep, tags, records, grace_seconds)
        if self.time.now() >= self._trash_due:
            self.free_trash()
        self.history.index(self.lease)

    def _publish_best(self, best: Best, tags: dict[str, Tag], records: Sequence[CheckpointRecord]) -> bool:
        """Move the tag "best", in the store and in `tags`, unless it points there already. Return whether it moved."""
        found = best_of(records, best.metric, best.mode)
        if not found or ("best" in tags and tags["best"].attempt == found[0].attempt):
            return False
        tags["best"] = Tag("best", found[0].step, found[0].attempt, self.time.now(), automatic=True)
        set_tag(self.store, tags["best"])
        return True

    def retain(self, keep: Rule, grace_seconds: int = 0) -> tuple[Decision, ...]:
        """Delete and demote what the retention rule lets go; return what was decided. Nothing was trained yet."""
        with contextlib.suppress(
            OutOfSpace
        ):  # the log says no more than who took the run, and waits for room
            self.log.flush()
        tags = self.history.tags()
        return self._retain(keep, tags, self.history.records(tags), grace_seconds)

    def _retain(
        self, keep: Rule, tags: dict[str, Tag], records: Sequence[CheckpointRecord], grace_seconds: int
    ) -> tuple[Decision, ...]:
        spared = self._spared(records)
        decisions = plan(spared, keep, now=self.time.now(), stored_together=self.history.stored_together)
        if self._unsure():
            return ()
        drops = [d for d in decisions if d.action == "drop"]
        why = {d.step: list(d.reasons) for d in drops}
        self._remove_steps([d.step for d in drops], why, tags, grace_seconds)
        for d in decisions:
            if d.action == "demote" and not self.history.summary(d.step).demoted:
                self._demote(d)
        return decisions

    def _spared(self, records: Sequence[CheckpointRecord]) -> list[CheckpointRecord]:
        """Return the records with those as in use that a copy is still to be made of."""
        owed = self.owed()
        self.spares = bool(owed)
        return [replace(r, leased=True) if r.attempt in owed else r for r in records]

    def _unsure(self) -> bool:
        """Return whether a tag cannot be read, so that what it protects is unknown; and say so."""
        if self.history.broken_tags:
            broken = "; ".join(self.history.broken_tags)
            logger.warning("nothing is deleted: %s. Remove that tag or set it again", broken)
        return bool(self.history.broken_tags)

    def leaving_with(self, keep: Rule | None, coming: CheckpointRecord) -> dict[int, list[str]]:
        """Return the steps, with the reasons, that retention lets go once a checkpoint is there that is still to come:
        without those that nothing may touch before it is."""
        if keep is None:
            return {}
        records = self._spared([r for r in self.history.records() if r.step != coming.step])
        guarded = guards(records)
        together = self.history.stored_together
        after = plan([*records, coming], keep, now=self.time.now(), stored_together=together)
        drops = [d for d in after if d.action == "drop" and (d.step, d.attempt) not in guarded]
        return {d.step: list(d.reasons) for d in drops if d.step != coming.step}

    def retain_ahead(self, leaving: dict[int, list[str]]) -> int:
        """Delete at once what retention would let go after the next save; return the bytes freed."""
        tags = self.history.tags()
        if not leaving or self._unsure():
            return 0
        freed = self._remove_steps([*leaving], leaving, tags, 0)
        self.settle()
        return freed

    def remove_steps(self, steps: Sequence[int], why: dict[int, list[str]], *, grace_seconds: int = 0) -> int:
        """Delete checkpoints, their tags, and the bytes only they needed, by way of the trash if there is a grace.
        Return the bytes freed now, or when the grace has ended."""
        return self._remove_steps(steps, why, self.history.tags(), grace_seconds) if steps else 0

    def _remove_steps(
        self, steps: Sequence[int], why: dict[int, list[str]], tags: Mapping[str, Tag], grace_seconds: int
    ) -> int:
        if not steps:
            return 0
        self.lease.check()
        for name, tag in tags.items():
            if tag.step in steps:
                delete_tag(self.store, name)
        # One that does not verify is of no use in the trash, and would keep all data there with it.
        aside = [s for s in steps if grace_seconds and s not in self.history.broken]
        attempts = {s: BROKEN if s in self.history.broken else self.history.summary(s).attempt for s in steps}
        freed = self.history.only_of(aside) if aside else 0
        with self._tidiness.freeing():
            if aside:
                self.history.set_aside(
                    aside, now=self.time.now(), grace_seconds=grace_seconds, tags=tags,
                    why={s: why.get(s) or ["asked for"] for s in aside},
                )  # fmt: skip
                self._trash_due = min(self._trash_due, self.time.now() + grace_seconds)
            freed += self.history.drop([s for s in steps if s not in aside])
        for s, attempt in attempts.items():
            self.log.record(Removed(self.time.now(), s, attempt, "removed", why.get(s, [])))
        self.log.flush()
        return freed

    def abandon_after(self, step: int, why: str) -> list[int]:
        """Set aside every checkpoint beyond `step`, sound or broken: training goes on from there.

        A broken one before `step` stays where it is, to be repaired or removed by its owner.
        """
        later = sorted(s for s in {*self.history.steps, *self.history.broken} if s > step)
        with self._tidiness.freeing():
            aside = self.history.set_aside(later, now=self.time.now(), why={s: [why] for s in later})
        self._trash_due = min(self._trash_due, self.time.now() + TRASH_SECONDS) if aside else self._trash_due
        for s, attempt in aside.items():
            self.log.record(Removed(self.time.now(), s, attempt, "set aside", [why]))
        return later

    def take_over(self) -> None:
        """Free what dead writers left behind, unless the holder before left nothing."""
        now, ages = self.time.now(), Ages(now=self.lease.store_time())
        self._note_trash(list_trash(self.store), ages.now)
        self._present = frozenset(self.store.names(CHECKPOINTS)) if self.lease.displaced else frozenset()
        if self._tidiness.inherited(now, ages):
            return
        self.freed = self._collect(ages)
        if self.freed.nbytes:
            logger.info("freed %d bytes that dead writers had left in %s", self.freed.nbytes, self.store.url)

    def _note_trash(self, trash: Sequence[Trashed], store_now: float) -> None:
        """Note when there is next something to be freed from the trash, by this machine's clock."""
        soonest = min((t.until for t in trash), default=math.inf)
        self._trash_due = self.time.now() + max(0.0, soonest - store_now)

    def free_trash(self, grace_seconds: float | None = None) -> int:
        """Free what has been in the trash for long enough; return the bytes. A save may be under way."""
        now = self.lease.store_time()
        due = expired(self.store.list(TRASH), Ages(now=now, grace_seconds=grace_seconds))
        freed = 0
        if due:
            self.lease.check()
            with self._tidiness.freeing():
                freed = self.history.empty_trash(due)
            logger.info(
                "freed %d bytes: %s left the trash of %s",
                freed, format_count(len(due), "checkpoint"), self.store.url,
            )  # fmt: skip
        self._note_trash(list_trash(self.store), now)
        return freed

    def _set_late_aside(self) -> None:
        """Put into the trash what a holder has committed after it had lost the run: nobody was told that it is there.

        Only a holder whose time was over, and that is not known to have ended, can do that; a lower generation tells
        it. What was brought back from the trash is known to the log.
        """
        if not self.lease.displaced:
            return
        new = [
            e
            for e in entries(self.store)
            if e.key not in self.history.known.by_key and e.key not in self._present
        ]
        late: list[Leaving] = []
        for entry in new:
            with contextlib.suppress(HoldfastError):
                manifest = read_entry(self.store, entry)
                if manifest.generation < self.lease.generation:
                    late.append(Leaving(entry, manifest.attempt, ("its writer had lost the run",)))
        gone = {e.attempt for e in self.history.turns() if isinstance(e, Removed)} if late else set()
        late = [one for one in late if one.attempt not in gone]
        if late:
            logger.warning(
                "steps %s were committed by a process that had lost the run; they are put into the trash",
                [one.entry.step for one in late],
            )
            retire(self.store, late, now=self.time.now(), grace_seconds=TRASH_SECONDS)

    def collect(self, grace_seconds: float | None = None) -> Freed:
        """Free what nothing refers to, and what has been in the trash for long enough: for as long as each is to stay
        there, or for `grace_seconds`. No save may be under way."""
        return self._collect(Ages(now=self.lease.store_time(), grace_seconds=grace_seconds))

    def _collect(self, ages: Ages) -> Freed:
        # A holder whose time was over may still live: what it has just written is left alone for a while.
        margin = ATTEMPT_SECONDS if self.lease.displaced else 0.0
        ages = replace(ages, half_made_seconds=HALF_MADE_SECONDS, attempt_seconds=margin)
        freed = collect(self.store, self.history.known, ages, self.lease.check)
        self._tidiness.searched(self.time.now())
        return freed

    def _demote(self, decision: Decision) -> None:
        """Replace a checkpoint by one that holds its weights alone."""
        entry, manifest = self.history.manifests[decision.step]
        parts = manifest.parts
        # Of several ranks, what each has for itself may be weights too.
        weights = {
            n: part for n, part in parts.items() if part.kind in (WEIGHTS, ELSEWHERE) or is_ranks(part)
        }
        if all(is_ranks(part) for part in weights.values()):
            return
        needed = {manifest.part_of(d.source) for part in weights.values() for d in part.derived.values()}
        if not needed <= weights.keys():
            logger.warning(
                "step %d is not demoted: its weights follow from what %s holds",
                manifest.step,
                ", ".join(needed),
            )
            return
        if not self._may_sign_anew(entry, manifest):
            logger.warning(
                "step %d is not demoted: it is signed, and without its signer's key what is left would not be",
                manifest.step,
            )
            return
        lighter = msgspec.structs.replace(manifest, parts=weights, demoted=True)
        with self._tidiness.freeing():
            self.history.take(commit(self.store, lighter, self.lease, self._key), lighter)
        self.log.record(
            Removed(self.time.now(), manifest.step, manifest.attempt, "demoted", list(decision.reasons))
        )

    def _may_sign_anew(self, entry: Entry, manifest: Manifest) -> bool:
        """Return whether a manifest made of this one may take its place: with our key only where that vouches for this
        one too, for a planted manifest must not be made ours; without, only where nobody does."""
        if self._key is None:
            return not read_signatures(self.store, manifest.step, manifest.attempt)
        own = Trust("require", (TrustedKey(self._key.public, "this run's own key"),), self.time)
        try:
            own.vouched(self.store, entry.key, manifest, self.history.run)
        except Untrusted:
            return False
        return True
