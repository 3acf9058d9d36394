"""A save by several ranks: each writes its share and leaves a record of it; rank 0 gathers them and commits once.

No process group is touched: ranks say what there is to say through the run's store, and every wait has an end.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence

import msgspec
from blake3 import blake3

from holdfast.catalog.checkpoints import commit
from holdfast.catalog.content import open_file
from holdfast.catalog.keys import data_prefix
from holdfast.catalog.lease import Lease
from holdfast.catalog.runlog import write_segment
from holdfast.core.errors import CommitUnknown, HoldfastError, LeaseLost, SaveFailed
from holdfast.distributed.meeting import Meeting
from holdfast.distributed.words import Outcome, Record, Seen
from holdfast.format.datafile import StoredTensor, lay_out
from holdfast.format.manifest import FileEntry, Manifest, Part, decode_manifest
from holdfast.format.ranks import ELSEWHERE, RANK, RANK_APART, OwnValues, own_part, rank_mark, values_name
from holdfast.format.signing import SigningKey
from holdfast.format.values import decode_value, tensor_leaves
from holdfast.saving.image import Image, PartImage
from holdfast.saving.job import Ahead, Base, Committed, DataWriter, Job, discard, set_tags
from holdfast.saving.persist import KnownTensors, persist_parts
from holdfast.saving.rank_checks import check_agreed, check_replicas
from holdfast.stores import Store

__all__ = ["Follower", "Leader", "refuse"]

NOTHING = msgspec.Raw(b"null")


class _Names:
    """Digests of the names of the tensors in value trees, remembered while the trees stay."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str]] = {}  # by part: of which values, of names

    def of(self, part: str, image: PartImage, values: str) -> str:
        known = self._known.get(part)
        if known is None or known[0] != values:
            leaves = tensor_leaves(decode_value(msgspec.json.decode(image.tree), part))
            known = self._known[part] = (
                values,
                _digest("\n".join(sorted(leaf.name for leaf in leaves)).encode()),
            )
        return known[1]


class _Share:
    """What all ranks do alike."""

    def __init__(self, store: Store, meeting: Meeting) -> None:
        self._store = store
        self._meeting = meeting
        ranks = meeting.ranks
        self._mark = rank_mark(ranks.rank, ranks.world)
        self._data = DataWriter(store, self._mark)
        self._names = _Names()

    def _parts(self, image: Image) -> dict[str, PartImage]:
        """Return the parts of the state in an image, without sheets of further files."""
        return {name: part for name, part in image.parts.items() if part.kind != RANK}

    def _seen(self, job: Job, image: Image) -> Seen:
        parts = self._parts(image)
        values = {name: _values_digest(part) for name, part in parts.items()}
        names = {name: self._names.of(name, part, values[name]) for name, part in parts.items()}
        return Seen(values, names, _environment_digest(job.manifest.environment))

    def _record(self, job: Job, image: Image, ahead: Ahead) -> Record:
        rank = self._meeting.ranks.rank
        files: dict[str, list[FileEntry]] = {}
        for sheet, entries in ahead.known.files.items():
            if sheet != own_part(rank):
                files.setdefault(sheet.partition("/")[0], []).extend(entries)
        return Record(
            rank, job.manifest.attempt, job.base.attempt if job.base is not None else "", job.agreement, ahead.written,
            files, {name: part.kind for name, part in self._parts(image).items()},
            list(ahead.known.files.get(own_part(rank), [])),
        )  # fmt: skip


