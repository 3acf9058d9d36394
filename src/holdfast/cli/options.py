"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Json", "RunPath", "Target", "Trusted", "Yes"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]
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
