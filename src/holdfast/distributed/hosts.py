"""A save by several ranks: each writes its share and leaves a record of it; rank 0 gathers them and commits once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
from blake3 import blake3

from holdfast.catalog.checkpoints import commit
from holdfast.catalog.lease import Lease
from holdfast.catalog.runlog import write_segment
from holdfast.catalog.tags import Tag, set_tag
from holdfast.core.errors import CommitUnknown, HoldfastError, LeaseLost, SaveFailed
from holdfast.distributed.meeting import Meeting
from holdfast.distributed.words import Outcome, Record
from holdfast.format.manifest import Manifest, Part, decode_manifest
from holdfast.format.ranks import own_part
from holdfast.format.signing import SigningKey
from holdfast.saving.environment import fingerprint
from holdfast.saving.image import Image
from holdfast.saving.job import Committed, Job, discard
from holdfast.saving.persist import KnownTensors, persist_parts
from holdfast.stores import Store

__all__ = ["Attempts", "Follower", "Leader"]


@dataclass(slots=True)
class Attempts:
    """The ids of saves, which every rank reckons for itself from the launch, the step, and how many there were."""

    meeting: Meeting
    count: int = 0

    def next(self, step: int) -> str:
        """Return the id of the next save, of this step."""
        self.count += 1
        text = f"{self.meeting.generation}/{self.count}/{step}"
        return blake3(text.encode()).hexdigest(4)


class _Share:
    """What both kinds of hosts do: nothing at first, and a share of the data in the end."""

    pid = 0

    def __init__(self, meeting: Meeting, shape: Callable[[], str]) -> None:
        self.meeting = meeting
        self.store: Store = meeting.store
        self._shape = shape
        self._shapes: dict[str, str] = {}

    def begin(self, job: Job, image: Image) -> None:
        self._shapes[job.manifest.attempt] = self._shape()

    def close(self) -> None:
        pass

    def _write(self, job: Job, image: Image) -> Record:
        """Make this rank's share durable."""
        ranks, manifest = self.meeting.ranks, job.manifest
        mark = f"-{ranks.rank:05d}-of-{ranks.world:05d}"
        parts, _, written = persist_parts(
            self.store, manifest.step, manifest.attempt, image, KnownTensors(), mark=mark
        )
        image.wait(image.end)
        shape = self._shapes.pop(manifest.attempt, "")
        return Record(ranks.rank, manifest.attempt, shape, written, parts, fingerprint())


class Follower(_Share):
    """The host of every rank but the first: its share becomes durable, and the first says what became of the whole."""

    def start(self, store: Store, lease: Lease, key: SigningKey | None = None) -> None:
        pass

    def finish(self, job: Job, image: Image) -> Committed:
        topic, rank = job.manifest.attempt, self.meeting.ranks.rank
        try:
            record = self._write(job, image)
        except BaseException as e:
            with contextlib.suppress(HoldfastError):
                self.meeting.say(topic, Record(rank, topic, error=f"{type(e).__name__}: {e}"))
            raise
        self.meeting.say(topic, record)
        outcome = self.meeting.hear(topic, 0, Outcome)
        if outcome is None:
            raise SaveFailed(
                f"step {job.manifest.step}: rank 0 did not say within {self.meeting.ranks.seconds:g} s whether the "
                "save is committed; see what became of it"
            )
        if outcome.error:
            raise SaveFailed(outcome.error)
        manifest = decode_manifest(self.store.read(outcome.key), outcome.key)
        return Committed(outcome.key, outcome.ordinal, {}, manifest.new_bytes, manifest)


