"""Every file of a run, in turn: gone, cut short, a bit flipped, zeroed, longer, or another file in its place. Whatever it
is, it is reported by name, no wrong value is restored, what does not need it restores, and training goes on."""

from __future__ import annotations

import pytest

import holdfast
from crash import ledger
from crash.operations import state, truth
from holdfast import Checkpointer, Run
from holdfast.core.errors import HoldfastError
from holdfast.stores import MemoryStore
from holdfast.testing import invariants

DAMAGES = {
    "file gone": None,
    "file empty": lambda raw, other: b"",
    "file cut short": lambda raw, other: raw[: len(raw) * 2 // 3],
    "bit flipped": lambda raw, other: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 4]) + raw[len(raw) // 2 + 1 :],
    "page zeroed": lambda raw, other: bytes(min(4096, len(raw))) + raw[4096:],
    "file longer": lambda raw, other: raw + b"\0",
    "another file in its place": lambda raw, other: other,
}  # fmt: skip
CELLS = [(damage, "restore") for damage in DAMAGES]
# What is there to be told by whom: data and manifests by verify, the rest of the run by verify_beside or by who reads it.
BESIDE = ("tags/", "log/", "index.json", "tidy.json", "lease/", "run.json", "signatures/", "trash/")


def made() -> MemoryStore:
    store = MemoryStore()
    for step in (1, 2, 3):
        holdfast.save(store, state(step), step=step, metrics={"loss": 1.0 / step}, tag=f"t{step}")
    Run(store).remove([1], force=True)
    return store


def needed(store: MemoryStore, step: int) -> set[str]:
    return {*holdfast.open(store, step).manifest.file_keys, Run(store).history.entry(step).key}


def other_of(store: MemoryStore, key: str) -> bytes:
    """Return what lies under another key of the same kind."""
    kind, end = key.split("/")[0], key.rsplit("/", 1)[-1]
    alike = [k for k in store.names("") if k != key and k.split("/")[0] == kind]
    same_name = [k for k in alike if k.rsplit("/", 1)[-1] == end]
    return store.read([*same_name, *alike, "run.json"][0])


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_in_turn(damage: str) -> None:
    base = made()
    keys = base.names("")
    kinds = set()
    for key in keys:
        store = MemoryStore()
        for each in keys:
            store.create(each, base.read(each))
        raw = store.read(key)
        of_step = {step: needed(store, step) for step in (2, 3)}
        change = DAMAGES[damage]
        if change is None:
            store.delete([key])
        elif change(raw, other_of(store, key)) == raw:
            continue
        else:
            store.replace(key, change(raw, other_of(store, key)))
        kinds.add(key.split("/")[0])
        try:
            check(store, key, of_step, gone=change is None)
        except BaseException:
            print(f"{damage}: {key}")
            raise
    assert {"checkpoints", "data", "tags"} <= kinds
    ledger.count(damage, "restore", len(keys))


def check(store: MemoryStore, key: str, of_step: dict[int, set[str]], *, gone: bool) -> None:
    if key == "run.json":
        with pytest.raises(HoldfastError, match="run"):
            Run(store)
        return
    if key.startswith(BESIDE):
        invariants.old_stays_readable(store, truth(2, 3))
        return
    invariants.no_silent_corruption(store, truth(1, 2, 3), {key})
    run = Run(store)
    for step, keys in of_step.items():
        if key not in keys:
            invariants.old_stays_readable(store, truth(step))
        elif step in run.steps or step in run.broken:
            named = {problem.key for problem in run.verify([step])[step]}
            assert named == {key}, f"step {step}: {named} were named"
        else:
            assert gone, f"step {step} is not listed any more"
            assert key.startswith("checkpoints/")
    goes_on(store, key, of_step)


def goes_on(store: MemoryStore, key: str, of_step: dict[int, set[str]]) -> None:
    """Training resumes from the newest checkpoint that is whole, and what it saves is whole."""
    whole = [step for step, keys in of_step.items() if key not in keys]
    held = state(7)
    with Checkpointer(store, held, writer="inline") as ckpt:
        if whole:
            ckpt.restore()
            assert ckpt.step == max(whole)
            assert invariants.same({**held, "counters": ckpt.state["counters"]}, state(max(whole)))
    holdfast.save(store, state(9), step=9)
    invariants.old_stays_readable(store, truth(9))
