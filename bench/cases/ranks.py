"""Four ranks under torchrun save and load one state: few large tensors, and very many small ones."""

from __future__ import annotations

import time
from dataclasses import replace

from bench.cases.saving import DISK, STEP_SECONDS, count_state, first_figures
from bench.figures import CaseResult, Column
from bench.ranks.desk import RanksDesk, RanksLimitDesk
from bench.rounds import Plan, Rounds, heats, workers

HELD = Column("held", "held", against="held", chart=True)
IN_A_LOOP = Column("held in a loop", "held in a loop", against="held in a loop")
DURABLE = Column("durable", "durable", against="durable", chart=True)
LOAD = Column("load", "load", against="load", chart=True)
BACK = Column("rolled back", "rolled back", against="rolled back", chart=True)
PROCESSOR = Column("processor", "rank 0's CPU", against="processor", chart=True)
LAUNCH_BYTES = 1600 << 20  # four ranks with torch, and the processes that help them
COPIES = 2.2  # of the state: the live one and a snapshot
LARGE_BYTES = 2_150_000_000


def ranks_case(plan: Plan) -> CaseResult:
    """Save a model and its optimizer under FSDP2."""
    about = (
        "Weights and Adam moments of a transformer under fully_shard, 4 ranks under torchrun, gloo. The slowest rank "
        "counts; in a loop, a forward and backward pass follow each save, and the optimizer's step waits."
    )
    columns = (HELD, IN_A_LOOP, DURABLE, LOAD, BACK, PROCESSOR, DISK)
    result = CaseResult("h", "4 ranks, FSDP2 + AdamW", about, columns)
    _measure(plan, result, "ranks.states:sharded", LARGE_BYTES, in_a_loop=True)
    return result


def many_ranks_case(plan: Plan) -> CaseResult:
    """Save 20,000 DTensors, of each of which every rank holds 64 floats."""
    about = "20,000 DTensors, 4 ranks under torchrun, gloo: what each tensor costs. The slowest rank counts."
    columns = (HELD, DURABLE, LOAD, BACK, PROCESSOR, DISK)
    result = CaseResult("i", "4 ranks, 20,000 small tensors each", about, columns)
    _measure(plan, result, "ranks.states:small", 0, in_a_loop=False)
    return result


def _measure(plan: Plan, result: CaseResult, state: str, nbytes: int, *, in_a_loop: bool) -> None:
    worker_bytes = LAUNCH_BYTES + (0 if plan.quick else int(COPIES * nbytes))
    for entries in heats(plan.ranks, worker_bytes):
        heat = replace(plan, entries=entries)
        with workers(heat, result, state, RanksDesk, limit=RanksLimitDesk) as rounds:
            count_state(rounds)
            if not plan.quick:
                time.sleep(STEP_SECONDS)
            rounds.turn("save", "saves for the first time", figures=first_figures)
            if in_a_loop:
                rounds.turn("step", "saves in a step for the first time", figures=_first_in_a_loop)
            for i in range(plan.rounds):
                _round(rounds, i + 1, in_a_loop=in_a_loop)
            time.sleep(1.0)  # what is removed behind the loop is gone then
            rounds.stored("disk", per=result.facts["bytes"])


def _round(rounds: Rounds, number: int, *, in_a_loop: bool) -> None:
    rounds.turn("save", f"saves, round {number}")
    rounds.turn("load", f"loads, round {number}")
    if in_a_loop:
        rounds.turn("step", f"saves in a step, round {number}")


def _first_in_a_loop(found: dict[str, float]) -> dict[str, float]:
    return {"first held in a loop": found["held in a loop"]}
