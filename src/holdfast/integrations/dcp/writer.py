"""The storage object for `dcp.save` and `dcp.async_save`."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from holdfast.catalog.keyfiles import KeySource, read_signing_key
from holdfast.catalog.keys import data_prefix, parse_grace
from holdfast.core.clock import check_count
from holdfast.core.errors import PolicyError, SaveFailed
from holdfast.core.names import check_tag
from holdfast.integrations.dcp.coordinator import Coordinator, Settings, begin
from holdfast.integrations.dcp.items import items_of, names_of
from holdfast.integrations.dcp.naming import required_step, step_of
from holdfast.integrations.dcp.shares import Share, Writing, write_share
from holdfast.integrations.dcp.unchanged import Stretch, known_to
from holdfast.loop.tracker import metric_number
from holdfast.policies import Rule, require_retention
from holdfast.replication.mirror import Mirror, MirrorLike
from holdfast.run import Run
from holdfast.stores import Store, is_reopenable, open_store

__all__ = ["HoldfastWriter"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Order:
    """What the coordinator tells a rank of a save. `token` is the rank's own, of this very save."""

    token: str
    step: int
    attempt: str
    world: int
    rank: int
    known: tuple[Stretch, ...] = ()


class HoldfastWriter(StorageWriter):
    """Stores what `torch.distributed.checkpoint.save` or `async_save` is given as a checkpoint of a run.

    Args:
        run: the run's place (a directory, a URL, a Store), or a Run. All ranks must reach it.
        step: the step of the checkpoint. By default it is the number that `checkpoint_id` ends with, and without one
            it is one after the newest.
        metrics: metrics of the step, for `keep=best(...)` and for whoever looks later.
        tag: a tag to point at the checkpoint.
        keep: what to keep (`last`, `best`, `every`, ... joined with `|`); by default everything. Applied after the
            commit, on the coordinator.
        grace: how long what retention lets go can still be brought back, in seconds or like "24h".
        mirrors: further places that get a copy of each checkpoint. The save returns when they have it, or have failed.
        self_contained: refer to nothing that an earlier checkpoint holds.
        sign: the private key that signs each checkpoint, as for `Checkpointer`.

    Raises:
        PolicyError: a step, a tag, a metric or a rule makes no sense.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | Store | Run,
        *,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tag: str | None = None,
        keep: Rule | None = None,
        grace: float | str = 0,
        mirrors: Sequence[MirrorLike] | None = None,
        self_contained: bool = False,
        sign: KeySource | None = None,
    ) -> None:
        super().__init__()
        self.run = run.store if isinstance(run, Run) else run
        self._step = check_count("step", step) if step is not None else None
        self._id: str | None = None
        self.metrics = dict(metrics or {})
        self.tag = check_tag(tag) if tag is not None else None
        self._keep = require_retention(keep) if keep is not None else None
        self._grace_seconds = parse_grace(grace)
        self._mirrors = tuple(mirrors) if mirrors is not None else None
        self._self_contained = self_contained
        self._sign = sign
        self._token = ""
        self._saving: Coordinator | None = None  # as the coordinator

    def __getstate__(self) -> dict[str, object]:
        """Return what DCP's process needs, which begins the save itself.

        Raises:
            PolicyError: a place is one that only this process can reach.
        """
        mirrors = tuple(map(_portable, self._mirrors)) if self._mirrors is not None else None
        return {**self.__dict__, "_saving": None, "run": _portable(self.run), "_mirrors": mirrors}

    @property
    def checkpoint_id(self) -> str | None:
        """The id that DCP was given last."""
        return self._id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether an id says which step it is."""
        return step_of(checkpoint_id) is not None

    def storage_meta(self) -> StorageMeta:
        """Return what planners may want to know of this save."""
        return StorageMeta(checkpoint_id=self._id, save_id=self._token)

    # ---- what DCP calls, in this order ----------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save.

        Raises:
            PolicyError: the id does not say which step it is.
        """
        if checkpoint_id is not None:
            self._step = required_step(checkpoint_id)
            self._id = os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **kwargs: Any) -> None:
        """Begin to plan a save.

        Raises:
            PolicyError: the ranks are not to be coordinated.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not kwargs.get("use_collectives", True) and distributed and torch.distributed.get_world_size() > 1:
            raise PolicyError(
                "use_collectives=False: a run has one checkpoint for all ranks, committed once; leave it True"
            )
        self._saving = None
        self._token = secrets.token_hex(4)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return dataclasses.replace(plan, storage_data=self._token)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As the coordinator, take the run up, and say what the save is called and what need not be written.

        Raises:
            LeaseHeld: another process writes the run.
        """
        cached = not all(plan.usable for plan in plans)
        if cached and self._step is None:
            raise PolicyError(
                "with a planner that caches plans, say which step it is: HoldfastWriter(step=...) or checkpoint_id"
            )
        saving = self._saving = begin(self._store(), self._step, self._settings())
        try:
            return [
                dataclasses.replace(
                    plan,
                    storage_data=_Order(
                        plan.storage_data if isinstance(plan.storage_data, str) else "",
                        saving.step, saving.attempt, len(plans), rank, known_to(saving.known, names_of(plan)),
                    ),
                )
                for rank, plan in enumerate(plans)
            ]  # fmt: skip
        except BaseException:
            saving.give_up()
            raise

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Make this rank's share durable.

        Raises:
            UnsupportedValue: something cannot be stored without running code at load; it is named.
            StoreError: it could not be written; the save fails on every rank.
        """
        try:
            share = self._write(plan, planner)
        except BaseException:
            if self._saving is not None:
                self._saving.wrote(failed=True)
            raise
        if self._saving is not None:
            self._saving.wrote()
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([WriteResult(MetadataIndex("holdfast"), share.new_bytes, share)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """As the coordinator, commit; then label, prune and mirror.

        Raises:
            SaveFailed: the shares are not all of what was planned.
            CommitError, LeaseLost: it could not be committed, or nobody knows.
        """
        if self._saving is None:
            raise SaveFailed("DCP asks for a commit of a save that this object has not begun")
        self._saving.finish(metadata, [r.storage_data for of_rank in results for r in of_rank])

    # ---- how -------------------------------------------------------------------------------------------------------

    def _write(self, plan: SavePlan, planner: SavePlanner) -> Share:
        order = plan.storage_data
        if not isinstance(order, _Order):
            raise SaveFailed(
                "the plan that DCP hands back is not the one that was prepared; is it of another writer?"
            )
        mark = f"-{order.rank:05d}-of-{order.world:05d}" if order.world > 1 else ""
        if order.token == self._token:
            writing, known = Writing(data_prefix(order.step, order.attempt), mark), order.known
        else:  # the planner has kept the plan of an earlier save: nothing in it is of this one
            assert self._step is not None
            writing, known = Writing(data_prefix(self._step, self._token), mark), ()
        return write_share(self._store(), writing, items_of(plan, planner), known, order.rank)

    def _settings(self) -> Settings:
        return Settings(
            metrics={k: metric_number(k, v) for k, v in self.metrics.items()},
            tags=(self.tag,) if self.tag else (),
            keep=self._keep,
            grace_seconds=self._grace_seconds,
            mirrors=self._mirrors,
            self_contained=self._self_contained,
            key=read_signing_key(self._sign) if self._sign is not None else None,
        )

    def _store(self) -> Store:
        return open_store(self.run)


def _portable(place: MirrorLike) -> MirrorLike:
    """Return a place as another process can open it."""
    if isinstance(place, Mirror):
        url = _portable(place.url)
        assert not isinstance(url, Mirror)
        return dataclasses.replace(place, url=url)
    store = open_store(place)
    if not is_reopenable(store):
        raise PolicyError(
            f"{store.url}: DCP's process cannot reach this store, which is in the memory of this one; give a "
            "directory or a URL, or save in a thread"
        )
    return place if isinstance(place, (str, os.PathLike)) else store.url
