"""A launch of so many ranks: they meet, save twice, and some of them restore."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

from bench.scale.hub import Account, Crew, Hub
from bench.scale.services import Service
from bench.scale.state import Held, State
from bench.scale.store import ModelStore
from holdfast.catalog.identity import create_run
from holdfast.catalog.lease import acquire
from holdfast.distributed.meeting import Meeting
from holdfast.distributed.ranks import Ranks
from holdfast.format.manifest import FORMAT_VERSION, Manifest
from holdfast.saving.committing import committing
from holdfast.saving.environment import fingerprint
from holdfast.saving.job import Base, Committed, Committing, Job

__all__ = ["Launch", "Phase"]

RANKS_A_MACHINE = 8
PACKAGE = "holdfast.distributed"


@dataclass(slots=True)
class Phase:
    """What each rank has cost in it, by rank, and how long it took until the last was done."""

    begin: float = 0.0
    accounts: list[Account] = field(default_factory=list)
    seconds: float = 0.0


class Launch:
    """The ranks of one launch on a model of a store."""

    def __init__(
        self,
        state: State,
        service: Service,
        *,
        magnify: int = 1,
        count_cpu: bool = True,
        seconds: float = 600.0,
    ) -> None:
        self.state = state
        self.hub = Hub(count_cpu=count_cpu)
        self.store = ModelStore(self.hub, service, magnify=magnify, keeps=state.real)
        self.environment = fingerprint()
        self.meetings = [
            Meeting(self.store, Ranks(rank, state.world, seconds)) for rank in range(state.world)
        ]
        self.committing: list[Committing | None] = [None] * state.world
        self.held: list[Held | None] = [None] * state.world
        self.run = ""
        self.base: Base | None = None
        self.manifest: Manifest | None = None

    def open(self) -> Phase:
        """Let the ranks meet, and rank 0 take the run up."""

        def act(rank: int) -> None:
            meeting = self.meetings[rank]
            lease = None
            if rank == 0:
                self.run = create_run(self.store, self.hub.now()).run
                lease = acquire(self.store, self.hub, heartbeat=False)
                meeting.open(self.run, lease.generation)
            else:
                meeting.join()
            self.committing[rank] = committing(self.store, lease, None, meeting)  # type: ignore[arg-type]

        return self.each(act)

    def plan(self) -> Phase:
        """Let each rank find out what it writes."""

        def act(rank: int) -> None:
            self.held[rank] = Held(self.state, rank)

        return self.each(act)

    def save(self, step: int) -> Phase:
        """Let all ranks save."""
        base = self.base

        def act(rank: int) -> Committed:
            held, carrying = self.held[rank], self.committing[rank]
            assert held is not None
            assert carrying is not None
            with self.hub.outside():
                image = held.image(fill=step % 256)
            done = carrying.carry_out(self._job(step, base, image.agreement), image)
            if rank == 0:
                self.base, self.manifest = Base(done.key, f"{step:08d}"), done.manifest
            return done

        return self.each(act)

    def _job(self, step: int, base: Base | None, agreement: object) -> Job:
        now = self.hub.time
        manifest = Manifest(
            FORMAT_VERSION, self.run, step, f"{step:08d}", 1, now, (step, 0, 0, 0, 0.0), {},
            parent=base.attempt if base is not None else None, environment=self.environment,
        )  # fmt: skip
        return Job(manifest, "", b"", [], base, agreement=agreement)  # type: ignore[arg-type]

    def each(self, act: Callable[[int], object], ranks: range | list[int] | None = None) -> Phase:
        begin = self.hub.time
        phase = Phase(begin)
        tasks = []
        with self._on_the_clock():
            for rank in range(self.state.world) if ranks is None else ranks:
                account = Account(rank)
                phase.accounts.append(account)

                def one(rank: int = rank, account: Account = account) -> None:
                    act(rank)
                    account.seconds = self.hub.time - begin

                tasks.append(self.hub.spawn(one, account))
            self.hub.run()
        for task in tasks:
            task.take()
        phase.seconds = max(account.seconds for account in phase.accounts)
        return phase

    def _machine(self) -> str:
        assert self.hub.task is not None
        return f"machine {self.hub.task.account.rank // RANKS_A_MACHINE}"

    @contextmanager
    def _on_the_clock(self) -> Iterator[None]:
        """Give the code under test this clock, threads that live on it, and machines of eight ranks."""
        Crew.hub = self.hub
        with ExitStack() as stack:
            for module in ("meeting", "rollcall"):
                stack.enter_context(mock.patch(f"{PACKAGE}.{module}.time", self.hub))
            stack.enter_context(mock.patch(f"{PACKAGE}.meeting.namespace", self._machine))
            stack.enter_context(mock.patch(f"{PACKAGE}.speech.Workers", Crew))
            gc.disable()
            stack.callback(gc.enable)
            yield