class Leader(_Share):
    """The host of rank 0, which commits."""

    _lease: Lease
    _key: SigningKey | None = None
    _before = ""  # the topic of the save before

    def start(self, store: Store, lease: Lease, key: SigningKey | None = None) -> None:
        self._lease, self._key = lease, key

    def finish(self, job: Job, image: Image) -> Committed:
        topic = job.manifest.attempt
        try:
            mine = self._write(job, image)
            others = self._gather(job.manifest, mine)
            manifest = _whole(job.manifest, [mine, *others])
            write_segment(self.store, job.log_key, job.log_lines)
        except BaseException as e:
            self._give_up(job.manifest, e)
            discard(self.store, job.manifest.step, topic)
            raise
        try:
            entry = commit(self.store, manifest, self._lease, self._key)
        except BaseException as e:
            self._give_up(job.manifest, e)
            if not isinstance(e, (CommitUnknown, LeaseLost)):
                discard(self.store, job.manifest.step, topic)
            raise
        for tag in job.tags:
            set_tag(self.store, Tag(tag, manifest.step, topic, manifest.time))
        self.meeting.say(topic, Outcome(entry.key, entry.ordinal))
        self._forget_before(topic)
        return Committed(entry.key, entry.ordinal, {}, manifest.new_bytes, manifest)

    def _gather(self, manifest: Manifest, mine: Record) -> list[Record]:
        """Return the records of the other ranks. Raises SaveFailed that names who failed, is silent, or differs."""
        meeting, step = self.meeting, manifest.step
        heard = meeting.hear_all(manifest.attempt, Record)
        for rank, record in heard.items():
            if record.error:
                raise SaveFailed(f"step {step}: rank {rank} could not write its share: {record.error}")
        if len(heard) < meeting.ranks.world - 1:
            raise SaveFailed(
                f"step {step}: {meeting.missing(list(heard))} left no record of its share within "
                f"{meeting.ranks.seconds:g} s; see what became of it"
            )
        for rank, record in heard.items():
            if record.shape != mine.shape:
                raise SaveFailed(
                    f"step {step}: rank {rank} does not hold the same spread and replicated tensors as rank 0, by "
                    "name, element type and shape; all ranks must hold shares of the same ones"
                )
        return [heard[rank] for rank in sorted(heard)]

    def _give_up(self, manifest: Manifest, error: BaseException) -> None:
        text = str(error) if isinstance(error, SaveFailed) else f"rank 0: {type(error).__name__}: {error}"
        with contextlib.suppress(HoldfastError):
            self.meeting.say(manifest.attempt, Outcome(error=text))
        self._forget_before(manifest.attempt)

    def _forget_before(self, topic: str) -> None:
        # Who leaves a record of a save has heard what became of the one before.
        if self._before:
            self.meeting.forget(self._before)
        self._before = topic


def _whole(manifest: Manifest, records: list[Record]) -> Manifest:
    """Return the manifest of a save from what each rank, in order, has made durable."""
    first = records[0]
    parts: dict[str, Part] = dict(first.parts)
    for record in records[1:]:
        for name, part in record.parts.items():
            if name in first.parts:
                parts[name] = msgspec.structs.replace(parts[name], files=[*parts[name].files, *part.files])
        for name, of_all in first.parts.items():
            own = record.parts.get(own_part(record.rank, name))
            if own is not None and _differs(own, of_all):
                parts[own_part(record.rank, name)] = own
    return msgspec.structs.replace(
        manifest,
        parts=parts,
        new_bytes=sum(r.new_bytes for r in records),
        world_size=len(records),
        environment=manifest.environment | _differences(first.environment, records[1:]),
    )


def _differs(own: Part, of_all: Part) -> bool:
    """Return whether a rank's part says anything that rank 0's does not."""
    return bool(own.files) or bytes(own.tree) != bytes(of_all.tree) or own.aliases != of_all.aliases


def _differences(first: Mapping[str, str], others: list[Record]) -> dict[str, str]:
    """Return what is another on some rank than on the first, with the rank in its name."""
    found: dict[str, str] = {}
    for record in others:
        for key, value in record.environment.items():
            if first.get(key) != value:
                found[f"{key} (rank {record.rank})"] = value
    return found
