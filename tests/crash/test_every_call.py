"""Every call of every operation goes wrong once, in each of the ways: all promises hold after each single fault."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crash import ledger
from crash.copies import COPIES
from crash.loop import ERRORS, KILLED, LEVELS, FaultKind, every_call
from crash.operations import LARGE, OPERATIONS, ROWS, Operation
from holdfast.catalog import tidiness

THOROUGH = {"save"}  # where even the short run leaves no call out
SHARED_MEMORY = Path("/dev/shm")

CELLS = [
    (kind.name, operation.name)
    for level in LEVELS.values()
    for operation in [*OPERATIONS, *COPIES]
    for kind in level
    if operation.uploads or not kind.call
]


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory in memory, where there is one; the mark of a long run must not hide what a dead writer left."""
    monkeypatch.setattr(tidiness, "MARK_FROM", 0)
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as made:
        yield Path(made)


def cases(level: str) -> list[object]:
    return [
        pytest.param(operation, kind, id=f"{operation.name}-{kind.name}".replace(" ", "_"))
        for operation in [*OPERATIONS, *COPIES]
        for kind in LEVELS[level]
        if operation.uploads or not kind.call
    ]


def run(operation: Operation, kind: FaultKind, level: str, scratch: Path) -> None:
    stride = 1 if ledger.LONG or operation.name in THOROUGH else 5
    offset = sum(map(ord, operation.name + kind.name))
    ledger.count(
        kind.name, operation.name, every_call(operation, kind, level, scratch, stride=stride, offset=offset)
    )


@pytest.mark.parametrize(("operation", "kind"), cases("disk"))
def test_of_a_disk(operation: Operation, kind: FaultKind, scratch: Path) -> None:
    run(operation, kind, "disk", scratch)


@pytest.mark.parametrize(("operation", "kind"), cases("store"))
def test_of_a_store(operation: Operation, kind: FaultKind, scratch: Path) -> None:
    run(operation, kind, "store", scratch)


@pytest.mark.parametrize(("operation", "kind"), cases("requests"))
def test_of_an_object_store(operation: Operation, kind: FaultKind, scratch: Path) -> None:
    run(operation, kind, "requests", scratch)


@pytest.mark.parametrize("kind", [*KILLED, ERRORS[0], ERRORS[3]], ids=lambda k: k.name)
@pytest.mark.parametrize("operation", [LARGE, ROWS], ids=["whole", "blocks"])
def test_of_a_disk_past_the_page_cache(
    operation: Operation, kind: FaultKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidiness, "MARK_FROM", 0)
    stride = ledger.budget(7, 1)
    ledger.count(kind.name, operation.name, every_call(operation, kind, "disk", tmp_path, stride=stride))
