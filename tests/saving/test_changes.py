"""Large tensors of which a save changes few rows: what is written is the blocks that changed, and old files stay few."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from holdfast import Run, demote, last
from holdfast.catalog.content import open_file
from holdfast.catalog.verify import verify_manifest
from holdfast.checkpoint import Checkpoint
from holdfast.format.datafile import StoredTensor
from holdfast.format.digest import BLOCK_BYTES
from holdfast.format.manifest import FileEntry, Manifest
from holdfast.saving import changes as changes_module
from holdfast.saving import known as known_module
from holdfast.saving.arena import Arena
from holdfast.saving.changes import MOST_FILES
from holdfast.saving.image import Image
from holdfast.saving.persist import KnownTensors, new_attempt, persist_parts
from holdfast.saving.snapshot import take_snapshot
from holdfast.stores import LocalStore, MemoryStore
from restoring.parts import file_of, manifest_of

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 128 * KIB
ROWS, WIDTH = 1100, 256  # float32: 1 KiB a row, so eight blocks of 128 rows and one of 76
LAST_SMALL = 1030  # of so many rows the last block has six


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks of 128 KiB instead of 4 MiB, so that a table of 1 MiB has many."""
    before, BLOCK_BYTES[2] = BLOCK_BYTES[2], BLOCK
    yield
    BLOCK_BYTES[2] = before


def image_of(state: dict[str, dict[str, np.ndarray]]) -> Image:
    return take_snapshot(state, Arena(), rng=False).image


class Saves:
    """Saves of one state, one after the other, without a run around them."""

    def __init__(self, state: dict[str, np.ndarray]) -> None:
        self.store = MemoryStore()
        self.state = state
        self.known = KnownTensors()
        self.manifests: list[Manifest] = []

    def save(self, *, restarted: bool = False, self_contained: bool = False) -> int:
        if restarted:
            self.known = KnownTensors.of(self.store, self.manifests[-1])
        parts, self.known, written = persist_parts(
            self.store, len(self.manifests), new_attempt(), image_of({"m": self.state}), self.known,
            self_contained=self_contained,
        )  # fmt: skip
        step = len(self.manifests)
        self.manifests.append(Manifest(1, "r" * 32, step, "a" * 8, 1, 0.0, (step, 0, 0, 0, 0.0), parts))
        self.check(self.manifests[-1])
        return written

    def check(self, manifest: Manifest) -> None:
        assert list(verify_manifest(self.store, manifest)) == []
        found = Checkpoint(self.store, manifest).values()["m"]
        assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in self.state.items()}

    @property
    def files(self) -> list[FileEntry]:
        return self.manifests[-1].parts["m"].files

    def firm(self) -> set[str]:
        """The files that hold all of a tensor."""
        reader = Checkpoint(self.store, self.manifests[-1]).reader
        keys = [{key for key, _, _ in reader.places(f"m/{n}")} for n in self.state]
        return {key for of_one in keys if len(of_one) == 1 for key in of_one}

    def blocks_written(self, name: str = "w") -> int:
        """Of the newest file, how many bytes of a tensor it holds."""
        file = open_file(self.store, self.files[0])
        return file.header.tensors[file.by_name[name]].nbytes if name in file.by_name else 0


