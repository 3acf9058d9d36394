"""What ranks say to each other, as sealed documents."""

from __future__ import annotations

import msgspec

from holdfast.format.documents import Attempt, Count, Name, StepNumber
from holdfast.format.manifest import FileEntry

__all__ = [
    "NOTHING_AGREED",
    "Ack",
    "Agreement",
    "Company",
    "Decision",
    "Hello",
    "Opening",
    "Outcome",
    "Process",
    "Record",
    "Replica",
    "Restoring",
    "Seen",
    "Turn",
]

Nonce = Name
Digest = str


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank's process: number and start time, and the machine boot and process namespace that these are of."""

    pid: Count
    started: Name
    namespace: Name


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank is there, and knows of so many; the nonce is this launch's. `writer` makes its snapshots durable."""

    rank: Count
    world: Count
    nonce: Nonce
    process: Process
    writer: Process | None = None


class Opening(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rank 0 holds the run under this generation of its lease, and has heard of these. `launch` is its nonce."""

    run: Name
    generation: Count
    world: Count
    nonces: dict[str, Nonce]
    process: Process
    writer: Process | None = None
    launch: Nonce = ""


class Ack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank has read the opening that repeats its nonce."""

    rank: Count


class Company(msgspec.Struct, frozen=True):
    """A rank among the others, as another process may act for it; `near` are the processes of the ranks of this machine
    that are known."""

    rank: int
    world: int
    seconds: float
    generation: int
    near: dict[int, list[Process]] = {}


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What rank 0 has restored and all others are to restore, or why it could not, and the name of that error's class;
    `attempt` is that checkpoint's."""

    step: StepNumber = 0
    attempt: str = ""
    error: str = ""
    kind: str = ""


class Restoring(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A rank has restored what was decided, or why it could not; `damaged`: what is stored does not verify.

    `unused` are the stored paths that nothing of this rank took; `own`: some are of what was not as rank 0 had it.
    `wide`: it looked at what other ranks had too, for it is laid out otherwise than then."""

    rank: Count
    error: str = ""
    damaged: bool = False
    unused: list[str] = []
    own: bool = False
    wide: bool = False


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What rank 0 decided at the end of a step: why to save, under which tags, whether to end, and for what signal; the
    step of the turn `before`, and that from which on there is a `next` one in any case."""

    step: StepNumber
    next: StepNumber = 0
    before: StepNumber = 0
    reasons: list[str] = []
    tags: list[str] = []
    by_rule: bool = True
    stop: str = ""
    signal: Count = 0


class Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What rank 0 sees: digests of the values and ties of each part, of its tensors' names, of its environment."""

    values: dict[str, Digest] = {}
    names: dict[str, Digest] = {}
    environment: Digest = ""


class Replica(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What a rank holds of a tensor that others hold too: the group it is spread over ("" for none), the shape of the
    whole, where the box begins, its shape, and a digest of its bytes."""

    group: str
    whole: tuple[Count, ...]
    offsets: tuple[Count, ...]
    shape: tuple[Count, ...]
    digest: Digest


class Agreement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What ranks must agree on: for each group of ranks a digest of what tensors all in it must hold, and, where that
    is to be checked, what they hold of tensors by name."""

    groups: dict[str, Digest] = {}
    replicas: dict[str, Replica] = {}


NOTHING_AGREED = Agreement()


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a rank has made durable of a save, or why it could not.

    `base` is the attempt of the checkpoint that it refers to for what did not change. `files` are those of each part,
    `kinds` what parts are that rank 0 need not have; `own` are the files of what is the rank's alone. `apart` are
    the parts of which it has other tensors than rank 0, by name.
    """

    rank: Count
    attempt: Attempt
    base: str = ""
    agreement: Agreement = Agreement()
    new_bytes: Count = 0
    files: dict[str, list[FileEntry]] = {}
    kinds: dict[str, str] = {}
    own: list[FileEntry] = []
    apart: list[str] = []
    environment: dict[str, str] = {}
    error: str = ""


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a save: the key and ordinal of its manifest, or why there is none; `unknown`: it may be there all
    the same. After a restore that not every rank could make, `instead` is the checkpoint that all leave out next."""

    key: str = ""
    ordinal: Count = 0
    error: str = ""
    unknown: bool = False
    instead: int = -1
