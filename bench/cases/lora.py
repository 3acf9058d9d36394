"""Save a frozen base with small adapters that change, ten times, and keep all."""

from __future__ import annotations

from bench.cases.saving import DURABLE, HELD, first_figures
from bench.desks import SaveDesk
from bench.figures import CaseResult, Column
from bench.rounds import Plan, without_loop, workers
from bench.states import lora

SAVES = 10

COLUMNS = (
    Column("disk", "bytes on disk / (base + 10 adapters)", unit="x", chart=True),
    Column("total", "bytes on disk", unit="bytes"),
    HELD,
    DURABLE,
)


def lora_case(plan: Plan) -> CaseResult:
    """Fine-tune adapters: ten checkpoints of a state of which half a percent changes."""
    about = f"A frozen base and adapters that change, saved {SAVES} times; all checkpoints are kept."
    result = CaseResult("c", "LoRA", about, COLUMNS)
    subject = lora(plan.quick)
    base, adapters = subject.nbytes("base"), subject.nbytes("adapters")
    least = base + SAVES * adapters
    result.facts |= {
        "bytes": base + adapters,
        "base bytes": base,
        "adapter bytes": adapters,
        "least bytes": least,
    }
    with workers(without_loop(plan), result, "states:lora", SaveDesk, True) as rounds:
        rounds.turn("save", "saves for the first time", figures=first_figures)
        for i in range(1, SAVES):
            rounds.turn("save", f"saves, {i + 1} of {SAVES}")
        rounds.stored("disk", per=least)
        rounds.stored("total", per=1)
    return result
