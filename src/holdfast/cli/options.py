"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.catalog.keys import parse_grace

__all__ = ["Grace", "Json", "Now", "RunPath", "Target", "Trusted", "Yes", "grace_of"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]
Now = Annotated[bool, typer.Option("--now", help="Free it at once, past the trash; there is no way back.")]
Grace = Annotated[
    str,
    typer.Option(
        "--grace", metavar="DURATION", help="How long it stays in the trash, to be brought back by undo."
    ),
]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run: a directory or URL.", show_default=False)]
Target = Annotated[
    str,
    typer.Argument(
        metavar="PATH[@STEP|@TAG]", help="A checkpoint; the newest by default.", show_default=False
    ),
]
Trusted = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="KEY|FILE",
        help="Refuse what this public key, or those of this .toml, did not sign.",
        show_default=False,
    ),
]


def grace_of(grace: str, *, now: bool) -> str:
    """Return how long what is deleted stays in the trash.

    Raises:
        PolicyError: `grace` is no duration, or too long.
    """
    parse_grace(grace)
    return "0s" if now else grace
