"""What is measured. To add a case: a file here with a function `(Plan) -> CaseResult`, and a line in `CASES`.

A case that this machine cannot have raises `LeftOut`.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.cases.gpu import gpu_case, gpu_training_case
from bench.cases.loading import load_case
from bench.cases.lora import lora_case
from bench.cases.packing import packing_case
from bench.cases.ranks import many_ranks_case, ranks_case
from bench.cases.saving import tiny_case, transformer_case
from bench.cases.scale import scale_case
from bench.cases.training import large_training_case, training_case
from bench.figures import CaseResult
from bench.rounds import Plan

CASES: dict[str, Callable[[Plan], CaseResult]] = {
    "a": transformer_case,
    "b": tiny_case,
    "c": lora_case,
    "d": training_case,
    "e": load_case,
    "f": scale_case,
    "g": packing_case,
    "h": ranks_case,
    "i": many_ranks_case,
    "j": large_training_case,
    "k": gpu_case,
    "l": gpu_training_case,
}
