"""What one of several ranks saves of the state, planned once and brought up to date like any other plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import msgspec
from blake3 import blake3

from holdfast.core.errors import StateError
from holdfast.core.names import matches
from holdfast.distributed.ownership import Division, divide
from holdfast.distributed.ranks import Ranks
from holdfast.distributed.words import Agreement, Replica
from holdfast.format.ranks import MARK
from holdfast.saving.plan import Layout, Plan, Planner, kinds_of
from holdfast.state.capture import CaptureReport
from holdfast.state.registry import dispatch, optimizers, parameters, replicated, settle
from holdfast.state.tensors import TensorSource, TensorSpec, group_of

__all__ = ["RankPlanner"]

NOTHING = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True)
class _RankLayout(Layout):
    """A layout with what it was made of. A plan with gradients has another, and the next without goes back to this."""

    division: Division
    shared: frozenset[str]  # names of what several ranks hold the same of, besides what says so itself


class RankPlanner(Planner):
    """Plans what one of several ranks saves. `same` are globs over the tree paths of tensors that are the same on every
    rank, besides those that say so themselves."""

    def __init__(
        self,
        state: Mapping[str, object],
        ranks: Ranks,
        same: tuple[str, ...] = (),
        *,
        check_replicas: bool = False,
    ) -> None:
        super().__init__(state)
        self._ranks = ranks
        self._same = same
        self._check = check_replicas
        self._everybody = group_of(range(ranks.world))
        self._compares = False
        self._compared: frozenset[str] = frozenset()  # names that were, with what other ranks hold

    def plan(self, *, gradients: bool = False, ahead: bool = False) -> Plan:
        """Find out what there is to copy; see `Planner.plan`. What is saved is compared with what other ranks hold."""
        self._compares = not ahead
        return super().plan(gradients=gradients, ahead=ahead)

    def _whole(self) -> dict[str, object]:
        """Return the state with all that is captured unasked. Raises StateError: a key looks like that of a rank."""
        settle(self._state)
        state = super()._whole()
        for key in state:
            if key.startswith(MARK):
                raise StateError(
                    f"state key {key!r}: with several ranks no key begins with {MARK!r}; rename it"
                )
        return state

    def _lay_out(
        self, state: Mapping[str, object], sources: Sequence[TensorSource], aliases: Mapping[str, str],
        lasting: Sequence[bool],
    ) -> Layout:  # fmt: skip
        specs = [s.spec for s in sources]
        shared = self._shared(state, specs)
        division = divide(specs, shared, list(state), self._ranks.rank)
        tied: dict[str, dict[str, str]] = {sheet: {} for sheet in division.sheets}
        for alias, stored in aliases.items():
            tied[alias.partition("/")[0]][alias] = stored
        keeps = [taken.rows is None and lasting[taken.source] for taken in division.taken]
        return _RankLayout(division.sheets, tied, [], keeps, division, frozenset(shared))

    def _planned(
        self, state: Mapping[str, object], layout: Layout, trees: dict[str, msgspec.Raw],
        sources: list[TensorSource], report: CaptureReport,
    ) -> Plan:  # fmt: skip
        assert isinstance(layout, _RankLayout)
        others = [sheet for sheet in layout.tensors if sheet not in state]
        ordered = list(map(sources.__getitem__, layout.division.numbers))
        for place, rows in layout.division.cut:
            ordered[place] = _some_rows(ordered[place], *rows)
        kinds = kinds_of(state) | dict.fromkeys(others, "rank")
        agreement = Agreement(layout.division.agreed, self._replicas(sources, layout.shared))
        return Plan(layout, kinds, trees | dict.fromkeys(others, NOTHING), ordered, report, agreement)

    def _replicas(self, sources: Sequence[TensorSource], shared: frozenset[str]) -> dict[str, Replica]:
        """Return what is to be compared with what other ranks hold: all that is shared, if that was asked for; else
        what is spread over some ranks only, once, for another group may mean something else by the same name."""
        if not self._compares:
            return {}

        def is_shared(spec: TensorSpec) -> bool:
            return spec.shard is not None or spec.name in shared

        is_wanted = is_shared if self._check else self._is_apart
        wanted = [source for source in sources if source.spec.nbytes and is_wanted(source.spec)]
        names = frozenset(source.spec.name for source in wanted)
        if not self._check:
            if names <= self._compared:
                return {}
            self._compared |= names
        return {source.spec.name: self._replica(source) for source in wanted}

    def _is_apart(self, spec: TensorSpec) -> bool:
        return spec.shard is not None and spec.shard.group != self._everybody

    def _replica(self, source: TensorSource) -> Replica:
        spec, shard = source.spec, source.spec.shard
        memory = memoryview(bytearray(spec.nbytes))
        engine = dispatch().engine_of(source.value)
        copying = engine.copy_out([source.value], engine.targets([spec], [memory]))
        if copying is not None:
            copying.wait()
        digest = blake3(memory).hexdigest(16)
        if shard is None:
            return Replica("", spec.shape, (0,) * len(spec.shape), spec.shape, digest)
        return Replica(shard.group, shard.box[1], shard.box[0], spec.shape, digest)

    def _shared(
        self, state: Mapping[str, object], specs: Sequence[TensorSpec]
    ) -> dict[str, tuple[str, Sequence[int]]]:
        """Return group and ranks of each tensor that several ranks hold the same of: parameters that are kept the same,
        their gradients, an optimizer's state for them, and what the globs name.

        Only what all ranks keep the same: of two groups of some ranks each nobody knows whether parameters of the same
        name are one (a replicated norm, say) or two (of two stages, or two slices); so they are each rank's own."""
        names, _ = parameters(state)
        # By number: the process group may count them otherwise than ranks= does.
        all_here = {i for i, ranks in replicated(state).items() if len(ranks) == self._ranks.world}
        kept_same = {names[i] for i in all_here if i in names}
        everybody = range(self._ranks.world)
        all_of_them = group_of(everybody)
        heads = [f"{path}/state/" for path in optimizers(state)]
        found: dict[str, tuple[str, Sequence[int]]] = {}
        for name in (spec.name for spec in specs if spec.shard is None):
            paths = chain([name, name.removesuffix(".grad")], _parameters_of(name, heads))
            if any(path in kept_same for path in paths) or (self._same and matches(name, self._same)):
                found[name] = (all_of_them, everybody)
        return found


def _parameters_of(name: str, heads: Sequence[str]) -> list[str]:
    """Return the path of the parameter that an optimizer's tensor is for; `heads` begin the names of such tensors."""
    return [name[len(head) :].rpartition("/")[0] for head in heads if name.startswith(head)]


def _some_rows(source: TensorSource, first: int, end: int) -> TensorSource:
    spec = source.spec
    part = msgspec.structs.replace(spec, shape=(end - first, *spec.shape[1:]))
    return TensorSource(part, source.value[first:end], source.volatile)  # type: ignore[index]
