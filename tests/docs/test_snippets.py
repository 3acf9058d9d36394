"""Every snippet of the documentation is run: Python blocks are executed, `holdfast` command lines called.

The blocks of a page run in order, in one namespace and one empty directory. A comment directly above a block
changes that:

    <!-- no-run: reason -->     a Python block is only compiled; only verb and options of command lines are checked
    <!-- raises: StateError --> a Python block must end in this exception
    <!-- exit: 1 -->            the block's command lines must end with this exit code, not 0
    <!-- shows: same -->        what the block's command lines print must hold this text

A Python block with `title="train.py"` is also written to that file, for console blocks with `python train.py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import verbs
from markdown_pages import PAGES, ROOT, Block, blocks, page_id

from holdfast.loop import open_runs

torch = pytest.importorskip("torch")

LANGUAGES = {"python", "console", "text", "json", "bash", "yaml", "toml", ""}
RUNNABLE = [p for p in PAGES if any(b.language in ("python", "console") for b in blocks(p))]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to run in; generators, threads and open checkpointers are put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("COLUMNS", "120")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    for left in list(open_runs._open):
        left.close()


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11, torch >= 2.13
@pytest.mark.parametrize("page", RUNNABLE, ids=page_id)
def test_every_snippet_of_the_page_runs(page: Path, workplace: Path, request: pytest.FixtureRequest) -> None:
    if page.stem == "object-stores":
        request.getfixturevalue("s3").make_bucket("my-bucket")
    module = types.ModuleType("docs_page_" + page.stem.replace("-", "_"))
    sys.modules[module.__name__] = module
    try:
        for block in blocks(page):
            run_block(block, module, workplace)
    finally:
        del sys.modules[module.__name__]


def run_block(block: Block, module: types.ModuleType, workplace: Path) -> None:
    if block.language == "python":
        run_python(block, module, workplace)
    elif block.language == "console":
        for command in block.commands():
            run_command(command, block)


def run_python(block: Block, module: types.ModuleType, workplace: Path) -> None:
    code = compile("\n" * block.line + block.text, block.where, "exec")
    if block.title is not None:
        (workplace / block.title).write_text(block.text)
    if "no-run" in block.markers:
        assert block.markers["no-run"], f"{block.where}: no-run wants a reason"
        return
    expected = block.markers.get("raises")
    raised = "nothing"
    try:
        exec(code, module.__dict__)
    except BaseException as error:
        if expected is None:
            raise
        raised = type(error).__name__
    assert expected is None or raised == expected, f"{block.where}: expected {expected}, {raised} was raised"


def run_command(command: str, block: Block) -> None:
    words = shlex.split(command, comments=True)
    expected = int(block.markers.get("exit", "0"))
    if words[0] == "holdfast":
        if "no-run" in block.markers:
            check_options(words[1:], block)
        else:
            code, output = call_holdfast(words[1:])
            assert code == expected, f"{block.where}: `{command}` ended with {code}:\n{output}"
            wanted = block.markers.get("shows", "")
            assert wanted in output, f"{block.where}: `{command}` does not show {wanted!r}:\n{output}"
    elif words[0] == "python" and "no-run" not in block.markers:
        done = subprocess.run(
            [sys.executable, *words[1:]], capture_output=True, text=True, timeout=120, check=False
        )
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        assert code == expected, f"{block.where}: `{command}` ended with {code}:\n{done.stdout}{done.stderr}"
    else:
        assert "no-run" in block.markers, f"{block.where}: `{words[0]}` is not run: mark it no-run"


def call_holdfast(arguments: list[str]) -> tuple[int, str]:
    """Call the command as a shell would; return its exit code and all that it printed."""
    from holdfast.cli import main

    out = io.StringIO()
    before = sys.argv
    sys.argv = ["holdfast", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            entry: Callable[[], object] = main
            returned = entry()
        return (returned if isinstance(returned, int) else 0), out.getvalue()
    except SystemExit as end:
        code = end.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out.getvalue() + str(code)
    finally:
        sys.argv = before


def check_options(arguments: list[str], block: Block) -> None:
    known = verbs()
    verb = arguments[0]
    assert verb in known, f"{block.where}: there is no verb {verb!r}"
    for word in arguments[1:]:
        if word.startswith("-"):
            assert word.partition("=")[0] in known[verb], (
                f"{block.where}: `holdfast {verb}` has no option {word}"
            )


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_name_their_language(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where}: unknown language {block.language!r}"
        assert not (block.language == "" and "import holdfast" in block.text), (
            f"{block.where}: mark it as python"
        )


def test_a_broken_snippet_fails(tmp_path: Path) -> None:
    """The runner can fail: a wrong exception, exit code or option, or missing output, is not passed over."""
    page = ROOT / "page.md"
    module = types.ModuleType("broken")
    with pytest.raises(ZeroDivisionError):
        run_python(Block(page, 1, "python", "", "1 / 0\n"), module, tmp_path)
    with pytest.raises(AssertionError, match="nothing was raised"):
        run_python(Block(page, 1, "python", "", "1\n", {"raises": "KeyError"}), module, tmp_path)
    with pytest.raises(SyntaxError):
        run_python(Block(page, 1, "python", "", "def\n", {"no-run": "an example"}), module, tmp_path)
    with pytest.raises(AssertionError, match="ended with"):
        run_command(f"holdfast ls {tmp_path / 'nothing-here'}", Block(page, 1, "console", "", ""))
    with pytest.raises(AssertionError, match="does not show"):
        run_command("holdfast --version", Block(page, 1, "console", "", "", {"shows": "no such text"}))
    with pytest.raises(AssertionError, match="has no option"):
        run_command(
            "holdfast ls --no-such-option", Block(page, 1, "console", "", "", {"no-run": "an example"})
        )
    assert os.getcwd() != str(ROOT / "docs")
