"""The writer process: what was snapshotted is committed whatever becomes of the trainer, and its own death is an error."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from crash.killed_trainer import state
from holdfast import Checkpointer, Run, every, load
from holdfast.errors import SaveFailed
from holdfast.saving.remote import WriterProcess
from holdfast.stores import LocalStore
from patience import TIMEOUT, until_gone

POINTS = 14

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the writer process needs memfd")


def trainer(run: pathlib.Path, at: str) -> subprocess.CompletedProcess[str]:
    script = pathlib.Path(__file__).with_name("killed_trainer.py")
    return subprocess.run(
        [sys.executable, str(script), str(run), at],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> int:
    counted = trainer(tmp_path_factory.mktemp("count") / "run", "count")
    assert counted.returncode == 0, counted.stderr
    return int(counted.stdout)


@pytest.mark.parametrize("point", range(POINTS))
def test_a_trainer_that_is_killed_after_the_snapshot_loses_nothing(
    tmp_path: pathlib.Path, lines: int, point: int
) -> None:
    at = 1 + point if point < 3 else 1 + point * (lines - 1) // POINTS  # the first lines, and then all over
    killed = trainer(tmp_path, str(at))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with Checkpointer(tmp_path, state(0)) as ckpt:  # the next start waits for the writer
        ckpt.restore()
        assert ckpt.step == ckpt.state["seen"] == 2
    np.testing.assert_array_equal(load(tmp_path)["model"]["w"], state(2)["model"]["w"])
    assert not any(Run(tmp_path).verify().values())


def writer_of(ckpt: Checkpointer) -> WriterProcess:
    host = ckpt._engine.session._host
    assert isinstance(host, WriterProcess)
    return host


def data_files(root: pathlib.Path) -> set[str]:
    return {p.parent.name for p in (root / "data").rglob("*.safetensors")}


def test_a_writer_that_dies_between_saves_is_replaced(tmp_path: pathlib.Path) -> None:
    held = state(1)
    with Checkpointer(tmp_path, held, writer="process") as ckpt:
        ckpt.save()
        ckpt.wait()
        before = writer_of(ckpt).pid
        os.kill(before, signal.SIGKILL)
        writer_of(ckpt)._process.wait(TIMEOUT)
        held["model"]["b"][:] = 5
        ckpt.save(tag="after")
        ckpt.wait()
        assert writer_of(ckpt).pid != before
        assert ckpt._engine.session.lease.doc.writer == writer_of(ckpt).pid
    assert load(tmp_path, step="after")["model"]["b"][0] == 5


def test_a_writer_that_dies_amid_a_save_is_an_error_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    ckpt = Checkpointer(tmp_path, state(1), writer="process", save=every(steps=1))
    failed = None
    for step in ckpt.steps(4):
        if step == 1:
            ckpt.wait()
            committed = data_files(tmp_path)
            os.kill(writer_of(ckpt).pid, signal.SIGSTOP)
        if step == 2:
            os.kill(writer_of(ckpt).pid, signal.SIGKILL)
            with pytest.raises(SaveFailed, match=r"writer process died while it saved step 2 .*signal 9"):
                ckpt.wait()
            failed = step
            assert data_files(tmp_path) == committed
        ckpt.state.update(state(step + 1))
    ckpt.close()
    assert failed == 2
    assert Run(tmp_path).steps == [1, 3, 4]


def test_what_the_writer_says_is_raised_as_it_is(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, state(1), writer="process") as ckpt:
        (tmp_path / "data").write_text("a file in the place of the directory")
        ckpt.save()
        with pytest.raises(SaveFailed, match="data") as caught:
            ckpt.wait()
        assert isinstance(caught.value.__cause__, OSError)
        (tmp_path / "data").unlink()
        ckpt.save()
    assert Run(tmp_path).steps == [0]


HALF_COPIED = """
    import os, signal, sys
    import numpy as np
    from holdfast import Checkpointer
    from holdfast.saving.image import Image
    from holdfast.saving.progress import Progress
    from holdfast.loop.session import Session

    begin = Session.begin
    def half(self, image, order, **wave):
        progress = Progress(image.end)
        begin(self, Image(image.parts, progress, image.memory), order)
        progress.advance(image.end // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    held = {"w": np.arange(2_000_000.0)}
    ckpt = Checkpointer(sys.argv[1], held, writer="process")
    ckpt.save()
    ckpt.wait()
    Session.begin = half
    held["w"] += 1
    ckpt.save()
"""


def test_a_trainer_that_is_killed_amid_the_copy_leaves_no_half(tmp_path: pathlib.Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HALF_COPIED), str(tmp_path)], check=False, timeout=TIMEOUT
    )
    assert ran.returncode == -signal.SIGKILL
    held = {"w": np.zeros(2_000_000)}
    with Checkpointer(tmp_path, held) as ckpt:
        ckpt.restore()
    assert held["w"][-1] == 1_999_999.0
    assert len(data_files(tmp_path)) == 1


FORKED = """
    import multiprocessing, os, signal, sys, time
    import numpy as np
    from holdfast import Checkpointer
    ckpt = Checkpointer(sys.argv[1], {"w": np.arange(100.0)}, writer="process")
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    print(worker.pid, ckpt._engine.session._host.pid, flush=True)
    ckpt.save()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_worker_that_outlives_the_trainer_does_not_keep_the_writer(tmp_path: pathlib.Path) -> None:
    ran = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FORKED), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert ran.stdout is not None
    worker, writer = map(int, ran.stdout.readline().split())
    try:
        ran.wait(TIMEOUT)
        with Checkpointer(tmp_path, {"w": np.zeros(100)}) as ckpt:
            ckpt.restore()
            assert ckpt.state["w"][-1] == 99.0
        assert pathlib.Path(f"/proc/{worker}").exists()  # it still holds the socket
        until_gone(writer)
    finally:
        os.kill(worker, signal.SIGKILL)
        ran.stdout.close()


def test_the_writer_ends_with_the_checkpointer(tmp_path: pathlib.Path) -> None:
    ckpt = Checkpointer(tmp_path, state(1), writer="process")
    pid = writer_of(ckpt).pid
    ckpt.close()
    until_gone(pid)


def test_a_store_that_no_other_process_can_open_gets_a_thread(tmp_path: pathlib.Path) -> None:
    class Mine(LocalStore):
        pass

    with Checkpointer(Mine(tmp_path), state(1)) as ckpt:
        assert ckpt._engine.session.lease.doc.writer == 0
        ckpt.save()
    assert Run(tmp_path).steps == [0]
