"""The plan of a snapshot: what goes where. Made once, and then only brought up to date, as long as the state keeps its
structure and its tensors their memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from holdfast.core.collector import collector_held
from holdfast.core.errors import StateError, UnsupportedValue
from holdfast.core.memory import page_aligned
from holdfast.core.names import check_path
from holdfast.distributed.words import NOTHING_AGREED, Agreement
from holdfast.format.datafile import METADATA, StoredTensor, lay_out
from holdfast.format.values import encode_value
from holdfast.state.capture import CaptureReport, capture
from holdfast.state.recapture import Recapture
from holdfast.state.registry import family
from holdfast.state.rng import capture_rng
from holdfast.state.tensors import TensorSource

__all__ = ["RNG_PART", "Layout", "Plan", "Planner", "kinds_of", "plan_once", "with_generators"]

RNG_PART = "rng"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of each part stand in its file, and the tied names. `order` puts captured tensors so; it is
    empty when they stand so already.

    `lasting` says of each tensor, in that order, whether all snapshots of this layout copy the same alias.
    """

    tensors: dict[str, list[StoredTensor]]
    aliases: dict[str, dict[str, str]]
    order: list[int]
    lasting: list[bool]

    def put_in_order(self, captured: list[TensorSource]) -> list[TensorSource]:
        """Return captured tensors in the order of their files."""
        return [captured[i] for i in self.order] if self.order else list(captured)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each part's tensors."""
        return [tensors[-1].end if tensors else 0 for tensors in self.tensors.values()]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a snapshot will hold: the kinds and the encoded values of the parts, and the live tensors in the order of
    the layout."""

    layout: Layout
    kinds: dict[str, str]
    trees: dict[str, msgspec.Raw]
    sources: list[TensorSource]
    report: CaptureReport
    agreement: Agreement = NOTHING_AGREED  # of several ranks

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the snapshot takes."""
        return sum(map(page_aligned, self.layout.sizes))


class Planner:
    """Plans snapshots of one state, again and again.

    `rng`: the state of every random generator is captured unasked, as the part "rng".
    """

    def __init__(self, state: Mapping[str, object], *, rng: bool = True) -> None:
        self._state = state
        self._rng = rng
        self._known: Recapture | None = None
        self._layout: Layout | None = None

    def plan(self, *, gradients: bool = False, ahead: bool = False) -> Plan:
        """Find out what there is to copy. Draws no random number and changes nothing.

        `gradients` adds the .grad of module parameters; such a snapshot costs a full capture. `ahead`: nothing is saved
        by this plan, only made ready.

        Raises:
            UnsupportedValue: something cannot be stored without running code at load.
            StateError: a key of the state is reserved.
        """
        with collector_held():
            state = self._whole()
            return self._from_start(state, gradients=True) if gradients else self._renewed(state)

    def once(self, *, gradients: bool = False) -> Plan:
        """As `plan`, for a state that is planned once only."""
        with collector_held():
            return self._from_start(self._whole(), gradients=gradients)

    def lasts(self, plan: Plan) -> bool:
        """Return whether the layout of a plan may be that of the next one."""
        return plan.layout is self._layout

    def _whole(self) -> dict[str, object]:
        """Return the state with all that is captured unasked."""
        return with_generators(self._state) if self._rng else dict(self._state)

    def _renewed(self, state: dict[str, object]) -> Plan:
        known, layout = self._known, self._layout
        sources = known.renew(state) if known is not None else None
        if known is None or layout is None or sources is None:
            self._known = self._layout = None
            try:
                known = Recapture(state, anew=(RNG_PART,) if self._rng else ())
            except UnsupportedValue:
                return self._from_start(state)  # which says what is wrong, if anything is
            sources = known.first()
            layout = self._lay_out(state, sources, known.aliases, known.lasting)
            self._known, self._layout = known, layout
        return self._planned(state, layout, dict(known.trees), sources, known.report)

    def _from_start(self, state: Mapping[str, object], *, gradients: bool = False) -> Plan:
        """Return the plan of a state of which nothing is known."""
        captured = capture(state, gradients=gradients)
        once = [True] * len(captured.tensors)
        layout = self._lay_out(state, captured.tensors, captured.aliases, once)
        # Encoding is the copy: nothing of the live state is shared with the snapshot afterwards.
        trees = {
            part: msgspec.Raw(msgspec.json.encode(encode_value(v, part))) for part, v in captured.tree.items()
        }
        return self._planned(state, layout, trees, captured.tensors, captured.report)

    def _lay_out(
        self, state: Mapping[str, object], sources: Sequence[TensorSource], aliases: Mapping[str, str],
        lasting: Sequence[bool],
    ) -> Layout:  # fmt: skip
        """Say where captured tensors go."""
        return _laid_out(state, sources, aliases, lasting)

    def _planned(
        self, state: Mapping[str, object], layout: Layout, trees: dict[str, msgspec.Raw],
        sources: list[TensorSource], report: CaptureReport,
    ) -> Plan:  # fmt: skip
        """Put together what is copied, once it is known where it goes."""
        return Plan(layout, kinds_of(state), trees, layout.put_in_order(sources), report)


def plan_once(state: Mapping[str, object], *, gradients: bool = False, rng: bool = True) -> Plan:
    """Plan one snapshot of a state; see `Planner.plan`."""
    return Planner(state, rng=rng).once(gradients=gradients)


def kinds_of(state: Mapping[str, object]) -> dict[str, str]:
    """Return what kind of object each part is."""
    return {part: family(value) for part, value in state.items()}


def with_generators(state: Mapping[str, object]) -> dict[str, object]:
    """Return the state with the random generators as a further part. Raises StateError if it has such a part."""
    if RNG_PART in state:
        raise StateError(
            f"state key {RNG_PART!r} is reserved: holdfast captures every random generator by itself; rename yours"
        )
    return {**state, RNG_PART: capture_rng()}


def _laid_out(
    parts: Iterable[str],
    sources: Sequence[TensorSource],
    aliases: Mapping[str, str],
    lasting: Sequence[bool],
) -> Layout:
    of_part: dict[str, list[StoredTensor]] = {check_path(part): [] for part in parts}
    numbers: dict[str, dict[str, int]] = {part: {} for part in of_part}
    for number, source in enumerate(sources):
        spec = source.spec
        if spec.shard is not None and spec.shape != spec.shard.box[1]:
            raise StateError(
                f"{spec.name}: this process holds a part of it only; save with a Checkpointer on every rank, which "
                "knows them from torch.distributed's default group or from ranks=(rank, number of ranks)"
            )
        part, _, name = check_path(spec.name).partition("/")  # the keys of a state hold no slash
        if name == METADATA:
            raise StateError(f"{spec.name}: data files reserve the name {METADATA!r}; rename that key")
        name = name or part
        of_part[part].append(StoredTensor(name, spec.dtype, spec.shape, spec.stride, 0, 0))
        numbers[part][name] = number
    tensors = {part: lay_out(found) for part, found in of_part.items()}
    tied: dict[str, dict[str, str]] = {part: {} for part in of_part}
    for alias, stored in aliases.items():
        tied[alias.partition("/")[0]][alias] = stored
    order = [numbers[part][t.name] for part, found in tensors.items() for t in found]
    return Layout(tensors, tied, [] if order == sorted(order) else order, [lasting[i] for i in order])
