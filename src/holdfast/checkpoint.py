"""A committed checkpoint, opened lazily: shapes at once, bytes when they are asked for, verified."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from holdfast.catalog.ranks import View, view_of
from holdfast.catalog.readers import reading
from holdfast.catalog.verify import Problem, verify_manifest
from holdfast.core.clock import Clock
from holdfast.core.collector import collector_held
from holdfast.core.errors import NoCheckpoint, StateError
from holdfast.format.manifest import Manifest, clock_from_doc, floats_from_doc
from holdfast.format.values import TensorLeaf
from holdfast.restoring.reader import Reader
from holdfast.restoring.select import NOTHING, select
from holdfast.state.place import materialize
from holdfast.state.tensors import HostTensor, TensorSpec
from holdfast.stores import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Checkpoint", "StoredTensorView"]


@dataclass(frozen=True, slots=True)
class StoredTensorView:
    """A tensor of a checkpoint; indexing reads only the blocks that the rows lie in."""

    name: str
    spec: TensorSpec
    _reader: Reader

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> str:
        """The element type by its canonical name, such as "bfloat16"."""
        return self.spec.dtype

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    def __getitem__(self, index: object) -> NDArray[np.generic]:
        """Return the indexed part as a numpy array. A slice or an integer in front reads just those rows.

        Raises:
            IntegrityError: the bytes are not what was committed.
        """
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        rows = self.shape[0] if self.shape else 0
        if isinstance(first, int) and not isinstance(first, bool) and self.shape:
            if not -rows <= first < rows:
                raise IndexError(f"{self.name}: row {first} is outside 0 … {rows - 1}")
            start = first % rows
            return cast("NDArray[np.generic]", self._rows(start, start + 1)[(0, *rest)])
        if isinstance(first, slice) and self.shape:
            start, stop, step = first.indices(rows)
            if step > 0:
                return self._rows(start, max(start, stop))[(slice(None, None, step), *rest)]
        return cast("NDArray[np.generic]", self.read()[cast("int", index)])

    def read(self) -> NDArray[np.generic]:
        """Return the whole tensor as a numpy array."""
        stored = self._reader.aliases.get(self.name, self.name)
        return _as_array(self._reader.read([stored])[stored])

    def _rows(self, start: int, stop: int) -> NDArray[np.generic]:
        return _as_array(self._reader.read_rows(self.name, start, stop))


def _as_array(tensor: HostTensor) -> NDArray[np.generic]:
    leaf = TensorLeaf(tensor.spec.name, "numpy.ndarray")
    return cast("NDArray[np.generic]", materialize(leaf, {tensor.spec.name: tensor}, as_="numpy"))


class _Tensors(Mapping[str, StoredTensorView]):
    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._names = sorted([*reader.specs, *reader.aliases])

    def __getitem__(self, name: str) -> StoredTensorView:
        try:
            return StoredTensorView(name, self._reader.spec(name), self._reader)
        except KeyError:
            close = ", ".join(n for n in self._names if n.rsplit("/", 1)[-1] == name.rsplit("/", 1)[-1])[:300]
            hint = f"; did you mean {close}?" if close else ""
            raise KeyError(f"no tensor {name!r} in step {self._reader.manifest.step}{hint}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Checkpoint:
    """A committed checkpoint of a run. Opening it reads its manifest; tensors are read when they are asked for."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self.manifest = manifest
        self._view: View | None = None
        self._reader: Reader | None = None

    def __repr__(self) -> str:
        return f"<Checkpoint step {self.step} of {self._store.url}>"

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def clock(self) -> Clock:
        return clock_from_doc(self.manifest.clock)

    @property
    def time(self) -> float:
        """When it was committed, in seconds since the Unix epoch."""
        return self.manifest.time

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics observed at its step."""
        return floats_from_doc(self.manifest.metrics)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it was saved."""
        return tuple(self.manifest.reasons)

    @property
    def environment(self) -> dict[str, str]:
        """Versions and flags of the process that saved it."""
        return dict(self.manifest.environment)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all data files it refers to."""
        return self.manifest.stored_bytes

    @property
    def _seen(self) -> View:
        """Without what each of several ranks had for itself."""
        if self._view is None:
            self._view = view_of(self._store, self.manifest)
        return self._view

    @property
    def seen(self) -> Manifest:
        """The manifest as a process of its own sees it: without what each of several ranks had for itself."""
        return self._seen.manifest

    @property
    def parts(self) -> list[str]:
        """The top-level keys of the state, "rng" included."""
        return list(self.seen.parts)

    @property
    def tensors(self) -> Mapping[str, StoredTensorView]:
        """Every tensor by its full name, tied names included."""
        return _Tensors(self.reader)

    def reading(self, why: str) -> contextlib.AbstractContextManager[None]:
        """Keep its data from being freed for as long as the context lasts, where the store can be written to."""
        return reading(self._store, self.manifest, why)

    @property
    def reader(self) -> Reader:
        """The reader behind it, with every header verified."""
        if self._reader is None:
            self._reader = Reader(self._store, self.seen, own=self._seen.own)
        return self._reader

    @property
    def tree(self) -> dict[str, object]:
        """The values by top-level key; tensors are `TensorLeaf` placeholders."""
        return self.reader.tree

    def __getitem__(self, name: str) -> StoredTensorView:
        return self.tensors[name]

    def values(
        self,
        parts: list[str] | None = None,
        *,
        only: tuple[str, ...] = (),
        as_: Literal["numpy", "torch", "jax"] = "numpy",
    ) -> dict[str, object]:
        """Return the parts as new values, every byte verified; tensors as "numpy" arrays or "torch" tensors.

        `only` (globs over tree paths) leaves everything else out, and unread.

        Raises:
            NoCheckpoint: there is no such part.
            MissingDependency: "torch" tensors are asked for and torch is not installed.
            IntegrityError: a byte is not what was committed.
        """
        if as_ not in ("numpy", "torch", "jax"):
            raise StateError(f"as_={as_!r} is not known; expected 'numpy', 'torch' or 'jax'")
        wanted = self.parts if parts is None else parts
        for part in wanted:
            if part not in self.seen.parts:
                raise NoCheckpoint(
                    f"step {self.step} has no part {part!r}; its parts are: {', '.join(self.parts)}"
                )
        with collector_held():
            return self._values(wanted, only, as_)

    def _values(
        self, wanted: list[str], only: tuple[str, ...], as_: Literal["numpy", "torch", "jax"]
    ) -> dict[str, object]:
        whole = {part: self.seen.parts[part].values(part) for part in wanted}
        trees = {p: select(t, p, only) for p, t in whole.items()} if only else whole
        trees = {p: t for p, t in trees.items() if t is not NOTHING}
        if only and not trees:
            have = ", ".join(wanted)
            raise StateError(f"only={list(only)} matches nothing in step {self.step}; its parts are: {have}")
        reader = Reader(self._store, self.seen, trees, trees, self._seen.own)
        tensors = reader.read(reader.specs)
        return {part: materialize(tree, tensors, as_=as_) for part, tree in trees.items()}

    def verify(self, progress: Callable[[int], None] = lambda done: None) -> list[Problem]:
        """Read every byte and return what is wrong, by name; an empty list means that all of it is right."""
        return list(verify_manifest(self._store, self.manifest, progress))

    @property
    def parameters(self) -> int:
        """The number of elements in all tensors of its modules."""
        modules = [p for p, part in self.seen.parts.items() if part.kind == "module"]
        return sum(
            math.prod(s.shape) for n, s in self.reader.specs.items() if self.seen.part_of(n) in modules
        )
