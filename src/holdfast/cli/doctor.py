"""`holdfast doctor`: what state a run is in, in words, and what to do."""

from __future__ import annotations

import typer

from holdfast.cli.exits import INTEGRITY
from holdfast.cli.options import Json, RunPath
from holdfast.cli.output import emit, line
from holdfast.replication.doctor import diagnose
from holdfast.stores import open_store

__all__ = ["doctor"]

_STYLES = {"good": "green", "note": "cyan", "warning": "yellow", "wrong": "bold red"}


def doctor(path: RunPath, json: Json = False) -> None:
    """Explain the state of a run in words, and what to do about each thing that is not as it should be.

    Changes nothing and reads no tensor. Exits with 4 when something is wrong.
    """
    store = open_store(path)
    found = diagnose(store)
    if json:
        findings = [{"topic": f.topic, "level": f.level, "text": f.text, "remedy": f.remedy} for f in found]
        emit({"run": store.url, "findings": findings})
    else:
        for finding in found:
            line((f"{finding.level}: ", _STYLES[finding.level]), finding.text)
            if finding.remedy:
                line("    -> ", finding.remedy)
    if any(f.level == "wrong" for f in found):
        raise typer.Exit(INTEGRITY)
