"""The program: its verbs, its help, and how every error ends."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from holdfast import __version__
from holdfast.cli.exits import BROKEN_PIPE, INTERRUPTED, OK, UNEXPECTED, USAGE, code_of
from holdfast.cli.output import fail, line, note
from holdfast.cli.teaching import HELP, epilog, rules
from holdfast.core.errors import HoldfastError

__all__ = ["build", "main"]

_VERBS = (
    "ls", "show", "diff", "cat", "verify", "doctor", "scrub", "status", "sync", "repair", "cp", "tag", "untag", "plan",
    "prune", "rm", "trash", "undo", "collect", "export", "sign", "keygen", "peer",
)  # fmt: skip
_BESIDE = {"untag": "tag"}  # verbs that stand in the file of another one
_WITH_RULES = ("plan", "prune")

# click's UsageError, by way of a subclass that every typer has: newer ones bring a click of their own.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


class _Notes(logging.Handler):
    """Prints what the library logs; a record may hold names from a checkpoint."""

    def emit(self, record: logging.LogRecord) -> None:
        note((record.getMessage(), "yellow"))


def _version(wanted: bool) -> None:
    if wanted:
        line(f"holdfast {__version__}")
        raise typer.Exit(OK)


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")
    ] = False,
) -> None:
    pass


def _wanted(arguments: Sequence[str]) -> Sequence[str]:
    """Return the verbs without which this cannot be answered: to import all takes longer than most of them do."""
    first = arguments[0]
    if first in _VERBS:
        return (first,)
    return () if first == "--version" else _VERBS


def build(verbs: Sequence[str] = _VERBS) -> typer.Typer:
    """Return the program, with all of its verbs or some."""
    app = typer.Typer(
        name="holdfast",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # help is plain text, on a terminal and in a pipe
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=HELP, epilog=epilog())(_options)
    for name in verbs:
        verb = getattr(importlib.import_module(f"holdfast.cli.{_BESIDE.get(name, name)}"), name)
        app.command(name, epilog=rules() if name in _WITH_RULES else None)(verb)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error is one sentence on the error stream."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"] or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    notes = _Notes(logging.WARNING)
    logging.getLogger("holdfast").addHandler(notes)
    try:
        code = build(_wanted(given))(given, prog_name="holdfast", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except Exception as error:
        if debug and not isinstance(error, (_USAGE_ERROR, typer.Abort)):
            raise
        return _failed(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as e:  # the reader of a pipe went away
        return BROKEN_PIPE if e.code in (1, BROKEN_PIPE) else UNEXPECTED
    finally:
        logging.getLogger("holdfast").removeHandler(notes)


def _failed(error: Exception) -> int:
    """Say what went wrong and return the exit code for it."""
    if isinstance(error, HoldfastError):
        fail(error)
        return code_of(error)
    if isinstance(error, _USAGE_ERROR):
        command = getattr(getattr(error, "ctx", None), "command_path", "holdfast")
        fail(getattr(error, "format_message", error.__str__)())
        note((f"`{command} --help` shows how it is used", "dim"))
        return USAGE
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    fail(f"unexpected {type(error).__name__}: {error} (holdfast --debug shows where)")
    return UNEXPECTED
