"""One launch after the other, and what each has cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from bench.scale.hub import Account
from bench.scale.restore import restored
from bench.scale.run import Launch, Phase
from bench.scale.services import Service
from bench.scale.state import State
from holdfast.format.manifest import encode_manifest

__all__ = ["Row", "Work", "measure"]

SAMPLED = 4  # ranks whose restore is looked at


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank has done in a phase: requests, bytes, seconds of a processor."""

    requests: int
    written_bytes: int
    word_bytes: int
    read_bytes: int
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """A launch: of so many ranks with so many tensors, or boxes of some, each. The second save and what follows it are
    those of a run that goes on: all tensors have changed, and older words are there to be freed."""

    service: str
    ranks: int
    tensors: int
    share_bytes: int
    meet_seconds: float
    commit_seconds: float  # from the beginning of a save until its manifest is there
    save_seconds: float  # until the last rank knows
    manifest_bytes: int
    plan_cpu_seconds: float
    follower_meets: Work
    leader_meets: Work
    follower_saves: Work  # the median one
    leader_saves: Work
    same: Work  # a rank restores, at the same number of ranks
    same_seconds: float  # all ranks do
    other: Work  # at three quarters of them
    other_seconds: float

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def measure(state: State, service: Service, *, seconds: float = 600.0) -> Row:
    """Let a launch meet, save twice, and restore."""
    launch = Launch(state, service, seconds=seconds)
    meet, plan, _ = launch.open(), launch.plan(), launch.save(1)
    save = launch.save(2)
    assert launch.base is not None
    assert launch.manifest is not None
    same, same_seconds = _restores(launch, state.world)
    other, other_seconds = _restores(launch, max(1, state.world * 3 // 4))
    return Row(
        service=service.name,
        ranks=state.world,
        tensors=state.shares,
        share_bytes=state.share_bytes,
        meet_seconds=meet.seconds,
        commit_seconds=launch.store.moment(launch.base.key) - save.begin,
        save_seconds=save.seconds,
        manifest_bytes=len(encode_manifest(launch.manifest)),
        plan_cpu_seconds=_middle(plan.accounts[1:]).cpu_seconds,
        follower_meets=_follower(meet),
        leader_meets=_work(meet.accounts[0]),
        follower_saves=_follower(save),
        leader_saves=_work(save.accounts[0]),
        same=same,
        same_seconds=same_seconds,
        other=other,
        other_seconds=other_seconds,
    )


def _restores(launch: Launch, world: int) -> tuple[Work, float]:
    """Return what a rank of so many costs, and how long all take: as long as one, or as the store needs for all."""
    sampled = sorted({number * (world - 1) // (SAMPLED - 1) for number in range(SAMPLED)})
    accounts = [restored(launch, rank, world)[0] for rank in sampled]
    work, service = _middle(accounts), launch.store.service
    alone = max(account.seconds for account in accounts)
    requests = world * work.requests / service.gets_a_second
    return work, max(alone, requests, world * work.read_bytes / service.total_bytes_a_second)


def _work(account: Account) -> Work:
    return Work(
        account.asked, account.written_bytes, account.word_bytes, account.read_bytes, account.cpu_seconds
    )


def _follower(phase: Phase) -> Work:
    return _middle(phase.accounts[1:])


def _middle(accounts: Iterable[Account]) -> Work:
    """Return the median of each figure."""
    works = [_work(account) for account in accounts]
    return Work(
        *(statistics.median_high(getattr(w, name) for w in works) for name in Work.__dataclass_fields__)
    )
