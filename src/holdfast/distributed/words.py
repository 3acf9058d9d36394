"""What ranks say to each other, as sealed documents."""

from __future__ import annotations

import msgspec

from holdfast.format.documents import Attempt, Count, Name, StepNumber
from holdfast.format.manifest import Part

__all__ = ["Ack", "Decision", "Hello", "Opening", "Outcome", "Record", "Restoring"]

Nonce = Name


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank is there, and knows of so many; the nonce is this launch's."""

    rank: Count
    world: Count
    nonce: Nonce


class Opening(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rank 0 holds the run under this generation of its lease, and has heard of these."""

    run: Name
    generation: Count
    world: Count
    nonces: dict[str, Nonce]


class Ack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank has read the opening that repeats its nonce."""

    rank: Count


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What rank 0 has restored and all others are to restore, or why it could not; `attempt` is that checkpoint's."""

    step: StepNumber = 0
    attempt: str = ""
    error: str = ""


class Restoring(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank has restored what was decided, or why it could not."""

    rank: Count
    error: str = ""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a rank has made durable of a save, or why it could not. `shape` is the digest of what all must hold."""

    rank: Count
    attempt: Attempt
    shape: str = ""
    new_bytes: Count = 0
    parts: dict[str, Part] = {}
    environment: dict[str, str] = {}
    error: str = ""


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a save: the key and ordinal of its manifest, or why there is none."""

    key: str = ""
    ordinal: Count = 0
    error: str = ""
