"""Where things lie in a run's store."""

from __future__ import annotations

import math
import re

from holdfast.core.errors import PolicyError
from holdfast.core.names import check_tag, step_name
from holdfast.core.units import parse_seconds

__all__ = [
    "CHECKPOINTS",
    "DATA",
    "INDEX",
    "LEASES",
    "LOG",
    "PROOFS",
    "READERS",
    "RUN",
    "SIGNATURES",
    "TAGS",
    "TIDY",
    "TRASH",
    "TRASH_SECONDS",
    "data_prefix",
    "is_data_key",
    "is_lease_key",
    "lease_key",
    "log_key",
    "manifest_key",
    "packed_key",
    "parse_grace",
    "parse_manifest_key",
    "plain_key",
    "signature_key",
    "parse_trash_key",
    "reader_key",
    "step_prefix",
    "tag_key",
    "trash_key",
]

RUN = "run.json"
INDEX = "index.json"
TIDY = "tidy.json"
PROOFS = "proofs.json"
CHECKPOINTS = "checkpoints"
DATA = "data"
TAGS = "tags"
LOG = "log"
LEASES = "lease"
TRASH = "trash"
SIGNATURES = "signatures"
READERS = "readers"

TRASH_SECONDS = 24 * 3600  # how long the trash keeps what does not say so itself

MAX_ORDINAL = 9999

PACKED = ".zst"

_DATA_FILE = re.compile(rf"data/\d{{12}}-[0-9A-Za-z]+/[^/]+\.safetensors(?:{re.escape(PACKED)})?")
_GRACE_DIGITS = 12
_TRASH = re.compile(rf"trash/(\d{{12}})-([0-9A-Za-z]+)(?:-(\d{{1,{_GRACE_DIGITS}}}))?\.json")
_LEASE = re.compile(r"lease/\d{12}\.json")
_MANIFEST = re.compile(r"checkpoints/(\d{12})(?:-(\d{4}))?\.json")


def manifest_key(step: int, ordinal: int = 0) -> str:
    """Return the key of a step's manifest; `ordinal` counts later states of the same step (an epoch's end, say).

    Raises:
        PolicyError: there are more of them than a key can count.
    """
    if ordinal > MAX_ORDINAL:
        raise PolicyError(
            f"step {step} was saved {MAX_ORDINAL:,} times more, and no later state of it can be told from the others; "
            "give each save a step of its own"
        )
    return f"{step_prefix(step)}{f'-{ordinal:04d}' if ordinal else ''}.json"


def step_prefix(step: int) -> str:
    """Return what the keys of a step's manifests start with. It sorts before them and behind those of earlier steps."""
    return f"{CHECKPOINTS}/{step_name(step)}"


def parse_manifest_key(key: str) -> tuple[int, int] | None:
    """Return (step, ordinal) of a manifest's key, or None when the key is not one."""
    found = _MANIFEST.fullmatch(key)
    return (int(found[1]), int(found[2] or 0)) if found else None


def data_prefix(step: int, attempt: str) -> str:
    """Return the prefix of the data files that one attempt to save a step writes."""
    return f"{DATA}/{step_name(step)}-{attempt}"


def tag_key(tag: str) -> str:
    """Return the key of a tag."""
    return f"{TAGS}/{check_tag(tag)}.json"


def trash_key(step: int, attempt: str, grace_seconds: int | None = None) -> str:
    """Return the key under which a manifest that was deleted is kept for so long; by default TRASH_SECONDS.

    The key says how long, so that a listing alone tells what may go, whatever became of the object's content.
    """
    return f"{TRASH}/{step_name(step)}-{attempt}{'' if grace_seconds is None else f'-{grace_seconds}'}.json"


def parse_grace(grace: str | float) -> int:
    """Return how long something is to stay in the trash, in whole seconds.

    Raises:
        PolicyError: it is no duration, or longer than a key can say.
    """
    seconds = math.ceil(parse_seconds(grace))
    if seconds >= 10**_GRACE_DIGITS:
        raise PolicyError(f"grace={grace!r} is too long; expected less than 10^{_GRACE_DIGITS} seconds")
    return seconds


def parse_trash_key(key: str) -> tuple[int, str, int] | None:
    """Return (step, attempt, grace in seconds) of a key in the trash, or None when it is not one of ours."""
    found = _TRASH.fullmatch(key)
    return (int(found[1]), found[2], int(found[3] or TRASH_SECONDS)) if found else None


def reader_key(reader: str) -> str:
    """Return the key of the lease of a reader."""
    return f"{READERS}/{reader}.json"


def signature_key(step: int, attempt: str) -> str:
    """Return the key of the signatures of what one attempt to save a step committed."""
    return f"{SIGNATURES}/{step_name(step)}-{attempt}.json"


def is_data_key(key: str) -> bool:
    """Return whether a key is one that an attempt to save, or a copy, may have written: others' files are none of our
    business."""
    return _DATA_FILE.fullmatch(key) is not None


def packed_key(key: str) -> str:
    """Return the key under which a data file lies where it is packed."""
    return f"{key}{PACKED}"


def plain_key(key: str) -> str:
    """Return the key that manifests have for a data file, packed or not."""
    return key.removesuffix(PACKED)


def lease_key(generation: int) -> str:
    """Return the key of a lease generation."""
    return f"{LEASES}/{generation:012d}.json"


def is_lease_key(key: str) -> bool:
    """Return whether a key is one of a lease; another file beside them makes nobody an owner."""
    return _LEASE.fullmatch(key) is not None


def log_key(writer: str, segment: int) -> str:
    """Return the key of a run-log segment."""
    return f"{LOG}/{writer}-{segment:06d}.jsonl"
