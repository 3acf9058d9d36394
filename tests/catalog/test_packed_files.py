"""A run whose data files lie packed is a run like any other: everything reads it, and deletion knows what it owns."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from packing import pack_all

import holdfast
from holdfast import Checkpointer, Run
from holdfast.catalog.content import open_file
from holdfast.catalog.deletion import collect
from holdfast.catalog.keys import is_data_key, packed_key, plain_key
from holdfast.core.errors import IntegrityError, MissingObject, Truncated
from holdfast.export import export_part
from holdfast.stores import LocalStore, MemoryStore, Store

LARGE = 300_000


def state(step: int) -> dict[str, object]:
    rng = np.random.default_rng(step)
    weights = (rng.standard_normal((LARGE, 2)) * 0.02).astype("<f4")
    return {
        "model": {"w": weights, "small": weights[:7], "frozen": np.arange(20_000, dtype="<i8"), "none": weights[:0]},
        "plain": {"lr": 0.1, "step": step},
    }  # fmt: skip


STORES: dict[str, Callable[[pathlib.Path], Store]] = {
    "memory": lambda path: MemoryStore("packed"),
    "local": lambda path: LocalStore(path / "run"),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Store:
    """Three checkpoints that share a frozen tensor, packed."""
    made = STORES[request.param](tmp_path)
    for step in (1, 2, 3):
        holdfast.save(made, state(step), step=step)
    pack_all(made)
    return made


def data_keys(store: Store) -> list[str]:
    return [key for key in store.names("data") if is_data_key(key)]


def same(found: object, expected: object) -> bool:
    assert isinstance(found, dict)
    assert isinstance(expected, dict)
    a, b = found["model"], expected["model"]
    return all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b)


def test_it_is_smaller_and_loads_bit_for_bit(store: Store) -> None:
    assert all(key.endswith(".safetensors.zst") for key in data_keys(store))
    plain = sum(
        e.size for _, m in Run(store).history.manifests.values() for p in m.parts.values() for e in p.files
    )
    assert sum(o.size for o in store.list("data")) < 0.9 * plain
    for step in (1, 2, 3):
        assert same(holdfast.load(store, step=step), state(step))
        assert Run(store).verify([step]) == {step: []}


def test_rows_and_exports_are_read_from_it(store: Store, tmp_path: pathlib.Path) -> None:
    opened = holdfast.open(store, step=2)
    expected = state(2)["model"]["w"]  # type: ignore[index]
    for start, stop in ((0, 1), (99_999, 100_003), (131_071, 131_073), (LARGE - 1, LARGE), (5, 5)):
        assert np.array_equal(opened["model/w"][start:stop], expected[start:stop])
    export_part(opened, tmp_path / "model.safetensors", part="model")
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(tmp_path / "model.safetensors")["w"], expected)


def test_a_run_goes_on_from_it_and_still_shares_what_did_not_change(store: Store) -> None:
    """A resume on a mirror: unchanged tensors are recognised by the digests of the packed file."""
    from holdfast import last

    live = state(3)
    with Checkpointer(store, state=live, keep=last(5)) as ckpt:
        ckpt.restore("latest")
        live["plain"]["step"] = 4  # type: ignore[index]
        ckpt.save()
    run = Run(store)
    assert run.verify() == {step: [] for step in run.history.steps}
    newest = run.history.resolve("latest")[1]
    assert newest.new_bytes < 100_000, "only small tensors were written"
    assert same(holdfast.load(store), state(3))


def test_removing_checkpoints_frees_packed_files_and_those_only(store: Store) -> None:
    needed = {e.key for p in Run(store).history.resolve(3)[1].parts.values() for e in p.files}
    run = Run(store)
    run.remove([1, 2], grace=0)
    assert {plain_key(key) for key in data_keys(store)} == needed
    assert same(holdfast.load(store, step=3), state(3))


def test_reclaiming_frees_packed_orphans_and_keeps_what_is_needed(store: Store) -> None:
    before = data_keys(store)
    orphan = "data/000000000009-abcd/model.safetensors.zst"
    foreign = "data/000000000009-abcd/model.safetensors.gz"
    store.write(orphan, [b"x" * 10])
    store.write(foreign, [b"x"])
    assert collect(store).nbytes == 10
    assert data_keys(store) == before
    assert foreign in store.names("data"), "what we did not write is none of our business"
    for step in (1, 2, 3):
        assert same(holdfast.load(store, step=step), state(step))


def test_the_plain_file_is_taken_where_both_are_there(store: Store) -> None:
    entry = next(iter(Run(store).history.resolve(1)[1].parts["model"].files))
    packed = store.read(packed_key(entry.key), 0, store.info(packed_key(entry.key)).size)
    store.write(entry.key, [b"not the file"])
    with pytest.raises(IntegrityError, match=r"model\.safetensors: has 12 bytes"):
        holdfast.load(store, step=1)
    store.delete([entry.key, packed_key(entry.key)])
    with pytest.raises(MissingObject, match=r"model\.safetensors: the data file is gone"):
        holdfast.load(store, step=1)
    store.write(packed_key(entry.key), [packed])
    assert same(holdfast.load(store, step=1), state(1))


def test_a_packed_file_of_another_checkpoint_is_refused(store: Store) -> None:
    """Files that were swapped are whole, each for itself: the manifest's digest of the header tells."""
    first, second = data_keys(store)[:2]
    content = store.read(second, 0, store.info(second).size)
    store.delete([first])
    store.write(first, [content])
    [problem] = Run(store).verify([1])[1]
    assert problem.key == plain_key(first)
    assert first in problem.message
    with pytest.raises(IntegrityError):
        holdfast.load(store, step=1)


def test_damage_is_reported_by_the_name_of_the_packed_file(store: Store) -> None:
    key = data_keys(store)[0]
    size = store.info(key).size
    whole = store.read(key, 0, size)
    for at in (0, 50, size // 2, size - 1):
        changed = bytearray(whole)
        changed[at] ^= 16
        store.delete([key])
        store.write(key, [bytes(changed)])
        problems = Run(store).verify([1])[1]
        assert problems
        assert all(key in p.message for p in problems), problems
        with pytest.raises(IntegrityError):
            holdfast.load(store, step=1)


def test_a_packed_file_of_other_sizes_is_refused_before_its_index_is_read(store: Store) -> None:
    """What a file claims of itself bounds nothing; what the manifest says does."""
    entry = next(iter(Run(store).history.resolve(1)[1].parts["model"].files))
    other = msgspec.structs.replace(entry, size=entry.size + 1)
    with pytest.raises(
        Truncated, match=r"\.zst: holds \d+ bytes with a header of \d+; \d+ with one of \d+ were committed"
    ):
        open_file(store, other)
