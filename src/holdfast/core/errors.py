"""Every error holdfast raises, in one tree.

```
HoldfastError
├── StoreError(OSError)               the place that holds the bytes said no
│   ├── NotFound(FileNotFoundError)
│   ├── AlreadyExists(FileExistsError)
│   ├── PermissionDenied(PermissionError)
│   └── OutOfSpace
├── IntegrityError                    bytes are not what was committed
│   ├── DigestMismatch
│   ├── Truncated
│   ├── InvalidFormat(ValueError)     not our grammar, or a hostile file
│   └── MissingObject
├── UnsupportedVersion                written by a newer holdfast
├── NotARun(FileNotFoundError)        a path that holds no run
├── NoCheckpoint(LookupError)         the run holds no checkpoint that was asked for
├── CommitError
│   ├── CommitConflict                another writer committed this step first
│   └── CommitUnknown                 neither success nor failure could be established
├── LeaseHeld                         another process writes this run
├── LeaseLost                         this process no longer holds the run
├── Untrusted                         a signature is missing, wrong, or of a key that is not trusted
├── StateError(ValueError)            the live state and the checkpoint do not fit; carries tree paths
│   └── UnsupportedValue(TypeError)   cannot be stored without running code at load
├── PolicyError(ValueError)           a trigger, a retention rule or a metric makes no sense
├── NotReplicated(TimeoutError)       fewer locations than ack= asks for hold a checkpoint in time
├── SaveFailed(RuntimeError)          a background save failed; raised at the next boundary and at exit
├── RanksDisagree(RuntimeError)       the processes of one run do not all come, or do not agree
└── MissingDependency(ImportError)    an optional dependency is not installed; says the pip line
```
A message names the object, what was expected, what was found, and what to do.
"""

from __future__ import annotations

__all__ = [
    "AlreadyExists",
    "CommitConflict",
    "CommitError",
    "CommitUnknown",
    "DigestMismatch",
    "HoldfastError",
    "IntegrityError",
    "InvalidFormat",
    "LeaseHeld",
    "LeaseLost",
    "MissingDependency",
    "MissingObject",
    "NoCheckpoint",
    "NotARun",
    "NotFound",
    "NotReplicated",
    "OutOfSpace",
    "PermissionDenied",
    "PolicyError",
    "RanksDisagree",
    "SaveFailed",
    "StateError",
    "StoreError",
    "Truncated",
    "UnsupportedValue",
    "UnsupportedVersion",
    "Untrusted",
]


class HoldfastError(Exception):
    """Any error that holdfast raises on purpose. Catch this to catch them all."""


class StoreError(HoldfastError, OSError):
    """A store refused or failed an operation; `errno` is set where the operating system gave one."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class NotFound(StoreError, FileNotFoundError):
    """No object under this key."""


class AlreadyExists(StoreError, FileExistsError):
    """A create-if-absent found the key taken."""


class PermissionDenied(StoreError, PermissionError):
    """The store may not be read or written with these rights."""


class OutOfSpace(StoreError):
    """The store is full or over quota."""


class IntegrityError(HoldfastError):
    """Stored bytes are not the bytes that were committed."""


class DigestMismatch(IntegrityError):
    """A digest differs: at least one byte changed."""


class Truncated(IntegrityError):
    """An object is shorter or longer than was committed."""


class InvalidFormat(IntegrityError, ValueError):
    """Bytes do not follow the grammar of `docs/format.md`."""


class MissingObject(IntegrityError):
    """A committed checkpoint refers to an object that is gone."""


class UnsupportedVersion(HoldfastError):
    """The file was written by a newer holdfast than this one."""


class NotARun(HoldfastError, FileNotFoundError):
    """The location exists or not, but it holds no holdfast run."""


class NoCheckpoint(HoldfastError, LookupError):
    """The run holds no such checkpoint."""


class CommitError(HoldfastError):
    """A checkpoint could not be committed."""


class CommitConflict(CommitError):
    """Another writer committed this step first; its checkpoint is intact."""


class CommitUnknown(CommitError):
    """Neither success nor failure of a commit could be established."""


class LeaseHeld(HoldfastError):
    """Another living process writes this run; the message says who."""


class LeaseLost(HoldfastError):
    """Another process took this run over; nothing more may be committed from here."""


class Untrusted(HoldfastError):
    """A checkpoint is not signed by a key that is trusted with its run; nothing live was changed."""


class StateError(HoldfastError, ValueError):
    """The live state and a checkpoint do not fit together."""


class UnsupportedValue(StateError, TypeError):
    """A value of the state cannot be stored without running code at load time."""


class PolicyError(HoldfastError, ValueError):
    """A trigger, retention rule, metric, interval, key or trust file makes no sense as given."""


class NotReplicated(HoldfastError, TimeoutError):
    """Fewer locations than `ack=` asks for hold a checkpoint in time; it is whole where it is, and copying goes on."""


class SaveFailed(HoldfastError, RuntimeError):
    """A background save failed; the cause is chained."""


class RanksDisagree(HoldfastError, RuntimeError):
    """The processes that train one run together do not all come, or do not agree on where they stand."""


class MissingDependency(HoldfastError, ImportError):
    """An optional dependency is needed for this and not installed."""
