"""Which of how many processes this one is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from holdfast.core.errors import PolicyError
from holdfast.state.registry import jax_group, torch_group

__all__ = ["Ranks", "RanksLike", "ranks_here", "ranks_of"]

MAX_RANKS = 100_000
# Of torchrun, Open MPI, MPICH, SLURM.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank `rank` of `world`. `seconds` is how long one waits for the others at most, before it says who is missing."""

    rank: int = 0
    world: int = 1
    seconds: float = 600.0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    @property
    def leads(self) -> bool:
        """Whether this one holds the run and commits."""
        return self.rank == 0


def ranks_here() -> int:
    """Return how many ranks run on this machine, as far as the launcher says so; else 1."""
    for name in _LOCAL_SIZES:
        found = os.environ.get(name, "").partition("(")[0]
        if found.isdecimal() and int(found) > 0:
            return int(found)
    return 1


RanksLike = tuple[int, int] | tuple[int, int, float] | Ranks


def ranks_of(given: RanksLike | None) -> Ranks:
    """Return what was given (rank, number of ranks and, if wanted, seconds), or else what torch.distributed's default
    group says, or jax.distributed.

    Raises:
        PolicyError: there is no such rank.
    """
    if isinstance(given, Ranks):
        found = given
    else:
        rank, world, *seconds = given if given is not None else torch_group() or jax_group() or (0, 1)
        found = Ranks(int(rank), int(world), *seconds)
    if not (0 <= found.rank < found.world <= MAX_RANKS and found.seconds > 0):
        raise PolicyError(
            f"ranks={given!r}: expected (rank, number of ranks), such as (0, 8), with 0 <= rank < number <= {MAX_RANKS}"
        )
    return found
