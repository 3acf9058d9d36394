"""The same kills, flips and full disks, met by other ways to save a state: python others.py OUT.json

Each library saves step 1, acknowledged, and then step 2, through its public call, into a place of its own for each step
as its documentation shows: torch.save and safetensors to a file under the name of the step, DCP and Orbax to a
directory. What is asked is what a resume asks: is there a newest checkpoint, can it be told, does it load, is it right?
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 40_000
FLIPS = 40
Save = Callable[[Path, int], None]
Load = Callable[[Path], np.ndarray]


def value(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=SIZE)


def torch_save(root: Path, step: int) -> None:
    import torch

    torch.save({"w": torch.from_numpy(value(step))}, root / f"step-{step}.pt")


def torch_load(path: Path) -> np.ndarray:
    import torch

    return torch.load(path, weights_only=True)["w"].numpy()


def safetensors_save(root: Path, step: int) -> None:
    import safetensors.numpy

    safetensors.numpy.save_file({"w": value(step)}, root / f"step-{step}.safetensors")


def safetensors_load(path: Path) -> np.ndarray:
    import safetensors.numpy

    return safetensors.numpy.load_file(path)["w"]


def dcp_save(root: Path, step: int) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    dcp.save({"w": torch.from_numpy(value(step))}, checkpoint_id=str(root / f"step-{step}"), no_dist=True)


def dcp_load(path: Path) -> np.ndarray:
    import torch
    import torch.distributed.checkpoint as dcp

    held = {"w": torch.zeros(SIZE, dtype=torch.float64)}
    dcp.load(held, checkpoint_id=str(path), no_dist=True)
    return held["w"].numpy()


def orbax_save(root: Path, step: int) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as saver:
        saver.save((root / f"step-{step}").absolute(), {"w": value(step)})


def orbax_load(path: Path) -> np.ndarray:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as saver:
        return np.asarray(saver.restore(path.absolute(), {"w": np.zeros(SIZE)})["w"])


def holdfast_save(root: Path, step: int) -> None:
    import holdfast

    holdfast.save(root, {"m": {"w": value(step)}}, step=step)


def holdfast_load(path: Path) -> np.ndarray:
    import holdfast

    return np.asarray(holdfast.load(path, as_="numpy")["m"]["w"])


def newest_path(root: Path) -> Path:
    """What a resume takes by name: the highest step."""
    return max(
        (p for p in root.iterdir() if re.fullmatch(r"step-\d+(\.\w+)?", p.name)),
        key=lambda p: int(re.findall(r"\d+", p.name)[0]),
    )


WAYS: dict[str, tuple[str, Save, Load, Callable[[Path], Path]]] = {
    "holdfast": ("holdfast", holdfast_save, holdfast_load, lambda root: root),
    "torch.save": ("torch", torch_save, torch_load, newest_path),
    "safetensors": ("safetensors", safetensors_save, safetensors_load, newest_path),
    "DCP": ("torch", dcp_save, dcp_load, newest_path),
    "Orbax": ("orbax-checkpoint", orbax_save, orbax_load, newest_path),
}


# Loaded before anything forks, so that a kill falls into a save and not into an import.
LOADED = {
    "holdfast": ["holdfast.functional", "holdfast.state.adapters.numpy"],
    "torch.save": ["torch"],
    "safetensors": ["safetensors.numpy"],
    "DCP": ["torch.distributed.checkpoint"],
    "Orbax": ["orbax.checkpoint"],
}


def resumed(way: str, root: Path) -> str:
    """Return what a resume in a process of its own comes to: see `loaded`."""
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place, "answer")

        def act() -> None:
            answer.write_text(loaded(way, root))

        return answer.read_text() if in_child(act) == 0 else "error"


def saved(way: str, root: Path, step: int) -> None:
    """Save in a process of its own: this one has loaded the library and started none of its threads."""
    status = in_child(lambda: WAYS[way][1](root, step))
    assert status == 0, f"{way} does not save: {status}"


def loaded(way: str, root: Path) -> str:
    """Return what a load of the newest comes to: the step whose values it gives, an "error", or "wrong" values."""
    _, _, load, find = WAYS[way]
    try:
        found = load(find(root))
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - whatever a library raises is an answer, and DCP's is no Exception
        return "error"
    for step in (1, 2):
        if found.shape == (SIZE,) and found.tobytes() == value(step).tobytes():
            return f"step {step}"
    return "wrong"


def in_child(act: Callable[[], None], meanwhile: Callable[[int], None] = lambda pid: None) -> int:
    """Do something in a forked process whose output is dropped; return its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(60)  # should it hang
        try:
            with contextlib.redirect_stderr(open(os.devnull, "w")):
                act()
            code = 0
        except BaseException:  # noqa: BLE001 - told by the exit code
            pass
        os._exit(code)
    meanwhile(pid)
    return os.waitpid(pid, 0)[1]