class Follower(_Share):
    """Every rank but the first: its share becomes durable, and the first says what became of the whole."""

    def __init__(self, store: Store, meeting: Meeting) -> None:
        super().__init__(store, meeting)
        self._own: tuple[str, set[str]] = ("", set())  # of which attempt; names of what is the rank's own
        self._held: dict[str, frozenset[str]] = {}  # names of the tensors in older files of what is, by key

    def carry_out(self, job: Job, image: Image) -> Committed:
        """Make this rank's share durable, and return when the whole is committed.

        Raises:
            SaveFailed: it is not, and why.
        """
        topic, rank = job.manifest.attempt, self._meeting.ranks.rank
        if self._own[0] != topic:
            self._own = (topic, set())
        try:
            ahead = self._data.write(job, image)
            if own_part(rank) in image.parts:
                self._own[1].update(t.name for t in image.parts[own_part(rank)].tensors)
            if job.more:
                return Committed("", 0, {}, ahead.written)
            record = self._with_values(self._record(job, image, ahead), job, image)
        except BaseException as e:
            self._data.forget()
            refuse(self._meeting, topic, e)
            self._free(job)
            outcome = self._meeting.look(topic, 0, Outcome)
            if (
                outcome is not None and outcome.error
            ):  # rank 0 gave up first, and freed what was being written here
                raise SaveFailed(outcome.error) from e
            raise
        self._meeting.say(topic, record)
        outcome = self._meeting.hear(topic, 0, Outcome)
        if outcome is None or outcome.error:
            self._data.forget()
        if outcome is None:
            raise SaveFailed(
                f"step {job.manifest.step}: rank 0 did not say whether the save is committed: {self._why(topic)}"
            )
        if outcome.error:
            if not outcome.unknown:  # a full store must not keep what came to nothing
                self._free(job)
            raise SaveFailed(outcome.error)
        self._data.committed(Base(outcome.key, topic))
        return Committed(outcome.key, outcome.ordinal, {}, record.new_bytes)

    def _why(self, topic: str) -> str:
        """Return what is known of why rank 0 says nothing of a save."""
        meeting = self._meeting
        if meeting.is_gone(0):
            return "it has ended, or gave the run up; see what became of it"
        heard = meeting.heard(topic)
        waits = len(heard) < meeting.ranks.world - 1
        who = f"{meeting.missing(heard)} left no record of its share" if waits else "it did not"
        return f"{who} within {meeting.ranks.seconds:g} s; see what became of it"

    def _free(self, job: Job) -> None:
        """Free what this rank has written of a save that came to nothing, in all of its waves."""
        with contextlib.suppress(HoldfastError):  # the next owner of the run frees it
            there = self._store.names(data_prefix(job.manifest.step, job.manifest.attempt))
            self._store.delete([key for key in there if self._mark in key])

    def _with_values(self, record: Record, job: Job, image: Image) -> Record:
        """Write the values that are not those of rank 0, and return the record with what says where they are."""
        topic, rank = job.manifest.attempt, record.rank
        seen = self._meeting.hear(_seen_topic(topic), 0, Seen, unless=topic)
        if seen is None:
            outcome = self._meeting.look(topic, 0, Outcome)
            if outcome is not None:  # it failed there before it came to that
                raise SaveFailed(outcome.error)
            raise SaveFailed(
                f"step {job.manifest.step}: rank 0 said nothing of its part; see what became of it"
            )
        mine = self._seen(job, image)
        parts = self._parts(image)
        other = {name: part for name, part in parts.items() if mine.values[name] != seen.values.get(name)}
        gone = self._gone(job, record)
        if gone and not other:
            other = dict(itertools.islice(parts.items(), 1))
        apart = [name for name in other if mine.names[name] != seen.names.get(name)]
        if other:
            own = _values_image(own_part(rank), {
                name: OwnValues(part.tree, part.kind, part.aliases, name in apart, gone if not index else [])
                for index, (name, part) in enumerate(other.items())
            })  # fmt: skip
            written, _, size = persist_parts(
                self._store, job.manifest.step, topic, own, KnownTensors(), mark=f"{self._mark}-values"
            )
            files = [*written[own_part(rank)].files, *record.own]
            record = msgspec.structs.replace(
                record, own=files, new_bytes=record.new_bytes + size, apart=apart
            )
        if mine.environment != seen.environment:
            record = msgspec.structs.replace(record, environment=_compared(job.manifest.environment))
        return record

    def _gone(self, job: Job, record: Record) -> list[str]:
        """Return the names of tensors that are not the rank's own any more, but shared, and that older files still
        hold: what is looked for among a rank's own first must not be found there."""
        fresh = data_prefix(job.manifest.step, job.manifest.attempt)
        older = [entry for entry in record.own if not entry.key.startswith(fresh)]
        self._held = {
            e.key: self._held.get(e.key) or frozenset(open_file(self._store, e).by_name) for e in older
        }
        return sorted(frozenset().union(*self._held.values()) - self._own[1])


