"""The state as a tree: nested names, folded layers, ties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.analysis.outline import Node, outline
from holdfast.analysis.runs import directions, find_runs, freed_bytes, stored_bytes, summarize
from holdfast.core.records import CheckpointRecord
from holdfast.policies import best, last
from holdfast.stores import MemoryStore


def tree(state: dict[str, object]) -> dict[str, Node]:
    checkpoint = holdfast.save(MemoryStore(), state)
    return {node.name: node for node in outline(checkpoint, checkpoint.parts)}


def lines(node: Node, depth: int = 0) -> list[str]:
    name = node.name + (f"…{node.last_name}" if node.last_name else "")
    return ["  " * depth + name, *(row for child in node.children for row in lines(child, depth + 1))]


def test_names_are_nested_at_dots_and_slashes() -> None:
    state = {"conv.weight": np.ones(2), "conv.bias": np.ones(1), "head/out.weight": np.ones(3), "v1.2": 5}
    assert lines(tree({"m": state})["m"]) == [
        "m",
        "  conv",
        "    weight",
        "    bias",
        "  head/out.weight",
        "  v1.2",
    ]


def test_alike_layers_are_folded() -> None:
    def layer(width: int) -> dict[str, np.ndarray]:
        return {"w": np.ones((width, 2)), "b": np.ones(width)}

    layers = {f"layers.{i}.{name}": v for i in range(5) for name, v in layer(3 if i != 3 else 4).items()}
    node = tree({"m": layers | {"out": np.ones(1)}})["m"]
    assert lines(node) == [
        "m", "  layers", "    0…2", "      w", "      b", "    3", "      w", "      b", "    4", "      w", "      b", "  out",
    ]  # fmt: skip
    folded = node.children[0].children[0]
    assert (folded.repeats, folded.tensors, folded.elements, folded.nbytes) == (3, 6, 27, 216)
    assert (node.tensors, node.elements) == (11, 5 * 9 + 3 + 1)


def test_groups_with_names_are_not_folded() -> None:
    node = tree({"m": {"weight": {"a": np.ones(2)}, "bias": {"a": np.ones(2)}}})["m"]
    assert [child.repeats for child in node.children] == [1, 1]


def test_a_tie_counts_once() -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(4, 4, bias=False)
    node = tree({"model": torch.nn.ModuleDict({"a": layer, "b": layer})})["model"]
    assert (node.tensors, node.elements) == (1, 16)
    tied = node.children[1] if node.children[1].spec else node.children[1].children[0]
    assert tied.tied_to == "model/a.weight"


def test_values_and_empty_groups() -> None:
    nodes = tree({"lr": 0.1, "empty": {}, "list": [1, {"a": np.ones(1)}], "plain": [1, 2]})
    assert (nodes["lr"].value, nodes["empty"].value, nodes["plain"].value) == (0.1, {}, [1, 2])
    assert lines(nodes["list"]) == ["list", "  0", "  1", "    a"]


def record(step: int, *reasons: str) -> CheckpointRecord:
    return CheckpointRecord(step, f"a{step}", float(step), reasons=reasons)


def test_directions_come_from_rules_and_reasons_only() -> None:
    records = [
        record(1, "val_loss improved to 0.5 (first value)"),
        record(2, "every 10 steps", "val_loss improved to 0.4 (was 0.5)"),
        record(3, "my acc improved to 0.9 (was 0.1)"),
        record(4, "flat improved to 1 (was 1)"),
    ]
    assert directions(records) == {"val_loss": "min", "my acc": "max"}
    assert directions(records[:1]) == {}
    assert directions([], best("f1", mode="max") & last(3) | best("wer", mode="min")) == {
        "f1": "max",
        "wer": "min",
    }


def test_a_reason_that_only_looks_like_one() -> None:
    for reason in (
        "x improved to soon (was late)",
        "x improved to 1.2.3 (was 0)",
        "x improved to nan (was 1)",
        "x",
    ):
        assert directions([record(1, reason)]) == {}


def test_freed_bytes_are_those_that_removal_frees(tmp_path: Path) -> None:
    state = {"m": {"same": np.ones(50_000), "other": np.zeros(50_000)}}
    for step in (1, 2, 3):
        state["m"]["other"] += 1
        holdfast.save(tmp_path / "r", state, step=step)
    run = holdfast.Run(tmp_path / "r")
    expected = freed_bytes(run, [1, 2])
    before = stored_bytes(run)
    assert run.remove([1, 2]) == expected
    assert before - stored_bytes(run) >= expected > 0


def test_find_runs_does_not_follow_links(tmp_path: Path) -> None:
    holdfast.save(tmp_path / "a" / "run", {"x": np.ones(1)})
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert list(find_runs(str(tmp_path), 9)) == [str(tmp_path / "a" / "run")]
    assert list(find_runs(str(tmp_path), 1)) == []
    assert list(find_runs(str(tmp_path / "nothing"), 1)) == []


def test_summarize_says_what_is_wrong(tmp_path: Path) -> None:
    holdfast.save(tmp_path / "r", {"x": np.ones(1)}, step=4)
    assert (summarize(str(tmp_path / "r")).newest_step, summarize(str(tmp_path / "r")).error) == (4, None)
    (tmp_path / "r" / "run.json").write_bytes(b"")
    assert summarize(str(tmp_path / "r")).error is not None
