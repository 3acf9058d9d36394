"""What stands in for DCP's own storage, in one process: what becomes of a path, who is caught, and what is put back."""

from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, _storage_utils, format_utils
from torch.distributed.checkpoint import state_dict_loader as loader
from torch.distributed.checkpoint import state_dict_saver as saver
from torch.distributed.checkpoint.api import CheckpointException

import holdfast
from holdfast import best, last
from holdfast.core.errors import MissingDependency, PolicyError
from holdfast.integrations.dcp import (
    HoldfastReader,
    HoldfastWriter,
    export_dcp,
    in_place_of_files,
    standing_in,
)
from holdfast.integrations.dcp.placing import step_and_name
from holdfast.replication.mirror import Mirror
from holdfast.stores import MemoryStore, Prefixed, open_store


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Whatever a test does, torch is as it was."""
    before = places()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield
    left = list(standing_in._active)
    for one in left:
        one.close()
    assert not left
    assert all(was is now for was, now in zip(before, places(), strict=True))


def places() -> list[object]:
    return [
        type(FileSystemWriter), type(FileSystemReader), dcp.FileSystemWriter, dcp.FileSystemReader,
        saver._storage_setup, loader._storage_setup, _storage_utils._storage_setup,
        saver._ThreadBasedAsyncCheckpointExecutor, saver._ProcessBasedAsyncCheckpointExecutor,
    ]  # fmt: skip


def state(value: float = 1.0) -> dict[str, Any]:
    return {"model": {"w": torch.full((40, 30), float(value))}, "epoch": 3}


def loaded(path: object, **how: Any) -> float:
    got = {"model": {"w": torch.zeros(40, 30)}, "epoch": None}
    dcp.load(got, **(how or {"checkpoint_id": path}))
    assert got["epoch"] == 3
    return float(got["model"]["w"][0, 0])  # type: ignore[index]


# ---- where a path leads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "step", "name"),
    [
        ("out/checkpoint_3/pytorch_model_fsdp_0", 3, "pytorch_model_fsdp_0"),
        ("out/checkpoint_3/pytorch_model_fsdp_1/", 3, "pytorch_model_fsdp_1"),
        ("out/checkpoint-500/optimizer_0", 500, "optimizer_0"),
        ("step_20/optimizer_0", 20, "optimizer_0"), ("epoch_2/optimizer_0", 2, "optimizer_0"),
        ("exp/7/optimizer_0", 7, "optimizer_0"), ("out/exp7/optimizer_0", 7, "optimizer_0"),
        ("checkpoint-500/optimizer", 500, "optimizer"),
        ("x/epoch=3-step=1000.ckpt", 1000, ""), ("run-2/epoch=3-step=1000-v1.ckpt", 1000, ""),
        ("outputs/checkpoint/step-1000", 1000, ""), ("version_0/step-1000", 1000, ""),
        ("run7/1000", 1000, ""), ("run7/1000.ckpt", 1000, ""), ("epoch_3/step_70", 70, ""),
        ("checkpoints/iter_0000500", 500, ""), ("out/ckpt7", 7, ""), ("weights-7", 7, ""), ("step-1", 1, ""),
        ("s3://bucket/x/step-9", 9, ""), ("C:\\out\\step-9", 9, ""),
    ],
)  # fmt: skip
def test_a_path_names_step_and_run(path: str, step: int, name: str) -> None:
    assert step_and_name(path) == (step, name)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("out/final/pytorch_model_fsdp_0", "does not say which step"), ("optimizer_0", "does not say which step"),
        ("version_0/last.ckpt", "does not say which step"), ("", "does not say which step"),
        ("step-1/a model", "cannot be called 'a model'"),
    ],
)  # fmt: skip
def test_a_path_that_does_not_is_refused(path: str, said: str) -> None:
    with pytest.raises(PolicyError, match=f"{said}.*where="):
        step_and_name(path)


@pytest.mark.parametrize("kind", ["directory", "url", "memory", "store"])
def test_runs_below_any_root_and_their_mirrors(tmp_path: Path, kind: str) -> None:
    memory = MemoryStore("of the test")
    root, mirror = {
        "directory": (tmp_path / "r", str(tmp_path / "m")),
        "url": (f"file://{tmp_path}/r", Mirror(f"file://{tmp_path}/m", verify=True)),
        "memory": ("memory://below-root", "memory://below-mirror"),
        "store": (memory, Prefixed(memory, "mirror")),
    }[kind]
    with in_place_of_files(root, mirrors=[mirror]):
        for step in (3, 4):
            dcp.save(state(step), checkpoint_id=tmp_path / f"out/checkpoint_{step}/optimizer_0")
        dcp.save(state(7), checkpoint_id=tmp_path / "out/step-7")
        assert loaded(tmp_path / "out/checkpoint_3/optimizer_0") == 3
    opened = [
        (root, mirror.url if isinstance(mirror, Mirror) else mirror),
        ({
            "directory": (tmp_path / "r/optimizer_0", tmp_path / "m/optimizer_0"),
            "url": (tmp_path / "r/optimizer_0", tmp_path / "m/optimizer_0"),
            "memory": ("memory://below-root/optimizer_0", "memory://below-mirror/optimizer_0"),
            "store": (Prefixed(memory, "optimizer_0"), Prefixed(memory, "mirror/optimizer_0")),
        }[kind]),
    ]  # fmt: skip
    for (run, copies), steps in zip(opened, ([7], [3, 4]), strict=True):
        assert holdfast.Run(run).steps == holdfast.Run(copies).steps == steps  # type: ignore[arg-type]


def test_where_decides(tmp_path: Path) -> None:
    asked: list[str] = []

    def where(path: str) -> tuple[str, int] | None:
        asked.append(path)
        return (str(tmp_path / "runs" / Path(path).parent.name), 12) if path.endswith("last") else None

    with in_place_of_files(tmp_path / "run", where=where):
        dcp.save(state(5), checkpoint_id=tmp_path / "ema/last")
        assert loaded(tmp_path / "ema/last") == 5
        assert not (tmp_path / "run").exists()
        dcp.save(state(6), checkpoint_id=tmp_path / "step-7")
        assert loaded(tmp_path / "step-7") == 6
    assert holdfast.Run(tmp_path / "runs/ema").steps == [12]
    assert holdfast.Run(tmp_path / "run").steps == [7]
    assert set(asked) == {str(tmp_path / "ema/last"), str(tmp_path / "step-7")}
    with pytest.raises(PolicyError, match="which where= decides"):
        in_place_of_files(tmp_path, where=where, mirrors=[tmp_path / "m"])


def test_two_paths_do_not_share_a_step_unless_they_hold_the_same(tmp_path: Path) -> None:
    with in_place_of_files(tmp_path / "run"):
        dcp.save(state(1), checkpoint_id=tmp_path / "model/step-5")
        for other in (state(2), {"ema": state(1)["model"]}, {"model": state(1)["model"]}):
            with pytest.raises(
                CheckpointException, match=r"leads to step 5 of .*, and so did '.*model/step-5'"
            ):
                dcp.save(other, checkpoint_id=tmp_path / "ema/step-5")
            assert loaded(tmp_path / "model/step-5") == 1
            assert holdfast.Run(tmp_path / "run").writer is None
        dcp.save(state(1), checkpoint_id=tmp_path / "best/step-5")
        dcp.save(state(2), checkpoint_id=tmp_path / "best/step-5")  # saved again
        dcp.save(state(3), checkpoint_id=tmp_path / "ema/step-6")
    assert holdfast.Run(tmp_path / "run").steps == [5, 6]
    assert holdfast.Run(tmp_path / "run").writer is None


# ---- who is caught --------------------------------------------------------------------------------------------------


def test_whoever_makes_the_classes_gets_ours(tmp_path: Path) -> None:
    class Own(FileSystemWriter):
        pass

    path = tmp_path / "step-1"
    with in_place_of_files(tmp_path / "run") as standing:
        for made in (
            FileSystemWriter(path),  # a name that was bound before
            dcp.FileSystemWriter(path=path, single_file_per_rank=True, thread_count=4, overwrite=False),
            dcp.filesystem.FileSystemWriter(path, False, False, 2),
            standing.writer(path),
        ):
            assert isinstance(made, HoldfastWriter)
        for read in (FileSystemReader(path), dcp.FileSystemReader(path=path), standing.reader(path)):
            assert isinstance(read, HoldfastReader)

        class Later(FileSystemWriter):
            pass

        assert type(Own(path)) is Own  # what somebody has made of it is theirs
        assert type(Later(path)) is Later
        with pytest.raises(TypeError, match="unexpected keyword argument 'threads'"):
            FileSystemWriter(path, threads=4)  # type: ignore[call-arg]
        with pytest.raises(PolicyError, match="_extensions"):
            FileSystemWriter(path, _extensions=[object()])  # type: ignore[list-item]
        with pytest.raises(PolicyError, match="does not say which step"):
            FileSystemWriter(tmp_path / "final")
        writer = FileSystemWriter(path)
        dcp.save(state(1), storage_writer=writer)
        dcp.save(state(2), storage_writer=writer, checkpoint_id=tmp_path / "step-2")
        reader = FileSystemReader(path)
        assert loaded(path, storage_reader=reader) == 1
        assert loaded(path, storage_reader=reader, checkpoint_id=tmp_path / "step-2") == 2
        assert reader.read_metadata().state_dict_metadata.keys() == {"model.w", "epoch"}
    assert not list(tmp_path.rglob("*.distcp"))
    assert type(FileSystemWriter(path)) is FileSystemWriter
    assert isinstance(FileSystemReader(path), FileSystemReader)


def test_ids_that_are_no_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with in_place_of_files(tmp_path / "run"):
        dcp.save(state(4), checkpoint_id="gs://nobody-has-this/step-4")
        assert loaded("gs://nobody-has-this/step-4") == 4
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_tools_that_begin_with_nothing(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    live = {**state(1), "groups": [{"lr": 0.1, "seen": torch.arange(3)}], "both": (1, "a")}
    with in_place_of_files(tmp_path / "run"):
        dcp.save(live, checkpoint_id=path)
        format_utils.dcp_to_torch_save(path, tmp_path / "whole.pt")
        some = loader._load_state_dict_from_keys("model", checkpoint_id=path)
        export_dcp(tmp_path / "run", tmp_path / "exported", step=1)
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert torch.equal(whole["model"]["w"], live["model"]["w"])
    assert whole["groups"][0]["lr"] == 0.1
    assert torch.equal(whole["groups"][0]["seen"], torch.arange(3))
    assert (whole["epoch"], whole["both"]) == (3, (1, "a"))
    assert some.keys() == {"model"}
    assert loaded(tmp_path / "exported") == 1
    assert list((tmp_path / "exported").glob("*.distcp"))


def test_options_reach_the_storage(tmp_path: Path) -> None:
    metrics = {"loss": 9.0}
    with in_place_of_files(tmp_path / "run", keep=best("loss", mode="min") | last(1), metrics=metrics):
        for step, loss in enumerate((3.0, 1.0, 2.0, 4.0)):
            metrics["loss"] = loss
            dcp.save(state(step), checkpoint_id=tmp_path / f"step-{step}")
    run = holdfast.Run(tmp_path / "run")
    assert run.steps == [1, 3]
    assert run.best("loss", mode="min").step == 1
    with in_place_of_files(tmp_path / "run", cast=["model/**"]):
        got = {"model": {"w": torch.zeros(40, 30, dtype=torch.float64)}}
        dcp.load(got, checkpoint_id=tmp_path / "step-3")
    assert got["model"]["w"].unique().tolist() == [3.0]
    with pytest.raises(PolicyError, match="keep="):
        in_place_of_files(tmp_path / "run", keep=holdfast.on("preempt"))
    assert not standing_in._active


# ---- files that were there before -----------------------------------------------------------------------------------


def test_files_are_loaded_until_the_run_has_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, final = tmp_path / "step-1", tmp_path / "final"
    dcp.save(state(10), checkpoint_id=old)
    dcp.save(state(11), checkpoint_id=final)
    metadata = (old / ".metadata").read_bytes()
    with in_place_of_files(tmp_path / "run"):
        assert loaded(old) == loaded(old, storage_reader=FileSystemReader(old)) == 10
        assert loaded(final) == 11  # it says no step, so it cannot be in a run
        assert "loading DCP's own files" in caplog.text
        dcp.save(state(12), checkpoint_id=old)
        assert loaded(old) == loaded(old, storage_reader=FileSystemReader(old)) == 12
        with pytest.raises(
            CheckpointException, match=r"has no checkpoint 2; .*nor are there DCP's own files"
        ):
            loaded(tmp_path / "step-2")
    assert (old / ".metadata").read_bytes() == metadata
    assert loaded(old) == 10


def test_a_mark_is_left_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    with in_place_of_files(tmp_path / "run"):
        dcp.save(state(), checkpoint_id=path)
    assert [p.name for p in path.iterdir()] == [".metadata"]
    assert f"step 1 of the run file://{tmp_path}/run" in (path / ".metadata").read_text()
    with pytest.raises(CheckpointException, match="invalid load key"):
        loaded(path)
    with (
        in_place_of_files(tmp_path / "other"),
        pytest.raises(CheckpointException, match="only the mark of a save"),
    ):
        loaded(path)


def test_damage_in_the_run_is_an_error_though_files_are_there(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    dcp.save(state(10), checkpoint_id=path)
    with in_place_of_files(tmp_path / "run"):
        dcp.save(state(11), checkpoint_id=path)
        for file, said in (
            ("*.safetensors", "at least one byte changed in tensor 'w'"),
            ("checkpoints/0*1.json", "digest"),
        ):
            [found] = (tmp_path / "run").rglob(file)
            found.chmod(0o600)
            raw = bytearray(found.read_bytes())
            raw[-5] ^= 4
            found.write_bytes(raw)
            with pytest.raises(CheckpointException, match=said):
                loaded(path)


def test_where_signatures_are_required_no_files_are_loaded(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key = Ed25519PrivateKey.generate()
    private = tmp_path / "key.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    private.chmod(0o600)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    path = tmp_path / "step-1"
    dcp.save(state(10), checkpoint_id=path)
    with in_place_of_files(tmp_path / "run", sign=private, trusted=[public]):
        with pytest.raises(CheckpointException, match="nobody can sign them"):
            loaded(path)
        dcp.save(state(11), checkpoint_id=path)
        assert loaded(path) == 11
    with in_place_of_files(tmp_path / "run"):
        dcp.save(state(12), checkpoint_id=path)
    with (
        in_place_of_files(tmp_path / "run", trusted=[public]),
        pytest.raises(CheckpointException, match="sign"),
    ):
        loaded(path)


# ---- what is put back -----------------------------------------------------------------------------------------------


def made(path: Path) -> object:
    """Return where a save of a path would go; None: to files."""
    writer = FileSystemWriter(path)
    return writer.run if isinstance(writer, HoldfastWriter) else None


def test_nested_and_crossed_and_entered_again(tmp_path: Path) -> None:
    path, a, b = tmp_path / "step-1", tmp_path / "a", tmp_path / "b"
    with in_place_of_files(a) as outer:
        with in_place_of_files(b):
            assert made(path) == b
        assert made(path) == a
        with outer:
            assert made(path) == a
        assert made(path) == a
    assert made(path) is None
    with outer:
        assert made(path) == a
    assert not outer.active
    first, second = in_place_of_files(a), in_place_of_files(b)
    first.close()
    assert made(path) == b
    first.close()
    second.close()
    assert made(path) is None
    with pytest.raises(ZeroDivisionError), in_place_of_files(a):
        1 / 0
    assert made(path) is None


def test_what_was_put_over_it_meanwhile_stays(tmp_path: Path) -> None:
    seen: list[object] = []
    original = saver._storage_setup
    with in_place_of_files(tmp_path / "run"):
        ours = saver._storage_setup

        def theirs(storage: Any, checkpoint_id: Any, reader: bool = False) -> Any:
            seen.append(checkpoint_id)
            return ours(storage, checkpoint_id, reader)

        saver._storage_setup = theirs
        dcp.save(state(1), checkpoint_id=tmp_path / "step-1")
    assert saver._storage_setup is theirs
    dcp.save(state(2), checkpoint_id=tmp_path / "step-2")
    assert len(seen) == 2
    assert list((tmp_path / "step-2").glob("*.distcp"))
    saver._storage_setup = original


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (saver, "_storage_setup"), (loader, "_storage_setup"),
        (saver, "_ThreadBasedAsyncCheckpointExecutor"), (saver, "_ProcessBasedAsyncCheckpointExecutor"),
    ],
)  # fmt: skip
def test_a_torch_without_the_places_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: Any, name: str
) -> None:
    for other in (None, lambda storage, where: None):  # gone, or something else
        with monkeypatch.context() as without:
            without.delattr(of, name) if other is None else without.setattr(of, name, other)
            with pytest.raises(
                MissingDependency, match=rf"{of.__name__}.{name}.*nothing was changed.*HoldfastWriter"
            ):
                in_place_of_files(tmp_path / "run")
            assert isinstance(FileSystemWriter(tmp_path), FileSystemWriter)
        assert not standing_in._active


# ---- behind the loop's back -----------------------------------------------------------------------------------------


def test_an_asynchronous_save_goes_where_it_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    go = threading.Event()
    try:
        save = saver.save
        monkeypatch.setattr(saver, "save", lambda *a, **k: go.wait(20) and save(*a, **k))
        with in_place_of_files(tmp_path / "run"):
            behind = dcp.async_save(state(6), checkpoint_id=tmp_path / "step-6")
        go.set()
        behind.result(timeout=60)  # type: ignore[union-attr]
    finally:
        go.set()
        torch.distributed.destroy_process_group()
    assert holdfast.Run(tmp_path / "run").steps == [6]
    assert not list(tmp_path.rglob("*.distcp"))


def test_what_goes_to_dcps_process(tmp_path: Path) -> None:
    path = tmp_path / "out/checkpoint_3/optimizer_0"
    with in_place_of_files(
        open_store(tmp_path / "runs"), mirrors=[Mirror(open_store(tmp_path / "m"))], where=None
    ) as standing:
        arrived = pickle.loads(pickle.dumps(standing.writer(path)))
    arrived.reset(path)
    with pytest.raises(PolicyError, match="no other path"):
        arrived.reset(tmp_path / "step-4")
    dcp.save(state(3), storage_writer=arrived)
    for place in ("runs", "m"):
        assert holdfast.Run(tmp_path / place / "optimizer_0").steps == [3]
    for unreachable in ("memory://somewhere", MemoryStore("x")):
        with (
            in_place_of_files(unreachable) as standing,
            pytest.raises(PolicyError, match="cannot reach this store"),
        ):
            pickle.dumps(standing.writer(path))
    with pytest.raises(PolicyError, match="cannot reach this store"):
        pickle.dumps(HoldfastWriter(tmp_path, mirrors=["memory://m"]))
