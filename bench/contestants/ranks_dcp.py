"""torch.distributed.checkpoint with several ranks: blocking, and in the background."""

from __future__ import annotations

import pathlib

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

from bench.contestants import dcp
from bench.contestants.ranks import OneOfRanks


class Dcp(OneOfRanks, dcp.Dcp):
    """Two threads, no sync in between, and plans that are remembered from save to save."""

    no_dist = False

    def planner(self) -> DefaultSavePlanner | None:
        return DefaultSavePlanner(enable_plan_caching=True)

    def files_of(self, rank: int) -> list[pathlib.Path]:
        return list(self.path.glob(f"__{rank}_*"))


class DcpAsItComes(Dcp):
    """`dcp.save` with nothing set: one thread, which syncs its file."""

    def write(self, path: pathlib.Path) -> None:
        save(dict(self.subject.tensors()), checkpoint_id=str(path))


class DcpAsync(Dcp, dcp.DcpAsync):
    """As for one process."""
