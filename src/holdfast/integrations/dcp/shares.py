"""A rank's share of a save: its tensors, streamed into one data file for each part.

Tensors are taken one by one, as the file comes to them; nothing is copied that lies in host memory already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from holdfast.core.errors import SaveFailed
from holdfast.core.names import file_stems
from holdfast.format.datafile import OpenHeader, lay_out, open_header
from holdfast.format.digest import digest
from holdfast.format.manifest import FileEntry
from holdfast.integrations.dcp.items import Items, Piece
from holdfast.integrations.dcp.unchanged import Key, Stretch
from holdfast.saving.environment import fingerprint
from holdfast.stores import Store, Stream

__all__ = ["Share", "Writing", "write_share"]


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank has made durable: by part its new files and the older ones that it refers to, and the encoded values
    by DCP's key. `tensors` is how many tensor items its plan had."""

    rank: int
    new: dict[str, list[FileEntry]]
    referred: dict[str, list[FileEntry]]
    values: dict[str, bytes]
    tensors: int
    environment: dict[str, str]

    @property
    def new_bytes(self) -> int:
        return sum(entry.size for entries in self.new.values() for entry in entries)


class Writing(NamedTuple):
    """Where a share goes: the prefix of its files, and the end of their names."""

    prefix: str
    mark: str


@dataclass(slots=True)
class _File:
    """A data file on its way. The digests are taken while its bytes go by."""

    key: str
    header: OpenHeader
    pieces: Sequence[Piece]  # in data order
    size: int
    digests: list[bytes] = field(default_factory=list)
    entry: FileEntry | None = None

    def body(self) -> Iterator[memoryview]:
        blocks = self.header.blocks
        at = 0
        while at < len(blocks):
            block = blocks[at]
            data = self._bytes_of(block.first, block.last)
            end = at + 1
            while end < len(blocks) and blocks[end].first == block.first:  # of one large tensor
                end += 1
            for one in blocks[at:end]:
                piece = data[one.start - block.start : one.end - block.start]
                self.digests.append(digest(piece))
                yield piece
            at = end

    def _bytes_of(self, first: int, last: int) -> memoryview:
        if first == last:
            return self.pieces[first].data()
        return memoryview(b"".join(p.data() for p in self.pieces[first : last + 1]))

    def head(self) -> bytes:
        head = self.header.close(self.digests)
        self.entry = FileEntry(self.key, self.header.size + self.size, self.header.size, digest(head).hex())
        return head


def write_share(store: Store, writing: Writing, items: Items, known: Sequence[Stretch], rank: int) -> Share:
    """Make a rank's share durable: what `known` has is referred to, the rest is written.

    Raises:
        StoreError: a file could not be written; none of this share's files stays.
    """
    referred: dict[str, list[FileEntry]] = {}
    left = {part: {p.key: p for p in pieces} for part, pieces in items.pieces.items()}
    for stretch in known:
        if stretch.part in left and _is_unchanged(stretch, left[stretch.part]):
            for key in stretch.tensors:
                del left[stretch.part][key]
            older = referred.setdefault(stretch.part, [])
            if stretch.entry not in older:
                older.append(stretch.entry)
    stems = file_stems(left)
    files = [
        (part, _file(f"{writing.prefix}/{stems[part]}{writing.mark}{more}.safetensors", together))
        for part, pieces in left.items()
        for more, together in _in_files(pieces.values())
    ]
    store.write_streams(Stream(f.key, f.header.size, f.body(), f.head, body_bytes=f.size) for _, f in files)
    new: dict[str, list[FileEntry]] = {}
    for part, file in files:
        if file.entry is None:
            raise SaveFailed(f"{file.key}: the store did not ask for all of the file")
        new.setdefault(part, []).append(file.entry)
    return Share(rank, new, referred, items.values, items.tensors, fingerprint())


def _in_files(pieces: Iterable[Piece]) -> Iterator[tuple[str, list[Piece]]]:
    """Yield the pieces of each file of a part, and what its name ends with: in one file a name stands once, so of a
    tensor of which a rank holds several boxes the second goes into a second file."""
    files: list[dict[str, Piece]] = []
    for piece in pieces:
        free = next((f for f in files if piece.tensor.name not in f), None)
        if free is None:
            files.append(free := {})
        free[piece.tensor.name] = piece
    for number, together in enumerate(files):
        yield f"-more{number:05d}" if number else "", list(together.values())


def _file(key: str, pieces: list[Piece]) -> _File:
    laid_out = lay_out([p.tensor for p in pieces])
    data = {p.tensor.name: p.data for p in pieces}
    ordered = [Piece(t, data[t.name]) for t in laid_out]
    return _File(key, open_header(laid_out), ordered, laid_out[-1].end)


def _is_unchanged(stretch: Stretch, pieces: Mapping[Key, Piece]) -> bool:
    if not all(key in pieces for key in stretch.tensors):
        return False
    found = [pieces[key].data() for key in stretch.tensors]
    data = found[0] if len(found) == 1 else memoryview(b"".join(found))
    start = 0
    for size, expected in stretch.blocks:
        if digest(data[start : start + size]) != expected:
            return False
        start += size
    return start == len(data)
