"""Names and values from a checkpoint are data: they cannot colour, move or turn around what is printed."""

from __future__ import annotations

import logging
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len

import holdfast

EVIL = "\x1b[31mred\x1b]0;title\x07\r\n\x9b2J\u202egnp.exe[bold]x[/bold]:smile:"
VERBS = (
    ("ls",),
    ("show",),
    ("cat", "m/[red]w[/red]"),
    ("verify",),
    ("prune", "--keep", "last(9)"),
    ("diff",),
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every name and value is hostile, as far as saving lets it be."""
    path = tmp_path_factory.mktemp("hostile") / "run"
    state = {
        "m": {
            "[/red]": np.ones(3),
            "[red]w[/red]": np.arange(4.0),
            "../../etc/passwd": np.ones(2),
            "b\u202ex": np.ones(1),
            "値" * 40: np.ones(3),
        },
        "v": {"text": EVIL, EVIL.replace("\x1b", "?"): 1, "deep": [[EVIL]], "bytes": b"\x1b[2J"},
        "[red]": 3,
    }
    for step in (1, 2):
        state["m"]["[red]w[/red]"] += step
        state["v"]["text"] = EVIL + str(step)
        holdfast.save(path, state, step=step, metrics={EVIL: 1.0, "[bold]acc[/bold]": 0.5})
    return path


def arguments(verb: tuple[str, ...], run: Path) -> list[str]:
    return [verb[0], str(run), *verb[1:], *(["1", "2"] if verb[0] == "diff" else [])]


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
@pytest.mark.parametrize("json", [False, True])
def test_plain_output_holds_printable_characters_only(
    cli, hostile: Path, verb: tuple[str, ...], json: bool
) -> None:
    result = cli(*arguments(verb, hostile), *(["--json"] if json else []))
    assert result.code == 0, result.err
    for stream in (result.out, result.err):
        assert all(c.isprintable() or c == "\n" for c in stream)
    if verb[0] == "ls" and not json:
        assert "[bold]acc[/bold]" in result.out
        assert "\\x1b[31mred" in result.out
    if json:
        assert result.out.isascii()


@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "[red]", "\u202e"])
def test_errors_are_escaped_too(cli, hostile: Path, name: str) -> None:
    result = cli("cat", hostile, name)
    assert result.code == 3
    assert all(c.isprintable() for c in result.err.rstrip("\n"))


def test_what_the_library_logs_is_escaped(cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(self: holdfast.Run) -> list[object]:
        logging.getLogger("holdfast").warning("step %s", EVIL)
        return []

    monkeypatch.setattr(holdfast.Run, "records", warn)
    result = cli("ls", run)
    assert result.code == 0
    assert result.err.startswith("step \\x1b[31mred")
    assert all(c.isprintable() for c in result.err.rstrip("\n"))


def on_terminal(command: list[str], typed: bytes = b"", width: int = 100) -> tuple[int, str]:
    """Run the command line with a terminal on all three streams."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(width), "LINES": "50"}
        environment.pop("NO_COLOR", None)
        os.execve(sys.executable, [sys.executable, "-m", "holdfast", *command], environment)
    out = b""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], 0.1)
        if ready:
            try:
                read = os.read(terminal, 65536)
            except OSError:
                break
            if not read:
                break
            out += read
            if typed and b"[y/N]" in out:
                os.write(terminal, typed)
                typed = b""
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out.decode()


SEQUENCES = re.compile(r"\x1b\[[0-9;]*m")  # colours
PROGRESS = re.compile(r"\x1b\[(\?25[lh]|2K|1A)|\r")  # what rich sends to redraw a progress bar


@pytest.mark.parametrize("verb", [("ls",), ("show",), ("diff",), ("cat", "m/[/red]")], ids=lambda v: v[0])
def test_on_a_terminal_only_our_own_colours_are_sent(hostile: Path, verb: tuple[str, ...]) -> None:
    code, out = on_terminal(arguments(verb, hostile), width=80)
    assert code == 0, out
    assert SEQUENCES.search(out)
    assert "\x1b[31mred" not in out
    text = PROGRESS.sub("", SEQUENCES.sub("", out))
    assert all(c.isprintable() or c == "\n" for c in text)
    if verb[0] != "show":  # facts that are longer go on below
        rows = [row for row in text.split("\n") if str(hostile) not in row and "━" not in row]
        assert max(map(cell_len, rows)) <= 80


def test_a_question_on_a_terminal(run: Path) -> None:
    code, out = on_terminal(["rm", str(run), "100"], typed=b"n\n")
    assert (code, holdfast.Run(run).steps[0]) == (0, 100), out
    code, out = on_terminal(["rm", str(run), "100"], typed=b"y\n")
    assert (code, holdfast.Run(run).steps[0]) == (0, 200), out


def test_control_c_at_a_question(run: Path) -> None:
    code, out = on_terminal(["rm", str(run), "100"], typed=b"\x03")
    assert (code, holdfast.Run(run).steps[0]) == (130, 100), out
    assert "Traceback" not in out


def test_verify_shows_progress_on_a_terminal_only(run: Path) -> None:
    code, out = on_terminal(["verify", str(run)])
    assert code == 0
    assert "verifying" in out
    quiet = subprocess.run([sys.executable, "-m", "holdfast", "verify", run], capture_output=True, text=True)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert quiet.stdout.startswith("5 checkpoints verified")


def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    for json in ((), ("--json",)):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-m", "holdfast", "ls", str(run), *json],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (141, "")


def test_a_locale_without_these_characters_is_no_error(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", "cat", str(run), "model/fc.weight"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()


def test_the_command_line_loads_no_framework(run: Path) -> None:
    code = (
        "import sys; from holdfast.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'jax', 'tensorflow', 'pandas', 'safetensors', 'asyncio'} & set(sys.modules);"
        "sys.exit(f'{code} {heavy}' if heavy or code else 0)"
    )
    for arguments in (["--help"], ["show", str(run)], ["diff", str(run), "100", "200"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_three_ways_to_start_it(run: Path) -> None:
    for module in ("holdfast", "holdfast.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"holdfast {holdfast.__version__}\n")
