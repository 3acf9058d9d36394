"""What one of several ranks saves of the state, planned once and brought up to date like any other plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import msgspec
from blake3 import blake3

from holdfast.core.collector import collector_held
from holdfast.core.errors import StateError, UnsupportedValue
from holdfast.core.names import matches
from holdfast.distributed.ownership import Division, divide
from holdfast.distributed.ranks import Ranks
from holdfast.distributed.words import Agreement
from holdfast.format.ranks import MARK
from holdfast.format.values import encode_value
from holdfast.saving.plan import RNG_PART, Layout, Plan, Planner, kinds_of, with_generators
from holdfast.state.capture import CaptureReport, capture
from holdfast.state.recapture import Recapture
from holdfast.state.registry import dispatch, family, parameters, replicated, settle
from holdfast.state.tensors import TensorSource, TensorSpec, group_of

__all__ = ["RankPlanner"]

NOTHING = msgspec.Raw(b"null")


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
        self._division = Division()
        self._shared_names: frozenset[str] = frozenset()

    def plan(self, *, gradients: bool = False) -> Plan:
        """Find out what there is to copy; as `Planner.plan`, and:

        Raises:
            StateError: a key of the state looks like that of a rank.
        """
        with collector_held():
            settle(self._state)
            state = with_generators(self._state)
            for key in state:
                if key.startswith(MARK):
                    raise StateError(
                        f"state key {key!r}: with several ranks no key begins with {MARK!r}; rename it"
                    )
            return self._from_start(state, gradients=gradients) if gradients else self._renewed(state)

    def _renewed(self, state: dict[str, object]) -> Plan:
        known, layout = self._known, self._layout
        sources = known.renew(state) if known is not None else None
        if known is None or layout is None or sources is None:
            self._known = self._layout = None
            try:
                known = Recapture(state, anew=(RNG_PART,))
            except UnsupportedValue:
                return self._from_start(state)  # which says what is wrong, if anything is
            sources = known.first()
            self._division = self._divided(state, [s.spec for s in sources])
            layout = self._laid_out(known.aliases, known.lasting)
            self._known, self._layout = known, layout
        trees = dict(known.trees)
        return self._planned(state, layout, trees, sources, known.report)

    def _from_start(self, state: Mapping[str, object], *, gradients: bool = False) -> Plan:
        captured = capture(state, gradients=gradients)
        self._division = self._divided(state, [s.spec for s in captured.tensors])
        layout = self._laid_out(captured.aliases, [True] * len(captured.tensors))
        trees = {
            part: msgspec.Raw(msgspec.json.encode(encode_value(value, part)))
            for part, value in captured.tree.items()
        }
        self._known = self._layout = None
        return self._planned(state, layout, trees, captured.tensors, captured.report)

    def _planned(
        self, state: Mapping[str, object], layout: Layout, trees: dict[str, msgspec.Raw],
        sources: Sequence[TensorSource], report: CaptureReport,
    ) -> Plan:  # fmt: skip
        others = [sheet for sheet in layout.tensors if sheet not in state]
        ordered = [
            sources[taken.source] if taken.rows is None else _some_rows(sources[taken.source], *taken.rows)
            for taken in self._division.taken
        ]
        kinds = kinds_of(state) | dict.fromkeys(others, "rank")
        agreement = Agreement(self._division.agreed, self._digests(sources) if self._check else {})
        return Plan(layout, kinds, trees | dict.fromkeys(others, NOTHING), ordered, report, agreement)

    def _digests(self, sources: Sequence[TensorSource]) -> dict[str, str]:
        """Return a digest of each tensor, or box of one, of which other ranks hold replicas."""
        engines = dispatch()
        found: dict[str, str] = {}
        for source in sources:
            spec, shard = source.spec, source.spec.shard
            if (
                not (spec.name in self._shared_names if shard is None else shard.replicas > 1)
                or not spec.nbytes
            ):
                continue
            memory = memoryview(bytearray(spec.nbytes))
            engine = engines.engine_of(source.value)
            engine.copy_out([source.value], engine.targets([spec], [memory]))
            box = "" if shard is None else f" {list(shard.box[0])}"
            found[spec.name + box] = blake3(memory).hexdigest(16)
        return found

    def _laid_out(self, aliases: Mapping[str, str], lasting: Sequence[bool]) -> Layout:
        division = self._division
        tied: dict[str, dict[str, str]] = {sheet: {} for sheet in division.sheets}
        for alias, stored in aliases.items():
            tied[alias.partition("/")[0]][alias] = stored
        keeps = [taken.rows is None and lasting[taken.source] for taken in division.taken]
        return Layout(division.sheets, tied, [], keeps)

    def _divided(self, state: Mapping[str, object], specs: Sequence[TensorSpec]) -> Division:
        shared = self._shared(state, specs)
        self._shared_names = frozenset(shared)
        return divide(specs, shared, list(state), self._ranks.rank)

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
        optimizers = [f"{key}/state/" for key, value in state.items() if family(value) == "optimizer"]
        found: dict[str, tuple[str, Sequence[int]]] = {}
        for name in (spec.name for spec in specs if spec.shard is None):
            paths = chain([name, name.removesuffix(".grad")], _parameters_of(name, optimizers))
            if any(path in kept_same for path in paths) or (self._same and matches(name, self._same)):
                found[name] = (all_of_them, everybody)
        return found


def _parameters_of(name: str, optimizers: Sequence[str]) -> list[str]:
    """Return the path of the parameter that an optimizer's tensor is for."""
    return [name[len(head) :].rpartition("/")[0] for head in optimizers if name.startswith(head)]


def _some_rows(source: TensorSource, first: int, end: int) -> TensorSource:
    spec = source.spec
    part = msgspec.structs.replace(spec, shape=(end - first, *spec.shape[1:]))
    return TensorSource(part, source.value[first:end], source.volatile)  # type: ignore[index]
