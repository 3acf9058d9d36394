"""ls and show: what they say of a sound run."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.catalog.lease import acquire
from holdfast.cli.words import age
from holdfast.stores import open_store


def test_ls_tells_each_checkpoint_in_one_line(cli, run: Path) -> None:
    result = cli("ls", run)
    assert (result.code, result.err) == (0, "")
    head, blank, titles, *rows = result.out.splitlines()
    assert "5 checkpoints" in head
    assert "on disk" in head
    assert blank == ""
    assert titles.split() == ["step", "saved", "val_loss", "acc", "size", "new", "tags", "why", "saved"]
    assert [int(r.split()[0]) for r in rows] == [500, 400, 300, 200, 100]
    assert "deployed" in rows[3]
    assert "nan" in rows[2]
    assert all(row == row.rstrip() for row in result.out.splitlines())


def test_ls_marks_the_best_only_where_its_direction_is_known(cli, run: Path) -> None:
    assert "*" not in cli("ls", run).out
    low = cli("ls", run, "--keep", 'best("val_loss", mode="min")').out
    assert [row.split()[0] for row in low.splitlines() if "*" in row] == ["200"]
    high = cli("ls", run, "--keep", 'best("val_loss", mode="max") | best("acc", mode="min")').out
    assert [row.split()[0] for row in high.splitlines() if "*" in row] == ["100"]
    assert "0.9*" in high
    assert "0.1*" in high


def test_ls_learns_the_direction_from_the_runs_own_reasons(cli, tmp_path: Path) -> None:
    weights = {"w": np.zeros(3)}
    with holdfast.Checkpointer(
        tmp_path / "r", {"model": weights}, save=holdfast.best("val_loss", mode="min"), keep=None
    ) as ckpt:
        for step in ckpt.steps(4):
            ckpt.log(val_loss=[4.0, 2.0, 3.0, 1.5][step])
    rows = cli("ls", tmp_path / "r").out.splitlines()
    assert sum("*" in row for row in rows) == 1
    assert any("1.5*" in row for row in rows)


def test_ls_keep_shows_the_plan(cli, run: Path) -> None:
    found = cli("ls", run, "--keep", "last(1)", "--json").json
    actions = {c["step"]: c["plan"]["action"] for c in found["checkpoints"]}
    assert actions == {100: "drop", 200: "keep", 300: "drop", 400: "drop", 500: "keep"}
    text = cli("ls", run, "--keep", "last(1)").out
    assert "no rule keeps it" in text
    assert "guard: tagged deployed" in text
    assert holdfast.Run(run).steps == [100, 200, 300, 400, 500]


def test_ls_json_of_a_run(cli, run: Path) -> None:
    found = cli("ls", run, "--json").json
    assert set(found) == {"run", "id", "size_bytes", "writer", "tags", "checkpoints", "broken"}
    assert found["tags"] == {"deployed": 200}
    assert found["writer"] is None
    needed = [*run.glob("checkpoints/*"), *run.glob("data/*/*")]
    assert found["size_bytes"] == sum(f.stat().st_size for f in needed)
    one = found["checkpoints"][2]
    assert set(one) == {
        "step", "attempt", "time", "clock", "metrics", "tags", "reasons", "stored_bytes", "new_bytes", "verified", "demoted",
    }  # fmt: skip
    assert one["metrics"] == {"val_loss": "nan", "acc": 0.3}
    assert one["clock"] == {"step": 300, "epoch": 0, "samples": 0, "tokens": 0, "active_seconds": 0.0}
    assert one["new_bytes"] < one["stored_bytes"]


def test_ls_of_a_directory_finds_runs_below(cli, run: Path, tmp_path: Path) -> None:
    holdfast.save(tmp_path / "deep" / "er" / "other", {"x": np.ones(3)}, step=7)
    (tmp_path / "deep" / "empty").mkdir()
    found = cli("ls", tmp_path, "--json").json
    assert [Path(r["run"]).name for r in found["runs"]] == ["other", "run"]
    assert [(r["checkpoints"], r["newest_step"], r["error"]) for r in found["runs"]] == [
        (1, 7, None),
        (5, 500, None),
    ]
    rows = cli("ls", tmp_path).out.splitlines()
    assert rows[1].split()[0] == "deep/er/other"
    assert rows[-1].startswith("2 runs, ")
    assert [Path(r["run"]).name for r in cli("ls", tmp_path, "--depth", 1, "--json").json["runs"]] == ["run"]


def test_ls_of_a_directory_goes_on_past_a_broken_run(cli, run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{}")
    result = cli("ls", tmp_path)
    assert result.code == 0
    assert "cut off or not ours" in result.out
    errors = {Path(r["run"]).name: r["error"] for r in cli("ls", tmp_path, "--json").json["runs"]}
    assert errors["run"] is None
    assert (tmp_path / "bad" / "run.json").as_uri() in errors["bad"]


def test_ls_says_who_writes_the_run(cli, run: Path) -> None:
    lease = acquire(open_store(run), heartbeat=False)
    try:
        assert "written now by process" in cli("ls", run).out
        assert set(cli("ls", run, "--json").json["writer"]) == {"host", "pid", "since"}
        assert "process" in cli("ls", run.parent).out
    finally:
        lease.release()
    assert "written now" not in cli("ls", run).out


def test_a_damaged_lease_keeps_nobody_from_looking(cli, run: Path) -> None:
    (lease,) = (run / "lease").iterdir()
    lease.write_text("{}")
    for verb in (["ls", run], ["status", run], ["doctor", run]):
        looked = cli(*verb)
        assert looked.code == 0, looked.err
        assert lease.name in looked.out + looked.err
    assert cli("ls", run, "--json").json["writer"] is None


def test_the_newest_that_cannot_be_read_is_named_where_another_is_taken(
    cli, run: Path, tmp_path: Path
) -> None:
    (run / "checkpoints" / "000000000500.json").write_text("{}")
    for verb in (["show", run], ["tag", run, "now"], ["export", run, tmp_path / "out", "--part", "model"]):
        taken = cli(*verb)
        assert taken.code == 0
        assert "step 500 of file://" in taken.err
        assert "is passed over: checkpoints/000000000500.json" in taken.err
    assert "passed over" not in cli("ls", run.parent).err  # it says that one is broken


def test_ls_chooses_the_metrics_that_are_asked_for(cli, run: Path) -> None:
    titles = cli("ls", run, "--metric", "acc").out.splitlines()[2]
    assert "acc" in titles
    assert "val_loss" not in titles


def test_show_tells_what_a_checkpoint_is(cli, run: Path) -> None:
    result = cli("show", f"{run}@deployed")
    assert result.code == 0
    first, *rest = result.out.splitlines()
    assert first.startswith("step 200 of ")
    assert first.endswith("deployed")
    text = "\n".join(rest)
    for expected in ("val_loss 0.5", "asked for", "python", "numpy", "attempt", "exact"):
        assert expected in text
    assert any(row.split()[:2] == ["weight", "float32[3,"] for row in rest)
    assert any(row.split() == ["lr", "0.05"] for row in rest)
    assert any(row.split() == ["name", "'tiny'"] for row in rest)


def test_show_takes_the_newest_by_default(cli, run: Path) -> None:
    assert cli("show", run).out.startswith("step 500 of ")
    assert cli("show", f"{run}@100").out.startswith("step 100 of ")
    assert cli("show", f"{run}@latest").out.startswith("step 500 of ")


def test_show_part_and_depth(cli, run: Path) -> None:
    whole, part = cli("show", run).out, cli("show", run, "--part", "model").out
    assert "'tiny'" in whole
    assert "'tiny'" not in part
    assert "float32[3, 4]" in part
    assert "float32[3, 4]" not in cli("show", run, "--part", "model", "--depth", 1).out


def test_show_json(cli, run: Path) -> None:
    found = cli("show", f"{run}@200", "--json").json
    assert set(found) == {
        "run", "step", "attempt", "parent", "time", "clock", "reasons", "metrics", "tags", "exact", "demoted",
        "stored_bytes", "new_bytes", "environment", "parts", "tensors", "signed_by",
    }  # fmt: skip
    assert list(found["parts"]) == ["model", "config", "rng"]
    assert found["parts"]["config"]["values"] == {
        "lr": 0.05,
        "name": "tiny",
        "betas": {"$tuple": [0.9, 0.95]},
    }
    weight = next(t for t in found["tensors"] if t["name"] == "model/fc.weight")
    assert weight == {
        "name": "model/fc.weight",
        "dtype": "float32",
        "shape": [3, 4],
        "bytes": 48,
        "tied_to": None,
    }
    only = cli("show", f"{run}@200", "--part", "config", "--json").json
    assert (list(only["parts"]), only["tensors"]) == (["config"], [])


def test_a_run_whose_path_holds_an_at_sign(cli, run: Path) -> None:
    other = run.rename(run.with_name("me@home"))
    assert cli("show", other).out.startswith("step 500 of ")
    assert cli("show", f"{other}@100").out.startswith("step 100 of ")


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        (0, "just now"),
        (45, "45s ago"),
        (61, "1m ago"),
        (3700, "1h 1m ago"),
        (90000, "1d 1h ago"),
        (1e9, "11574d 1h ago"),
    ],
)
def test_ages(monkeypatch: pytest.MonkeyPatch, passed: float, said: str) -> None:
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert age(2e9 - passed) == said
    assert math.isfinite(2e9)


def test_a_time_ahead_of_ours_is_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert age(2e9).startswith("2033-05-1")


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """Two hundred checkpoints; the tag is on step 3 and the best loss at step 7."""
    run = tmp_path / "long"
    with holdfast.Checkpointer(
        run, {"model": {"w": np.zeros(3)}}, save=holdfast.every(steps=1), keep=None, writer="inline"
    ) as ckpt:
        for step in ckpt.steps(200):
            ckpt.log(loss=0.1 if step == 6 else 1.0 + step)
    holdfast.Run(run).tag("mine", 3)
    return run


def steps_in(lines: list[str]) -> list[int]:
    return [
        int(row.split()[0])
        for row in lines
        if row[:1].isdigit() or (row[:1] == " " and row.split()[0].isdigit())
    ]


KEEP = ("--keep", 'best("loss", mode="min")')


def test_a_terminal_shows_the_newest_and_of_the_older_ones_the_tagged_and_the_best(
    cli, screen, long: Path
) -> None:
    shown = screen(160)
    cli("ls", long, *KEEP)
    assert steps_in(shown()[2:]) == [*range(200, 150, -1), 7, 3]
    assert "and 148 older ones; --all shows them" in shown()
    assert "200 checkpoints" in shown()[0]


def test_all_shows_all_on_a_terminal(cli, screen, long: Path) -> None:
    shown = screen(160)
    cli("ls", long, *KEEP, "--all")
    assert steps_in(shown()[2:]) == [*range(200, 0, -1)]
    assert not any("--all" in line for line in shown())


def test_without_a_terminal_nothing_is_left_out(cli, long: Path) -> None:
    out = cli("ls", long).out
    assert steps_in(out.splitlines()[2:]) == [*range(200, 0, -1)]
    assert "--all" not in out


def test_a_list_that_is_not_much_longer_is_not_cut(cli, screen, long: Path) -> None:
    holdfast.Run(long).prune(holdfast.last(100) & ~holdfast.tagged())
    holdfast.Run(long).untag("mine")
    holdfast.Run(long).prune(holdfast.last(100))
    shown = screen(160)
    cli("ls", long)
    assert len(steps_in(shown()[2:])) == 100


def test_runs_below_a_url(cli, s3_url: str) -> None:
    for name in ("group/a", "group/deep/b", "c@x"):
        holdfast.save(f"{s3_url}/{name}", {"n": 1}, step=3)
    found = cli("ls", s3_url)
    assert [line.split()[0] for line in found.out.splitlines()[1:]] == ["c@x", "group/a", "group/deep/b", "3"]
    told = cli("ls", f"{s3_url}/group/", "--json").json
    assert [r["run"] for r in told["runs"]] == [f"{s3_url}/group/a", f"{s3_url}/group/deep/b"]
    assert all(r["newest_step"] == 3 and r["error"] is None for r in told["runs"])
    assert [r["run"] for r in cli("ls", f"{s3_url}/group", "--depth", 1, "--json").json["runs"]] == [
        f"{s3_url}/group/a"
    ]
    nothing = cli("ls", f"{s3_url}/nowhere")
    assert nothing.code == 3
    assert "holds none within 4 levels" in nothing.err
    missing = cli("ls", "s3://no-such-bucket/runs")
    assert missing.code == 6
    assert "create the bucket first" in missing.err


def test_runs_below_a_url_are_found_whatever_they_are_called(cli, s3_url: str) -> None:
    names = ["100%25/a%2541", "größe", "my runs/~a", "what%3F/%23 1"]
    for name in names:
        holdfast.save(f"{s3_url}/{name}", {"n": 1}, step=3)
    told = cli("ls", s3_url, "--json").json
    assert [r["run"] for r in told["runs"]] == [f"{s3_url}/{name}" for name in sorted(names)]
    assert [holdfast.Run(r["run"]).steps for r in told["runs"]] == [[3]] * len(names)


def test_runs_below_a_file_url(cli, tmp_path: Path) -> None:
    holdfast.save(tmp_path / "some runs" / "a", {"n": 1}, step=3)
    told = cli("ls", (tmp_path / "some runs").as_uri(), "--json").json
    assert [r["run"] for r in told["runs"]] == [(tmp_path / "some runs" / "a").as_uri()]


def test_a_verb_waits_for_no_other_one(run: Path) -> None:
    """Who lists a run does not wait until numpy and what compares tensors are imported."""
    shown = (
        "import sys; from holdfast.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", shown, "ls", str(run)], capture_output=True, text=True, check=True
    )
    found = set(done.stderr.split())
    assert found & {f"holdfast.cli.{verb}" for verb in HELPED} == {"holdfast.cli.ls"}
    assert "numpy" not in found


HELPED = [
    "ls", "show", "diff", "cat", "verify", "doctor", "scrub", "status", "sync", "repair", "cp", "tag", "untag", "plan",
    "prune", "rm", "trash", "undo", "collect", "export", "sign", "keygen", "peer",
]  # fmt: skip


@pytest.mark.parametrize("asked", [["--help"], [], ["-h", "ls"]])
def test_the_help_tells_every_verb(cli, asked: list[str]) -> None:
    said = cli(*asked).out.partition("Commands:")[2].partition("Examples:")[0]
    assert [row.split()[0] for row in said.splitlines() if row.strip()] == HELPED


@pytest.mark.parametrize("verb", HELPED)
def test_every_verb_has_help_of_its_own(cli, verb: str) -> None:
    result = cli(verb, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: holdfast {verb} ")
    assert ("Rules, joined" in result.out) == (verb in ("plan", "prune"))
