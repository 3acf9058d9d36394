"""Save, load and train a state on a GPU: beside copies into pinned memory, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.cases.saving import DISK, DURABLE, FIRST, HELD, LOAD, save_and_count
from bench.cases.training import (
    COPIES,
    LARGE_BYTES,
    LARGE_ROUNDS,
    LOOP_COLUMNS,
    PROCESS_BYTES,
    measure_training,
    training_about,
)
from bench.desks import SaveDesk
from bench.devices import is_here
from bench.figures import CaseResult
from bench.limits import DeviceLimitDesk
from bench.rounds import LeftOut, Plan, heats, without_loop, workers

CONTEXT_BYTES = 600 << 20  # of a GPU's memory: what a process takes before it has a tensor there
TRAINED = 6.0  # times the state: the live one, activations, and what the optimizer needs for a moment
LOADED = 2.2  # times the state: the live one, and one that a contestant loads beside it


def gpu_case(plan: Plan) -> CaseResult:
    """Save weights and Adam moments of a transformer, and load them from a cold disk."""
    plan = _on_gpu(plan)
    about = (
        "The state of case a, on the device. The limits: all tensors copied into pinned memory on one stream; that "
        "memory written past the page cache; the file read into it, and all tensors copied to the device."
    )
    result = CaseResult("k", f"Transformer + Adam, {plan.device}", about, (FIRST, HELD, DURABLE, LOAD, DISK))
    for heat in _heats(without_loop(plan), LOADED):
        with workers(
            heat, result, "states:transformer", SaveDesk, limit=DeviceLimitDesk, device=plan.device
        ) as rounds:
            save_and_count(rounds, load=True)
    return result


def gpu_training_case(plan: Plan) -> CaseResult:
    """Train a transformer with AdamW, and save every few steps."""
    plan = _on_gpu(plan)
    every = 40 if plan.device == "cuda" and not plan.quick else 3
    about = training_about("with AdamW", every)
    result = CaseResult("l", f"Training loop, large state, {plan.device}", about, LOOP_COLUMNS)
    few = replace(plan, rounds=min(plan.rounds, LARGE_ROUNDS))
    for heat in _heats(few, TRAINED):
        measure_training(heat, result, "states:large_training", every, 1, device=plan.device)
    return result


def _on_gpu(plan: Plan) -> Plan:
    """Return the plan for those who take tensors on a GPU. Raises LeftOut where there is none."""
    if not is_here(plan.device):
        raise LeftOut(f"no {plan.device.upper()} device here")
    return replace(plan, entries=tuple(e for e in plan.entries if e.on_gpu))


def _heats(plan: Plan, states: float) -> Iterator[Plan]:
    """Yield the plan of each heat; `states` is how many times the state a worker needs on the device."""
    nbytes = 0 if plan.quick else LARGE_BYTES
    on_device = CONTEXT_BYTES + int(states * nbytes)
    for entries in heats(plan.entries, PROCESS_BYTES + int(COPIES * nbytes), (plan.device, on_device)):
        yield replace(plan, entries=entries)
