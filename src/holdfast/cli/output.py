"""What the verbs print: text for people, colour on a terminal only; JSON for programs; names never as markup.

Everything that comes out of a store is data. It passes through `plain`, so a name cannot move the cursor,
change colours, or turn the text around.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TextIO

import msgspec
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from holdfast.cli.exits import BROKEN_PIPE
from holdfast.core.errors import StateError

__all__ = [
    "ask_secret",
    "confirm",
    "emit",
    "fail",
    "growing_progress",
    "line",
    "lines",
    "note",
    "plain",
    "progress",
    "stdout",
    "text",
    "write",
]

TOGETHER = 100  # lines that are printed at once


class _Quiet(Console):
    """A console whose reader may go away, as `head` does, without a word."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        raise SystemExit(BROKEN_PIPE)


def stdout() -> Console:
    """Return the console for results. Without a terminal it has no colours and never breaks a line."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Return the console for errors, questions and progress."""
    return _console(sys.stderr)


def _console(file: TextIO) -> Console:
    console = _Quiet(file=file, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = _Quiet(
            file=file,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
            no_color=True,
            width=100_000,
        )
    return console


def plain(value: object) -> str:
    """Return text in which every character is printable; others (control, bidirectional) become escapes."""
    shown = str(value)
    if shown.isprintable():
        return shown
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in shown
    )


def text(*pieces: object | tuple[object, str]) -> Text:
    """Return printable text from pieces, each a value or a pair of value and style."""
    out = Text()
    for piece in pieces:
        if isinstance(piece, Text):
            out.append_text(piece)
        elif isinstance(piece, tuple):
            out.append(plain(piece[0]), style=piece[1])
        else:
            out.append(plain(piece))
    return out


def line(*pieces: object | tuple[object, str]) -> None:
    """Print one line of a result; a terminal that is too narrow breaks it between words."""
    printed = text(*pieces)
    printed.rstrip()
    _print(stdout(), printed)


def lines(printed: Iterable[Text]) -> None:
    """Print many lines of a result, for less than as many times `line` costs."""
    console, left = stdout(), iter(printed)
    while some := list(islice(left, TOGETHER)):
        for one in some:
            one.rstrip()
        _print(console, Text("\n").join(some))


def note(*pieces: object | tuple[object, str]) -> None:
    """Print one line beside the result, to the error stream."""
    _print(stderr(), text(*pieces))


def fail(message: object) -> None:
    """Print an error as one sentence."""
    _print(stderr(), text(("error:", "bold red"), " ", message))


def _print(console: Console, printed: Text) -> None:
    console.print(printed, soft_wrap=not console.is_terminal)


def emit(document: Mapping[str, object]) -> None:
    """Print a result as JSON in ASCII: floats that JSON lacks as "nan", "inf", "-inf"."""
    try:
        told = json.dumps(document, allow_nan=False, default=_jsonable)
    except (TypeError, ValueError):  # a key that is no text, or a float that JSON lacks
        told = json.dumps(_jsonable(document), allow_nan=False)
    write(msgspec.json.format(told, indent=2) + "\n")


def write(shown: str) -> None:
    """Print text for programs as it is: all at once, however long."""
    console = stdout()
    try:
        console.file.write(shown)
        console.file.flush()
    except BrokenPipeError:
        console.on_broken_pipe()


def _jsonable(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, (Sequence, set, frozenset)):
        return [_jsonable(v) for v in value]
    return str(value)


def confirm(question: str) -> bool | None:
    """Ask on the terminal; anything but y or yes is no. Returns None at once where there is no terminal to
    ask on.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    stderr().print(text(question, (" [y/N] ", "bold")), end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def ask_secret(question: str, variable: str, *, twice: bool = False) -> str:
    """Ask on the terminal for what nobody is to see.

    Raises:
        StateError: there is no terminal to ask on; the message names the environment variable that may tell it.
    """
    if not (sys.stdin.isatty() or sys.stderr.isatty()):
        raise StateError(
            f"{question}: nobody can be asked here, because this is not a terminal; set {variable}"
        )
    return str(typer.prompt(question, hide_input=True, confirmation_prompt=twice, err=True))


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show how many bytes are done and how fast, on a terminal; yield the function that is told of more
    bytes.
    """
    if total_bytes <= 0:
        yield lambda done: None
        return
    with growing_progress(label) as (expect, advance):
        expect(total_bytes)
        yield advance


@contextmanager
def growing_progress(label: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Do as `progress` does where the work finds out how much there is; yield the functions that are told of more
    bytes to do, and of more bytes done.
    """
    console = stderr()
    if not console.is_terminal:
        yield lambda total: None, lambda done: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(plain(label), total=None)

        def expect(total: int) -> None:
            bar.update(task, total=(bar.tasks[0].total or 0) + total)

        yield expect, lambda done: bar.advance(task, done)
