"""Memory of a trainer that died: the next one finds its last snapshot there, and takes nothing for it that is not."""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import numpy as np
import pytest

from holdfast import Checkpointer, Run, load
from holdfast.saving import keeping
from holdfast.saving.keeping import Kept, keep, take_over
from patience import TIMEOUT, until_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux")

SIZE = 400_000

TRAINER = """
    import os, signal, sys
    import numpy as np
    from holdfast import Checkpointer, every
    held = {"w": np.zeros(400_000), "small": np.zeros(3, np.float32)}
    ckpt = Checkpointer(sys.argv[1], held, save=every(steps=1), writer="process")
    for step in ckpt.steps(5):
        held["w"] += 1
        held["small"] += 1
        if step == 3:
            ckpt.wait()
            if sys.argv[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif sys.argv[2] == "raise":
                raise ArithmeticError("the loss is lost")
            elif sys.argv[2] == "exit":
                sys.exit(3)
"""


def train(run: pathlib.Path, end: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINER), str(run), end],
        check=False,
        timeout=TIMEOUT,
        stderr=subprocess.DEVNULL,
    ).returncode


def identity(run: pathlib.Path) -> str:
    return Run(run).id


def spoil(run: pathlib.Path, step: int) -> None:
    """Flip a bit of the tensors of a checkpoint on the disk."""
    file = next(run.glob(f"data/{step:012d}-*/w.safetensors"))
    with file.open("r+b") as f:
        f.seek(-100, os.SEEK_END)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


def settled(run: pathlib.Path) -> None:
    """Wait until the writer of a trainer that was killed has ended."""
    with Checkpointer(run, {}, writer="thread"):
        pass


@contextlib.contextmanager
def resumed(run: pathlib.Path, **options: object) -> Iterator[tuple[Checkpointer, dict[str, np.ndarray]]]:
    held = {"w": np.full(SIZE, -1.0), "small": np.zeros(3, np.float32)}
    with Checkpointer(run, held, **options) as ckpt:
        ckpt.restore()
        yield ckpt, held


@pytest.mark.parametrize("end", ["kill", "raise"])
def test_a_restart_reads_the_last_snapshot_from_memory(tmp_path: pathlib.Path, end: str) -> None:
    assert train(tmp_path, end) != 0
    settled(tmp_path)
    spoil(tmp_path, 3)
    with resumed(tmp_path) as (ckpt, held):
        assert ckpt.step == 3
        assert set(held["w"]) == {3.0}
        assert held["small"].tolist() == [3, 3, 3]
        # The memory is the arena of this one now, and the next save goes through it.
        held["w"][:] = 7
        ckpt.save(tag="after")
        ckpt.wait()
    assert not any(Run(tmp_path).verify().values())  # what was spoiled is replaced
    assert take_over(identity(tmp_path), 0) is None


@pytest.mark.parametrize("end", ["exit", "whole"])
def test_who_ends_in_order_leaves_nothing(tmp_path: pathlib.Path, end: str) -> None:
    train(tmp_path, end)
    assert take_over(identity(tmp_path), 0) is None


def test_an_error_in_a_notebook_leaves_it_too(tmp_path: pathlib.Path) -> None:
    held = {"w": np.full(SIZE, 5.0), "small": np.zeros(3, np.float32)}
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path, held, writer="process") as ckpt:
        ckpt.save()
        ckpt.wait()
        raise ZeroDivisionError
    spoil(tmp_path, 0)
    with resumed(tmp_path) as (_, held):
        assert set(held["w"]) == {5.0}


def test_bytes_that_changed_in_memory_are_read_from_the_disk(tmp_path: pathlib.Path) -> None:
    train(tmp_path, "kill")
    settled(tmp_path)
    kept = take_over(identity(tmp_path), 0)
    assert kept is not None
    kept.image.parts["w"].data[1000] ^= 1
    keeper = keep(kept, 0)
    with resumed(tmp_path) as (_, held):
        assert set(held["w"]) == {3.0}
        assert held["small"].tolist() == [3, 3, 3]
    assert keeper.wait(TIMEOUT) == 0