class Leader(_Share):
    """Rank 0, which commits."""

    def __init__(self, store: Store, meeting: Meeting, lease: Lease, key: SigningKey | None = None) -> None:
        super().__init__(store, meeting)
        self._lease, self._key = lease, key
        self._said: list[str] = []  # the topics of the newest save that was committed, and of later ones
        self._parent: Manifest | None = None

    def carry_out(self, job: Job, image: Image) -> Committed:
        """Make this rank's share durable, and commit the whole once every rank's share is.

        Raises:
            SaveFailed: a rank could not, or is silent, or holds something else; names it.
        """
        topic, step = job.manifest.attempt, job.manifest.step
        try:
            if not job.more:
                self._meeting.say(_seen_topic(topic), self._seen(job, image))
            ahead = self._data.write(job, image)
            if job.more:
                return Committed("", 0, {}, ahead.written)
            mine = self._record(job, image, ahead)
            records = [mine, *self._gather(job.manifest, mine)]
            manifest = self._whole(job, image, records)
            write_segment(self._store, job.log_key, job.log_lines)
        except BaseException as e:
            self._give_up(topic, e)
            discard(self._store, step, topic)
            raise
        try:
            entry = commit(self._store, manifest, self._lease, self._key)
        except BaseException as e:
            self._give_up(topic, e)
            if not isinstance(e, (CommitUnknown, LeaseLost)):
                discard(self._store, step, topic)
            raise
        self._data.committed(Base(entry.key, topic))
        self._parent = manifest
        self._meeting.say(topic, Outcome(entry.key, entry.ordinal))
        self._forget_before(topic)
        set_tags(self._store, job)
        return Committed(entry.key, entry.ordinal, {}, manifest.new_bytes, manifest)

    def _gather(self, manifest: Manifest, mine: Record) -> list[Record]:
        """Return the records of the other ranks. Raises SaveFailed that names who failed, is silent, or differs."""
        meeting, step = self._meeting, manifest.step
        heard = meeting.hear_all(manifest.attempt, Record, enough=lambda record: bool(record.error))
        for rank, record in heard.items():
            if record.error:
                raise SaveFailed(f"step {step}: rank {rank} could not write its share: {record.error}")
        if len(heard) < meeting.ranks.world - 1:
            raise SaveFailed(
                f"step {step}: {meeting.missing(list(heard))} left no record of its share within "
                f"{meeting.ranks.seconds:g} s, or will not any more; see what became of it"
            )
        records = [mine, *(heard[rank] for rank in sorted(heard))]
        for record in records[1:]:
            if record.base != mine.base:
                raise SaveFailed(
                    f"step {step}: rank {record.rank} builds on {record.base or 'nothing'} and rank 0 on "
                    f"{mine.base or 'nothing'}; the next save tries afresh"
                )
        check_agreed(step, records)
        check_replicas(step, records)
        return records[1:]

    def _whole(self, job: Job, image: Image, records: Sequence[Record]) -> Manifest:
        """Return the manifest of a save from what each rank, in order, has made durable."""
        own = self._parts(image)
        parts = {name: Part(part.tree, part.kind, [], part.aliases) for name, part in own.items()}
        for record in records[1:]:
            for name in record.kinds:
                parts.setdefault(name, Part(NOTHING, ELSEWHERE))
        fresh = data_prefix(job.manifest.step, job.manifest.attempt)
        order = self._order(job.base)
        for name, part in parts.items():
            files = [file for record in records for file in record.files.get(name, [])]
            part.files.extend(_newest_first(files, fresh, order.get(name, {})))
        for record in records[1:]:
            if record.own:
                parts[own_part(record.rank)] = Part(NOTHING, RANK_APART if record.apart else RANK, record.own)
        return msgspec.structs.replace(
            job.manifest,
            parts=parts,
            new_bytes=sum(r.new_bytes for r in records),
            world_size=len(records),
            environment=job.manifest.environment | _differences(job.manifest.environment, records[1:]),
        )

    def _order(self, base: Base | None) -> dict[str, dict[str, int]]:
        """Return, by part, at which place the checkpoint before has each of its files: where two hold something of the
        same name, the first has the last word, whichever ranks wrote them."""
        if base is None:
            return {}
        if self._parent is None or self._parent.attempt != base.attempt:
            self._parent = decode_manifest(self._store.read(base.key), base.key)
        return {
            name: {file.key: place for place, file in enumerate(part.files)}
            for name, part in self._parent.parts.items()
        }

    def _give_up(self, topic: str, error: BaseException) -> None:
        self._data.forget()
        refuse(self._meeting, topic, error)
        self._said.append(topic)

    def _forget_before(self, topic: str) -> None:
        # Who leaves a record of a save has heard what became of the ones before; but of one that failed not all have.
        for before in self._said:
            self._meeting.forget(before)
            self._meeting.forget(_seen_topic(before))
        self._said = [topic]


