"""The storage objects that stand in for DCP's own: made of a path, they write and read the run that it leads to."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader, WriteResult

from holdfast.core.errors import HoldfastError, NoCheckpoint, NotARun, PolicyError, RanksDisagree
from holdfast.integrations.dcp.foreign import METADATA
from holdfast.integrations.dcp.placing import Terms
from holdfast.integrations.dcp.reader import HoldfastReader
from holdfast.integrations.dcp.writer import HoldfastWriter

__all__ = ["InPlaceReader", "InPlaceWriter"]

logger = logging.getLogger("holdfast")

_MARK = b"# holdfast"  # no pickle begins so: to torch's own reader it is damage
_FILES = "DCP's own files"


class _Saved(NamedTuple):
    """Which step of a run was saved last, from which path, and a hash of its state dict's keys."""

    step: int
    path: str
    keys: int


_saved: dict[
    tuple[str, str], _Saved
] = {}  # by who stands in, and run; only the coordinator's process has them


class InPlaceWriter(HoldfastWriter):
    """Stores what is saved to a path in the run that the path leads to.

    A `.metadata` that says so is left at a path of this machine, for programs that look for one to find out what can be
    loaded. One that is there already is not touched.

    Raises:
        PolicyError: the path does not say which step it is.
    """

    def __init__(self, terms: Terms, path: str | os.PathLike[str]) -> None:
        super().__init__(
            terms.root,
            keep=terms.keep,
            grace=terms.grace,
            self_contained=terms.self_contained,
            sign=terms.sign,
        )
        self._terms: Terms | None = terms
        self._standing = terms.token
        self._aim(terms, os.fspath(path))

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_terms": None}  # where= may be a function of the program

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save. Raises PolicyError: the id does not say which step it is."""
        if checkpoint_id is None or os.fspath(checkpoint_id) == self._id:
            return
        if self._terms is None:
            raise PolicyError(f"this object has come to DCP's process for {self._id!r} and no other path")
        self._aim(self._terms, os.fspath(checkpoint_id))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """As the coordinator, commit, and leave a mark at the path.

        Raises:
            PolicyError: it is another state, saved to another path, that this step of the run holds already.
        """
        assert self._saving is not None
        assert self._id is not None
        saving, url = self._saving, self._saving.session.store.url
        now = _Saved(saving.step, self._directory, hash(frozenset(metadata.state_dict_metadata)))
        before = _saved.get((self._standing, url))
        new_bytes = sum(r.storage_data.new_bytes for of_rank in results for r in of_rank)
        elsewhere = before is not None and before.step == now.step and before.path != now.path
        if before is not None and elsewhere and (before.keys != now.keys or new_bytes):
            saving.give_up()
            raise PolicyError(
                f"{self._id!r} leads to step {saving.step} of {url}, and so did {before.path!r}, which held something "
                "else; give each a run of its own with where= of in_place_of_files"
            )
        super().finish(metadata, results)
        _saved[self._standing, url] = now
        self._leave_mark(url, saving.step)

    def _aim(self, terms: Terms, path: str) -> None:
        placed = terms.placed(path)
        self.run, self._step, self._mirrors = placed.run, placed.step, placed.mirrors
        self.metrics = dict(terms.metrics or {})
        self._id, self._directory = path, os.path.abspath(path)

    def _leave_mark(self, url: str, step: int) -> None:
        assert self._id is not None
        if "://" in self._id:
            return
        said = f": this is step {step} of the run {url}. Load it with holdfast.integrations.dcp.in_place_of_files.\n"
        try:
            os.makedirs(self._directory, exist_ok=True)
            with open(os.path.join(self._directory, METADATA), "xb") as file:
                file.write(_MARK + said.encode())
        except FileExistsError:
            return
        except OSError as e:
            logger.warning("step %d is saved, but no mark could be left at %s: %s", step, self._id, e)


class InPlaceReader(HoldfastReader):
    """Loads what was saved to a path from the run that the path leads to, or, where the run does not have it, from the
    files that DCP's own storage has left there. `files` makes a reader for these."""

    def __init__(
        self, terms: Terms, path: str | os.PathLike[str], files: Callable[[str], StorageReader]
    ) -> None:
        super().__init__(terms.root, cast=terms.cast, trusted=terms.trusted, verify=terms.verify)
        self._terms = terms
        self._make_files = files
        self._files: StorageReader | None = None
        self._aim(os.fspath(path))

    # ---- what DCP calls, in this order ----------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load."""
        self._opened = self._files = None
        if checkpoint_id is not None:
            self._aim(os.fspath(checkpoint_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Open the checkpoint.

        Raises:
            NotARun, NoCheckpoint, PolicyError: it is neither in the run nor at the path.
            IntegrityError, UnsupportedVersion, Untrusted: it is in the run, and is not sound or not to be trusted.
        """
        self._opened = self._files = None
        missing: HoldfastError | None = self._unplaced
        if missing is None:
            try:
                return super().read_metadata()
            except (NotARun, NoCheckpoint) as e:
                missing = e
        return self._open_files(missing, args, kwargs)

    # DCP looks at the signature of these for the name `kwargs`: then it says which rank this is.
    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        if self._files is not None:
            self._files.set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        if self._files is None:
            return super().prepare_local_plan(plan)
        return dataclasses.replace(self._files.prepare_local_plan(plan), storage_data=_FILES)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As the coordinator, see to it that all ranks load the same.

        Raises:
            RanksDisagree: they do not.
        """
        of_files = [plan.storage_data == _FILES for plan in plans]
        if len(set(of_files)) > 1:
            raise RanksDisagree(
                f"{self._id}: rank {of_files.index(False)} finds it in the run, rank {of_files.index(True)} only as "
                f"{_FILES}; do all ranks reach the same run?"
            )
        if self._files is None:
            return super().prepare_global_plan(plans)
        return self._files.prepare_global_plan(
            [dataclasses.replace(plan, storage_data=None) for plan in plans]
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read and place what this rank wants.

        Raises:
            IntegrityError, StateError: as `HoldfastReader`. Of DCP's own files nothing is verified.
        """
        if self._files is None:
            return super().read_data(plan, planner)
        return self._files.read_data(plan, planner)

    # ---- how -------------------------------------------------------------------------------------------------------

    def _aim(self, path: str) -> None:
        self._id = path
        self._unplaced: PolicyError | None = None
        try:
            placed = self._terms.placed(path)
        except PolicyError as e:
            self._unplaced = e
        else:
            self.run, self.step = placed.run, placed.step

    def _open_files(self, missing: HoldfastError, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Metadata:
        assert self._id is not None
        if self._terms.needs_signatures:
            raise type(missing)(
                f"{missing}; DCP's own files are not looked at, for nobody can sign them"
            ) from missing
        if _is_marked(self._id):
            raise type(missing)(f"{missing}; what stands at {self._id} is only the mark of a save into a run")
        try:
            files = self._make_files(self._id)
            metadata = files.read_metadata(*args, **kwargs)
        except FileNotFoundError as e:
            raise type(missing)(f"{missing}; nor are there {_FILES} at {self._id}") from e
        logger.warning("%s; loading %s at %s, unverified", missing, _FILES, self._id)
        self._files = files
        return metadata


def _is_marked(path: str) -> bool:
    try:
        with open(os.path.join(path, METADATA), "rb") as file:
            return file.read(len(_MARK)) == _MARK
    except OSError:
        return False
