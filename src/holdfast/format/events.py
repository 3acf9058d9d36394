"""Run-log events: one sealed JSON object a line, append-only, in segments.

The log is the run's memory: every policy is a fold over it. A last line that a crash cut off before its newline is
ignored; any other line that does not verify is an IntegrityError.
"""

from __future__ import annotations

import json

import msgspec

from holdfast.core.errors import InvalidFormat
from holdfast.format.documents import Count, Moment, Name, StepNumber, refuse_twins
from holdfast.format.manifest import ClockDoc
from holdfast.format.sealed import LINE_DIGEST_CHARS, seal, unseal

__all__ = [
    "Damaged",
    "Event",
    "Observed",
    "Removed",
    "Resumed",
    "Saved",
    "Started",
    "Untagged",
    "Verified",
    "Verdicted",
    "decode_events",
    "encode_event",
]


class Started(msgspec.Struct, frozen=True, tag="started", tag_field="event"):
    """A process took the run up; `generation` is its lease."""

    time: Moment
    generation: Count
    host: Name
    pid: Count


class Resumed(msgspec.Struct, frozen=True, tag="resumed", tag_field="event"):
    """Training went on from this step: what the log says of later steps belongs to an abandoned branch."""

    time: Moment
    step: StepNumber
    attempt: Name
    note: str = ""


class Observed(msgspec.Struct, frozen=True, tag="observed", tag_field="event"):
    """Metrics seen when the clock stood here; `attempt` names a checkpoint for observations made after its commit."""

    clock: ClockDoc
    metrics: dict[str, float | str]
    attempt: str | None = None


class Saved(msgspec.Struct, frozen=True, tag="saved", tag_field="event"):
    """A checkpoint of this step was asked for; it exists only if its manifest does."""

    time: Moment
    clock: ClockDoc
    attempt: Name
    reasons: list[str]


class Verdicted(msgspec.Struct, frozen=True, tag="verdict", tag_field="event"):
    """Early stopping said to stop."""

    step: StepNumber
    action: Name
    reason: str


class Removed(msgspec.Struct, frozen=True, tag="removed", tag_field="event"):
    """A checkpoint was deleted, demoted, or set aside; `reasons` say why."""

    time: Moment
    step: StepNumber
    attempt: Name
    action: Name
    reasons: list[str]


class Verified(msgspec.Struct, frozen=True, tag="verified", tag_field="event"):
    """Every byte of this checkpoint was read back and was right."""

    time: Moment
    step: StepNumber
    attempt: Name


class Damaged(msgspec.Struct, frozen=True, tag="damaged", tag_field="event"):
    """Something that this checkpoint needs was read and was wrong: the objects with these keys. It counts as verified
    no more until it is verified again."""

    time: float
    step: int
    attempt: str
    keys: list[str]


class Untagged(msgspec.Struct, frozen=True, tag="untagged", tag_field="event"):
    """A tag was removed on purpose: one that was set earlier and is found elsewhere is not to come back."""

    time: float
    tag: str


Event = Damaged | Untagged | Verified | Started | Resumed | Observed | Saved | Verdicted | Removed
_DECODER = msgspec.json.Decoder(Event)
_ENCODER = msgspec.json.Encoder()


def encode_event(event: Event) -> bytes:
    """Return the sealed line of an event."""
    return seal(msgspec.json.encode(event), LINE_DIGEST_CHARS)


def decode_events(raw: bytes, name: str, first_line: int = 1) -> list[Event]:
    """Return the events of a segment (or of whole lines of it); what follows the last newline is left out.

    Raises:
        IntegrityError: a line does not verify.
    """
    events: list[Event] = []
    lines = raw.split(b"\n")
    lines.pop()  # empty, or a line that a crash cut off before its newline
    for number, line in enumerate(lines, first_line):
        where = f"{name}, line {number}"
        body = unseal(line + b"\n", where, LINE_DIGEST_CHARS)
        try:
            events.append(_decode(body))
        except (ValueError, RecursionError) as e:
            raise InvalidFormat(f"{where}: is not a run-log event: {e}") from e
    return events


def _decode(body: bytes) -> Event:
    event: Event = _DECODER.decode(body)
    if _ENCODER.encode(event) != body:  # then it may hold a key twice; it need not
        json.loads(body, object_pairs_hook=refuse_twins)
    return event
