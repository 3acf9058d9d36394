"""How a run and a checkpoint are written on the command line: `PATH`, `PATH@STEP`, `PATH@TAG`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from holdfast.catalog.keyfiles import PASSPHRASE_VARIABLE, read_signing_key
from holdfast.catalog.keys import RUN
from holdfast.checkpoint import Checkpoint
from holdfast.cli.output import ask_secret
from holdfast.core.errors import PolicyError, StoreError
from holdfast.format.signing import SigningKey
from holdfast.run import Run
from holdfast.stores import open_store
from holdfast.stores.address import shown

__all__ = ["checkpoint_of", "open_key", "open_target", "split_target"]

_WHICH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def split_target(target: str) -> tuple[str, int | str | None]:
    """Return (path, step or tag) of a target; the second is None when none is named.

    A run whose own path contains an `@` is found under its whole path.
    """
    path, at, which = target.rpartition("@")
    if not at or "/" in which or _is_run(target):
        return target, None
    if not path or not _WHICH.fullmatch(which):
        named = shown(target) if "://" in target else target  # a URL may hold a secret where none belongs
        raise PolicyError(f"{named!r} is not a checkpoint: write PATH, PATH@STEP or PATH@TAG")
    return path, int(which) if which.isdigit() else which


def open_target(target: str, trusted: Sequence[str] | None = None) -> tuple[Run, int | str | None]:
    """Return the run of a target and the step or tag it names. Raises NotARun."""
    path, which = split_target(target)
    return Run(path, trusted=trusted or None), which


def open_key(source: str) -> SigningKey:
    """Return a private key; its passphrase is asked for where it has one and the environment does not."""
    return read_signing_key(source, ask=lambda name: ask_secret(f"passphrase of {name}", PASSPHRASE_VARIABLE))


def checkpoint_of(target: str, trusted: Sequence[str] | None = None) -> Checkpoint:
    """Return the checkpoint that a target names, the newest by default. Raises NotARun, NoCheckpoint, Untrusted."""
    run, which = open_target(target, trusted)
    return run["latest" if which is None else which]


def _is_run(path: str) -> bool:
    try:
        open_store(path).info(RUN)
    except StoreError:  # what is wrong with the store shows when the run is opened
        return False
    return True
