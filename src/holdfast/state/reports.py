"""What was captured, what was restored: records that can be read by people and by code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from holdfast.core.units import format_count
from holdfast.state.tensors import TensorSpec

__all__ = ["CaptureEntry", "CaptureReport", "RestoreOptions", "RestoreReport"]


class CaptureEntry(NamedTuple):
    """One line of a capture report; `what` is "captured", "alias" (tensor stored elsewhere) or "ignored"."""

    path: str
    what: str
    kind: str
    detail: str | TensorSpec = ""

    @property
    def note(self) -> str:
        """What is to be said about it; a tensor's shape is put into words only when it is asked for."""
        return self.detail if isinstance(self.detail, str) else self.detail.describe()


@dataclass(slots=True)
class CaptureReport:
    """Say for each path what was captured and what was left out on purpose."""

    entries: list[CaptureEntry] = field(default_factory=list)

    def ignored(self) -> list[CaptureEntry]:
        """Return the entries of what was left out."""
        return [e for e in self.entries if e.what == "ignored"]

    def __str__(self) -> str:
        if not self.entries:
            return "nothing was captured"
        width = min(max(len(e.path) for e in self.entries), 60)
        return "\n".join(
            f"{e.what:<9} {e.path:<{width}}  {e.kind}{'  (' + e.note + ')' if e.note else ''}"
            for e in self.entries
        )


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """Say where a restore may be less than strict; each field is a tuple of globs over tree paths.

    A glob that matches a path covers everything below it. `only` restores nothing else. `missing` keeps the
    live value where the checkpoint has none that fits. `unexpected` ignores what no live object takes, and
    lets an array of another shape inside a plain container be replaced. `cast` allows another element type
    or optimizer class. `shared`: other ranks restore from the same checkpoint, and what nothing takes here is
    listed as `elsewhere`.
    """

    only: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    shared: bool = False


@dataclass(slots=True)
class RestoreReport:
    """Say what a restore did: lists of (tree path, note)."""

    restored: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    unexpected: list[tuple[str, str]] = field(default_factory=list)
    mismatched: list[tuple[str, str]] = field(default_factory=list)
    cast: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # stored paths that another rank may take

    @property
    def exact(self) -> bool:
        """Whether everything the live objects hold came from the checkpoint, unchanged."""
        return not (self.missing or self.unexpected or self.mismatched or self.cast)

    def __str__(self) -> str:
        lines = [f"restored {format_count(len(self.restored), 'value')}"]
        for title in ("missing", "unexpected", "mismatched", "cast"):
            rows: list[tuple[str, str]] = getattr(self, title)
            lines += [f"{title:<10} {path}{': ' + note if note else ''}" for path, note in rows]
        return "\n".join(lines + [f"note: {n}" for n in self.notes])
