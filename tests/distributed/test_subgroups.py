"""DDP over some of the ranks: what two groups call the same is not taken for the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import holdfast
from distributed.launching import each, results

pytest.importorskip("torch.distributed")

WORKER = Path(__file__).with_name("subgroup_worker.py")


@pytest.mark.parametrize("apart", [False, True], ids=["one run", "a run for each group"])
def test_each_rank_of_each_group_gets_back_what_it_had(tmp_path: Path, apart: bool) -> None:
    order = {"run": str(tmp_path / "run"), "out": str(tmp_path), "name": "x", "apart": apart}
    assert [code for code, _ in each(4, order, WORKER)] == [0] * 4
    assert [found["same"] for found in results(tmp_path, "x", 4)] == [True] * 4
    for run in [tmp_path / f"run-{pair}" for pair in (0, 1)] if apart else [tmp_path / "run"]:
        assert list(holdfast.Run(str(run)).latest.verify()) == []
