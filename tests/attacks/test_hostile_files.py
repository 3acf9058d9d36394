"""A hostile directory: links, pipes, directories and sparse giants where files of a run should be."""

from __future__ import annotations

import os
import pathlib

import pytest
from forge import ALIGNMENT, MANIFESTS, bounded, check_refused, edit, file_entry, run, state

import holdfast
from holdfast.catalog.keys import signature_key
from holdfast.core.errors import (
    HoldfastError,
    InvalidFormat,
    MissingObject,
    NotARun,
    Truncated,
)
from holdfast.stores import LocalStore

GIANT = 1 << 43


@pytest.fixture
def store(tmp_path: pathlib.Path) -> LocalStore:
    """The sound run, as files."""
    local, memory = LocalStore(tmp_path / "run"), run()
    for info in memory.list(""):
        local.write(info.key, [memory.read(info.key)])
    return local


def data_path(store: LocalStore) -> pathlib.Path:
    """The data file of part "a" of step 2."""
    return next(pathlib.Path(store.root).glob("data/000000000002-*/a.safetensors"))


def path_of(store: LocalStore, what: str) -> pathlib.Path:
    return data_path(store) if what == "data" else pathlib.Path(store.root, MANIFESTS[2])


def test_the_sound_run_is_sound(store: LocalStore) -> None:
    assert not any(holdfast.Run(store).verify().values())


# ---- things that are no files ---------------------------------------------------------------------------------------


def make(kind: str, path: pathlib.Path, outside: pathlib.Path) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to(outside / "nothing")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to a directory":
        path.symlink_to(outside)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        (outside / "secret").write_bytes(b"s" * 5000)
        path.symlink_to(outside / "secret")


KINDS = [
    "pipe", "directory", "link to nothing", "link to itself", "link to a directory", "link to a device", "link to a secret",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_file_that_is_none_is_refused(store: LocalStore, tmp_path: pathlib.Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    make(kind, data_path(store), outside)
    check_refused(store, HoldfastError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_is_none_is_no_checkpoint(
    store: LocalStore, tmp_path: pathlib.Path, kind: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    make(kind, path_of(store, "manifest"), outside)
    with bounded():
        assert holdfast.Run(store).steps == [1]
        assert holdfast.load(store, as_="numpy")["a"]["n"] == state(1)["a"]["n"]  # type: ignore[index]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_json_that_is_none_is_no_run(store: LocalStore, tmp_path: pathlib.Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    make(kind, pathlib.Path(store.root, "run.json"), outside)
    with bounded(), pytest.raises(HoldfastError) as raised:
        holdfast.Run(store)
    if kind in ("pipe", "directory", "link to nothing", "link to a directory"):
        assert isinstance(raised.value, NotARun)


def test_a_link_to_the_very_bytes_is_the_very_file(store: LocalStore, tmp_path: pathlib.Path) -> None:
    """Large data may lie on another disk; the digests say whether it is the data."""
    path = data_path(store)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert not any(holdfast.Run(store).verify().values())


def test_removing_a_checkpoint_removes_a_link_and_not_what_it_leads_to(
    store: LocalStore, tmp_path: pathlib.Path
) -> None:
    path = data_path(store)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    holdfast.Run(store).remove([2], force=True, grace=0)
    assert not path.is_symlink()
    assert (tmp_path / "elsewhere").exists()


def test_a_linked_directory_is_neither_searched_nor_emptied(
    store: LocalStore, tmp_path: pathlib.Path
) -> None:
    outside = tmp_path / "000000000009-aaaaaaaa"
    outside.mkdir()
    (outside / "model.safetensors").write_bytes(b"someone else's")
    pathlib.Path(store.root, "data", outside.name).symlink_to(outside)
    holdfast.save(store, state(3), step=3)  # reclaims what nothing refers to
    assert (outside / "model.safetensors").read_bytes() == b"someone else's"


# ---- giants ---------------------------------------------------------------------------------------------------------


def grow(path: pathlib.Path, size: int = GIANT) -> None:
    """Make a file as large as can be: it is sparse and takes no room."""
    with path.open("r+b") as f:
        f.truncate(size)


def test_a_gigantic_manifest_is_not_read_into_memory(store: LocalStore) -> None:
    grow(path_of(store, "manifest"))
    check_refused(store, InvalidFormat)


@pytest.mark.parametrize("document", ["run.json", "tags/t1.json", "lease"])
def test_a_gigantic_document_is_not_read_into_memory(store: LocalStore, document: str) -> None:
    path = pathlib.Path(store.root, document)
    grow(next(path.iterdir()) if path.is_dir() else path)
    with bounded():
        if document == "tags/t1.json":
            assert holdfast.Run(store).tags == {"t2": 2}
            return
        with pytest.raises(InvalidFormat, match="no document of a run has"):
            _ = holdfast.Run(store).writer


SMALL = ["run.json", "tags/t1.json", "lease", "index.json", "tidy.json", "signatures"]


@pytest.mark.parametrize("document", SMALL)
def test_a_small_document_of_many_bytes_is_not_read_into_memory(store: LocalStore, document: str) -> None:
    """Smaller than what a store reads as a whole, and far more than any of these may have."""
    path = pathlib.Path(store.root, document)
    if document == "signatures":
        path = pathlib.Path(store.root, signature_key(2, holdfast.Run(store)[2].manifest.attempt))
        path.parent.mkdir()
    if not path.exists():
        path.touch()
    grow(next(path.iterdir()) if path.is_dir() else path, 900 << 20)
    with bounded():
        if document == "run.json":
            with pytest.raises(InvalidFormat, match="no document of a run has"):
                holdfast.Run(store)
            return
        run_of = holdfast.Run(store)
        if document == "lease":
            with pytest.raises(InvalidFormat, match="no document of a run has"):
                _ = run_of.writer
            return
        assert [p for p in run_of.verify_beside() if "no document of a run has" in p.message]
        assert run_of.steps == [1, 2]


def test_a_gigantic_log_is_left_out(store: LocalStore, caplog: pytest.LogCaptureFixture) -> None:
    before = len(holdfast.Run(store).events())
    path = pathlib.Path(store.root, "log/evil-000000.jsonl")
    path.touch()
    grow(path)
    with bounded():
        run_of = holdfast.Run(store)
        assert len(run_of.events()) == before
        assert len(run_of.records()) == 2
    assert "which no segment has" in caplog.text


def test_a_gigantic_data_file_is_not_read_into_memory(store: LocalStore) -> None:
    grow(data_path(store))
    check_refused(store, Truncated)


def test_a_gigantic_header_is_not_read_into_memory(store: LocalStore) -> None:
    path = data_path(store)
    grow(path)
    edit(store, MANIFESTS[2], lambda d: file_entry(d, "a").update(size=GIANT, header_size=GIANT - ALIGNMENT))
    check_refused(store, InvalidFormat)


@pytest.mark.parametrize("size", [0, 1, 100])
@pytest.mark.parametrize("what", ["data", "manifest"])
def test_what_was_cut_off_is_refused(store: LocalStore, what: str, size: int) -> None:
    grow(path_of(store, what), size)
    check_refused(store, Truncated)


def test_what_is_gone_is_missed_by_name(store: LocalStore) -> None:
    path = data_path(store)
    path.unlink()
    check_refused(store, MissingObject)
    with pytest.raises(MissingObject, match=os.path.join("data", path.parent.name, path.name)):
        holdfast.load(store, step=2, as_="numpy")
