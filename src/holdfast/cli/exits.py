"""Exit codes, and which error means which. Scripts rely on them: a number is never given a new meaning."""

from __future__ import annotations

from holdfast.core.errors import (
    CommitConflict,
    HoldfastError,
    IntegrityError,
    LeaseHeld,
    LeaseLost,
    NoCheckpoint,
    NotARun,
    NotFound,
    NotReplicated,
    PolicyError,
    StateError,
    StoreError,
    UnsupportedVersion,
    Untrusted,
)

__all__ = [
    "BEHIND",
    "BROKEN_PIPE",
    "CODES",
    "HELD",
    "INTEGRITY",
    "INTERRUPTED",
    "NOT_FOUND",
    "OK",
    "STORE",
    "UNEXPECTED",
    "UNTRUSTED",
    "USAGE",
    "code_of",
]

OK = 0
UNEXPECTED = 1
USAGE = 2
NOT_FOUND = 3
INTEGRITY = 4
HELD = 5
STORE = 6
UNTRUSTED = 7
BEHIND = 8
INTERRUPTED = 130
BROKEN_PIPE = 141

CODES = {
    OK: "done",
    UNEXPECTED: "an unexpected error",
    USAGE: "wrong usage: arguments, a rule, a key or trust file, an act that needs --force or --yes",
    NOT_FOUND: "no such run, checkpoint, tag, part or tensor",
    INTEGRITY: "stored bytes are wrong or gone, or a newer holdfast wrote them",
    HELD: "another process holds the run for writing",
    STORE: "the disk or store refused: permission, space, I/O",
    UNTRUSTED: "no trusted key has signed it",
    BEHIND: "something is not yet where it must be: a mirror is behind, full or away",
    INTERRUPTED: "interrupted by Ctrl-C",
}

# The first match counts: NotFound is a StoreError too.
_BY_ERROR: tuple[tuple[type[HoldfastError] | tuple[type[HoldfastError], ...], int], ...] = (
    ((NotARun, NoCheckpoint, NotFound), NOT_FOUND),
    ((IntegrityError, UnsupportedVersion), INTEGRITY),
    ((LeaseHeld, LeaseLost, CommitConflict), HELD),
    (StoreError, STORE),
    (Untrusted, UNTRUSTED),
    (NotReplicated, BEHIND),
    ((PolicyError, StateError), USAGE),
)


def code_of(error: HoldfastError) -> int:
    """Return the exit code of an error."""
    return next((code for kinds, code in _BY_ERROR if isinstance(error, kinds)), UNEXPECTED)
