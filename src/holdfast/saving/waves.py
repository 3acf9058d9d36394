"""A state that is larger than the memory for it goes through that memory in waves, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec

from holdfast.core.memory import page_aligned
from holdfast.format.datafile import StoredTensor, lay_out
from holdfast.saving.arena import Arena
from holdfast.saving.plan import Layout, Plan
from holdfast.saving.snapshot import Snapshot, place, way

__all__ = ["in_waves"]

NOTHING = msgspec.Raw(b"null")


def in_waves(plan: Plan, arena: Arena, budget_bytes: int) -> Iterator[tuple[Snapshot, bool]]:
    """Yield (snapshot, whether it is the last): the state piece by piece, each copied before the next is asked for.

    A wave takes at most the budget, or one tensor that is larger. The values go with the last.
    """
    waves = list(_cut(plan, budget_bytes))
    done = 0
    for number, wave in enumerate(waves):
        count = sum(map(len, wave.values()))
        last = number == len(waves) - 1
        layout = Layout(
            {part: lay_out(tensors) for part, tensors in wave.items()},
            plan.layout.aliases if last else {part: {} for part in wave},
            [],
            [False] * count,
        )
        trees = plan.trees if last else dict.fromkeys(wave, NOTHING)
        sources = plan.sources[done : done + count]
        done += count
        part_of_it = replace(plan, layout=layout, trees=trees, sources=sources)
        pieces = arena.reserve(layout.sizes)
        yield place(part_of_it, arena, pieces, way(part_of_it, pieces)), last


def _cut(plan: Plan, budget_bytes: int) -> Iterator[dict[str, list[StoredTensor]]]:
    """Yield the tensors of each wave by part, in the order of the plan; every part is in the last one."""
    wave: dict[str, list[StoredTensor]] = {}
    taken = 0  # bytes of the wave's parts before the present one, in whole pages
    for part, tensors in plan.layout.tensors.items():
        size = 0
        for t in tensors:
            if wave and taken + page_aligned(size + t.nbytes) > budget_bytes:
                yield wave
                wave, taken, size = {}, 0, 0
            wave.setdefault(part, []).append(t)
            size += t.nbytes
        taken += page_aligned(size)
    yield {part: wave.get(part, []) for part in plan.layout.tensors}
