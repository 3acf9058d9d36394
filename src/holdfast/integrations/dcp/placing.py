"""Where what a framework saves to a path of its own goes instead: to a step of a run below a root."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from holdfast.catalog.keyfiles import KeySource, TrustSource
from holdfast.catalog.trust import Verifying
from holdfast.core.clock import check_count
from holdfast.core.errors import PolicyError
from holdfast.core.names import is_key
from holdfast.integrations.dcp.naming import step_of
from holdfast.policies import Rule
from holdfast.replication.mirror import Mirror, MirrorLike
from holdfast.stores import Store, place_below

__all__ = ["Placed", "Terms", "Where", "step_and_name"]

Location: TypeAlias = str | os.PathLike[str] | Store
Where: TypeAlias = Callable[[str], tuple[Location, int] | None]

# What a component says, by precedence. Of two that say the same, the outer one names the step.
_SAYS = tuple(
    re.compile(words, re.IGNORECASE)
    for words in (
        r"step[^0-9a-z]{0,3}\d",
        r"(?:checkpoint|ckpt)[^0-9a-z]{0,3}\d|^\d+(?:\.[a-z]\w*)?$",
        r"(?:epoch|iter|iteration)[^0-9a-z]{0,3}\d",
    )
)
_NUMBERED = re.compile(r"(?:pytorch_model_fsdp|optimizer)_\d+")  # Accelerate: which model it is, never a step


class Placed(NamedTuple):
    """Where a path leads: the run, the step, and the run's mirrors."""

    run: Location
    step: int
    mirrors: tuple[MirrorLike, ...] | None


def step_and_name(path: str) -> tuple[int, str]:
    """Return the step that a path names, and the name of the run below the root; "" is the root itself.

    One of the last two components is the step: the one that says "step" with a number, else the one that says
    "checkpoint" or is a number, else the one that says "epoch" or "iter"; else the only number in the last one. What
    comes after it is the run's name.

    Raises:
        PolicyError: there is no telling.
    """
    parts = [part for part in re.split(r"[/\\]", path) if part][-2:]
    steps = [None if _NUMBERED.fullmatch(part) else step_of(part) for part in parts]
    sayings = [(says, at) for says in _SAYS for at in range(len(parts)) if says.search(parts[at])]
    for _, at in sayings:
        step = steps[at]
        if step is not None:
            return step, _name(parts[at + 1 :], path)
    if parts and (last := steps[-1]) is not None:
        return last, ""
    if len(parts) == 2 and _NUMBERED.fullmatch(parts[1]) and (before := steps[0]) is not None:
        return before, _name(parts[1:], path)
    raise PolicyError(
        f"{path!r} does not say which step it is: neither of its last two parts is like 'step-1000', "
        "'checkpoint-500' or 'epoch_3'; name it so, or pass where= to in_place_of_files"
    )


def _name(parts: list[str], path: str) -> str:
    name = "/".join(parts)
    if name and not is_key(name):
        raise PolicyError(f"{path!r}: a run cannot be called {name!r}; pass where= to in_place_of_files")
    return name


@dataclass(frozen=True, slots=True)
class Terms:
    """What `in_place_of_files` was asked for."""

    root: Location
    where: Where | None = None
    keep: Rule | None = None
    grace: float | str = 0
    mirrors: tuple[MirrorLike, ...] | None = None
    metrics: Mapping[str, float] | None = None
    self_contained: bool = False
    sign: KeySource | None = None
    cast: Sequence[str] = ()
    trusted: TrustSource | None = None
    verify: Verifying | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def needs_signatures(self) -> bool:
        """Whether only what a trusted key has signed may be loaded."""
        return self.verify == "require" or (self.verify is None and self.trusted is not None)

    def placed(self, path: str) -> Placed:
        """Return where a path leads.

        Raises:
            PolicyError: it does not say.
        """
        said = self.where(path) if self.where is not None else None
        if said is not None:
            return Placed(said[0], check_count("step", said[1]), None)
        step, name = step_and_name(path)
        if not name:
            return Placed(self.root, step, self.mirrors)
        mirrors = tuple(_below(one, name) for one in self.mirrors) if self.mirrors is not None else None
        return Placed(place_below(self.root, name), step, mirrors)


def _below(mirror: MirrorLike, name: str) -> MirrorLike:
    if isinstance(mirror, Mirror):
        return dataclasses.replace(mirror, url=place_below(mirror.url, name))
    return place_below(mirror, name)
