"""What the campaign has tried: a line for each fault and operation, with the number of cases, written where
`HOLDFAST_LEDGER` says (nowhere, by default). `fault_matrix.py` makes the page of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

# "long": all that is declared, with large budgets; "broad": all of it, with the budgets of every run of the suite.
LONG = os.environ.get("HOLDFAST_CAMPAIGN", "") == "long"
BROAD = LONG or os.environ.get("HOLDFAST_CAMPAIGN", "") == "broad"


def budget(default: int, long: int) -> int:
    """Return how many cases to try: few in every run of the suite, many in `make campaign`."""
    return long if LONG else default


def count(fault: str, operation: str, cases: int) -> None:
    """Note that so many cases of a fault in an operation were tried by the present test, and all promises held."""
    assert cases > 0, f"{fault} in {operation}: nothing was tried"
    folder = os.environ.get("HOLDFAST_LEDGER")
    if folder:
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0].partition("[")[0].removeprefix("tests/")
        line = json.dumps({"fault": fault, "operation": operation, "cases": cases, "test": test})
        with Path(folder, f"{os.getpid()}.jsonl").open("a") as ledger:
            ledger.write(line + "\n")
