"""Turn the data files of a store into packed ones, as a copy to a mirror makes them."""

from __future__ import annotations

from holdfast import Run
from holdfast.catalog.content import open_file
from holdfast.catalog.keys import packed_key
from holdfast.format.packed import Pack
from holdfast.format.packing import Packing
from holdfast.stores import Store, Stream


def pack_all(store: Store, how: Pack | None = None) -> list[str]:
    """Replace every data file by a packed one; return their keys."""
    entries = {
        entry.key: entry
        for _, manifest in Run(store).history.manifests.values()
        for part in manifest.parts.values()
        for entry in part.files
    }
    for entry in entries.values():
        file = open_file(store, entry)
        packing = Packing(file.header, how or Pack())
        blocks = (file.read_block(i) for i in range(len(file.header.blocks)))
        stream = Stream(packed_key(entry.key), 0, packing.body(blocks), bytes)
        store.write_streams([stream])
        store.delete([entry.key])
    return sorted(map(packed_key, entries))
