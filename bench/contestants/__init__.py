"""Who is measured. To add a way to save: a file with a `Contestant` here, and a line in `CONTESTANTS`."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass

from bench.contestants.base import Contestant


@dataclass(frozen=True, slots=True)
class Entry:
    """A way to save: where it is, what it needs, and the settings it is measured with."""

    name: str
    where: str  # module:class, imported in the worker alone
    needs: tuple[str, ...]  # distributions; the first one's version is the contestant's
    settings: str
    on_gpu: bool = True  # whether it takes tensors that are on a GPU as they are

    def missing(self) -> str | None:
        """Return why it cannot be measured here, or None."""
        absent = [n for n in self.needs if _version(n) is None]
        if absent:
            return f"not installed: {', '.join(absent)}"
        return None

    def version(self) -> str | None:
        return _version(self.needs[0])

    def load(self) -> type[Contestant]:
        module, _, name = self.where.partition(":")
        found: type[Contestant] = getattr(importlib.import_module(f"bench.contestants.{module}"), name)
        return found


LIMIT = "limit"
HOLDFAST = "holdfast"
NO_OVERLAP = "holdfast, no overlap"

CONTESTANTS = (
    Entry(HOLDFAST, "holdfast:Holdfast", ("holdfast", "torch"), "background writer"),
    Entry(NO_OVERLAP, "holdfast:HoldfastNoOverlap", ("holdfast", "torch"), "overlap=False: copies at once"),
    Entry("torch.save", "torch_save:TorchSave", ("torch",), "blocking; loads with mmap and weights_only"),
    Entry(
        "safetensors", "safetensors:Safetensors", ("safetensors", "torch"), "blocking; loads through its map"
    ),
    Entry("DCP", "dcp:Dcp", ("torch",), "dcp.save, two writer threads"),
    Entry(
        "DCP async",
        "dcp:DcpAsync",
        ("torch",),
        "dcp.async_save in a process, one DefaultStager kept (shared memory, async; on a GPU pinned, non-blocking); "
        "in a thread for many tensors",
    ),
    Entry(
        "torch_checkpointing",
        "torch_checkpointing:TorchCheckpointing",
        ("torch_checkpointing", "torch"),
        "async, prewarmed shared memory (on a GPU pinned), one writer thread per file, "
        "no direct I/O (it fails on ext4)",
    ),
    Entry(
        "Orbax",
        "orbax:Orbax",
        ("orbax-checkpoint", "jax", "torch"),
        "AsyncCheckpointer, no compression; jax arrays; numpy arrays in the loop and, with OCDBT, for many tensors",
        on_gpu=False,
    ),
)

# As one of several ranks; the settings are those of CONTESTANTS where nothing is said.
RANKS = (
    Entry(HOLDFAST, "holdfast:Holdfast", ("holdfast", "torch"), "a writer process for each rank"),
    Entry("DCP", "ranks_dcp:Dcp", ("torch",), "dcp.save, two writer threads, remembered plans"),
    Entry("DCP, as it comes", "ranks_dcp:DcpAsItComes", ("torch",), "dcp.save, nothing set"),
    Entry(
        "DCP async",
        "ranks_dcp:DcpAsync",
        ("torch",),
        "as for one process, two writer threads, remembered plans",
    ),
    Entry(
        "torch_checkpointing",
        "ranks_torch_checkpointing:TorchCheckpointing",
        ("torch_checkpointing", "torch"),
        "as for one process, no resharder: each rank's file is that rank's alone",
    ),
)


def entries(names: list[str] | None = None) -> list[Entry]:
    """Return those of the given names, all by default. Raises ValueError for an unknown one."""
    known = list(dict.fromkeys(e.name for e in (*CONTESTANTS, *RANKS)))
    for name in names or ():
        if name not in known:
            raise ValueError(f"no contestant {name!r}; there are: {', '.join(known)}")
    return [e for e in CONTESTANTS if names is None or e.name in names]


def ranks_entries(names: list[str] | None = None) -> list[Entry]:
    """Return those of the given names that can be one of several ranks, all by default."""
    return [e for e in RANKS if names is None or e.name in names]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
