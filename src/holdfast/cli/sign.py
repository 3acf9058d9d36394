"""`holdfast sign`: vouch for a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.analysis.runs import data_bytes
from holdfast.cli.options import Json, Target
from holdfast.cli.output import emit, line, progress
from holdfast.cli.targets import open_key, open_target

__all__ = ["sign"]


def sign(
    target: Target,
    key: Annotated[
        str,
        typer.Option(
            "--key",
            metavar="KEY.pem",
            help="The private key, or env:NAME for a variable.",
            show_default=False,
        ),
    ],
    json: Json = False,
) -> None:
    """Read every byte of a checkpoint, then sign it.

    Signatures of others stay: each says that its owner stands behind these exact bytes.
    """
    signing = open_key(key)
    run, which = open_target(target)
    checkpoint = run["latest" if which is None else which]
    with progress("verifying", data_bytes(checkpoint)) as advance:
        said = run.sign(checkpoint.step, signing, advance)
    if json:
        emit({"run": run.store.url, "step": said.step, "attempt": said.attempt, "key": said.key})
    else:
        line((f"step {said.step}", "bold"), " is signed by key ", (said.key, "cyan"))
