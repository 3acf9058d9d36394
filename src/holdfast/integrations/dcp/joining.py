"""What the ranks have written, joined into one manifest: the last act of a save, which alone makes it exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from holdfast.catalog.checkpoints import commit
from holdfast.catalog.lease import Lease
from holdfast.catalog.runlog import write_segment
from holdfast.catalog.tags import Tag, set_tag
from holdfast.core.errors import SaveFailed
from holdfast.distributed.words import Company
from holdfast.format.manifest import FileEntry, Part
from holdfast.format.signing import SigningKey
from holdfast.integrations.dcp.shares import Share
from holdfast.integrations.dcp.trees import Trees
from holdfast.saving.image import Image
from holdfast.saving.job import Committed, Job
from holdfast.stores import Store

__all__ = ["Joining"]


class Joining:
    """The host of a session whose data the ranks have written: what is left is the manifest."""

    pid = 0

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        self.new_bytes = 0
        self.world = 1
        self.environment: dict[str, str] = {}

    def join(
        self, metadata: Metadata, shares: Sequence[Share], order: Mapping[str, list[str]], step: int
    ) -> None:
        """Take in what all ranks have made durable; `order` is that of the newest checkpoint's files, by part.

        Raises:
            SaveFailed: it is not all of what was planned. StateError: two entries would stand in one place.
        """
        _check_complete(metadata, shares, step)
        trees = Trees.of(metadata, {fqn: raw for share in shares for fqn, raw in share.values.items()})
        self.parts = {
            part: Part(tree, trees.kinds[part], _files(part, shares, order.get(part, []), step))
            for part, tree in trees.encoded.items()
        }
        self.new_bytes = sum(share.new_bytes for share in shares)
        self.world = len(shares)
        self.environment = _together(shares) | trees.note

    def start(
        self, store: Store, lease: Lease, key: SigningKey | None = None, company: Company | None = None
    ) -> None:
        self._store, self._lease, self._key = store, lease, key

    def begin(self, job: Job, image: Image) -> None:
        pass

    def finish(self, job: Job, image: Image) -> Committed:
        manifest = msgspec.structs.replace(
            job.manifest,
            parts=self.parts,
            new_bytes=self.new_bytes,
            world_size=self.world,
            environment=job.manifest.environment | self.environment,
        )
        write_segment(self._store, job.log_key, job.log_lines)
        entry = commit(self._store, manifest, self._lease, self._key)
        for tag in job.tags:
            set_tag(self._store, Tag(tag, manifest.step, manifest.attempt, manifest.time))
        return Committed(entry.key, entry.ordinal, {}, manifest.new_bytes, manifest)

    def close(self) -> None:
        pass


def _files(part: str, shares: Sequence[Share], order: Sequence[str], step: int) -> list[FileEntry]:
    """Return the files of a part: the first listed that has a name has the last word, so new ones come first, and older
    ones stay in the order they had."""
    new = [entry for share in shares for entry in share.new.get(part, [])]
    older = {e.key: e for share in shares for e in share.referred.get(part, [])}
    if not older.keys() <= set(order):
        raise SaveFailed(
            f"step {step}: a rank refers to files of {part!r} that the newest checkpoint does not have"
        )
    return [*new, *(older[key] for key in order if key in older)]


def _check_complete(metadata: Metadata, shares: Sequence[Share], step: int) -> None:
    planned = sum(
        len(stored.chunks)
        for stored in metadata.state_dict_metadata.values()
        if isinstance(stored, TensorStorageMetadata)
    )
    written = sum(share.tensors for share in shares)
    if planned != written:
        raise SaveFailed(
            f"step {step}: DCP planned {planned} pieces of tensors and the ranks wrote {written}; nothing was committed"
        )


def _together(shares: Sequence[Share]) -> dict[str, str]:
    """Return what is another on some rank than on the first, with the rank in its name."""
    first = shares[0].environment
    return {
        f"{key} (rank {share.rank})": value
        for share in shares[1:]
        for key, value in share.environment.items()
        if first.get(key) != value
    }
