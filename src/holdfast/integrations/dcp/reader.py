"""The storage object for `dcp.load`."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from holdfast.catalog.keyfiles import TrustSource
from holdfast.catalog.trust import Verifying
from holdfast.core.errors import RanksDisagree, StateError
from holdfast.core.machine import available_memory
from holdfast.core.names import matches
from holdfast.format.boxes import Box
from holdfast.integrations.dcp.naming import step_of
from holdfast.integrations.dcp.opened import Opened, open_for_dcp
from holdfast.run import Run
from holdfast.state.adapters.torch_placing import NAMES, copy_in
from holdfast.state.restoring import BoxWanted
from holdfast.state.tensors import HostTensor, TensorSpec
from holdfast.stores import Store

__all__ = ["HoldfastReader"]

AT_LEAST_BYTES = 256 << 20  # of what is read at once, however little memory there is


class _Wanted(NamedTuple):
    """A box of a stored tensor that DCP asks for, and where it goes."""

    item: ReadItem
    name: str
    box: Box
    shape: tuple[int, ...]
    nbytes: int


class HoldfastReader(StorageReader):
    """Gives `torch.distributed.checkpoint.load` a checkpoint of a run, whoever saved it.

    Only the blocks that the wanted boxes lie in are read, and every byte is verified before it is copied.

    Args:
        run: the run's place (a directory, a URL, a Store), or a Run.
        step: a step, "latest", or a tag. A `checkpoint_id` that ends with a number means that step.
        cast: globs over tree paths ("model/**") of tensors that may be loaded into another element type.
        trusted: the keys whose signatures count, as for `Checkpointer`; not with a Run, which has its own.
        verify: what becomes of a checkpoint that no trusted key has signed.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | Store | Run,
        *,
        step: int | str = "latest",
        cast: Sequence[str] = (),
        trusted: TrustSource | None = None,
        verify: Verifying | None = None,
    ) -> None:
        super().__init__()
        self.run = run
        self.step = step
        self._cast = tuple(cast)
        self._trusted = trusted
        self._verify: Verifying | None = verify
        self._id: str | None = None
        self._opened: Opened | None = None

    @property
    def checkpoint_id(self) -> str | None:
        """The id that DCP was given last."""
        return self._id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether an id says which step it is."""
        return step_of(checkpoint_id) is not None

    # ---- what DCP calls, in this order ----------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load. An id without a number is a tag, or "latest"."""
        self._opened = None
        if checkpoint_id is not None:
            self._id = os.fspath(checkpoint_id)
            step = step_of(checkpoint_id)
            self.step = os.path.basename(self._id.rstrip("/\\")) if step is None else step

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """Open the checkpoint.

        Raises:
            NotARun, NoCheckpoint, IntegrityError, UnsupportedVersion: there is nothing sound to open.
            Untrusted: no trusted key has signed it.
        """
        run = (
            self.run
            if isinstance(self.run, Run)
            else Run(self.run, trusted=self._trusted, verify=self._verify)
        )
        run.refresh()
        self._opened = open_for_dcp(run[self.step])
        return self._opened.metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_options: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        manifest = self._now().checkpoint.manifest
        return dataclasses.replace(plan, storage_data=(manifest.step, manifest.attempt))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As the coordinator, see to it that all ranks load the same.

        Raises:
            RanksDisagree: they do not: a checkpoint was committed just now, or they are given other runs.
        """
        found = [plan.storage_data for plan in plans]
        for rank, one in enumerate(found):
            if one != found[0]:
                raise RanksDisagree(
                    f"rank {rank} has opened step {one[0]} (attempt {one[1]}), rank 0 step {found[0][0]} (attempt "
                    f"{found[0][1]}); give all the same run, and say which step"
                )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read, verify and place what this rank wants.

        Raises:
            IntegrityError: a byte is not what was committed; names the file and the tensors.
            StateError: a tensor is of another element type, and `cast` does not allow it.
        """
        opened = self._now()
        wanted = [self._wanted(opened, i) for i in plan.items if i.type != LoadItemType.BYTE_IO]
        with opened.checkpoint.reading("dcp.load"):
            for batch in _batches(wanted):
                self._place(opened, batch, planner)
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(
                        item, _pickled_here(opened.value(opened.entries[item.storage_index.fqn]))
                    )
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    # ---- how -------------------------------------------------------------------------------------------------------

    def _now(self) -> Opened:
        if self._opened is None:
            self.read_metadata()
        assert self._opened is not None
        return self._opened

    def _wanted(self, opened: Opened, item: ReadItem) -> _Wanted:
        entry = opened.entries[item.storage_index.fqn]
        spec = opened.spec(entry)
        chunk = item.storage_index.offset or (0,) * len(spec.shape)
        offsets = tuple(c + o for c, o in zip(chunk, item.storage_offsets, strict=True))
        shape = tuple(item.lengths)
        nbytes = TensorSpec(spec.name, spec.dtype, shape).nbytes
        return _Wanted(item, spec.name, (offsets, spec.shape), shape, nbytes)

    def _place(self, opened: Opened, batch: list[_Wanted], planner: LoadPlanner) -> None:
        """Read some boxes, all of them verified, and only then copy them."""
        whole = {w.name for w in batch if w.shape == w.box[1]}
        parts = {
            f"\0{number}": BoxWanted(w.name, w.box, w.shape)
            for number, w in enumerate(batch)
            if w.shape != w.box[1]
        }
        read = opened.reader.read(whole, parts)
        pairs: list[tuple[_Wanted, torch.Tensor, HostTensor]] = []
        for number, w in enumerate(batch):
            host = read[w.name] if w.shape == w.box[1] else read[f"\0{number}"]
            target = planner.resolve_tensor(w.item).detach()
            self._check(w, target, host.spec.dtype)
            pairs.append((w, target, host))
        copy_in([(target, host) for _, target, host in pairs])
        for w, target, _ in pairs:
            planner.commit_tensor(w.item, target)

    def _check(self, w: _Wanted, target: torch.Tensor, stored: str) -> None:
        if tuple(target.shape) != w.shape:
            raise StateError(f"{w.name}: DCP wants a box of {list(w.shape)} in {list(target.shape)}")
        if NAMES.get(target.dtype) != stored and not matches(w.name, self._cast):
            raise StateError(
                f"{w.name}: {stored} is stored, and the state dict holds {target.dtype}; to convert, pass "
                f"HoldfastReader(..., cast=[{w.name!r}]), or a glob such as 'model/**'"
            )


def _pickled_here(value: object) -> io.BytesIO:
    """Return a value as DCP's planners want it. What they unpickle was pickled by this line, never by a file."""
    made = io.BytesIO()
    torch.save(value, made)
    made.seek(0)
    return made


def _batches(wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """Yield what is read at once: all of it where memory allows, so that an error finds nothing changed."""
    free = available_memory()
    most = AT_LEAST_BYTES if free is None else max(AT_LEAST_BYTES, free // 2)
    batch: list[_Wanted] = []
    size = 0
    for w in wanted:
        if batch and size + w.nbytes > most:
            yield batch
            batch, size = [], 0
        batch.append(w)
        size += w.nbytes
    if batch:
        yield batch
