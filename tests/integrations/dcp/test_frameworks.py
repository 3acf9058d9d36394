"""Frameworks that make DCP's storage themselves, under torchrun: what they save is in runs, and comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import holdfast
from distributed.launching import launch, results

pytest.importorskip("accelerate")
pytest.importorskip("lightning")

PROGRAM = Path(__file__).with_name("frameworks.py")
TIMEOUT = 200

Left = tuple[Path, dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Where two ranks have run all three, and what each rank has noted."""
    root = tmp_path_factory.mktemp("frameworks")
    launch(PROGRAM, 2, str(root), seconds=TIMEOUT)
    names = ("bare_ids", "accelerate", "lightning")
    return root, {name: results(root, name, 2) for name in names}


def sound(run: Path) -> holdfast.Run:
    found = holdfast.Run(run)
    assert found.writer is None
    assert not any(found.verify().values())
    return found


@pytest.mark.slow
def test_bare_checkpoint_ids(left: Left) -> None:
    root, ranks = left
    assert ranks["bare_ids"][0] == ranks["bare_ids"][1]
    out = ranks["bare_ids"][0]
    assert len({json.dumps(out[k]) for k in ("files", "1", "2", "3", "4")}) == 5
    assert out["newest"] == 3  # found as frameworks find it, by what lies in the directories
    assert out["resumed"] == out["3"]
    assert out["by class"] == out["4"]
    run = sound(root / "titan")
    assert run.steps == [3, 4]  # keep=last(2)
    assert run[3].tensors["model/first.weight"].shape == (7, 4)
    assert run[4].values(as_="torch")["train_state"]["step"] == torch.tensor(5, dtype=torch.int32)  # type: ignore[index]
    assert "has no checkpoint 1" in out["gone"]
    assert "only the mark of a save into a run" in out["gone"]


@pytest.mark.slow
def test_what_was_saved_as_files_is_loaded_until_the_run_has_it(left: Left) -> None:
    root, ranks = left
    out = ranks["bare_ids"][0]
    assert out["switched over"] == out["files"]
    assert out["both"] == out["4"]
    assert sorted(p.name for p in (root / "outputs/checkpoint/step-0").iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp",
    ]  # fmt: skip
    assert "RanksDisagree" in out["disagree"]
    assert "rank 0 finds it in the run, rank 1 only as DCP's own files" in out["disagree"]
    lightning = ranks["lightning"][0]
    assert lightning["switched over"] == lightning["old"]


@pytest.mark.slow
def test_accelerate(left: Left) -> None:
    root, ranks = left
    assert ranks["accelerate"][0] == ranks["accelerate"][1]
    out = ranks["accelerate"][0]
    assert out["is sharded"] == "DTensor"
    assert out["loaded"] == out["3"] != out["4"] != out["before"]
    models, optimizers = (
        sound(root / "accelerate/pytorch_model_fsdp_0"),
        sound(root / "accelerate/optimizer_0"),
    )
    assert models.steps == optimizers.steps == [3, 4]
    merged = load_file(root / "merged/model.safetensors")
    assert merged.keys() == models[3].values(as_="torch")["model"].keys()  # type: ignore[union-attr]
    for name, tensor in merged.items():
        assert torch.equal(tensor, torch.from_numpy(models[3][f"model/{name}"].read())), name
    assert "out/final/pytorch_model_fsdp_0' does not say which step it is" in out["no step"]


@pytest.mark.slow
def test_lightning(left: Left) -> None:
    root, ranks = left
    assert ranks["lightning"][0] == ranks["lightning"][1]
    out = ranks["lightning"][0]
    assert out["loaded"] == out["new"] != out["old"]
    assert out["epoch"] == 3
    model = {k.replace("m.", ".m.", 1): v for k, v in out["consolidated"].items()}
    assert model.items() <= out["new"].items()
    run = sound(root / "lightning")
    assert run.steps == [2000]
    assert run.latest.tensors["optim/state/first.weight/exp_avg"].shape == (7, 4)


@pytest.mark.slow
def test_nothing_was_stored_as_files(left: Left) -> None:
    root, _ = left
    found = {p.parent.name for p in root.rglob("*.distcp")}
    assert found == {"step-0", "epoch=1-step=1000.ckpt"}  # those saved before
