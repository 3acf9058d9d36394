"""What it costs some of the ranks to restore a checkpoint, each by itself; as many as there were, or another number."""

from __future__ import annotations

from bench.scale.hub import Account
from bench.scale.run import Launch
from bench.scale.state import State
from holdfast.catalog.checkpoints import entries, read_entry
from holdfast.catalog.ranks import view_of
from holdfast.restoring.reader import Reader
from holdfast.saving.plan import RNG_PART
from holdfast.state.restoring import BoxWanted
from holdfast.state.tensors import HostTensor

__all__ = ["restored"]


def restored(launch: Launch, rank: int, world: int) -> tuple[Account, dict[str, HostTensor]]:
    """Restore the newest checkpoint as one of so many ranks; return what that cost and the tensors."""
    found: dict[str, HostTensor] = {}

    def act(rank: int) -> None:
        store = launch.store
        manifest = read_entry(store, entries(store)[-1])
        view = view_of(store, manifest, rank, world)
        reader = Reader(store, view.manifest, own=view.own, mine=view.mine)
        boxes = _wanted(launch.state, rank, world)
        rest = [name for name in reader.specs if name not in boxes]
        found.update(reader.read(rest, boxes))
        store.settle()

    phase = launch.each(act, [rank])
    return phase.accounts[0], found


def _wanted(state: State, rank: int, world: int) -> dict[str, BoxWanted]:
    """Return the box of each spread tensor that a rank holds."""
    shards = {spec.name: spec for spec in state.specs(rank, world) if spec.shard is not None}
    return {
        name: BoxWanted(name, spec.shard.box, spec.shape)
        for name, spec in shards.items()
        if spec.shard is not None
    }


def generators_of(found: dict[str, HostTensor]) -> dict[str, bytes]:
    """Return what was restored of the random generators."""
    return {name: bytes(t.data) for name, t in found.items() if name.startswith(f"{RNG_PART}/")}
