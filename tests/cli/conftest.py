"""A small run on disk, and the command line as a function."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.cli import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, object]:
        assert self.code in (0, 4), self.err
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


LOSSES = {100: 0.9, 200: 0.5, 300: float("nan"), 400: 0.7, 500: 0.6}


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five checkpoints; 200 is the best and tagged, "frozen" never changes, "big" has its own blocks."""
    path = tmp_path_factory.mktemp("template") / "run"
    model = {
        "fc.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "fc.bias": np.zeros(3, np.float32),
        "big": np.zeros((64, 512), np.float32),
        "frozen": np.ones((256, 128), np.float32),
    }
    state = {"model": model, "config": {"lr": 0.1, "name": "tiny", "betas": (0.9, 0.95)}}
    for step, loss in LOSSES.items():
        model["fc.weight"] += 1
        model["big"][: step // 100] += 0.5
        state["config"]["lr"] = 10.0 / step  # type: ignore[call-overload]
        holdfast.save(path, state, step=step, metrics={"val_loss": loss, "acc": step / 1000}, rng=True)
    holdfast.Run(path).tag("deployed", 200)
    return path


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    """A copy of the template that a test may spoil."""
    return Path(shutil.copytree(template, tmp_path / "run"))


@pytest.fixture
def data_file(run: Path) -> Callable[..., Path]:
    def find(step: int, part: str = "model") -> Path:
        (found,) = run.glob(f"data/{step:012d}-*/{part}.safetensors")
        return found

    return find


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    """Change one bit of a file."""

    def change(path: Path, position: int) -> None:
        raw = bytearray(path.read_bytes())
        raw[position] ^= 0x10
        path.write_bytes(raw)

    return change


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Callable[[], list[str]]]:
    """A terminal of a given width; returns what is on it, without colours."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def of(width: int):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        return lambda: re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()

    return of
