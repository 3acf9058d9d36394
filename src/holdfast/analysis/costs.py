"""What saving and failing cost a run: from its log and manifests, or measured on the spot."""

from __future__ import annotations

import secrets
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from holdfast.catalog.content import open_file
from holdfast.catalog.keys import CHECKPOINTS
from holdfast.core.errors import NoCheckpoint
from holdfast.core.memory import map_pages
from holdfast.core.records import CheckpointRecord
from holdfast.core.units import format_bytes, format_count, format_seconds
from holdfast.format.events import Event, Observed, Resumed, Saved
from holdfast.run import Run
from holdfast.stores import Store
from holdfast.stores.probe import PROBES

__all__ = ["Figures", "Measured", "Speed", "copy_speed", "measure_run", "measure_store"]

NEWEST = 50  # checkpoints that are looked at
READ_BYTES = 256 << 20
PROBE_BYTES = 32 << 20
LONGEST_WRITE_SECONDS = (
    3600.0  # a manifest that changed later was copied by something that does not keep times
)
FEWEST_RESUMES = 3  # from which a failure rate can be told


@dataclass(frozen=True, slots=True)
class Figures:
    """What a plan stands on: sizes in bytes, times in seconds, shares from 0 to 1; None where nothing says."""

    state: int | None = None
    changed: float | None = None
    weights: float | None = None
    step_seconds: float | None = None
    held: float | None = None
    durable: float | None = None
    load: float | None = None
    mtbf: float | None = None


@dataclass(frozen=True, slots=True)
class Measured(Figures):
    """What is known of a run, with counts per step; `origins` has, by the name of a figure, where it comes from."""

    epoch_steps: float = 0.0
    step_samples: float = 0.0
    step_tokens: float = 0.0
    origins: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a store is: seconds for a small durable write, bytes per second of large ones and of reads."""

    latency: float
    write: float
    read: float


def measure_run(run: Run) -> Measured:
    """Return what a run's own records say of its costs; some of its data is read to see how fast that goes.

    Raises:
        NoCheckpoint: the run has none.
    """
    records = run.records()
    whole = [r for r in records if not r.demoted]
    if not whole:
        raise NoCheckpoint(f"{run.store.url} has no checkpoint to measure by; give sizes and times instead")
    state = max(r.stored_bytes for r in whole)
    changed = [r.new_bytes / r.stored_bytes for r in whole[1:] if r.stored_bytes]
    newest = whole[-1].clock
    events = run.events()
    step, held = _from_log(events)
    if step is None and newest.step:
        step = newest.active_seconds / newest.step or None
    durable = _durable(run, whole[-NEWEST:])
    load, speed = _load(run, whole[-1], state)
    resumes = sum(1 for e in events if isinstance(e, Resumed) and e.attempt)
    failing = resumes >= FEWEST_RESUMES and newest.active_seconds > 0
    origins = {
        "state": "the largest checkpoint",
        "changed": f"median of {format_count(len(changed), 'checkpoint')}",
        "weights": "the modules' share of the newest checkpoint",
        "step_seconds": "the run log",
        "held": "the run log: steps with a save against steps without",
        "durable": "the times of the manifests",
        "load": f"measured: its data is read at {format_bytes(round(speed))}/s",
        "mtbf": f"the run log: {resumes} resumes in {format_seconds(newest.active_seconds)} of training",
    }
    return Measured(
        state,
        statistics.median(changed) if changed else None,
        _weights(run, whole[-1]),
        step,
        held,
        durable,
        load,
        newest.active_seconds / resumes if failing else None,
        newest.step / newest.epoch if newest.epoch else 0.0,
        newest.samples / newest.step if newest.step else 0.0,
        newest.tokens / newest.step if newest.step else 0.0,
        origins,
    )


def _from_log(events: list[Event]) -> tuple[float | None, float | None]:
    """Return how long a step takes, and how much longer one with a save: medians of what metrics were logged at."""
    clocks = sorted(
        {(e.clock[0], e.clock[4]) for e in events if isinstance(e, Observed) and e.attempt is None}
    )
    saves = sorted(e.clock[0] for e in events if isinstance(e, Saved))
    stretches = [(a, b, (t - s) / (b - a)) for (a, s), (b, t) in pairwise(clocks) if b > a]
    plain = [per for a, b, per in stretches if not _between(saves, a, b)]
    if not stretches:
        return None, None
    step = statistics.median(plain or [per for _, _, per in stretches])
    longer = [(per - step) * (b - a) / n for a, b, per in stretches if plain and (n := _between(saves, a, b))]
    return step or None, max(0.0, statistics.median(longer)) if longer else None


def _between(points: list[int], first: int, end: int) -> int:
    """Return how many of some sorted points lie from `first` on and before `end`."""
    return bisect_left(points, end) - bisect_left(points, first)


def _durable(run: Run, records: list[CheckpointRecord]) -> float | None:
    """Return the median time from the beginning of a save to its manifest, as the store dates it."""
    modified = {o.key: o.modified for o in run.store.list(CHECKPOINTS)}
    passed = [modified.get(run.history.entry(r.step).key, 0.0) - r.time for r in records]
    sound = [p for p in passed if 0 < p < LONGEST_WRITE_SECONDS]
    return statistics.median(sound) if sound else None


def _weights(run: Run, record: CheckpointRecord) -> float | None:
    """Return the share of a checkpoint's bytes that its modules take."""
    parts = run[record.step].manifest.parts
    sizes = {k: sum(f.size for f in part.files) for k, part in parts.items()}
    modules = sum(sizes[k] for k, part in parts.items() if part.kind == "module")
    return modules / sum(sizes.values()) if modules else None


def _load(run: Run, record: CheckpointRecord, state: int) -> tuple[float, float]:
    """Return how long reading and verifying the state takes, by a part of it, and the speed in bytes per second."""
    done, started = 0, time.perf_counter()
    for block in _blocks(run, record):
        done += block
        if done >= READ_BYTES:
            break
    speed = max(done, 1) / max(time.perf_counter() - started, 1e-9)
    return state / speed, speed


def _blocks(run: Run, record: CheckpointRecord) -> Iterator[int]:
    for part in run[record.step].manifest.parts.values():
        for entry in part.files:
            file = open_file(run.store, entry)
            for index in range(len(file.header.blocks)):
                yield len(file.read_block(index))


def measure_store(store: Store) -> Speed:
    """Return how fast a store takes and gives bytes. Two objects are written there, read and deleted."""
    place = f"{PROBES}/{secrets.token_hex(8)}"
    small, large = f"{place}-small", f"{place}-large"
    data = secrets.token_bytes(1 << 20)
    try:
        latency = _timed(lambda: store.write(small, [b"holdfast"]))
        writing = _timed(lambda: store.write(large, [data] * (PROBE_BYTES >> 20)))
        memory = map_pages(PROBE_BYTES)
        reading = _timed(lambda: store.read_into(large, 0, memory))
    finally:
        store.delete([small, large])
    return Speed(latency, PROBE_BYTES / max(writing - latency, writing / 2), PROBE_BYTES / reading)


def copy_speed() -> float:
    """Return how many bytes per second this machine copies in memory."""
    source, target = map_pages(PROBE_BYTES), map_pages(PROBE_BYTES)
    target[:] = source
    return PROBE_BYTES / min(_timed(lambda: target.__setitem__(slice(None), source)) for _ in range(3))


def _timed(act: Callable[[], None]) -> float:
    started = time.perf_counter()
    act()
    return max(time.perf_counter() - started, 1e-9)
