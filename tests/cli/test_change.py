"""tag, untag, prune, rm and export: what they do, what they refuse, what they ask first."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import holdfast
from holdfast.catalog.lease import acquire
from holdfast.stores import open_store


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch):
    """Make the standard streams a terminal on which somebody gives this answer."""

    def give(answer: str) -> Terminal:
        screen = Terminal()
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return give


def steps(run: Path) -> list[int]:
    return holdfast.Run(run).steps


def test_tag_and_untag(cli, run: Path) -> None:
    assert cli("tag", run, "good").out == "good is step 500\n"
    assert cli("tag", run, "good", "300", "--json").json["tags"] == {"deployed": 200, "good": 300}
    assert cli("tag", f"{run}@100", "first").out == "first is step 100\n"
    assert cli("tag", run, "again", "deployed").out == "again is step 200\n"
    assert cli("tag", f"{run}@200", "again", 200).out == "again is step 200\n"
    assert cli("untag", run, "good").code == 0
    assert cli("untag", run, "first", "--json").json == {
        "run": run.as_uri(), "tag": "first", "step": None, "tags": {"again": 200, "deployed": 200},
    }  # fmt: skip
    assert holdfast.Run(run).tags == {"again": 200, "deployed": 200}


@pytest.mark.parametrize("name", ["", "../up", "a b", "x" * 200, "a/b", "\x1b[31m", ".hidden"])
def test_tag_names_are_checked(cli, run: Path, name: str) -> None:
    result = cli("tag", run, name)
    assert result.code == 2
    assert "\x1b" not in result.err
    assert holdfast.Run(run).tags == {"deployed": 200}


def test_prune_dry_run_changes_nothing(cli, run: Path) -> None:
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    result = cli("prune", run, "--keep", "last(1)", "--dry-run")
    assert result.code == 0
    assert "3 checkpoints of 5 to delete" in result.out
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_prune_does_what_it_showed(cli, run: Path) -> None:
    shown = cli("prune", run, "--keep", "last(1)", "--dry-run", "--json").json
    done = cli("prune", run, "--keep", "last(1)", "--yes", "--json").json
    assert shown["plan"] == done["plan"]
    assert (shown["dry_run"], done["dry_run"]) == (True, False)
    assert done["rule"] == "last(1)"
    assert steps(run) == [200, 500]  # 200 is tagged
    assert cli("verify", run).code == 0


def test_prune_with_nothing_to_do_does_not_ask(cli, run: Path) -> None:
    result = cli("prune", run, "--keep", "last(9)")
    assert result.code == 0
    assert "0 checkpoints of 5 to delete" in result.out


@pytest.mark.parametrize("arguments", [("prune", "--keep", "last(1)"), ("rm", "100")])
def test_nothing_is_deleted_where_nobody_can_be_asked(cli, run: Path, arguments: tuple[str, ...]) -> None:
    verb, *rest = arguments
    result = cli(verb, run, *rest)
    assert result.code == 2
    assert "--yes" in result.err
    assert steps(run) == [100, 200, 300, 400, 500]


@pytest.mark.parametrize("arguments", [("prune", "--keep", "last(1)"), ("rm", "100")])
@pytest.mark.parametrize("answer", ["\n", "n\n", "", "yess\n", "maybe"])
def test_no_is_no(cli, answers, run: Path, arguments: tuple[str, ...], answer: str) -> None:
    screen = answers(answer)
    verb, *rest = arguments
    result = cli(verb, run, *rest)
    assert result.code == 0
    assert "[y/N]" in screen.getvalue()
    assert "nothing was changed" in result.out
    assert steps(run) == [100, 200, 300, 400, 500]


@pytest.mark.parametrize("answer", ["y\n", "YES\n"])
def test_yes_is_yes(cli, answers, run: Path, answer: str) -> None:
    answers(answer)
    assert cli("prune", run, "--keep", "last(1)").code == 0
    assert steps(run) == [200, 500]


def test_rm(cli, run: Path) -> None:
    result = cli("rm", run, 100, 300, "--yes")
    assert result.code == 0
    assert result.out.splitlines()[-1].startswith("deleted 2 checkpoints")
    assert steps(run) == [200, 400, 500]
    found = cli("rm", run, 400, "--yes", "--json").json
    assert set(found) == {"run", "removed", "freed_bytes", "left"}
    assert (found["removed"], found["left"]) == ([400], [200, 500])
    assert cli("verify", run).code == 0


@pytest.mark.parametrize(
    "arguments", [("rm", 200), ("rm", 100, "--grace", "x"), ("prune", "--keep", "last(1)", "--grace", "x")]
)
def test_what_is_wrong_is_refused_before_it_is_asked(
    cli, answers, run: Path, arguments: tuple[object, ...]
) -> None:
    screen = answers("y\n")
    assert cli(arguments[0], run, *arguments[1:]).code == 2
    assert "[y/N]" not in screen.getvalue()


def test_rm_refuses_the_tagged_and_the_last(cli, run: Path) -> None:
    assert "deployed" in cli("rm", run, 200, "--yes").err
    cli("untag", run, "deployed")
    assert cli("rm", run, 100, 200, 300, 400, 500, "--yes").code == 2
    assert steps(run) == [100, 200, 300, 400, 500]
    assert cli("rm", run, 100, 200, 300, 400, 500, "--yes", "--force").code == 0
    assert steps(run) == []


def test_rm_of_a_missing_step_deletes_nothing(cli, run: Path) -> None:
    result = cli("rm", run, 100, 150, "--yes")
    assert result.code == 3
    assert "150" in result.err
    assert 100 in steps(run)


def test_a_held_run_is_not_changed(cli, run: Path) -> None:
    lease = acquire(open_store(run), heartbeat=False)
    try:
        for arguments in (("prune", run, "--keep", "last(1)", "-y"), ("rm", run, 100, "-y")):
            result = cli(*arguments)
            assert result.code == 5
            assert "is being written by" in result.err
    finally:
        lease.release()
    assert steps(run) == [100, 200, 300, 400, 500]


def test_export_writes_a_file_that_safetensors_reads(cli, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    result = cli("export", f"{run}@200", out)
    assert result.code == 0
    assert "4 tensors of model" in result.out
    want = holdfast.load(run, step=200)["model"]
    found = load_file(out)
    assert set(found) == set(want)
    for name, value in found.items():
        np.testing.assert_array_equal(value, want[name])
    with safe_open(out, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_export_json(cli, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    found = cli("export", run, out, "--part", "rng", "--json").json
    assert set(found) == {
        "step",
        "part",
        "file",
        "size_bytes",
        "tensors",
        "tied",
        "values_left_out",
        "signature",
    }
    assert found["size_bytes"] == out.stat().st_size
    assert found["values_left_out"] > 0


def test_export_does_not_overwrite(cli, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    out.write_text("mine")
    result = cli("export", run, out)
    assert result.code == 6
    assert out.read_text() == "mine"
    assert cli("export", run, out, "--force").code == 0
    assert load_file(out)
    assert list(tmp_path.glob(".tmp-*")) == []


def test_export_refuses_what_it_cannot_write(cli, run: Path, tmp_path: Path) -> None:
    assert cli("export", run, tmp_path / "no" / "dir.safetensors").code == 6
    for directory in (tmp_path, "."):
        refused = cli("export", run, directory, "--part", "model", "--force")
        assert refused.code == 2
        assert "is a directory; name the file" in refused.err
    assert cli("export", run, tmp_path / "w.safetensors", "--part", "config").code == 2
    assert cli("export", run, tmp_path / "w.safetensors", "--part", "nope").code == 3
    assert list(tmp_path.iterdir()) == [run]
