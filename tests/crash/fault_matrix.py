"""Make docs/fault-matrix.md of what a campaign has tried: python -m crash.fault_matrix LEDGER_FOLDER OTHERS.json PAGE [NOTE].

Rows and columns are those that the tests declare as their `CELLS`; the numbers are what they counted.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crash.planted import CAUGHT_BY

PAGE = Path(__file__).parents[2] / "docs" / "fault-matrix.md"
MODULES = [
    "crash.test_every_call",
    "crash.test_sigkill",
    "crash.test_writer_faults",
    "crash.test_power_loss",
    "crash.test_file_by_file",
    "crash.test_rivals",
    "crash.test_storms",
    "crash.test_network",
    "stateful.test_histories",
]
HEAD = """# Fault matrix

What is done to holdfast while it works, and what was found. This page is made by the suite itself: `make campaign` runs it with large budgets and counts. The default suite runs the same tests with a smaller share of the cases.

After **every single fault** the [promises](reference/testing.md#invariants) are asked, as far as the fault allows: what was acknowledged restores bit by bit, nothing half is listed, what is listed has all it needs, the error says what happened, the same operation and the next save work without manual steps, and what a dead writer left is freed. A number is the count of cases in which all of that held. A case in which it did not ends the campaign, and this page is not written.
"""
LIMITS = """## What this does not show

- The model of a power cut is what POSIX allows, and ext4 is shut down by an ioctl that drops what its journal does not have. Neither is a disk that confirms a write and loses it.
- The object store of these rows is a model in memory, with S3's rules, so that each request can go wrong. The [store contract](reference/testing.md#storetests) is held against real server processes in other tests.
- Seeds choose the orders of rivals' calls and the histories. They are samples; calls of one operation are tried one by one, and all of them.
"""


def cells() -> set[tuple[str, str]]:
    """Return every (fault, operation) that the tests declare."""
    found: set[tuple[str, str]] = set()
    for name in MODULES:
        found |= set(importlib.import_module(name).CELLS)
    return found


def rows_of(page: str) -> dict[str, dict[str, str]]:
    """Return the cells of a page, by fault and operation; empty ones are left out."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    columns: list[str] = []
    for line in page.split("## Faults by operation")[1].split("\n## ")[0].splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        if line.startswith("| fault |"):
            columns = parts[1:]
        elif line.startswith("| ---"):
            continue
        elif line.startswith("| ") and columns:
            found[parts[0]] |= {c: n for c, n in zip(columns, parts[1:], strict=True) if n}
        elif not line.startswith("|"):
            columns = []
    return dict(found)


def table(head: Iterable[str], rows: Iterable[Iterable[str]], column: str = "---") -> str:
    head = list(head)
    lines = [head, ["---", *[column] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(folder: Path, others: Path, page: Path, note: Path = Path()) -> None:
    """`note`: a file that says in what this campaign differs from the others, for the page."""
    counts: Counter[tuple[str, str]] = Counter()
    tests: dict[str, set[str]] = defaultdict(set)
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            counts[entry["fault"], entry["operation"]] += entry["cases"]
            tests[entry["fault"]].add(entry["test"])
    declared = cells()
    missing = declared - set(counts)
    if missing:
        sys.exit(f"declared and not tried: {sorted(missing)}")
    page.write_text(
        render(
            counts,
            tests,
            declared,
            json.loads(others.read_text()),
            note.read_text() if note.is_file() else "",
        )
    )
    print(f"{page}: {sum(counts.values())} cases")


def render(
    counts: Counter[tuple[str, str]],
    tests: dict[str, set[str]],
    declared: set[tuple[str, str]],
    others: dict[str, Any],
    note: str,
) -> str:
    faults = list(dict.fromkeys(fault for fault, _ in sorted(declared, key=lambda c: order(c[0]))))
    tried = {cell: n for cell, n in counts.items() if cell in declared}
    out = [HEAD, f"{sum(tried.values()):,} cases, of {len(faults)} faults in {len({o for _, o in declared})} operations. "
           f"Last campaign: {datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, {platform.system()} {platform.release().split('-')[0]}.",
           note, "## Faults by operation\n"]  # fmt: skip
    for title, columns in groups({operation for _, operation in declared}):
        here = [f for f in faults if any((f, c) in tried for c in columns)]
        body = [[f, *[f"{tried[f, c]:,}" if (f, c) in tried else "" for c in columns]] for f in here]
        out += [f"### {title}\n", table(["fault", *columns], body, "--:")]
    out += [
        "## Which tests\n",
        table(["fault", "tests"], [[f, ", ".join(f"`{t}`" for t in sorted(tests[f]))] for f in faults]),
    ]
    out += ["## Planted defects\n", "A suite that cannot fail shows nothing. Each of these defects is planted in the product, and a named test goes red.\n",
            table(["defect", "caught by"], [[d, ", ".join(f"`{t}`" for t in by)] for d, by in CAUGHT_BY.items()])]  # fmt: skip
    out += [comparison(others), LIMITS]
    return "\n".join(out)


def order(fault: str) -> tuple[int, str]:
    words = ["killed", "EIO", "applied", "torn", "disk full", "read-only", "timeout", "answer", "4", "5", "a part", "the end", "power", "file", "bit", "page", "another", "two", "writer", "owner", "SIG", "mirror", "random"]  # fmt: skip
    return next((n for n, word in enumerate(words) if fault.startswith(word)), len(words)), fault


def groups(operations: set[str]) -> list[tuple[str, list[str]]]:
    """Split the columns into tables that fit a page."""
    titles = {
        "Saving and restoring": ["save", "async save (thread)", "async save (process)", "async save (inline)", "import", "restore"],
        "Keeping and deleting": ["prune", "prune at once", "remove", "undo", "collect", "collect what is due", "tag"],
    }  # fmt: skip
    named = {o for columns in titles.values() for o in columns}
    titles["Copies, proofs, whole histories"] = sorted(operations - named)
    return [(title, [c for c in columns if c in operations]) for title, columns in titles.items()]


MEANING = {
    "step 1": "goes on from the old checkpoint",
    "step 2": "has the new one",
    "error": "refuses to load the newest",
    "wrong": "loads wrong values and says nothing",
}


def comparison(others: dict[str, Any]) -> str:
    """Say how other ways to save fared, at the versions that were tried."""
    out = [
        "## Other ways to save\n",
        "The same kills, full disks and flips, met by other libraries through their public calls, each step saved under a name of its own, the newest name resumed from. "
        "A save of 320 kB on a local disk; kills fall where they fall in time. None of these libraries promises what is asked here, and who writes to a temporary name and renames, or keeps digests beside, gets more from them. Of a flipped bit, to refuse is the right answer.\n",
    ]  # fmt: skip
    cases = list(next(iter(others.values()))["rows"])
    for case in cases:
        body = []
        for way, found in others.items():
            if found["version"] is None:
                body.append([way, "not installed", ""])
                continue
            said = "; ".join(f"{n} × {meaning(o)}" for o, n in sorted(found["rows"][case].items()))
            body.append([way, found["version"], said])
        out += [f"### {case[0].upper()}{case[1:]}\n", table(["", "version", "a resume afterwards"], body)]
    return "\n".join(out)


def meaning(outcome: str) -> str:
    state, _, said = outcome.partition(", ")
    return MEANING.get(state, state) + (f", {said}" if said else "")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
