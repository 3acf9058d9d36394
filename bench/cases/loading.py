"""Load a state of large tensors, all of it and one tensor, from a disk whose cache is cold."""

from __future__ import annotations

from bench.cases.saving import LOAD, count_state
from bench.desks import SaveDesk
from bench.figures import CaseResult, Column
from bench.rounds import Plan, without_loop, workers
from bench.states import ONE_TENSOR, transformer

COLUMNS = (
    LOAD,
    Column("rolled back", "rolled back", against="rolled back", chart=True),
    Column("load one", "one tensor", against="load one", chart=True),
    Column("load memory", "peak memory", unit="x"),
)


def load_case(plan: Plan) -> CaseResult:
    """Load weights and Adam moments of a transformer into live tensors."""
    about = "The state of case a, into live tensors: right after a save, and from the disk; one of its tensors alone."
    result = CaseResult("e", "Load", about, COLUMNS)
    part, name = ONE_TENSOR
    result.facts["one tensor bytes"] = transformer(plan.quick).tensors()[part][name].nbytes
    with workers(without_loop(plan), result, "states:transformer", SaveDesk) as rounds:
        count_state(rounds)
        rounds.turn("save", "saves", figures=lambda _: {})
        for i in range(plan.rounds):
            rounds.turn("roll_back", f"rolls back, round {i + 1}")
            rounds.turn("load", f"loads, round {i + 1}")
            rounds.turn("load_one", f"loads one tensor, round {i + 1}")
        rounds.memory("load", "load memory")
    return result
