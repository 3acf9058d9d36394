"""The Checkpointer: four lines around a training loop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TypeVar, get_args, overload

from holdfast.catalog.keyfiles import KeySource, TrustSource, signing_of
from holdfast.catalog.keys import parse_grace
from holdfast.catalog.trust import Verifying
from holdfast.core.clock import Clock, SystemTime, TimeSource, check_count
from holdfast.core.errors import HoldfastError, PolicyError, SaveFailed
from holdfast.core.names import check_tag
from holdfast.core.units import parse_bytes
from holdfast.distributed.ranks import RanksLike, ranks_of
from holdfast.loop.batches import BatchSource
from holdfast.loop.engine import Engine
from holdfast.loop.open_runs import forget_open, note_open
from holdfast.loop.room import WhenFull
from holdfast.loop.saver import Overlapping, SaveSettings, WhenBusy, WriterKind
from holdfast.loop.together import Together
from holdfast.policies import EarlyStopping, Rule, Verdict, every, require_retention, require_trigger
from holdfast.replication.keeper import MirrorStatus
from holdfast.replication.mirror import MirrorLike
from holdfast.replication.replicas import Ack, Replicas
from holdfast.state.reports import CaptureReport, RestoreOptions, RestoreReport
from holdfast.stores import Store, open_store

__all__ = ["Checkpointer"]

Batch = TypeVar("Batch")
Word = TypeVar("Word", bound=str)


class Checkpointer:
    """Saves, resumes, keeps and stops one training run.

    Args:
        url: the run's place: a directory, a URL (`s3://`, `gs://`, `az://`, `peer://`, `file://`, ...), or a Store.
        state: the named things the run consists of: modules, optimizers, schedulers, loaders, anything with
            `state_dict`, and nested plain values. Every random generator is captured unasked.
        save: when to save (`every`, `at`, `best`, ... joined with `|`); by default every ten minutes. A run is also
            saved when it ends, and when SIGINT, SIGTERM or SIGUSR1 arrives.
        keep: what to keep (`last`, `best`, `every`, ... joined with `|`); by default everything.
        stop: early stopping.
        writer: who makes a snapshot durable: a "process" of its own, which finishes what was snapshotted even when
            this one is killed; a "thread"; or nobody else ("inline": a save returns when it is durable). "auto" is a
            process where there can be one (Linux, a store that can be opened by URL), else a thread.
        overlap: in the loop, copy what only an optimizer changes behind the next forward and backward pass; the step of
            any optimizer waits for the rest; CUDA devices copy by themselves, and nobody waits. Whatever else changes
            parameters in place calls `protect()` first.
            "check" compares digests of both ends, to find out whether a program does so.
        when_busy: what becomes of a save that is due while the one before is still being written: "wait" (at once, if
            there is memory for a second snapshot), "skip" it, or let it "replace" one that waits.
        memory: bytes that snapshots may take together, as a number or like "8GB"; by default as much as half of what
            the machine or container has to give. A larger state is written piece by piece while the loop waits.
        self_contained: write every tensor anew, instead of referring to an earlier checkpoint for what did not change.
        derive: leave out bfloat16 tensors whose bytes are the rounding of a float32 one in the same state, as weights
            with a master copy are; they are made again when they are read. Older versions of holdfast refuse such a
            checkpoint, and `demote()` leaves it whole.
        grace: how long what `keep` lets go stays in the trash, to be brought back by `holdfast undo`: seconds, or like
            "24h"; by default it is freed at once.
        when_full: what to do when a save is expected to find too little room, once the trash is emptied: "warn" once
            and try; "prune": retention first, as if the save had been made; "pause": leave out what `save` asks for
            until there is room; "stop": raise OutOfSpace.
        deadline_seconds: how long after SIGTERM or Ctrl-C the process may live to make its last checkpoint.
        mirrors: further places that hold copies of the checkpoints: directories, URLs, or `Mirror(...)` for one with
            a rule, compression or a bandwidth of its own. Copying goes on behind training and never fails it.
        ack: how many locations, the run's own included, must hold a save before `wait()` returns: "local" (the run's
            own), a number, or "all".
        mirror_seconds: how long `wait()` waits for them at most, and `close()` for the mirrors to catch up.
        missing, unexpected, cast: globs over tree paths where a restore may be less than strict.
        sign: the private key that signs every commit: a PEM file of `holdfast keygen`, or "env:NAME" for a variable.
        trusted: whose signatures count: public keys (PEM, base64, or a file), trust files (`.toml`), or a list of them.
        verify: "require" a trusted signature before anything live changes (the default where someone is trusted),
            "warn" where there is none, or "off". "require" with `sign` alone trusts that key.
        ranks: (rank, number of ranks[, seconds to wait for each other]) of several processes that save one run; by
            default as torch.distributed's default group has them. (0, 1) is a process of its own.
        replicated: globs over tree paths of tensors that are the same on every rank, besides DDP's and DTensors.
        check_replicas: compare digests of all replicas at each save, and fail it where a rank holds other values.
        broadcast: tensors that all ranks restore whole are read by rank 0 alone and handed to the others by
            torch.distributed; for stores that many readers would slow down.

    Raises:
        LeaseHeld: another living process writes this run.
        PolicyError: a policy makes no sense.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Store,
        state: Mapping[str, object],
        *,
        save: Rule | None = None,
        keep: Rule | None = None,
        stop: EarlyStopping | None = None,
        writer: WriterKind = "auto",
        overlap: Overlapping = True,
        when_busy: WhenBusy = "wait",
        memory: int | str | None = None,
        self_contained: bool = False,
        derive: bool = False,
        grace: str | float = 0,
        when_full: WhenFull = "warn",
        deadline_seconds: float = 30.0,
        mirrors: Sequence[MirrorLike] | None = None,
        ack: Ack = "local",
        mirror_seconds: float = 300.0,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        cast: Sequence[str] = (),
        sign: KeySource | None = None,
        trusted: TrustSource | None = None,
        verify: Verifying | None = None,
        ranks: RanksLike | None = None,
        replicated: Sequence[str] = (),
        check_replicas: bool = False,
        broadcast: bool = False,
        time: TimeSource | None = None,
    ) -> None:
        if not deadline_seconds > 0:
            raise PolicyError(f"deadline_seconds={deadline_seconds!r} must be a positive number of seconds")
        time = time or SystemTime()
        among = ranks_of(ranks)
        signing = signing_of(sign, verify, trusted, time)
        self.state: dict[str, object] = dict(state)
        self._depth = 0
        self._foreign = False  # the loop is somebody else's: it ends when we are closed
        store = open_store(url)
        together = (
            Together(among, store, tuple(replicated), check_replicas, broadcast) if among.several else None
        )
        self._engine = Engine(
            store,
            self.state,
            save=require_trigger(save) if save is not None else every(minutes=10),
            keep=require_retention(keep) if keep is not None else None,
            stop=stop,
            options=RestoreOptions((), tuple(missing), tuple(unexpected), tuple(cast)),
            settings=SaveSettings(
                _word("writer", writer, WriterKind),
                overlap,
                _word("when_busy", when_busy, WhenBusy),
                None if memory is None else parse_bytes(memory),
                self_contained,
                derive,
                parse_grace(grace),
                _word("when_full", when_full, WhenFull),
            ),
            signing=signing,
            deadline_seconds=deadline_seconds,
            replicas=Replicas(
                store,
                mirrors if among.leads else (),
                ack=ack if among.leads else "local",
                seconds=mirror_seconds,
                time=time,
            ),
            time=time,
            together=together,
        )
        note_open(self)

    @property
    def url(self) -> str:
        """Where the run lives."""
        return self._engine.session.store.url

    @property
    def clock(self) -> Clock:
        """How far training has come."""
        return self._engine.clock

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return self._engine.clock.step

    @property
    def stopped(self) -> Verdict | None:
        """The verdict that ended training early, with its reason, or None."""
        return self._engine.stopped

    @property
    def mirrors(self) -> list[MirrorStatus]:
        """How each mirror stands: its newest step, what it still lacks, and what went wrong last."""
        return self._engine.replicas.statuses

    @property
    def capture_report(self) -> CaptureReport | None:
        """What the newest snapshot found, captured and left out on purpose."""
        return self._engine.capture_report

    @property
    def restore_report(self) -> RestoreReport | None:
        """What the newest restore, an automatic one included, put where; None when nothing was restored."""
        return self._engine.restore_report

    # ---- the loop -------------------------------------------------------------------------------------------------

    @overload
    def steps(self, total: int | None = None) -> Iterator[int]: ...
    @overload
    def steps(self, total: int | None, data: Iterable[Batch]) -> Iterator[tuple[int, Batch]]: ...
    @overload
    def steps(self, *, data: Iterable[Batch]) -> Iterator[tuple[int, Batch]]: ...

    def steps(self, total: int | None = None, data: Iterable[Batch] | None = None) -> Iterator[object]:
        """Restore the newest valid checkpoint, then yield the steps that remain.

        A step ends when the loop asks for the next one. With `data`, yields (step, batch), going through the data
        again and again; inside `epochs()` only to the end of the epoch. `total` counts the steps of the whole run.

        Raises:
            StateError: the data has no position, or no batch at all.
            SaveFailed: a save in the background failed; raised at the next step's end.
            KeyboardInterrupt, SystemExit: after a signal, once the last checkpoint is durable.
        """
        if total is not None:
            check_count("total", total)
        return self._steps(total, BatchSource(data) if data is not None else None)

    def _steps(self, total: int | None, source: BatchSource | None) -> Iterator[object]:
        engine, inner = self._engine, self._depth > 0
        with self._looping(source):
            while (total is None or self.step < total) and self.stopped is None:
                if source is None:
                    yield self.step
                    engine.boundary(steps=1)
                    continue
                if not source.is_open:
                    source.open(resumed_at=engine.resumed_batch())
                present, batch = source.take()
                if present:
                    yield self.step, batch
                    engine.boundary(steps=1)
                elif inner:
                    return
                else:
                    engine.boundary(steps=0, epochs=1, events=frozenset({"epoch_end"}))
            if not inner:
                engine.finish()

    def epochs(self, total: int) -> Iterator[int]:
        """Restore the newest valid checkpoint, then yield the epochs that remain; `steps()` may run inside.

        An epoch in which no step was counted counts as one step.
        """
        return self._epochs(check_count("total", total))

    def _epochs(self, total: int) -> Iterator[int]:
        engine = self._engine
        with self._looping(None):
            while self.clock.epoch < total and self.stopped is None:
                before = self.step
                yield self.clock.epoch
                alone = self.step == before == self.clock.epoch  # no step was ever counted but for the epochs
                engine.boundary(steps=int(alone), epochs=1, events=frozenset({"epoch_end"}))
            engine.finish()

    def log(self, **metrics: object) -> None:
        """Record metrics of the present step: numbers, or arrays of one element.

        Triggers, retention and early stopping read them at the end of the step.

        Raises:
            PolicyError: a value is not a number.
        """
        self._engine.tracker.log(metrics)

    def count(self, *, samples: int = 0, tokens: int = 0) -> None:
        """Add to the run's counts of samples and tokens, for triggers in those units."""
        self._engine.tracker.count(samples=samples, tokens=tokens)

    def step_end(self, step: int | None = None, metrics: Mapping[str, object] | None = None) -> None:
        """End a step of a loop that belongs to someone else: the same safe point that `steps()` has.

        Call `restore()` before such a loop to resume, and `close()` after it, which saves its end. `step` is the number
        of finished steps, for loops that count by themselves.

        Raises:
            PolicyError: `step` lies before the clock.
            SaveFailed: a save in the background failed.
        """
        if not self._engine.started:
            self._engine.start()
            self._engine.interrupts.install()
            self._foreign = True
        if metrics:
            self._engine.tracker.log(metrics)
        ahead = 1 if step is None else check_count("step", step) - self.step
        if ahead < 0:
            raise PolicyError(
                f"step_end({step}) goes back: the run's clock stands at {self.step}; use restore()"
            )
        self._engine.boundary(steps=ahead)

    # ---- verbs ----------------------------------------------------------------------------------------------------

    def save(self, tag: str | None = None) -> None:
        """Save now; inside a loop, at the end of the present step, not if the loop is left before. `tag` names it."""
        tags = [] if tag is None else [check_tag(tag)]
        if self._depth:
            self._engine.requested = [*(self._engine.requested or []), *tags]
        else:
            self._engine.save(("asked for",), tags=tuple(tags))

    def restore(
        self, which: int | str = "latest", *, only: Sequence[str] = (), from_memory: bool = True
    ) -> RestoreReport:
        """Put a checkpoint (a step, "latest", "best" or another tag) into the state.

        With `only` (globs over tree paths) just that part is restored, and the run's clock stays. Training that goes
        on after the restore of an older step sets the newer checkpoints aside. What still lies in the memory that the
        checkpoint was saved from is verified there; without `from_memory` every byte is read from the run's location.

        Raises:
            NoCheckpoint: there is none.
            IntegrityError: it does not verify; nothing live was changed.
            Untrusted: no trusted key has signed it; nothing live was changed.
            StateError: it does not fit the live objects; nothing live was changed.
        """
        return self._engine.restore(which, only, from_memory=from_memory).report

    def wait(self) -> None:
        """Return when every save that was started is durable, in as many locations as `ack=` asks for.

        Raises:
            SaveFailed: one failed.
            NotReplicated: mirrors did not take the newest one within `mirror_seconds`; the message names them.
        """
        self._engine.acknowledge()

    def close(self) -> None:
        """Wait for what is under way and give the run up. Safe to call twice, and in a forked process, where it does
        nothing.

        After a loop of `step_end()` calls its last state is saved first.
        """
        if self._foreign and not self._engine.closed:
            self._foreign = False
            self._engine.finish()
        self._give_up()

    def _give_up(self) -> None:
        forget_open(self)
        self._engine.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        engine = self._engine
        if isinstance(error, Exception) and not isinstance(error, HoldfastError) and not engine.closed:
            engine.save_after(error)
        if engine.interrupts.aborted:  # a second Ctrl-C: leave at once
            forget_open(self)
        elif error is None:
            self.close()
        else:
            with contextlib.suppress(*([SaveFailed] if isinstance(error, SaveFailed) else [])):
                self._give_up()  # of saves that failed the first says why

    @contextlib.contextmanager
    def _looping(self, source: BatchSource | None) -> Iterator[None]:
        engine = self._engine
        if self._depth == 0:
            engine.start()
            engine.tracker.start_timing()
            engine.interrupts.install()
        self._depth += 1
        engine.source = source
        try:
            yield
        finally:
            self._depth -= 1
            engine.source = None
            if self._depth == 0:
                engine.leave_loop()

    def _close_at_exit(self) -> None:
        """Finish what the user left open. Raises what a save failed with."""
        if not self._engine.interrupts.aborted:
            self._give_up()


def _word(name: str, value: Word, kind: object) -> Word:
    allowed = get_args(kind)
    if value not in allowed:
        raise PolicyError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
    return value
