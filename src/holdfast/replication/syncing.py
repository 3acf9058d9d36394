"""One pass over each mirror of a run, by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.catalog.history import History
from holdfast.catalog.identity import read_identity
from holdfast.core.clock import TimeSource
from holdfast.core.errors import HoldfastError, PolicyError
from holdfast.replication.looking import look
from holdfast.replication.mirror import Mirror, mirrors_of
from holdfast.replication.reconcile import Goal, Outcome, Reconciler
from holdfast.replication.record import read_mirrors
from holdfast.stores import Store

__all__ = ["Synced", "remembered_mirrors", "sync"]


@dataclass(frozen=True, slots=True)
class Synced:
    """What a pass over one mirror came to: `error` is why it was not finished, None where all is where it must be.

    `broken` are the steps whose manifest at the run's own place does not verify, and so was not copied.
    """

    url: str
    outcome: Outcome | None
    error: str | None
    broken: tuple[int, ...] = ()


def remembered_mirrors(primary: Store) -> list[Mirror]:
    """Return the mirrors that a run remembers.

    Raises:
        NotARun: there is no run.
        PolicyError: it remembers none, or one whose rule text cannot hold.
    """
    found = read_mirrors(primary, read_identity(primary).run)
    if not found:
        raise PolicyError(
            f"{primary.url} remembers no mirrors; name one with --to, or give mirrors= to its Checkpointer"
        )
    for one in found:
        if not one.told:
            raise PolicyError(
                f"the rule of {one.url} is a function that only the program knows; name that mirror with --to, and a "
                "rule with --keep, or let the program do it"
            )
    return [one.mirror() for one in found]


def sync(
    primary: Store,
    mirrors: Sequence[Mirror],
    time: TimeSource,
    *,
    expect: Callable[[int], None] = lambda size: None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Synced]:
    """Make one pass over each mirror. Works while the run is being written; a failure at one keeps no other from it. A
    place that holds another run is left as it is, and is a failure.

    `expect` is told how many bytes are to be copied, `advance` those that were since its last call.

    Raises:
        PolicyError: a mirror is the run's own place.
    """
    done: list[Synced] = []
    run = read_identity(primary).run
    for mirror in mirrors:
        url, broken = str(mirror.url), tuple[int, ...]()
        try:
            ((_, store),) = mirrors_of(primary, [mirror], time)
            url = store.url
            goal = Goal(mirror.keep, mirror.pack, mirror.verify)
            reconciler = Reconciler(store, goal, time, advance, _first_time(expect))
            source = look(History(primary, run), run)
            broken = tuple(sorted(source.location.broken))
            outcome = reconciler.run(source)
        except PolicyError:
            raise
        except HoldfastError as e:
            done.append(Synced(url, None, str(e), broken))
        else:
            error = next((f"step {step}: {why}" for step, why in outcome.failed.items()), None)
            done.append(Synced(url, outcome, error, broken))
    return done


def _first_time(expect: Callable[[int], None]) -> Callable[[Outcome], None]:
    """Return what tells `expect` how much a pass has to copy when it begins."""
    told: list[Outcome] = []

    def look_at(outcome: Outcome) -> None:
        if not told:
            told.append(outcome)
            expect(outcome.missing_bytes)

    return look_at
