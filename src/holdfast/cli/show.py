"""`holdfast show`: what is in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from holdfast.analysis.outline import Node, outline
from holdfast.analysis.values import short
from holdfast.checkpoint import Checkpoint
from holdfast.cli.options import Json, Target, Trusted
from holdfast.cli.output import emit, line, stdout, text
from holdfast.cli.table import Column, show_facts, show_table
from holdfast.cli.targets import open_target
from holdfast.cli.words import (
    age,
    bytes_,
    clock_document,
    count,
    date,
    number,
    spec_document,
    tensor,
)
from holdfast.core.errors import NoCheckpoint
from holdfast.core.records import CheckpointRecord
from holdfast.core.units import format_seconds
from holdfast.run import Run
from holdfast.stores import name_of

__all__ = ["show"]

PartOption = Annotated[
    str | None, typer.Option("--part", metavar="NAME", help="Show this part of the state only.")
]


def show(
    target: Target,
    part: PartOption = None,
    depth: Annotated[int, typer.Option(min=1, help="How many levels of the state to open.")] = 2,
    trust: Trusted = None,
    json: Json = False,
) -> None:
    """Show what a checkpoint holds: when and why it was saved, and its state."""
    run, which = open_target(target, trust)
    checkpoint = run["latest" if which is None else which]
    if part is not None and part not in checkpoint.parts:
        raise NoCheckpoint(
            f"step {checkpoint.step} has no part {part!r}; its parts are: {', '.join(checkpoint.parts)}"
        )
    record = run.history.record(checkpoint.step)
    parts = checkpoint.parts if part is None else [part]
    if json:
        emit(_document(run, checkpoint, record, parts))
        return
    _print_head(run, checkpoint, record)
    line()
    show_table(
        [Column(""), Column("", elastic=True), Column("", right=True)], list(_rows(checkpoint, parts, depth))
    )


def _print_head(run: Run, checkpoint: Checkpoint, record: CheckpointRecord) -> None:
    manifest, clock = checkpoint.seen, checkpoint.clock
    files = len(manifest.file_keys)
    counters = [("epoch", clock.epoch), ("samples", clock.samples), ("tokens", clock.tokens)]
    line(
        (f"step {checkpoint.step}", "bold"),
        f" of {name_of(run.store.url)}",
        ("  " + " ".join(sorted(record.tags)), "cyan"),
        ("  weights only" if record.demoted else "", "yellow"),
    )
    facts: list[tuple[str, object]] = [
        ("saved", f"{date(record.time)} ({age(record.time)})"),
        ("because", "; ".join(record.reasons)),
        ("metrics", "  ".join(f"{k} {number(v)}" for k, v in record.metrics.items())),
        ("clock", "  ".join([f"step {clock.step:,}", *(f"{k} {n:,}" for k, n in counters if n)])),
        ("training", format_seconds(clock.active_seconds) if clock.active_seconds else ""),
        (
            "stored",
            f"{bytes_(record.stored_bytes)} in {count(files, 'file')}, {bytes_(record.new_bytes)} of it new",
        ),
        (
            "resume",
            "exact"
            if manifest.exact
            else text(("not exact: something of the state could not be captured", "yellow")),
        ),
        (
            "attempt",
            text(f"{manifest.attempt}", ("  after " + manifest.parent if manifest.parent else "", "dim")),
        ),
        ("ranks", manifest.world_size if manifest.world_size > 1 else ""),
        ("signed", _signers(run, checkpoint.step)),
        *_environment(checkpoint.environment),
    ]
    show_facts(facts)


def _signers(run: Run, step: int) -> str:
    """Return who signed, which only --trust checks."""
    said = {True: "", False: " (not trusted)", None: " (not checked; see --trust)"}
    return "  ".join(f"key {key}{said[trusted]}" for key, trusted in run.signers(step).items())


def _environment(environment: dict[str, str]) -> Iterator[tuple[str, object]]:
    flags = {k: v for k, v in environment.items() if "." in k}
    where = {k: environment[k] for k in ("host", "platform", "machine", "git") if k in environment}
    versions = {k: v for k, v in environment.items() if k not in {*flags, *where, "single_writer"}}
    yield "single writer", environment.get("single_writer", "")
    yield "git", where.get("git", "")
    yield "versions", "  ".join(f"{k} {v}" for k, v in versions.items())
    yield "flags", "  ".join(f"{k.removeprefix('torch.')} {v}" for k, v in flags.items())
    yield "machine", "  ".join(where[k] for k in ("host", "platform") if k in where)


def _rows(checkpoint: Checkpoint, parts: list[str], depth: int) -> Iterator[list[object]]:
    guides = stdout().is_terminal
    for node in outline(checkpoint, parts):
        kind = checkpoint.seen.parts[node.name].kind if node.name in checkpoint.seen.parts else ""
        yield [text((node.name, "bold")), _contents(node, kind), _size(node)]
        yield from _below(node, "", depth, guides=guides)


def _below(node: Node, prefix: str, depth: int, *, guides: bool) -> Iterator[list[object]]:
    if depth <= (0 if node.tensors else -1):  # plain values are few and short: one level more of those
        return
    for i, child in enumerate(node.children):
        is_last = i == len(node.children) - 1
        branch, stem = (("└─ ", "   ") if is_last else ("├─ ", "│  ")) if guides else ("  ", "  ")
        yield [text((prefix + branch, "dim"), _label(child)), _contents(child), _size(child)]
        yield from _below(child, prefix + stem, depth - 1, guides=guides)


def _label(node: Node) -> Text:
    return text(node.name, (f" … {node.last_name}" if node.last_name is not None else "", ""))


def _contents(node: Node, kind: str = "") -> Text:
    if node.spec is not None:
        return text((tensor(node.spec), "cyan"), (f"  tied to {node.tied_to}" if node.tied_to else "", "dim"))
    if not node.is_group:
        return text((short(node.value, 60), "green"))
    words = [kind] if kind and kind != "values" else []
    if node.repeats > 1:
        words.append(f"{node.repeats} alike")
    if node.tensors:
        words.append(f"{count(node.tensors, 'tensor')}, {count(node.elements, 'element')}")
    elif not words:
        words.append(count(len(node.children), "entry", "entries"))
    return text((", ".join(words), "dim"))


def _size(node: Node) -> Text:
    return text((bytes_(node.nbytes) if node.nbytes else "", "dim" if node.is_group else ""))


def _document(
    run: Run, checkpoint: Checkpoint, record: CheckpointRecord, parts: list[str]
) -> dict[str, object]:
    reader, manifest = checkpoint.reader, checkpoint.seen
    tensors = [
        {"name": name, **spec_document(view.spec), "tied_to": reader.aliases.get(name)}
        for name, view in checkpoint.tensors.items()
        if manifest.part_of(name) in parts
    ]
    return {
        "run": run.store.url,
        "step": checkpoint.step,
        "attempt": manifest.attempt,
        "parent": manifest.parent,
        "time": record.time,
        "clock": clock_document(checkpoint.clock),
        "reasons": record.reasons,
        "signed_by": run.signers(checkpoint.step),
        "metrics": record.metrics,
        "tags": sorted(record.tags),
        "exact": manifest.exact,
        "demoted": record.demoted,
        "stored_bytes": record.stored_bytes,
        "new_bytes": record.new_bytes,
        "environment": checkpoint.environment,
        "parts": {
            name: {
                "kind": manifest.parts[name].kind,
                "values": msgspec.json.decode(manifest.parts[name].tree),
            }
            for name in parts
        },
        "tensors": tensors,
    }
