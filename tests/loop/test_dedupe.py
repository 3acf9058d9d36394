"""Unchanged tensors are referred to, and the newest version of each is the one that is read, whatever changed when."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from holdfast import Run, limit
from holdfast.stores import MemoryStore

NAMES = "abcd"
LARGE = 9_000  # float64: more than 64 KiB, so that a tensor has digest blocks of its own


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    saves=st.lists(
        st.tuples(st.integers(0, 3), st.sets(st.sampled_from(NAMES)), st.booleans()), min_size=2, max_size=8
    )
)
def test_every_save_reads_back_what_was_saved(saves: list[tuple[int, set[str], bool]]) -> None:
    """Steps repeat, so that several states of one step follow each other; sometimes a value returns to an older one."""
    store = MemoryStore()
    live = {name: np.full(LARGE, 0.0) for name in NAMES}
    expected: dict[int, dict[str, float]] = {}
    for number, (step, changed, back) in enumerate(saves, 1):
        for name in changed:
            live[name][:] = 0.0 if back else number
        holdfast.save(store, {"m": live}, step=step)
        expected[step] = {name: float(live[name][0]) for name in NAMES}
        for at, values in expected.items():
            found = holdfast.load(store, step=at, as_="numpy")["m"]
            assert {n: float(v[0]) for n, v in found.items()} == values
    assert not any(Run(store).verify().values())


def test_a_limit_in_bytes_counts_shared_files_once() -> None:
    store = MemoryStore()
    base = np.arange(50_000.0)  # 400 kB, the same in every checkpoint
    for step in range(1, 7):
        holdfast.save(store, {"base": base, "head": np.full(10_000, float(step))}, step=step)
    run = Run(store)
    assert sum(r.stored_bytes for r in run.records()) > 2_800_000
    kept = [d.step for d in run.plan(limit("800 kB")) if d.action == "keep"]
    assert kept == [3, 4, 5, 6]  # 400 kB and four times 80 kB with their headers
    run.prune(limit("800 kB"), grace=0)
    assert Run(store).steps == kept
    assert sum(o.size for o in store.list("data")) <= 800_000
