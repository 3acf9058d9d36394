"""Tensors that every rank needs whole are read once, by rank 0, and handed to the others: `broadcast=True`.

The only place where holdfast calls a collective. It does so in the foreground, while a restore is waited for, and only
once all ranks have said through the run's store that they are about to, so that none waits for one that failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from blake3 import blake3

from holdfast.core.errors import PolicyError
from holdfast.core.memory import map_pages
from holdfast.distributed.meeting import Meeting
from holdfast.distributed.ranks import Ranks
from holdfast.format.documents import Count
from holdfast.restoring.reader import Reader
from holdfast.state.registry import torch_broadcast, torch_group
from holdfast.state.restoring import BoxWanted
from holdfast.state.tensors import HostTensor

__all__ = ["Handing", "check_broadcast"]

AT_ONCE_BYTES = 64 << 20
NOT_READ = memoryview(b"")


class Wants(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A rank is ready to be handed these tensors, by the digest of their names; "": it is not. Rank 1 lists them: what
    rank 0 has for itself, it alone cannot tell from what all have."""

    rank: Count
    names: str
    listed: list[str] = []


class Go(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rank 0 hands them out, or everybody reads for itself."""

    hands: bool


def check_broadcast(ranks: Ranks) -> None:
    """Raise PolicyError where there is no process group of exactly these ranks."""
    if torch_group() != (ranks.rank, ranks.world):
        raise PolicyError(
            f"broadcast=True: tensors are handed on by torch.distributed's default group, which must have these "
            f"{ranks.world} ranks and none else; initialise it first, or leave broadcast= out"
        )


@dataclass(slots=True)
class Handing:
    """One restore, as one rank takes part in it."""

    meeting: Meeting
    topic: str
    _kept: dict[str, HostTensor] = field(default_factory=dict)  # as rank 0: what was read
    _said: bool = False

    def fetch(
        self, reader: Reader, names: Sequence[str], parts: Mapping[str, BoxWanted]
    ) -> dict[str, HostTensor]:
        """Return the tensors of a restore, as `Reader.read` does."""
        if self.meeting.ranks.leads:
            found = reader.read(names, parts)
            self._kept = {name: found[name] for name in names}
            return found
        shared = [name for name in names if not reader.is_own(name)]
        # First what may fail: who has said that it takes part must come to the collective.
        found = reader.read([name for name in names if reader.is_own(name)], parts)
        if self._said or not self._agree(shared):
            return found | reader.read(shared)
        for piece, memory in _pieces([reader.spec(name).nbytes for name in shared]):
            torch_broadcast(memory)
            for index, place in piece:
                found[shared[index]] = HostTensor(reader.spec(shared[index]), memory, start=place)
        return found

    def give_up(self) -> None:
        """Say that this rank will not take part, unless it did."""
        if not (self._said or self.meeting.ranks.leads):
            self._said = True
            self.meeting.say(f"{self.topic}-wants", Wants(self.meeting.ranks.rank, ""))

    def hand_out(self) -> None:
        """As rank 0, which has restored: hand on what was read, if all are ready for it."""
        heard = self.meeting.hear_all(f"{self.topic}-wants", Wants)
        listed = heard[1].listed if 1 in heard else []
        ready = len(heard) == self.meeting.ranks.world - 1 and self._kept.keys() >= set(listed)
        all_ready = ready and all(w.names == _digest(listed) for w in heard.values())
        self.meeting.say(f"{self.topic}-go", Go(all_ready))
        if all_ready:
            tensors = [self._kept[name] for name in listed]
            for piece, memory in _pieces([t.spec.nbytes for t in tensors]):
                for index, place in piece:
                    memory[place : place + tensors[index].spec.nbytes] = tensors[index].data
                torch_broadcast(memory)
        self._kept = {}

    def _agree(self, names: list[str]) -> bool:
        self._said = True
        rank = self.meeting.ranks.rank
        word = Wants(rank, _digest(names), names if rank == 1 else [])
        self.meeting.say(f"{self.topic}-wants", word)
        go = self.meeting.hear(f"{self.topic}-go", 0, Go)
        return go is not None and go.hands


def _digest(names: Sequence[str]) -> str:
    return blake3("\n".join(names).encode()).hexdigest(16)


def _pieces(sizes: Sequence[int]) -> Iterator[tuple[list[tuple[int, int]], memoryview]]:
    """Yield (index and place of each tensor, memory for them) of what is handed on at once; the same on all ranks."""
    piece: list[tuple[int, int]] = []
    total = 0
    for index, size in enumerate(sizes):
        if piece and total + size > AT_ONCE_BYTES:
            yield piece, map_pages(total) if total else NOT_READ
            piece, total = [], 0
        piece.append((index, total))
        total += -(-size // 64) * 64
    if piece:
        yield piece, map_pages(total) if total else NOT_READ