def refuse(meeting: Meeting, topic: str, error: BaseException) -> None:
    """Tell the other ranks that a save fails because of this one."""
    rank = meeting.ranks.rank
    text = str(error) if isinstance(error, SaveFailed) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(HoldfastError):
        if rank:
            meeting.say(topic, Record(rank, topic, error=text))
        else:
            unknown = isinstance(error, (CommitUnknown, LeaseLost))
            said = text if isinstance(error, SaveFailed) else f"rank 0: {text}"
            meeting.say(topic, Outcome(error=said, unknown=unknown))


def _seen_topic(topic: str) -> str:
    return f"{topic}-seen"


def _digest(data: bytes) -> str:
    return blake3(data).hexdigest(16)


def _values_digest(part: PartImage) -> str:
    return _digest(bytes(part.tree) + b"\n" + msgspec.json.encode([part.kind, sorted(part.aliases.items())]))


def _environment_digest(environment: Mapping[str, str]) -> str:
    return _digest(msgspec.json.encode(sorted(_compared(environment).items())))


def _compared(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what of an environment should be the same on all ranks."""
    return {key: value for key, value in environment.items() if key not in ("host", "single_writer")}


def _values_image(name: str, values: Mapping[str, OwnValues]) -> Image:
    """Return an image of a rank's own part that holds values as tensors of bytes."""
    raws = {part: msgspec.json.encode(value) for part, value in values.items()}
    tensors = lay_out(
        [StoredTensor(values_name(p), "uint8", (len(raw),), None, 0, 0) for p, raw in raws.items()]
    )
    data = memoryview(b"".join(raws.values()))
    return Image({name: PartImage(NOTHING, RANK, {}, tensors, data, 0)})


def _newest_first(files: Sequence[FileEntry], fresh: str, order: Mapping[str, int]) -> list[FileEntry]:
    """Return files of a part in the order in which they are asked: those of this save, then the older ones as they were
    ordered before."""
    new = [file for file in files if file.key.startswith(fresh)]
    old = [file for file in files if not file.key.startswith(fresh)]
    return [*new, *sorted(old, key=lambda file: order.get(file.key, len(order)))]


def _differences(first: Mapping[str, str], others: Sequence[Record]) -> dict[str, str]:
    """Return what is another on some rank than on the first, with the rank in its name."""
    found: dict[str, str] = {}
    for record in others:
        for key, value in record.environment.items():
            if first.get(key) != value:
                found[f"{key} (rank {record.rank})"] = value
    return found