def test_a_state_that_has_grown_keeps_what_lies_there(tmp_path: pathlib.Path) -> None:
    train(tmp_path, "kill")
    settled(tmp_path)
    spoil(tmp_path, 3)
    held = {"w": np.zeros(SIZE), "small": np.zeros(3, np.float32), "new": np.ones(2 * SIZE)}
    with Checkpointer(tmp_path, held, missing=["new"]) as ckpt:
        ckpt.restore()
        assert set(held["w"]) == {3.0}
        held["w"] += 1
        ckpt.save(tag="grown")
    assert load(tmp_path, step="grown")["new"].sum() == 2 * SIZE


def test_memory_beyond_the_budget_is_let_go(tmp_path: pathlib.Path) -> None:
    train(tmp_path, "kill")
    settled(tmp_path)
    with resumed(tmp_path, memory=SIZE) as (ckpt, held):
        assert ckpt._engine._saver._arenas.first.memory is None
        assert set(held["w"]) == {3.0}
    assert take_over(identity(tmp_path), 0) is None


def test_each_run_and_rank_has_its_own(tmp_path: pathlib.Path) -> None:
    train(tmp_path, "kill")
    settled(tmp_path)
    run = identity(tmp_path)
    assert take_over(run, 1) is None
    assert take_over("another", 0) is None
    assert take_over(run, 0) is not None


RANK = """
    import os, signal, sys
    import numpy as np
    from holdfast import Checkpointer
    url, rank, kills = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "kill"
    held = {"mine": np.full(400_000, -1.0), "all": np.full(300_000, -1.0)}
    ckpt = Checkpointer(url, held, writer="process", ranks=(rank, 2, 60.0), replicated=["all"])
    if kills:
        held["mine"][:], held["all"][:] = rank, 7.0
        ckpt.save()
        ckpt.wait()
        print(ckpt._engine.session._host.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    ckpt.restore()
    assert set(held["mine"]) == {rank} and set(held["all"]) == {7.0}
    print("restored", flush=True)
    ckpt.close()
"""


def test_each_rank_finds_its_own_share(tmp_path: pathlib.Path) -> None:
    def launch(what: str) -> list[tuple[int, str]]:
        script = textwrap.dedent(RANK)
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(tmp_path), str(rank), what],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in (0, 1)
        ]
        said = [rank.communicate(timeout=TIMEOUT)[0] for rank in ranks]
        return [(rank.returncode, words) for rank, words in zip(ranks, said, strict=True)]

    killed = launch("kill")
    assert [code for code, _ in killed] == [-signal.SIGKILL] * 2
    for _, writer in killed:
        until_gone(int(writer))  # by then the memory is kept
    own = [f for f in tmp_path.glob("data/*/*.safetensors") if f.stat().st_size > 8 * SIZE]
    assert len(own) == 2
    for file in own:
        with file.open("r+b") as f:
            f.seek(4 * SIZE)
            f.write(b"spoiled!")
    assert launch("restore") == [(0, "restored\n")] * 2


def kept_of(run: pathlib.Path) -> Kept:
    train(run, "kill")
    settled(run)
    found = take_over(identity(run), 0)
    assert found is not None
    return found


def test_the_keeper_ends(tmp_path: pathlib.Path) -> None:
    kept = kept_of(tmp_path)
    gc.collect()
    run = identity(tmp_path)
    assert keep(kept, 0, seconds=0.1).wait(TIMEOUT) == 0
    assert take_over(run, 0) is None
    # A newer one takes the place of an older one.
    first = keep(kept, 0)
    second = keep(kept, 0)
    assert first.wait(TIMEOUT) == 0
    assert take_over(run, 0) is not None
    assert second.wait(TIMEOUT) == 0


def test_the_keeper_gives_way_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = os.memfd_create("test")
    os.ftruncate(memory, 5000)
    with socket.socket(socket.AF_UNIX) as waiting:
        monkeypatch.setattr(keeping, "available_memory", lambda: 4999)
        started = time.monotonic()
        assert not keeping.hand_over(waiting, memory, memory, 30.0)
        assert time.monotonic() - started < 20
    os.close(memory)


def test_what_is_not_ours_to_read_is_left(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = kept_of(tmp_path)
    keeper = keep(kept, 0)
    asked = []
    monkeypatch.setattr(keeping, "_is_ours", lambda sock: asked.append(sock) is not None)
    assert take_over(identity(tmp_path), 0) is None
    monkeypatch.undo()
    keeper.kill()
    keeper.wait()
    assert len(asked) == 1
