"""What rank 0 looks at before it commits what several ranks have written: that they hold shares of the same tensors."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.core.errors import SaveFailed
from holdfast.distributed.words import Record, Replica

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
    """Refuse a save in which ranks hold different things under one name: replicas that are not equal (where that was
    asked for, see `check_replicas=`), or tensors of different groups, such as stages of a pipeline that call their
    layers alike."""
    seen: dict[str, list[tuple[int, Replica]]] = {}
    for record in records:
        for name, mine in record.agreement.replicas.items():
            for rank, other in seen.get(name, ()):
                why = _differ(mine, other)
                if why:
                    raise SaveFailed(
                        f"step {step}: {name}: rank {record.rank} holds {why} than rank {rank}. {_remedy(mine, other)} "
                        "Nothing was committed"
                    )
            known = seen.setdefault(name, [])
            if not any(
                (o.group, o.offsets, o.shape) == (mine.group, mine.offsets, mine.shape) for _, o in known
            ):
                known.append((record.rank, mine))


def _differ(mine: Replica, other: Replica) -> str:
    if mine.whole != other.whole:
        return "a tensor of another shape"
    if (
        mine.group.partition(":")[0] != other.group.partition(":")[0]
    ):  # what cannot be compared is not believed
        return "a share of it among another number of ranks"
    same_box = (mine.offsets, mine.shape) == (other.offsets, other.shape)
    return "other values" if same_box and mine.digest != other.digest else ""


def _remedy(mine: Replica, other: Replica) -> str:
    if mine.group == other.group:
        return "Both are replicas of one tensor: a rank has diverged, or its memory is corrupt."
    return (
        "They are of two groups of ranks: where these are stages or slices that call their parameters alike, give the "
        "state, or the modules, names that differ between them; where they are replicas, a rank has diverged."
    )
