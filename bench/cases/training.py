"""Train for real, and see how much slower it gets when it saves."""

from __future__ import annotations

from bench.cases.saving import MEMORY, count_state
from bench.contestants import LIMIT
from bench.desks import TrainDesk
from bench.figures import CaseResult, Column
from bench.rounds import Plan, workers

SAVES = 2  # in each turn

COLUMNS = (
    Column("step", "step"),
    Column("median slowdown", "median step", unit="x", chart=True),
    Column("total slowdown", "whole loop", unit="x", chart=True),
    Column("held", "held per save", against="held", chart=True),
    Column("lost", "time lost per save", chart=True),
    MEMORY,
)


def training_case(plan: Plan) -> CaseResult:
    """Train a transformer with AdamW on one core, and save every few steps."""
    every = 3 if plan.quick else 8
    about = (
        f"A transformer trained with AdamW on one core, saved every {every} steps, beside the same steps without "
        "saving; who can saves in the background."
    )
    result = CaseResult("d", "Training loop", about, COLUMNS)
    result.facts |= {"steps between saves": every, "saves in a turn": SAVES}
    with workers(plan, result, "training", TrainDesk, every, SAVES) as rounds:
        count_state(rounds)
        for i in range(plan.rounds):
            rounds.turn("turn", f"trains, round {i + 1}")
        rounds.memory("turn", "memory")
    result.rounds[LIMIT] = {"held": result.rounds[LIMIT]["held"]}
    return result
