"""The environment fingerprint."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from holdfast.saving.environment import differences, fingerprint


def test_the_commit_is_that_of_the_beginning(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that runs was imported before it was changed."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/HEAD").write_text("a" * 40 + "\n")
    (tmp_path / "scripts").mkdir()
    monkeypatch.chdir(tmp_path / "scripts")
    assert fingerprint()["git"] == "a" * 40
    (tmp_path / ".git/HEAD").write_text("b" * 40 + "\n")
    assert fingerprint()["git"] == "a" * 40


def test_without_a_repository_or_a_directory_there_is_no_commit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    assert "git" not in fingerprint()
    shutil.rmtree(gone)
    assert "git" not in fingerprint()


def test_what_can_change_numbers_is_told() -> None:
    then = {"torch": "1", "git": "a", "host": "x", "numpy": "2"}
    assert differences(then, {"torch": "2", "git": "b", "host": "y"}) == [
        "torch was 1 at the save and is 2 now"
    ]
