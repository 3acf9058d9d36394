"""`holdfast cat`: one tensor, as numbers."""

from __future__ import annotations

import re
from typing import Annotated

import numpy as np
import typer

from holdfast.analysis.statistics import Statistics, describe
from holdfast.checkpoint import Checkpoint, StoredTensorView
from holdfast.cli.options import Json, Target, Trusted
from holdfast.cli.output import emit, line, progress, stdout
from holdfast.cli.table import show_facts
from holdfast.cli.targets import checkpoint_of
from holdfast.cli.words import bytes_, count, number, spec_document, tensor
from holdfast.core.errors import NoCheckpoint, PolicyError

__all__ = ["cat"]

FIRST_VALUES = 8
FIRST_PLACES = 4
_BARS = "▁▂▃▄▅▆▇█"
_INDEXED = re.compile(r"(?P<name>.+)\[(?P<index>[^\[\]]*)\]", re.DOTALL)
_INDEX = re.compile(r"(-?\d+)|(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?|(\.\.\.)")

Index = tuple[object, ...]


def cat(
    target: Target,
    name: Annotated[
        str,
        typer.Argument(
            metavar="TENSOR",
            help="Its full name, as in model/fc.weight or 'model/fc.weight[0:4]'.",
            show_default=False,
        ),
    ],
    values: Annotated[bool, typer.Option("--values", help="Print the values themselves.")] = False,
    trust: Trusted = None,
    json: Json = False,
) -> None:
    """Show one tensor: its place, statistics and first values.

    With an index, as in 'model/fc.weight[0:4]', show the values there.
    """
    checkpoint = checkpoint_of(target, trust)
    view, index = _find(checkpoint, name)
    places = checkpoint.reader.places(view.name)
    place = _place_document(places)
    if index is not None or values:
        _print_values(view, index or (), place, json=json)
        return
    with progress(view.name, 2 * view.nbytes) as advance:
        found = describe(checkpoint.reader, view.name, advance)
    if json:
        emit(
            {
                "step": checkpoint.step,
                "name": view.name,
                **spec_document(view.spec),
                **place,
                "statistics": _document(found),
            }
        )
        return
    line((view.name, "bold"), "  ", (tensor(view.spec), "cyan"), f"  {bytes_(view.nbytes)}")
    for key, start, end in places[:FIRST_PLACES]:
        line((f"step {checkpoint.step}, {key}, bytes {start:,} to {end:,}", "dim"))
    if len(places) > FIRST_PLACES:
        line((f"and {count(len(places) - FIRST_PLACES, 'more place')}", "dim"))
    line()
    _print_statistics(found)
    first = _first_values(view)
    if first:
        line()
        line("first values  ", "  ".join(first), " …" if found.count > len(first) else "")


def _place_document(places: list[tuple[str, int, int]]) -> dict[str, object]:
    """Return where a tensor lies: one place, or the first of several and all of them."""
    found = [{"file": key, "first_byte": start, "end_byte": end} for key, start, end in places]
    return {"place": found[0]} if len(found) == 1 else {"place": found[0], "places": found}


def _find(checkpoint: Checkpoint, name: str) -> tuple[StoredTensorView, Index | None]:
    tensors = checkpoint.tensors
    matched = _INDEXED.fullmatch(name)
    if matched is None or name in tensors:
        return _tensor(checkpoint, name), None
    return _tensor(checkpoint, matched["name"]), _parse_index(matched["index"])


def _tensor(checkpoint: Checkpoint, name: str) -> StoredTensorView:
    try:
        return checkpoint.tensors[name]
    except KeyError as e:
        raise NoCheckpoint(e.args[0]) from None


def _parse_index(written: str) -> Index:
    """Return the index that text such as `0:4, 2` describes."""
    out: list[object] = []
    for piece in written.split(","):
        found = _INDEX.fullmatch(piece.strip())
        if found is None:
            raise PolicyError(f"[{written}] is not an index; write integers and slices, as in [0:4, 2]")
        whole, start, stop, step, dots = found.groups()
        if dots:
            out.append(...)
        elif whole is not None:
            out.append(int(whole))
        else:
            out.append(slice(*(None if n is None else int(n) for n in (start, stop, step))))
    return tuple(out)


def _print_values(view: StoredTensorView, index: Index, place: dict[str, object], *, json: bool) -> None:
    try:
        found = np.asarray(view[index] if index else view.read())
    except (IndexError, ValueError) as e:
        raise PolicyError(f"{view.name} has the shape {list(view.shape)}: {e}") from None
    if json:
        emit({"name": view.name, **spec_document(view.spec), **place, "values": _plain_numbers(found)})
        return
    with np.printoptions(
        linewidth=min(stdout().width, 200), threshold=100_000 if not stdout().is_terminal else 1000
    ):
        for row in str(found).splitlines():
            line(row)


def _plain_numbers(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> object:
    kind = array.dtype.kind
    if kind == "c":
        return np.stack([array.real, array.imag], axis=-1).tolist()
    return array.tolist() if kind in "biuf" else array.astype(np.float64).tolist()


def _first_values(view: StoredTensorView) -> list[str]:
    if not view.nbytes:
        return []
    array = np.asarray(view[0:1] if view.shape else view.read())
    while array.ndim > 1:
        array = array[0]
    return [str(v) for v in array.reshape(-1)[:FIRST_VALUES]]


def _print_statistics(found: Statistics) -> None:
    rows = [
        ("elements", f"{found.count:,}"),
        ("min", number(found.minimum)),
        ("max", number(found.maximum)),
        ("mean", number(found.mean)),
        ("std", number(found.std)),
        ("norm", number(found.norm)),
        ("zeros", f"{found.zeros:,} ({found.zeros / found.count:.1%})" if found.zeros else "none"),
    ]
    show_facts(rows)
    wrong = [("NaN", found.nan), ("+inf", found.positive_infinite), ("-inf", found.negative_infinite)]
    for what, times in wrong:
        if times:
            line("  ", (f"{what}  {count(times, 'element')}", "bold red"))
    if found.minimum is not None and found.minimum != found.maximum:
        line()
        line(
            "  ",
            (number(found.minimum), "dim"),
            " ",
            (_histogram(found.histogram), "cyan"),
            " ",
            (number(found.maximum), "dim"),
        )


def _histogram(counts: tuple[int, ...]) -> str:
    """Return one bar for each interval; the smallest bar stands for few, a blank for none."""
    most = max(counts)
    return "".join(_BARS[(n * len(_BARS) - 1) // most] if n else " " for n in counts)


def _document(found: Statistics) -> dict[str, object]:
    return {
        "count": found.count,
        "finite": found.finite,
        "zeros": found.zeros,
        "nan": found.nan,
        "positive_infinite": found.positive_infinite,
        "negative_infinite": found.negative_infinite,
        "min": found.minimum,
        "max": found.maximum,
        "mean": found.mean,
        "std": found.std,
        "norm": found.norm,
        "histogram": found.histogram,
    }
