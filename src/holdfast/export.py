"""One part of a checkpoint as a single plain safetensors file, for programs that know nothing of holdfast."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from holdfast.analysis.blocks import Blocks
from holdfast.checkpoint import Checkpoint
from holdfast.core.dtypes import CARRIERS, DTYPES
from holdfast.core.errors import (
    AlreadyExists,
    NoCheckpoint,
    OutOfSpace,
    PermissionDenied,
    StateError,
    StoreError,
)
from holdfast.core.names import name_in_file
from holdfast.format.model_signature import ONE_FILE, sign_files
from holdfast.format.signing import SigningKey
from holdfast.state.tensors import TensorSpec

__all__ = ["Exported", "choose_part", "export_part"]

_CODES = {dtype: code for code, dtype in CARRIERS.items()} | {"float8_e8m0fnu": "F8_E8M0"}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: file size, the names of the tensors, tied names (alias to tensor), plain values left
    out.
    """

    part: str
    size_bytes: int
    tensors: tuple[str, ...]
    aliases: dict[str, str]
    left_out: int


def choose_part(checkpoint: Checkpoint) -> str:
    """Return the part to export when none is named: the only module, else "model".

    Raises:
        NoCheckpoint: there is no such part; the message lists what there is.
    """
    modules = [name for name, part in checkpoint.seen.parts.items() if part.kind == "module"]
    if len(modules) == 1:
        return modules[0]
    if "model" in checkpoint.parts:
        return "model"
    raise NoCheckpoint(
        f"step {checkpoint.step} has no single model; name a part: {', '.join(checkpoint.parts)}"
    )


def export_part(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    part: str | None = None,
    overwrite: bool = False,
    key: SigningKey | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Exported:
    """Write the tensors of one part to a plain safetensors file, every byte verified, and return what was
    written.

    Names are those inside the part, bytes are in C order. A tied weight is written once, under the name it
    was saved by, and the other names are in the file's metadata: the convention of
    `safetensors.torch.save_model`, which `safetensors.torch.load_model` and Hugging Face's `from_pretrained`
    expect. The file appears whole or not at all. With a key, which must be of P-256, a signature that OpenSSF model
    signing verifies is written beside it, under its name and `.sig`.

    Raises:
        NoCheckpoint: there is no such part.
        StateError: it holds no tensors, or an element type that safetensors has no code for; or `out` is a directory.
        AlreadyExists: the file is there, and `overwrite` was not given.
        StoreError: it cannot be written.
        IntegrityError: bytes are not what was committed; no file was made.
    """
    part = choose_part(checkpoint) if part is None else part
    if part not in checkpoint.parts:
        raise NoCheckpoint(
            f"step {checkpoint.step} has no part {part!r}; its parts are: {', '.join(checkpoint.parts)}"
        )
    path = Path(out)
    if not path.name or path.is_dir():
        raise StateError(f"{str(out)!r} is a directory; name the file to write")
    beside = path.with_name(f"{path.name}.sig")
    for made in (path, *([beside] if key is not None else [])):
        if not overwrite and made.exists():
            raise AlreadyExists(f"{made} exists already; remove it first, or force the export")
    stored = checkpoint.seen.parts[part]
    specs = _laid_out(checkpoint, part)
    aliases = {name_in_file(part, a): name_in_file(part, b) for a, b in stored.aliases.items()}
    header = _header(part, specs, aliases)
    blocks = Blocks(checkpoint.reader)
    signed = hashlib.sha256(header)
    if key is not None:
        sign_files(path.name, {}, key)  # a key of the wrong kind is refused before anything is written
    with checkpoint.reading("export"), _new_file(path, overwrite=overwrite) as write:
        write(header)
        for spec in specs:
            for piece in blocks.pieces(spec.name):
                write(piece)
                if key is not None:
                    signed.update(piece)
                progress(len(piece))
    if key is not None:
        with _new_file(beside, overwrite=overwrite) as write:
            write(sign_files(path.name, {ONE_FILE: signed.digest()}, key))
    names = tuple(name_in_file(part, s.name) for s in specs)
    size = len(header) + sum(s.nbytes for s in specs)
    return Exported(part, size, names, aliases, _plain_values(checkpoint.tree[part]))


def _laid_out(checkpoint: Checkpoint, part: str) -> list[TensorSpec]:
    """Return the part's tensors in the order of the file: widest element first, so that each is aligned."""
    part_of = checkpoint.seen.part_of
    specs = [s for name, s in checkpoint.reader.specs.items() if part_of(name) == part]
    if not specs:
        raise StateError(
            f"part {part!r} of step {checkpoint.step} holds no tensors, so there is nothing to export"
        )
    foreign = [s for s in specs if s.dtype not in _CODES]
    if foreign:
        raise StateError(
            f"{foreign[0].name} is {foreign[0].dtype}, which plain safetensors has no code for; "
            f"{len(foreign)} of {len(specs)} tensors of part {part!r} cannot be exported"
        )
    return sorted(specs, key=lambda s: (-DTYPES[s.dtype].itemsize, s.name))


def _header(part: str, specs: list[TensorSpec], aliases: dict[str, str]) -> bytes:
    """Return length prefix and header. Source: https://github.com/huggingface/safetensors#format."""
    body: dict[str, object] = {"__metadata__": {**aliases, "format": "pt"}}
    position = 0
    for spec in specs:
        end = position + math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
        body[name_in_file(part, spec.name)] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = msgspec.json.encode(body)
    raw = raw.ljust(-(-len(raw) // 8) * 8)
    return len(raw).to_bytes(8, "little") + raw


def _plain_values(value: object) -> int:
    from_dict = (
        value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    )
    if from_dict is None:
        return 0 if type(value).__name__ == "TensorLeaf" else 1
    return sum(_plain_values(v) for v in from_dict)


@contextlib.contextmanager
def _new_file(path: Path, *, overwrite: bool) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Open a file that appears under its name, whole and durable, when the block ends without an error."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(6)}")
    try:
        with _translated(path):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "wb", buffering=0) as file:

            def write(data: bytes | memoryview) -> None:
                view = memoryview(data)
                with _translated(path):
                    while view:
                        view = view[file.write(view) :]

            yield write
            with _translated(path):
                os.fsync(descriptor)  # durability: the bytes, before the name
        with _translated(path):
            _publish(temporary, path, overwrite=overwrite)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _publish(temporary: Path, path: Path, *, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, path)
    else:
        os.link(temporary, path)  # fails when the name was taken meanwhile
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # durability: the name
    finally:
        os.close(directory)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as e:
        raise AlreadyExists(e.errno, f"{path} exists already; remove it first, or force the export") from e
    except PermissionError as e:
        raise PermissionDenied(e.errno, f"could not write {path}: {e.strerror}; choose another place") from e
    except OSError as e:
        kind = OutOfSpace if e.errno in (28, 122) else StoreError
        raise kind(e.errno, f"could not write {path}: {e.strerror}") from e
