"""`holdfast export`: weights for programs that know nothing of holdfast."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.analysis.runs import data_bytes
from holdfast.cli.options import Json, Target, Trusted
from holdfast.cli.output import emit, line, note, progress
from holdfast.cli.targets import checkpoint_of, open_key
from holdfast.cli.words import bytes_, count
from holdfast.export import choose_part, export_part

__all__ = ["export"]


def export(
    target: Target,
    out: Annotated[
        str, typer.Argument(metavar="OUT.safetensors", help="The file to write.", show_default=False)
    ],
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="NAME", help="The part of the state; the model by default."),
    ] = None,
    sign_with: Annotated[
        str | None,
        typer.Option(
            "--sign-with", metavar="KEY.pem", help="Write a signature for model signing too; a p256 key."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite the file if it is there.")] = False,
    trust: Trusted = None,
    json: Json = False,
) -> None:
    """Write the tensors of one part to a plain safetensors file.

    Names are those inside the part. A tied weight is written once and its other names are in the file's
    metadata, as `safetensors.torch.save_model` does; `load_model` and Hugging Face's `from_pretrained` tie it
    again.
    """
    key = open_key(sign_with) if sign_with is not None else None
    checkpoint = checkpoint_of(target, trust)
    part = choose_part(checkpoint) if part is None else part
    with progress(f"exporting {part}", data_bytes(checkpoint, part)) as advance:
        done = export_part(checkpoint, out, part=part, overwrite=force, key=key, progress=advance)
    if json:
        emit(
            {
                "step": checkpoint.step,
                "part": done.part,
                "file": out,
                "signature": f"{out}.sig" if key is not None else None,
                "size_bytes": done.size_bytes,
                "tensors": done.tensors,
                "tied": done.aliases,
                "values_left_out": done.left_out,
            }
        )
        return
    line((out, "bold"), f"  {count(len(done.tensors), 'tensor')} of {done.part}, {bytes_(done.size_bytes)}")
    if key is not None:
        line((f"{out}.sig", "bold"), "  signed by key ", (key.public.id, "cyan"))
    for alias, name in done.aliases.items():
        line((f"  {alias} is tied to {name} and written once", "dim"))
    if done.left_out:
        note((f"{count(done.left_out, 'value')} of {done.part} that are not tensors were left out", "yellow"))
