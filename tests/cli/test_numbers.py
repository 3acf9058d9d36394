"""cat and diff on the command line; the arithmetic is tested in tests/analysis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import holdfast


def test_cat_shows_place_statistics_and_first_values(cli, run: Path) -> None:
    result = cli("cat", f"{run}@100", "model/fc.weight")
    assert result.code == 0
    rows = result.out.splitlines()
    assert rows[0].split() == ["model/fc.weight", "float32[3,", "4]", "48", "B"]
    assert "model.safetensors, bytes " in rows[1]
    assert "first values  1.0  2.0  3.0  4.0 …" in rows[-1]
    facts = dict(row.split(None, 1) for row in rows if row.startswith("  ") and len(row.split()) > 1)
    assert facts["min"] == "1"
    assert facts["max"] == "12"
    assert facts["mean"] == "6.5"
    assert any("█" in row for row in rows)


def test_cat_json_names_the_very_bytes(cli, run: Path) -> None:
    found = cli("cat", f"{run}@100", "model/fc.weight", "--json").json
    assert set(found) == {"step", "name", "dtype", "shape", "bytes", "place", "statistics"}
    place = found["place"]
    raw = (run / place["file"]).read_bytes()[place["first_byte"] : place["end_byte"]]
    np.testing.assert_array_equal(np.frombuffer(raw, np.float32), np.arange(1, 13, dtype=np.float32))
    assert found["statistics"]["count"] == 12
    assert sum(found["statistics"]["histogram"]) == 12


@pytest.mark.parametrize(
    ("index", "want"),
    [
        ("[0]", [1, 2, 3, 4]),
        ("[1:3, 2]", [7, 11]),
        ("[-1, -1]", 12),
        ("[::-2, 0]", [9, 1]),
        ("[..., 0]", [1, 5, 9]),
    ],
)
def test_cat_with_an_index(cli, run: Path, index: str, want: object) -> None:
    assert cli("cat", f"{run}@100", f"model/fc.weight{index}", "--json").json["values"] == want
    assert cli("cat", f"{run}@100", f"model/fc.weight{index}").code == 0


def test_cat_values_prints_all(cli, run: Path) -> None:
    out = cli("cat", f"{run}@100", "model/fc.weight", "--values").out
    assert [float(n) for n in out.replace("[", " ").replace("]", " ").split()] == list(range(1, 13))


@pytest.mark.parametrize(
    "index", ["[a]", "[0:1:2:3]", "[9]", "[0, 0, 0]", "[::0]", "[__import__('os')]", "[]"]
)
def test_cat_refuses_other_indices(cli, run: Path, index: str) -> None:
    assert cli("cat", run, f"model/fc.weight{index}").code in (2, 3)


def test_cat_prefers_a_tensor_of_that_very_name(cli, tmp_path: Path) -> None:
    holdfast.save(tmp_path / "r", {"m": {"a[0]": np.arange(3.0), "a": np.zeros(2)}})
    assert cli("cat", tmp_path / "r", "m/a[0]", "--json").json["shape"] == [3]


def test_cat_of_odd_tensors(cli, tmp_path: Path) -> None:
    odd = {
        "none": np.zeros((0, 3)),
        "one": np.array(7),
        "bad": np.array([np.nan, np.inf, -np.inf, 1.0]),
        "flag": np.array([True, False]),
    }
    holdfast.save(tmp_path / "r", {"m": odd})
    for name in odd:
        result = cli("cat", tmp_path / "r", f"m/{name}")
        assert result.code == 0, result.err
        assert cli("cat", tmp_path / "r", f"m/{name}", "--json").code == 0
        assert cli("cat", tmp_path / "r", f"m/{name}", "--values", "--json").code == 0
    assert "NaN  1 element\n" in cli("cat", tmp_path / "r", "m/bad").out


def test_diff_of_two_steps(cli, run: Path) -> None:
    result = cli("diff", run, 100, 200)
    assert result.code == 0
    rows = result.out.splitlines()
    assert rows[0] == "step 100 → step 200"
    titles = next(i for i, r in enumerate(rows) if r.startswith("model"))
    assert rows[titles + 1].split()[0] == "big"
    assert rows[titles + 2].split()[0] == "fc.weight"
    assert any(r.split()[0] == "config/lr" and r.split()[1:] == ["0.1", "→", "0.05"] for r in rows if r)
    assert "tensors: 2 changed" in rows[-1]
    assert "frozen" not in result.out


def test_the_three_ways_to_name_two_checkpoints(cli, run: Path) -> None:
    wanted = cli("diff", run, 100, "deployed", "--json").json
    for arguments in (
        (f"{run}@100", f"{run}@200"),
        (f"{run}@100", "@200"),
        (f"{run}@100", f"{run}@deployed"),
    ):
        assert cli("diff", *arguments, "--json").json == wanted
    assert cli("diff", f"{run}@100", run, "--json").json["after"]["step"] == 500


def test_diff_json(cli, run: Path) -> None:
    found = cli("diff", run, 100, 200, "--json").json
    assert set(found) == {"before", "after", "tensors", "values", "same", "read_bytes"}
    big, weight = [c for c in found["tensors"] if c["name"].startswith("model/")]
    assert set(big) == {
        "name",
        "kind",
        "before",
        "after",
        "max_delta",
        "relative",
        "fraction",
        "cosine",
        "lost_finite",
    }
    assert weight["max_delta"] == 1.0
    assert weight["fraction"] == 1.0
    assert big["fraction"] == 2 / 64
    assert {"path": "config/lr", "before": "0.1", "after": "0.05"} in found["values"]
    assert found["read_bytes"] < 10 * 64 * 512 * 4  # what the digests already tell is not read


def test_diff_with_itself(cli, run: Path) -> None:
    result = cli("diff", run, 200, 200)
    assert "no difference" in result.out
    assert cli("diff", run, 200, 200, "--json").json["read_bytes"] == 0


def test_diff_of_part_and_top(cli, run: Path) -> None:
    assert "config/lr" not in cli("diff", run, 100, 200, "--part", "model").out
    assert "and 1 tensor of model that changed less" in cli("diff", run, 100, 200, "--top", 1).out


def test_diff_tells_of_random_generators_in_a_word_unless_asked(cli, run: Path) -> None:
    np.random.seed(5)
    holdfast.save(run, {"x": np.ones(1)}, step=600, rng=True)
    np.random.seed(6)
    holdfast.save(run, {"x": np.ones(1)}, step=700, rng=True)
    whole = cli("diff", run, 600, 700).out
    assert "random generators moved on" in whole
    assert "numpy/state/key" not in whole
    assert "numpy/state/key" in cli("diff", run, 600, 700, "--part", "rng").out


def test_diff_of_other_shapes(cli, tmp_path: Path) -> None:
    holdfast.save(tmp_path / "a", {"m": {"x": np.zeros(3), "y": np.zeros(3), "gone": np.ones(2), "v": 1}})
    holdfast.save(
        tmp_path / "b", {"m": {"x": np.zeros(4), "y": np.zeros(3, np.float32), "new": np.ones(2), "w": 2}}
    )
    out = cli("diff", tmp_path / "a", tmp_path / "b").out
    for expected in ("float64[3] → float64[4]", "float64[3] → float32[3]", "removed", "added", "absent"):
        assert expected in out
    assert "1 added, 1 removed, 1 of another shape, 1 of another dtype" in out
