"""Save a state that rests: one of large tensors, one of many tiny ones."""

from __future__ import annotations

import time

from bench.contestants import LIMIT
from bench.desks import SaveDesk
from bench.figures import CaseResult, Column
from bench.rounds import Plan, Rounds, without_loop, workers

FIRST = Column("first held", "first held")
HELD = Column("held", "held", against="held", chart=True)
DURABLE = Column("durable", "durable", against="durable", chart=True)
LOAD = Column("load", "load", against="load", chart=True)
MEMORY = Column("memory", "peak memory", unit="x", chart=True)
STEP_SECONDS = 5.0  # of a first step of training, in which memory may be made ready
DISK = Column("disk", "bytes on disk", unit="x")


def transformer_case(plan: Plan) -> CaseResult:
    """Save weights and Adam moments of a transformer."""
    about = (
        "Weights and Adam moments of a transformer, fp32. Every tensor changes between saves; one is kept."
    )
    result = CaseResult("a", "Transformer + Adam", about, (FIRST, HELD, DURABLE, MEMORY, DISK))
    with workers(without_loop(plan), result, "transformer", SaveDesk) as rounds:
        _save_and_count(rounds)
    return result


def tiny_case(plan: Plan) -> CaseResult:
    """Save and load very many tensors of 256 bytes."""
    about = "Tensors of 64 floats: what each tensor costs besides its bytes. Every one changes between saves."
    result = CaseResult("b", "Tiny tensors", about, (FIRST, HELD, DURABLE, LOAD, MEMORY, DISK))
    with workers(without_loop(plan), result, "tiny", SaveDesk) as rounds:
        _save_and_count(rounds, load=True)
    return result


def count_state(rounds: Rounds) -> None:
    """Note how large the state is."""
    rounds.result.facts["bytes"] = rounds.workers[LIMIT].call("stored_bytes")


def first_figures(found: dict[str, float]) -> dict[str, float]:
    return {"first held": found["held"], "first durable": found["durable"]}


def _save_and_count(rounds: Rounds, *, load: bool = False) -> None:
    count_state(rounds)
    if not rounds.plan.quick:
        time.sleep(STEP_SECONDS)
    rounds.turn("save", "saves for the first time", figures=first_figures)
    for i in range(rounds.plan.rounds):
        rounds.turn("save", f"saves, round {i + 1}")
        if load:
            rounds.turn("load", f"loads, round {i + 1}")
    rounds.stored("disk", per=rounds.result.facts["bytes"])
    rounds.memory("save", "memory")
