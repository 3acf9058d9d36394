"""Train for real, and see how much slower it gets when it saves: a state of some megabytes, and a large one."""

from __future__ import annotations

from dataclasses import replace

from bench.cases.saving import MEMORY, count_state
from bench.desks import TrainDesk
from bench.figures import CaseResult, Column
from bench.rounds import Plan, heats, workers

LOOP_COLUMNS = (
    Column("step", "step"),
    Column("median slowdown", "median step", unit="x", chart=True),
    Column("total slowdown", "whole loop", unit="x", chart=True),
    Column("held", "held per save", against="held", chart=True),
    Column("lost", "time lost per save", chart=True),
)
COLUMNS = (*LOOP_COLUMNS, MEMORY)
LARGE_ROUNDS = 3
LARGE_BYTES = 1_110_000_000
COPIES = (
    3.5  # of the state: the live one, gradients, what the optimizer needs for a moment, and a contestant's
)
ON_ONE_CORE = "with AdamW on one core"
PROCESS_BYTES = 800 << 20  # a process with torch, and one that helps it


def training_case(plan: Plan) -> CaseResult:
    """Train a transformer with AdamW on one core, and save every few steps."""
    every = 3 if plan.quick else 8
    result = CaseResult("d", "Training loop", training_about(ON_ONE_CORE, every), COLUMNS)
    measure_training(plan, result, "states:training", every, 2)
    return result


def large_training_case(plan: Plan) -> CaseResult:
    """Do the same with a state as large as that of case a, in which what each save costs besides its bytes is little.

    Steps are long, so there are few; and where the memory does not hold all workers side by side, they run in heats.
    """
    every = 3
    result = CaseResult("j", "Training loop, large state", training_about(ON_ONE_CORE, every), COLUMNS)
    rounds = min(plan.rounds, LARGE_ROUNDS)
    worker_bytes = PROCESS_BYTES + (0 if plan.quick else int(COPIES * LARGE_BYTES))
    for entries in heats(plan.entries, worker_bytes):
        heat = replace(plan, entries=entries, rounds=rounds)
        measure_training(heat, result, "states:large_training", every, 1)
    return result


def training_about(how: str, every: int) -> str:
    return (
        f"A transformer trained {how}, saved every {every} steps, beside the same steps without saving; who can saves "
        "in the background."
    )


def measure_training(
    plan: Plan, result: CaseResult, state: str, every: int, saves: int, *, device: str = "cpu"
) -> None:
    """Measure one heat. Memory is looked at where the result has a column for it."""
    result.facts |= {"steps between saves": every, "saves in a turn": saves}
    with workers(plan, result, state, TrainDesk, every, saves, device=device) as rounds:
        count_state(rounds)
        for i in range(plan.rounds):
            rounds.turn("turn", f"trains, round {i + 1}")
        if MEMORY in result.columns:
            rounds.memory("turn", "memory")
