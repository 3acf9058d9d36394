"""From what stores hold to the values that plans are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from holdfast.catalog.history import History, Marks, marked_with
from holdfast.catalog.keys import TRASH, packed_key, parse_trash_key
from holdfast.catalog.tags import read_tags
from holdfast.core.errors import IntegrityError
from holdfast.format.events import Removed, Resumed, Started
from holdfast.replication.desired import Departure, Held, Location, Past, Turn
from holdfast.stores import ObjectInfo, Store

__all__ = ["Source", "location_of", "look", "past_of", "without_data"]


@dataclass(frozen=True, slots=True)
class Source:
    """What a run's primary holds and its log says, as of one moment; a value that any thread may use.

    `unsure` says what could not be read of what protects checkpoints: as long as it is not empty nothing is removed.
    """

    store: Store
    run: str
    generation: int
    location: Location
    past: Past
    marks: Marks
    unsure: tuple[str, ...] = ()

    def marked(self, theirs: Location, read: frozenset[str] = frozenset()) -> Location:
        """Return what a mirror holds with the tags and the log of this run; `read` are the attempts that somebody reads
        there."""
        marks = (*self.marks[:2], read)
        held = {s: replace(h, record=marked_with(h.record, marks)) for s, h in theirs.held.items()}
        return replace(theirs, held=held)


def look(history: History, run: str, generation: int = 0) -> Source:
    """Return what a history holds; `generation` is that of the newest lease on it.

    Tags count by what they name, also where the primary has lost it.
    """
    unsure: list[IntegrityError] = []
    tags = read_tags(history.store, unsure.append)
    names, facts, _ = history.marks(tags)
    marks: Marks = (names, facts, frozenset())  # who reads the primary is nothing to a mirror
    past = past_of(history.turns(), history.store)
    location = location_of(history, marks)
    newest = max([generation, *(t.generation for t in past.turns)])
    return Source(history.store, run, newest, location, past, marks, tuple(map(str, unsure)))


def location_of(history: History, marks: Marks) -> Location:
    """Return the newest state of each step of a history, with what tags and log say of them."""
    held: list[Held] = []
    for step in history.steps:
        summary = history.summary(step)
        record = marked_with(history.plain_record(step), marks)
        held.append(Held(history.entry(step), record, summary.generation, summary))
    return Location.of(held, [entry for entry, _ in history.broken.values()])


def without_data(location: Location, data: Iterable[ObjectInfo]) -> Location:
    """Return a location with what its data, as listed, shows to be missing or cut off noted. A packed file may have any
    size; a plain one hides it."""
    listed = {o.key: o.size for o in data}

    def there(key: str, size: int) -> bool:
        return listed[key] == size if key in listed else packed_key(key) in listed

    gaps = [
        step
        for step, held in location.held.items()
        if not all(there(key, size) for key, size in held.sizes().items())
    ]
    return replace(location, incomplete=frozenset(gaps))


def past_of(turns: Iterable[Started | Resumed | Removed], store: Store) -> Past:
    """Return what a log says of departures. What lies in the trash has left, even where the word was lost."""
    found: list[Turn] = []
    moves: list[Removed] = []
    generation = 0
    for event in turns:
        if isinstance(event, Started):
            generation = event.generation
        elif isinstance(event, Resumed):
            found.append(Turn(generation, event.time, event.step))
        else:
            moves.append(event)
    departed, undone = _departures(moves)
    trashed = [parsed[1] for key in store.names(TRASH) if (parsed := parse_trash_key(key)) is not None]
    for attempt in trashed:
        departed.setdefault(attempt, "removed")
    return Past(departed, tuple(found), frozenset(trashed), undone)


def _departures(moves: Iterable[Removed]) -> tuple[dict[str, Departure], frozenset[str]]:
    """Return the attempts that are gone, and those that were brought back. Who brings one back holds no lease, so that
    word lies in a segment of its own, in no particular place of the log: times count."""
    departed: dict[str, Departure] = {}
    undone: set[str] = set()
    for event in sorted(moves, key=lambda e: e.time):
        if event.action == "set aside":
            departed[event.attempt] = "set aside"
        elif event.action == "removed":
            departed[event.attempt] = "removed" if event.reasons else "removed by hand"
        elif event.action != "demoted":  # it was brought back
            departed.pop(event.attempt, None)
            undone.add(event.attempt)
    return departed, frozenset(undone.difference(departed))
