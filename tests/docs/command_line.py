"""The command line as data: each verb with its options, read from the program itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping


@functools.cache
def verbs() -> Mapping[str, frozenset[str]]:
    """Every verb and the options it takes, long and short; `--help` included."""
    import typer.main

    from holdfast.cli.app import build

    group = typer.main.get_command(build())
    return {
        name: frozenset(o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-"))
        | {"--help"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        if not command.hidden
    }
