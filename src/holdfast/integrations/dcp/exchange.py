"""Import DCP's own directories into a run, and export checkpoints as such directories. No process group is needed, and
one piece of a tensor is in memory at a time."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from holdfast.catalog.keyfiles import KeySource, TrustSource, read_signing_key
from holdfast.catalog.keys import data_prefix
from holdfast.catalog.trust import Verifying
from holdfast.checkpoint import Checkpoint
from holdfast.core.clock import check_count
from holdfast.core.errors import PolicyError
from holdfast.core.names import check_tag, matches
from holdfast.integrations.dcp.coordinator import Settings, begin
from holdfast.integrations.dcp.foreign import METADATA, Directory
from holdfast.integrations.dcp.items import items_of, names_of
from holdfast.integrations.dcp.naming import step_of
from holdfast.integrations.dcp.opened import Opened, open_for_dcp
from holdfast.integrations.dcp.shares import Writing, write_share
from holdfast.integrations.dcp.unchanged import known_to
from holdfast.loop.tracker import metric_number
from holdfast.run import Run
from holdfast.stores import Store, open_store

__all__ = ["export_dcp", "import_dcp"]


class _Source(SavePlanner):
    """Hands over what a plan says, item by item, from wherever it lies."""

    def set_up_planner(
        self,
        state_dict: Mapping[str, object],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        raise NotImplementedError("there is no state dict")

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan


def _plan_of(metadata: Metadata) -> SavePlan:
    """Return the plan of one process that writes all that DCP's metadata speaks of."""
    items: list[WriteItem] = []
    for fqn, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, BytesStorageMetadata):
            items.append(WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO))
            continue
        for number, chunk in enumerate(stored.chunks):
            data = TensorWriteData(chunk, stored.properties, stored.size)
            items.append(
                WriteItem(MetadataIndex(fqn, chunk.offsets, number), WriteItemType.SHARD, tensor_data=data)
            )
    return SavePlan(items, planner_data=metadata.planner_data)


# ---- import ---------------------------------------------------------------------------------------------------------


class _FromDirectory(_Source):
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return self._directory.item(write_item.index)  # type: ignore[return-value]
        return self._directory.tensor(write_item.index)


def import_dcp(
    directory: str | os.PathLike[str],
    run: str | os.PathLike[str] | Store | Run,
    *,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    tag: str | None = None,
    skip: Sequence[str] = (),
    sign: KeySource | None = None,
) -> Checkpoint:
    """Make a checkpoint of a run from a directory that DCP's FileSystemWriter has written, and return it.

    `step` is by default the number that the directory's name ends with. `skip` are globs over DCP's keys of what is
    left out. The directory is not changed. Its bytes have no digests, so what was damaged there before is not noticed.

    Raises:
        PolicyError: there is no telling the step.
        IntegrityError: the directory is not what DCP writes, or would run code; nothing was committed.
        UnsupportedValue: a value cannot be read or stored without running code; `skip` leaves it out.
        LeaseHeld: another process writes the run.
    """
    path = Path(directory)
    at = check_count("step", step) if step is not None else step_of(path.resolve())
    if at is None:
        raise PolicyError(f"{path}: its name does not say which step it is; pass step=")
    found = Directory(path)
    metadata = _without(found.metadata, tuple(skip))
    plan, planner = _plan_of(metadata), _FromDirectory(found)
    items = items_of(plan, planner)
    settings = Settings(
        metrics={k: metric_number(k, v) for k, v in (metrics or {}).items()},
        tags=(check_tag(tag),) if tag is not None else (),
        key=read_signing_key(sign) if sign is not None else None,
    )
    store = run.store if isinstance(run, Run) else open_store(run)
    saving = begin(store, at, settings)
    try:
        known = known_to(saving.known, names_of(plan))
        share = write_share(store, Writing(data_prefix(at, saving.attempt), ""), items, known, 0)
    except BaseException:
        saving.give_up()
        raise
    return Checkpoint(store, saving.finish(metadata, [share]))


def _without(metadata: Metadata, skip: tuple[str, ...]) -> Metadata:
    kept = {fqn: m for fqn, m in metadata.state_dict_metadata.items() if not matches(fqn, skip)}
    return dataclasses.replace(metadata, state_dict_metadata=kept)


# ---- export ---------------------------------------------------------------------------------------------------------


class _Files(FileSystemWriter):
    """DCP's own, also while something stands in for it: that does not touch subclasses."""


class _FromCheckpoint(_Source):
    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        value = self._opened.value(self._opened.entries[write_item.index.fqn])
        if write_item.type != WriteItemType.BYTE_IO:
            return value  # type: ignore[return-value]
        made = io.BytesIO()
        torch.save(value, made)
        return made


def export_dcp(
    run: str | os.PathLike[str] | Store | Run,
    directory: str | os.PathLike[str],
    *,
    step: int | str = "latest",
    trusted: TrustSource | None = None,
    verify: Verifying | None = None,
) -> None:
    """Write a checkpoint of a run, whoever saved it, as a new directory that plain `dcp.load` reads.

    Every byte is verified as it is read.

    Raises:
        PolicyError: the directory holds a DCP checkpoint already.
        NotARun, NoCheckpoint, IntegrityError, Untrusted: there is nothing sound to export.
    """
    path = Path(directory)
    if (path / METADATA).exists():
        raise PolicyError(
            f"{path}: holds a DCP checkpoint already, and none is written over; name a new directory"
        )
    source = run if isinstance(run, Run) else Run(run, trusted=trusted, verify=verify)
    opened = open_for_dcp(source[step])
    metadata = opened.metadata()
    plan, planner = _plan_of(metadata), _FromCheckpoint(opened)
    writer = _Files(path)
    writer.set_up_storage_writer(True)
    with opened.checkpoint.reading("export"):
        [plan] = writer.prepare_global_plan([writer.prepare_local_plan(plan)])
        written = writer.write_data(plan, planner)
        results = written.wait()
    if len(results) != len(plan.items):  # https://github.com/pytorch/pytorch/issues/191391
        raise OSError(f"{path}: DCP wrote {len(results)} of {len(plan.items)} items")
    writer.finish(metadata, [results])
