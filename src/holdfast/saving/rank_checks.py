"""What rank 0 looks at before it commits what several ranks have written: that they hold shares of the same tensors."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.core.errors import SaveFailed
from holdfast.distributed.words import Record

__all__ = ["check_agreed", "check_replicas"]


def check_agreed(step: int, records: Sequence[Record]) -> None:
    """Refuse a save in which ranks that share tensors do not hold the same ones, or not all of them are there."""
    found: dict[str, dict[str, list[int]]] = {}
    for record in records:
        for group, digest in record.agreement.groups.items():
            found.setdefault(group, {}).setdefault(digest, []).append(record.rank)
    for group, digests in found.items():
        ranks = sorted(rank for held in digests.values() for rank in held)
        if len(digests) > 1:
            odd = min(digests.values(), key=lambda held: (len(held), -held[0]))
            others = next(rank for rank in ranks if rank not in odd)
            raise SaveFailed(
                f"step {step}: rank {odd[0]} does not hold the same spread and replicated tensors as rank {others}, by "
                "name, element type and shape; all ranks that share tensors must hold shares of the same ones"
            )
        members = int(group.partition(":")[0])
        if len(ranks) != members:
            raise SaveFailed(
                f"step {step}: tensors are spread over {members} ranks and only {ranks[:8]} hold shares of them; give "
                "every one of these ranks a Checkpointer with the same state"
            )


def check_replicas(step: int, records: Sequence[Record]) -> None:
    """Refuse a save in which what must be equal on several ranks is not. Only asked for: see `check_replicas=`."""
    first: dict[str, tuple[int, str]] = {}
    for record in records:
        other = [
            name for name, digest in record.agreement.replicas.items()
            if first.setdefault(name, (record.rank, digest))[1] != digest
        ]  # fmt: skip
        if other:
            name = other[0].partition(" ")[0]
            more = f", and {len(other) - 1} more" if len(other) > 1 else ""
            raise SaveFailed(
                f"step {step}: {name}{more}: rank {record.rank} holds other values than rank {first[other[0]][0]}, and "
                "both are replicas of one tensor: a rank has diverged, or its memory is corrupt. Nothing was committed"
            )
