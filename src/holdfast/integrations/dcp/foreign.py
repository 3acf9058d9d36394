"""DCP's own directories, read without running what is in them.

`.metadata` is a pickle. It is read with an unpickler that knows DCP's dataclasses, sizes, element types and paths, and
nothing else: a pickle that names anything else is refused before a call is made. Items are `torch.save` archives and
are read with `weights_only=True`.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from holdfast.core.errors import InvalidFormat, MissingObject, Truncated, UnsupportedValue

__all__ = ["Directory"]

METADATA = ".metadata"
MAX_METADATA_BYTES = 4 << 30

_DATACLASSES: dict[tuple[str, str], type] = {
    (cls.__module__, cls.__name__): cls
    for cls in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )
}
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


def _layout(name: object) -> torch.layout:
    """Return a layout by the name that a pickle has for it."""
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise pickle.UnpicklingError(f"{name!r} is no layout")
    return found


class _Unpickler(pickle.Unpickler):
    """Makes what DCP writes into `.metadata`, and refuses by name to make anything else."""

    def find_class(self, module: str, name: str) -> Any:
        known: Callable[..., object] | None = _DATACLASSES.get((module, name))
        if known is not None:
            return known
        if module == "torch":
            found = getattr(torch, name, None) if name.isidentifier() else None
            if found is torch.Size or isinstance(found, (torch.dtype, torch.layout)):
                return found
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return pathlib.PurePosixPath if "Posix" in name else pathlib.PureWindowsPath
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which is no part of DCP's metadata; nothing of it was run"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def _read_metadata(path: Path) -> Metadata:
    """Return what `.metadata` holds.

    Raises:
        MissingObject: there is none. InvalidFormat: it is not DCP's, or would run code.
    """
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise InvalidFormat(
                f"{path}: is larger than {MAX_METADATA_BYTES} bytes, more than any metadata of DCP"
            )
        raw = path.read_bytes()
    except FileNotFoundError as e:
        raise MissingObject(
            f"{path}: is not there, so this is no DCP checkpoint of all ranks, or its save was not completed (one that "
            "was saved with use_collectives=False has no such file and cannot be read)"
        ) from e
    try:
        found = _Unpickler(io.BytesIO(raw)).load()
        if not isinstance(found, Metadata):
            raise TypeError(f"it holds a {type(found).__name__}")
        _check(found)
    except InvalidFormat:
        raise
    except Exception as e:  # a hostile pickle makes Python raise anything
        raise InvalidFormat(f"{path}: is not the metadata of a DCP checkpoint: {e}") from e
    return found


def _check(found: Metadata) -> None:
    """Refuse what the rest relies on not to be there. Raises TypeError, ValueError."""
    for fqn, stored in found.state_dict_metadata.items():
        if not isinstance(fqn, str):
            raise TypeError(f"a key is a {type(fqn).__name__}")
        if isinstance(stored, BytesStorageMetadata):
            continue
        if not isinstance(stored, TensorStorageMetadata) or not isinstance(
            stored.properties.dtype, torch.dtype
        ):
            raise TypeError(f"{fqn!r} is a {type(stored).__name__}")
        for chunk in stored.chunks:
            boxes = zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
            if not all(o >= 0 and n >= 0 and o + n <= whole for o, n, whole in boxes):
                raise ValueError(f"{fqn!r} has a piece that does not lie inside of it")
    for index, where in found.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(where, filesystem._StorageInfo):
            raise TypeError("its places are not those of DCP's file storage")
        name = where.relative_path
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"an item lies in {name!r}, which is no plain file name")
        if (
            type(where.offset) is not int
            or type(where.length) is not int
            or min(where.offset, where.length) < 0
        ):
            raise ValueError(f"an item lies at {where.offset!r} to {where.length!r}")


class Directory:
    """A checkpoint as DCP's FileSystemWriter leaves it.

    Raises:
        MissingObject: there is no `.metadata`. InvalidFormat: it is not DCP's, or would run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = _read_metadata(path / METADATA)

    def item(self, index: MetadataIndex) -> object:
        """Return what an item holds.

        Raises:
            MissingObject, Truncated, InvalidFormat: its bytes are not there, or not as DCP writes them.
            UnsupportedValue: to read it would take code.
        """
        where = self.metadata.storage_data.get(index)
        if where is None:
            raise MissingObject(
                f"{self.path}: {_said(index)} is in the metadata, and no file is said to hold it"
            )
        if getattr(where, "transform_descriptors", None):
            raise UnsupportedValue(
                f"{_said(index)}: went through {where.transform_descriptors} on its way; load it with dcp.load and "
                "those extensions, and save it with HoldfastWriter"
            )
        file = self.path / where.relative_path
        try:
            with file.open("rb") as stream:
                stream.seek(where.offset)
                raw = stream.read(where.length)
        except FileNotFoundError as e:
            raise MissingObject(f"{file}: is gone; {_said(index)} was in it") from e
        if len(raw) < where.length:
            raise Truncated(
                f"{file}: ends before byte {where.offset + where.length}, where {_said(index)} ends"
            )
        return _loaded(raw, index, file)

    def tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return a piece of a tensor. Raises as `item`, and InvalidFormat when it is something else."""
        found = self.item(index)
        if not isinstance(found, torch.Tensor):
            raise InvalidFormat(
                f"{self.path}: {_said(index)} should be a tensor, and is a {type(found).__name__}"
            )
        return found


def _loaded(raw: bytes, index: MetadataIndex, file: Path) -> object:
    try:
        if not zipfile.is_zipfile(io.BytesIO(raw)):
            raise InvalidFormat(
                f"{file}: {_said(index)} is no torch.save archive; only DCP's default serialization is read"
            )
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).splitlines()[0]
        raise UnsupportedValue(
            f"{_said(index)}: cannot be read without running code ({reason}); leave it out with "
            f"skip=[{index.fqn!r}]"
        ) from e
    except RuntimeError as e:
        raise InvalidFormat(f"{file}: {_said(index)} is damaged: {e}") from e


def _said(index: MetadataIndex) -> str:
    at = f" at {list(index.offset)}" if index.offset is not None and any(index.offset) else ""
    return f"{index.fqn!r}{at}"
