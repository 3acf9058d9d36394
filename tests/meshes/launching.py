"""Start processes with as many host devices as a test wants, one or several that make up one run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from servers.processes import free_port

HERE = Path(__file__).parent
SECONDS = 200


def started(devices: int, script: str, *words: object) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", str(HERE / script), *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> list[str]:
    """Return what a process has printed; it must have ended well."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it went on for {SECONDS} s\n{err}") from None
    assert process.returncode == 0, err
    return out.splitlines()


def run(devices: int, *words: object) -> list[str]:
    return ended(started(devices, "worker.py", *words))


def start_several(world: int, devices: int, *words: object) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [started(devices, "several.py", rank, world, port, *words) for rank in range(world)]


def run_several(world: int, devices: int, *words: object) -> list[list[str]]:
    processes = start_several(world, devices, *words)
    try:
        return [ended(process) for process in processes]
    finally:
        for process in processes:  # where one failed, the others wait for it
            if process.poll() is None:
                process.kill()
                process.communicate()


def losses(lines: list[str]) -> dict[int, str]:
    return {int(m[1]): m[2] for line in lines if (m := re.fullmatch(r"step (\d+) (\S+)", line.strip()))}
