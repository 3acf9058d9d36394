"""What of the state a rank writes: its shares of what is spread or the same everywhere, and what is its own."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterator, Mapping

import msgspec
from blake3 import blake3

from holdfast.core.collector import collector_held
from holdfast.core.errors import StateError
from holdfast.core.names import check_path, matches
from holdfast.distributed.ranks import Ranks
from holdfast.format.datafile import METADATA, StoredTensor, lay_out
from holdfast.format.ranks import own_part
from holdfast.format.values import encode_value
from holdfast.saving.plan import Layout, Plan, Planner, with_generators
from holdfast.state.capture import Captured, capture
from holdfast.state.registry import family, parameters, replicated, settle
from holdfast.state.tensors import TensorSource

__all__ = ["RankPlanner"]


class RankPlanner(Planner):
    """Plans what one of several ranks saves. `same` are globs over the tree paths of tensors that are the same on every
    rank, besides those that say so themselves."""

    def __init__(self, state: Mapping[str, object], ranks: Ranks, same: tuple[str, ...] = ()) -> None:
        super().__init__(state)
        self._ranks = ranks
        self._same = same
        self.shape = ""  # digest of what all ranks must agree on in the newest plan

    def plan(self, *, gradients: bool = False) -> Plan:
        """Find out what there is to copy; as `Planner.plan`, and:

        Raises:
            StateError: a key of the state looks like that of a rank.
        """
        with collector_held():
            settle(self._state)
            state = with_generators(self._state)
            for key in state:
                if key.startswith("~"):
                    raise StateError(
                        f"state key {key!r}: with several ranks no key begins with '~'; rename it"
                    )
            captured = capture(state, gradients=gradients)
            return self._divided(state, captured)

    def _divided(self, state: Mapping[str, object], captured: Captured) -> Plan:
        rank = self._ranks.rank
        same = _Same(state, captured, self._same)
        owners = _owners([s for s in captured.tensors if same.has(s)], self._ranks.world)
        of_part: dict[str, list[StoredTensor]] = {check_path(part): [] for part in state}
        for part in list(state) if rank else ():
            of_part[own_part(rank, part)] = []
        sources: dict[tuple[str, str], TensorSource] = {}
        agreed = blake3()
        for source in captured.tensors:
            spec = source.spec
            part, _, name = spec.name.partition("/")
            if name == METADATA:
                raise StateError(f"{spec.name}: data files reserve the name {METADATA!r}; rename that key")
            name, box, whole = name or part, None, spec.shape
            if spec.shard is not None:
                whole, box = spec.shard.box[1], spec.shard.box if spec.shape != spec.shard.box[1] else None
                mine = zlib.crc32(spec.name.encode()) % spec.shard.replicas == spec.shard.replica
                # An empty share is no one's, but for a tensor that is empty altogether.
                mine = mine and (spec.nbytes > 0 or box is None)
            elif spec.name in owners:
                mine = owners[spec.name] == rank
            else:
                part, mine, whole = own_part(rank, part), True, ()
            if whole or spec.shard is not None or spec.name in owners:
                agreed.update(f"{spec.name}\n{spec.dtype}{whole}\n".encode())
            if mine:
                of_part[part].append(StoredTensor(name, spec.dtype, spec.shape, spec.stride, 0, 0, box))
                sources[part, name] = source
        self.shape = agreed.hexdigest(16)
        tensors = {part: lay_out(found) for part, found in of_part.items()}
        ordered = [sources[part, t.name] for part, found in tensors.items() for t in found]
        layout = Layout(tensors, self._aliases(captured, of_part), [], [True] * len(ordered))
        kinds = {part: family(value) for part, value in state.items()}
        kinds |= {part: "rank" for part in of_part if part not in kinds}
        trees = dict(self._trees(captured))
        return Plan(layout, kinds, trees, ordered, captured.report)

    def _aliases(self, captured: Captured, parts: Mapping[str, object]) -> dict[str, dict[str, str]]:
        tied: dict[str, dict[str, str]] = {part: {} for part in parts}
        for alias, stored in captured.aliases.items():
            tied[own_part(self._ranks.rank, alias.partition("/")[0])][alias] = stored
        return tied

    def _trees(self, captured: Captured) -> Iterator[tuple[str, msgspec.Raw]]:
        for part, value in captured.tree.items():
            raw = msgspec.Raw(msgspec.json.encode(encode_value(value, part)))
            if self._ranks.rank:
                yield part, msgspec.Raw(b"null")  # rank 0 says what it is
            yield own_part(self._ranks.rank, part), raw


class _Same:
    """Which tensors of a capture are the same on every rank."""

    def __init__(self, state: Mapping[str, object], captured: Captured, globs: tuple[str, ...]) -> None:
        names, _ = parameters(state)
        paths = {names[i] for i in replicated(state) if i in names}
        self._globs = globs
        self._paths = frozenset(paths)
        self._optimizers = tuple(key for key, value in state.items() if family(value) == "optimizer")

    def has(self, source: TensorSource) -> bool:
        """Return whether it is a parameter that is kept the same, its gradient, or an optimizer's state for it."""
        spec = source.spec
        if spec.shard is not None:
            return False
        if spec.name in self._paths or (self._globs and matches(spec.name, self._globs)):
            return True
        if not self._paths:
            return False
        if spec.name.removesuffix(".grad") in self._paths:
            return True
        for key in self._optimizers:
            head = f"{key}/state/"
            if spec.name.startswith(head) and spec.name[len(head) :].rpartition("/")[0] in self._paths:
                return True
        return False


def _owners(same: list[TensorSource], world: int) -> dict[str, int]:
    """Return who writes each tensor that all have: the largest first, each to the rank that has the least to write."""
    load = [(0, rank) for rank in range(world)]  # a heap
    owners: dict[str, int] = {}
    for source in sorted(same, key=lambda s: (-s.spec.nbytes, s.spec.name)):
        nbytes, rank = load[0]
        owners[source.spec.name] = rank
        heapq.heapreplace(load, (nbytes + source.spec.nbytes, rank))
    return owners
