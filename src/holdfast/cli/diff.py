"""`holdfast diff`: what changed between two checkpoints."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Annotated

import typer

from holdfast.analysis.diff import Difference, TensorChange, compare
from holdfast.analysis.runs import data_bytes
from holdfast.analysis.values import ABSENT, ValueChange, short
from holdfast.checkpoint import Checkpoint
from holdfast.cli.options import Json, Trusted
from holdfast.cli.output import emit, line, progress, text
from holdfast.cli.table import Column, show_table
from holdfast.cli.targets import checkpoint_of, split_target
from holdfast.cli.words import bytes_, count, number, spec_document, tensor
from holdfast.saving.plan import RNG_PART

__all__ = ["diff"]

_COLUMNS = (
    Column("", leaves=1),
    Column("relative", right=True),
    Column("max |Δ|", right=True),
    Column("changed", right=True, leaves=3),
    Column("cosine", right=True, leaves=2),
    Column("", elastic=True),
)
_KIND_STYLES = {"added": "green", "removed": "red", "shape": "yellow", "dtype": "yellow"}


def diff(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="A checkpoint: RUN@STEP, RUN@TAG; or a run.", show_default=False),
    ],
    b: Annotated[
        str,
        typer.Argument(metavar="B", help="The other one; or a step or tag of that run.", show_default=False),
    ],
    c: Annotated[
        str | None, typer.Argument(metavar="[C]", help="Then the second step or tag.", show_default=False)
    ] = None,
    part: Annotated[
        str | None, typer.Option("--part", metavar="NAME", help="Compare this part of the state only.")
    ] = None,
    top: Annotated[
        int, typer.Option(min=0, help="How many changed tensors of each part to show; 0 for all.")
    ] = 10,
    trust: Trusted = None,
    json: Json = False,
) -> None:
    """Show what changed from one checkpoint to another, the most changed first.

    Write `diff RUN@100 RUN@200`, `diff RUN@best OTHER`, or `diff RUN 100 200`.
    """
    before, after = _both(a, b, c, trust)
    with progress("comparing", data_bytes(after, part)) as advance:
        found = compare(before, after, part=part, progress=advance)
    if json:
        emit(_document(before, after, found))
        return
    line((f"step {before.step}", "bold"), " → ", (f"step {after.step}", "bold"))
    shown = found if part is not None else _without_random(found)
    _print_tensors(shown, after, top)
    _print_values(shown)
    _print_summary(found)


def _both(a: str, b: str, c: str | None, trust: list[str] | None) -> tuple[Checkpoint, Checkpoint]:
    path, _ = split_target(a)
    if c is not None:
        return checkpoint_of(f"{path}@{b}", trust), checkpoint_of(f"{path}@{c}", trust)
    return checkpoint_of(a, trust), checkpoint_of(f"{path}{b}" if b.startswith("@") else b, trust)


def _print_tensors(found: Difference, after: Checkpoint, top: int) -> None:
    """Print the changed tensors part by part: moments of an optimizer always change more than weights."""
    by_part: dict[str, list[TensorChange]] = {}
    for change in found.tensors:
        if not _is_scalar(change):
            by_part.setdefault(change.part, []).append(change)
    for part in sorted(by_part, key=lambda p: after.parts.index(p) if p in after.parts else -1):
        changes = by_part[part]
        shown = changes[:top] if top else changes
        line()
        show_table([Column(part, elastic=True, keep_end=True), *_COLUMNS], [_row(c) for c in shown])
        if len(changes) > len(shown):
            rest = count(len(changes) - len(shown), "tensor")
            line((f"… and {rest} of {part} that changed less; --top 0 shows all", "dim"))


def _row(change: TensorChange) -> list[object]:
    spec = change.after or change.before
    name = text((change.name.removeprefix(f"{change.part}/"), "bold"))
    if change.kind != "changed":
        what: str = change.kind
        if change.before and change.after:
            what = f"{tensor(change.before)} → {tensor(change.after)}"
        shown = tensor(spec) if spec and what == change.kind else ""
        return [name, text((shown, "cyan")), "", "", "", "", text((what, _KIND_STYLES[change.kind]))]
    lost = f"{count(change.lost_finite, 'element')} became NaN or infinite" if change.lost_finite else ""
    return [
        name,
        text((tensor(spec) if spec else "", "cyan")),
        text((number(change.relative), "yellow" if change.relative > 1 else "")),
        number(change.max_delta),
        f"{change.fraction:.1%}",
        "" if math.isnan(change.cosine) else f"{change.cosine:.6f}",
        text((lost, "bold red")),
    ]


def _print_values(found: Difference) -> None:
    counters = collections.Counter(
        (c.name.rsplit("/", 1)[-1].rsplit(".", 1)[-1], c.max_delta) for c in found.tensors if _is_scalar(c)
    )
    if not found.values and not counters:
        return
    rows: list[list[object]] = [[text((v.path, "bold")), *_sides(v)] for v in found.values]
    for (name, by), times in counters.items():
        several = f"  {times} one-element tensors" if times > 1 else ""
        rows.append([text((name, "bold"), (several, "dim")), "", "", f"by {number(by)}"])
    line()
    show_table(
        [
            Column("value", elastic=True, keep_end=True),
            Column("before", right=True, elastic=True),
            Column(""),
            Column("after", elastic=True),
        ],
        rows,
    )


def _sides(change: ValueChange) -> list[object]:
    before = text((short(change.before), "dim" if change.before is ABSENT else ""))
    return [before, "→", text((short(change.after), "dim" if change.after is ABSENT else "green"))]


def _print_summary(found: Difference) -> None:
    kinds = collections.Counter(c.kind for c in found.tensors)
    pieces = [f"{kinds[k]} {k}" for k in ("changed", "added", "removed") if kinds[k]]
    pieces += [f"{kinds[k]} of another {k}" for k in ("shape", "dtype") if kinds[k]]
    random = any(_is_random(c.name) for c in found.tensors) or any(_is_random(v.path) for v in found.values)
    line()
    if not found.tensors and not found.values:
        line(("no difference: ", "bold green"), f"{count(found.same, 'tensor')} and every value are the same")
        return
    words = [f"tensors: {', '.join([*pieces, f'{found.same} the same'])}"]
    words += [count(len(found.values), "value") + " changed"] if found.values else []
    words += ["random generators moved on"] if random else []
    line("; ".join(words), (f"  ({bytes_(found.read_bytes)} read)", "dim"))


def _without_random(found: Difference) -> Difference:
    """Return the difference without the random generators, which always move on."""
    tensors = tuple(c for c in found.tensors if not _is_random(c.name))
    return dataclasses.replace(
        found, tensors=tensors, values=tuple(v for v in found.values if not _is_random(v.path))
    )


def _is_random(name: str) -> bool:
    return name == RNG_PART or name.startswith(f"{RNG_PART}/")


def _is_scalar(change: TensorChange) -> bool:
    return change.kind == "changed" and change.after is not None and math.prod(change.after.shape) == 1


def _document(before: Checkpoint, after: Checkpoint, found: Difference) -> dict[str, object]:
    return {
        "before": {"step": before.step, "attempt": before.manifest.attempt},
        "after": {"step": after.step, "attempt": after.manifest.attempt},
        "tensors": [_change(c) for c in found.tensors],
        "values": [
            {
                "path": v.path,
                "before": None if v.before is ABSENT else repr(v.before),
                "after": None if v.after is ABSENT else repr(v.after),
            }
            for v in found.values
        ],
        "same": found.same,
        "read_bytes": found.read_bytes,
    }


def _change(change: TensorChange) -> dict[str, object]:
    document: dict[str, object] = {
        "name": change.name,
        "kind": change.kind,
        "before": change.before and spec_document(change.before),
        "after": change.after and spec_document(change.after),
    }
    if change.kind == "changed":
        document |= {
            "max_delta": change.max_delta,
            "relative": change.relative,
            "fraction": change.fraction,
            "cosine": change.cosine,
            "lost_finite": change.lost_finite,
        }
    return document