def table(rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(rows).random((rows, WIDTH), np.float32)


@pytest.mark.parametrize("restarted", [False, True])
def test_only_the_blocks_that_changed_are_written(restarted: bool) -> None:
    saves = Saves({"w": table(), "b": np.zeros(3, np.float32)})
    saves.save()
    for rows, expected in (([0], [0]), ([127, 128], [0, 1]), ([5, 600, 1099], [0, 4, 8]), ([300], [2])):
        saves.state["w"][rows] += 1
        saves.save(restarted=restarted)
        size = sum((76 if block == 8 else 128) * KIB for block in expected)
        assert saves.blocks_written() == size
    assert saves.save(restarted=restarted) < 8 * KIB, "the small tensor alone"
    assert saves.blocks_written() == 0


def test_a_block_too_small_for_a_digest_of_its_own_takes_the_one_before_along() -> None:
    saves = Saves({"w": table(LAST_SMALL)})
    saves.save()
    for _ in range(3):
        saves.state["w"][-1] += 1
        saves.save()
        assert saves.blocks_written() == (128 + 6) * KIB


def test_what_cannot_be_cut_at_rows_is_written_whole() -> None:
    saves = Saves({"w": np.zeros((3, 3 * BLOCK), np.uint8), "x": np.zeros((2, BLOCK // 2), np.uint8)})
    saves.save()
    for array in saves.state.values():
        array[1, 7] += 1
    saves.save()
    assert [saves.blocks_written(n) for n in "wx"] == [9 * BLOCK, BLOCK]


def test_another_shape_or_layout_is_another_tensor() -> None:
    saves = Saves({"w": table()})
    saves.save()
    saves.state["w"][3] += 1
    saves.save()
    for other in (
        saves.state["w"].reshape(-1, 2 * WIDTH),
        np.asfortranarray(saves.state["w"]),
        table().view("i4"),
    ):
        saves.state["w"] = other
        saves.save()
        assert saves.blocks_written() == other.nbytes
        assert len(saves.files) == 1


def test_no_byte_is_digested_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = known_module.digest
    monkeypatch.setattr(known_module, "digest", lambda data: taken.append(len(data)) or real(data))
    saves = Saves({"w": table()})
    saves.save()
    assert not taken
    saves.state["w"] += 1
    saves.save()
    assert not taken, "every block's sample differs"
    saves.state["w"][128:256] += 1
    saves.save()
    assert sum(taken) == saves.state["w"].nbytes - BLOCK


def test_files_of_a_tensor_stay_few_and_little_of_them_is_dead() -> None:
    rng = np.random.default_rng(0)
    saves = Saves({"w": table(6400), "dense": rng.random(200_000, np.float32)})
    whole = sum(a.nbytes for a in saves.state.values())
    saves.save()
    base = saves.files[0].key
    for step in range(25):
        saves.state["w"][128 * step : 128 * step + 3] += 1
        saves.state["dense"] += 1
        saves.save(restarted=step % 7 == 3)
        needed = [f for f in saves.files if open_file(saves.store, f).by_name]
        assert len(needed) <= MOST_FILES + 1
        assert sum(f.size for f in saves.files) <= 2 * whole + 40 * KIB
        assert saves.blocks_written() < 25 * BLOCK, "not the whole of it"
    assert base in [f.key for f in saves.files], "the base is the last to be given up"


def test_a_file_that_is_mostly_dead_is_given_up() -> None:
    saves = Saves({"w": table(), "dense": np.zeros(5 * MIB, np.uint8)})
    saves.save()
    for step in range(4):
        saves.state["w"][step * 128] += 1
        saves.state["dense"] += 1
        saves.save()
        assert sum(f.size for f in saves.files) <= 2 * (5 * MIB + ROWS * KIB) + 16 * KIB
    saves.state["w"][::128] += 1
    saves.state["dense"] += 1
    saves.save()
    assert len(saves.files) == 1


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from("vwx"), st.integers(0, ROWS - 1), st.integers(1, 400), st.integers(0, 2)), max_size=4),
            st.booleans(), st.integers(0, 9),
        ),
        min_size=1, max_size=12,
    ),
)  # fmt: skip
def test_every_save_reads_back_and_writes_no_more_than_it_must(saves_made) -> None:
    """Values that return to older ones, processes that start anew, checkpoints that hold everything."""
    saves = Saves({n: np.zeros((ROWS, WIDTH), np.float32) for n in "vwx"})
    saves.save()
    whole = 3 * ROWS * KIB
    for changes, restarted, contained in saves_made:
        before = {n: a.copy() for n, a in saves.state.items()}
        for name, first, count, value in changes:
            saves.state[name][first : first + count] = value
        blocks = sum(
            np.any(before[n][at : at + 128] != saves.state[n][at : at + 128])
            for n in "vwx"
            for at in range(0, ROWS, 128)
        )
        written = saves.save(restarted=restarted, self_contained=contained == 0)
        if contained == 0:
            assert written >= whole
            assert len(saves.files) == 1
        else:
            firm = saves.firm()
            loose = [f for f in saves.files if f.key not in firm]
            assert len(loose) <= MOST_FILES + 1
            assert sum(f.size for f in loose) <= 2 * whole + 64 * KIB
            if not blocks:
                assert written == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, ROWS - 1), st.integers(1, 300), st.integers(0, 4)), min_size=2, max_size=10
    )
)
def test_a_run_of_such_saves_is_pruned_demoted_and_resumed(acts: list[tuple[int, int, int]]) -> None:
    store = MemoryStore()
    live = {"m": {"w": table()}, "optimizer": {"exp_avg": table(ROWS)}}
    expected: dict[int, bytes] = {}
    for step, (first, count, act) in enumerate(acts):
        live["m"]["w"][first : first + count] += 1
        live["optimizer"]["exp_avg"][first] -= 1
        holdfast.save(store, live, step=step)
        expected[step] = live["m"]["w"].tobytes()
        run = Run(store)
        if act == 1 and len(run.steps) > 1:
            run.remove([run.steps[len(run.steps) // 2]], force=True, grace=0)
        if act == 2:
            run.prune(last(2), grace=0)
        if act == 3:
            run.prune(last(1) | demote(last(3)), grace=0)
        for at in Run(store).steps:
            found = holdfast.load(store, step=at, as_="numpy", only=["m/**"])["m"]["w"]
            assert found.tobytes() == expected[at]
        assert not any(Run(store).verify().values())
    needed = {k for s in Run(store).steps for k in Run(store)[s].manifest.file_keys}
    assert {o.key for o in store.list("data")} == needed


def test_any_safetensors_reader_opens_the_rows() -> None:
    saves = Saves({"w": table()})
    saves.save()
    saves.state["w"][[5, 600]] += 1
    saves.save()
    found = safetensors.numpy.load(saves.store.read(saves.files[0].key))
    expected = np.concatenate([saves.state["w"][:128], saves.state["w"][512:640]])
    assert np.array_equal(found["w"], expected)


def test_files_of_version_1_are_built_on_where_they_are_cut_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    saves = Saves({"w": table(), "small": np.arange(20_000.0, dtype=np.float32)})
    BLOCK_BYTES[2] = BLOCK_BYTES[1]
    saves.save()  # version 1
    BLOCK_BYTES[2] = BLOCK
    saves.state["w"][0] += 1
    saves.save(restarted=True)
    assert saves.blocks_written() == saves.state["w"].nbytes, "cut otherwise, so written anew, once"
    assert saves.blocks_written("small") == 0
    saves.state["w"][0] += 1
    saves.save(restarted=True)
    assert saves.blocks_written() == BLOCK


def parts_on_top(*rows: tuple[int, int]) -> tuple[MemoryStore, Manifest]:
    """A table, and on top of it a file that holds some stretches of its rows."""
    store, whole = MemoryStore(), np.zeros((ROWS, WIDTH), np.float32)
    base = file_of(store, [(StoredTensor("w", "float32", whole.shape, None, 0, 0), whole)])
    held = np.concatenate([whole[a:b] for a, b in rows])
    box = ((rows[0][0], 0), whole.shape)
    t = StoredTensor("w", "float32", held.shape, None, 0, 0, box, rows if len(rows) > 1 else None)
    return store, manifest_of([file_of(store, [(t, held)]), base], "w")


@pytest.mark.parametrize(
    "rows",
    [
        ((10, 200),),
        ((0, 127),),
        ((128, 300),),
        ((0, 64), (192, 256)),
        ((0, 64), (200, 328)),
        ((0, 128), (200, 328)),
        ((100, 228),),
    ],
)
def test_parts_that_are_not_whole_blocks_are_not_built_on(rows: tuple[tuple[int, int], ...]) -> None:
    """What the blocks of the whole are then, no digest says: even where all bytes and so all digests are equal."""
    store, manifest = parts_on_top(*rows)
    assert "w" not in KnownTensors.of(store, manifest).parts["m"]


def test_parts_that_are_whole_blocks_are_built_on() -> None:
    store, manifest = parts_on_top((0, 128), (256, 512))
    known = KnownTensors.of(store, manifest).parts["m"]["w"]
    newer, base = manifest.parts["m"].files
    assert list(known.files) == [newer, base, newer, newer, base, base, base, base, base]


@pytest.mark.parametrize("scattered", [False, True])
def test_a_quarter_gigabyte_of_which_one_percent_changes(tmp_path: pathlib.Path, scattered: bool) -> None:
    BLOCK_BYTES[2] = 4 * MIB
    store = LocalStore(tmp_path)
    rows = 65_536
    live = {"m": {"w": np.zeros((rows, 1024), np.float32)}}
    live["m"]["w"] += np.arange(rows, dtype=np.float32)[:, None]
    holdfast.save(store, live, step=0)
    picks = (
        np.concatenate([np.arange(a, a + 164) for a in (1100, 20_000, 40_000, 65_000)])
        if scattered
        else slice(30_000, 30_656)
    )
    live["m"]["w"][picks] = -1
    saved = holdfast.save(store, live, step=1)
    assert saved.manifest.new_bytes <= (4 if scattered else 2) * 4 * MIB + 8 * KIB
    found = holdfast.load(store, step=1, as_="numpy")["m"]["w"]
    assert np.array_equal(found, live["m"]["w"])
    assert not any(Run(store).verify().values())


def test_the_plan_gives_up_the_thinnest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes_module, "MOST_FILES", 2)
    saves = Saves({"w": table()})
    saves.save()
    base = saves.files[0].key
    for block in (0, 1, 1, 2):
        saves.state["w"][block * 128] += 1
        saves.save()
    assert [f.key for f in saves.files][-1] == base
    assert len(saves.files) == 3
