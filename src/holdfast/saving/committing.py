"""Who carries jobs out: for a process that saves by itself, or as one of several ranks; in this process or another."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.catalog.lease import Lease
from holdfast.distributed.meeting import Meeting
from holdfast.distributed.words import Company
from holdfast.format.signing import SigningKey
from holdfast.saving.image import Image
from holdfast.saving.job import Committed, Committer, Committing, Job
from holdfast.saving.rank_job import Follower, Leader
from holdfast.stores import Store

__all__ = ["Here", "committing"]


def committing(
    store: Store, lease: Lease, key: SigningKey | None, meeting: Meeting | None = None
) -> Committing:
    """Return what carries out the jobs of this process."""
    if meeting is None:
        return Committer(store, lease, key)
    return Leader(store, meeting, lease, key) if meeting.ranks.leads else Follower(store, meeting)


@dataclass(slots=True)
class Here:
    """The host that is this very process: `finish` does the work, in whichever thread calls it."""

    pid: int = 0
    _committing: Committing | None = None

    def start(
        self, store: Store, lease: Lease, key: SigningKey | None = None, company: Company | None = None
    ) -> None:
        meeting = None if company is None else Meeting.of(store, company)
        self._committing = committing(store, lease, key, meeting)

    def begin(self, job: Job, image: Image) -> None:
        pass

    def finish(self, job: Job, image: Image) -> Committed:
        assert self._committing is not None
        return self._committing.carry_out(job, image)

    def close(self) -> None:
        pass
