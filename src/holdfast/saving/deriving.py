"""What need not be written: bfloat16 tensors that are the rounding of a float32 one in the same image.

Nobody says which belong together: a few elements of each, spread over it, find the pairs, and then every byte is
compared. So a tensor that was changed by something else than its master copy is simply written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

from holdfast.format.datafile import StoredTensor
from holdfast.format.digest import digest
from holdfast.format.manifest import DERIVED_DTYPE, DERIVED_FROM, Derived
from holdfast.format.rounding import is_rounded, rounded
from holdfast.saving.image import Image, PartImage
from holdfast.saving.known import is_large

__all__ = ["Derivation"]

SPOTS = 64

Sample = tuple[tuple[int, ...], bytes]


class Derivation:
    """Finds in an image what follows from what. `candidates` has the tensors that may, by part: large ones, stored
    whole, of a shape that a float32 tensor has too."""

    def __init__(self, image: Image) -> None:
        self._image = image
        shapes = {t.shape for _, t in self._large(DERIVED_FROM)}
        self.candidates: dict[str, list[StoredTensor]] = {}
        for part, t in self._large(DERIVED_DTYPE):
            if t.shape in shapes:
                self.candidates.setdefault(part, []).append(t)

    def find(self, part: str) -> dict[str, Derived]:
        """Return what of a part follows from something, by the name in its file. All of the image must be there."""
        found: dict[str, Derived] = {}
        for t in self.candidates.get(part, ()):
            data = _data(self._image.parts[part], t)
            for source_part, source in self._sources.get((t.shape, _spots(data, "H")), ()):
                if is_rounded(_data(self._image.parts[source_part], source), data):
                    found[t.name] = Derived(
                        f"{source_part}/{source.name}", t.shape, digest(data).hex(), t.stride
                    )
                    break
        return found

    @functools.cached_property
    def _sources(self) -> dict[Sample, list[tuple[str, StoredTensor]]]:
        """The tensors that something may follow from, by their shape and what some of their elements round to."""
        shapes = {t.shape for tensors in self.candidates.values() for t in tensors}
        found: dict[Sample, list[tuple[str, StoredTensor]]] = {}
        for part, t in self._large(DERIVED_FROM):
            if t.shape in shapes:
                spots = bytes(rounded(_spots(_data(self._image.parts[part], t), "I")))
                found.setdefault((t.shape, spots), []).append((part, t))
        return found

    def _large(self, dtype: str) -> Iterator[tuple[str, StoredTensor]]:
        for name, part in self._image.parts.items():
            for t in part.tensors:
                # A part that is a tensor itself has its own name in the file, as one of that name in a part has.
                if t.dtype == dtype and is_large(t) and t.box is None and t.name != name:
                    yield name, t


def _data(part: PartImage, t: StoredTensor) -> memoryview:
    return part.data[t.start : t.end]


def _spots(data: memoryview, code: Literal["H", "I"]) -> bytes:
    """Return the bytes of some elements, each of the size of `code`, spread over the tensor."""
    elements: memoryview[int] = data.cast(code)
    return elements[:: max(1, len(elements) // SPOTS)].tobytes()