def seconds_of(way: str, root: Path) -> float:
    """How long a save takes in a child, so that kills fall into it."""
    began = time.perf_counter()
    assert in_child(lambda: WAYS[way][1](root, 2)) == 0
    return time.perf_counter() - began


def kills(way: str, scratch: Path, cases: int) -> dict[str, int]:
    """SIGKILL at moments spread over the whole of the second save."""
    found: dict[str, int] = {}
    save = WAYS[way][1]
    root = scratch / "run"

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        saved(way, root, 1)

    fresh()
    whole = seconds_of(way, root)
    for n in range(cases):
        fresh()
        moment = whole * n / cases

        def kill(pid: int, moment: float = moment) -> None:
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)

        in_child(lambda: save(root, 2), kill)
        outcome = resumed(way, root)
        found[outcome] = found.get(outcome, 0) + 1
    return found


def full_disk(way: str, scratch: Path, cases: int) -> dict[str, int]:
    """A file may grow to a limit only (RLIMIT_FSIZE), as on a full disk or over quota: what is there after the error?"""
    found: dict[str, int] = {}
    save = WAYS[way][1]
    for n in range(cases):
        root = scratch / f"full-{n}"
        root.mkdir()
        saved(way, root, 1)

        def act(root: Path = root, n: int = n) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limit = SIZE * 8 * (n + 1) // (cases + 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save(root, 2)

        status = in_child(act)
        outcome = resumed(way, root)
        said = "" if status else ", and the save reported success"
        found[outcome + said] = found.get(outcome + said, 0) + 1
    return found


def flips(way: str, scratch: Path, cases: int) -> dict[str, int]:
    """One flipped bit in one of the files, spread over all their bytes."""
    found: dict[str, int] = {}
    root = scratch / "flips"
    root.mkdir()
    for step in (1, 2):
        saved(way, root, step)
    at = WAYS[way][3](root)
    newest = [
        p for p in ([at] if at.is_file() else sorted(at.rglob("*"))) if p.is_file() and p.stat().st_size
    ]
    if way == "holdfast":
        newest = [
            p for p in newest if p.parent.name.startswith("000000000002") or p.name.startswith("000000000002")
        ]
    total = sum(p.stat().st_size for p in newest)
    for n in range(cases):
        position = total * (2 * n + 1) // (2 * cases)
        for path in newest:
            if position < path.stat().st_size:
                break
            position -= path.stat().st_size
        raw = path.read_bytes()
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1 << n % 8]) + raw[position + 1 :])
        outcome = resumed(way, root)
        found[outcome] = found.get(outcome, 0) + 1
        path.write_bytes(raw)
    return found


def power(way: str, scratch: Path, cases: int) -> dict[str, int]:
    """The power is cut right after a save has returned, on a real ext4."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from crash.test_power_loss import Ext4
    from holdfast.testing import Crash

    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        disk = Ext4(Path(memory))
        if why := disk.make():
            return {f"not tried: {why}": 0}
        try:
            saved(way, disk.mount, 1)
            os.sync()
            disk.save()
            for _ in range(cases):
                disk.fresh()
                saved(way, disk.mount, 2)
                with contextlib.suppress(Crash):
                    disk.cut()
                disk.unmount()
                disk.remount()
                outcome = resumed(way, disk.mount)
                found[outcome] = found.get(outcome, 0) + 1
                disk.unmount()
        finally:
            subprocess.run(["umount", str(disk.mount)], capture_output=True, check=False)
    return found


CASES: dict[str, Callable[[str, Path, int], dict[str, int]]] = {
    "killed at 20 moments of a save (SIGKILL)": lambda w, s, n: kills(w, s, n),
    "no more room, at 8 sizes": lambda w, s, n: full_disk(w, s, 8),
    "power cut right after the save returned (ext4)": lambda w, s, n: power(w, s, 5),
    f"one bit flipped, at {FLIPS} places": lambda w, s, n: flips(w, s, FLIPS),
}


def version(way: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(WAYS[way][0])
    return None


def measure(way: str) -> dict[str, Any]:
    for module in LOADED[way]:
        importlib.import_module(module)
    rows = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            rows[name] = case(way, Path(place), 20)
    return {"version": version(way), "rows": rows}


def main(out: Path) -> None:
    found: dict[str, Any] = {}
    for way in WAYS:
        if version(way) is None:
            found[way] = {"version": None, "rows": {}}
            continue
        ran = subprocess.run(  # each in a process of its own: they fork, and some start threads
            [sys.executable, __file__, "--one", way], capture_output=True, text=True, check=False, timeout=600
        )
        assert ran.returncode == 0, f"{way}: {ran.stderr[-3000:]}"
        found[way] = json.loads(ran.stdout.splitlines()[-1])
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(Path(sys.argv[1]))
