"""On which machine, with what, and when."""

from __future__ import annotations

import datetime
import mmap
import os
import pathlib
import platform

import torch

from bench.contestants import CONTESTANTS, RANKS


def describe(out: pathlib.Path) -> dict[str, object]:
    """Return what a reader must know to compare figures: processor, memory, kernel, file system, disk, date."""
    mount, kind, device = _mount(out.resolve())
    return {
        "processor": _first("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory": f"{int(_first('/proc/meminfo', 'MemTotal').split()[0]) / 1024**2:.1f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file system": kind,
        "disk": _disk(mount, device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def touch_memory(share: float = 0.7) -> None:
    """Use most of the free memory once. A virtual machine may be slow where memory is used for the first time, and
    whoever came first would pay for it."""
    with mmap.mmap(-1, int(free_bytes() * share), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1


def free_bytes() -> int:
    """Return the memory that can be had now."""
    return 1024 * int(_first("/proc/meminfo", "MemAvailable").split()[0])


def contestants() -> dict[str, dict[str, str | None]]:
    """Return version and settings of everyone, installed or not."""
    found = {e.name: {"version": e.version(), "settings": e.settings} for e in CONTESTANTS}
    ranks = {f"{e.name} (ranks)": {"version": e.version(), "settings": e.settings} for e in RANKS}
    return found | ranks


def in_a_line(machine: dict[str, object]) -> str:
    gpu = "" if machine["gpu"] == "none" else f"{machine['gpu']}, "
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory']} of memory, {gpu}"
        f"Linux {machine['kernel']}, {machine['file system']} on {machine['disk']}, "
        f"Python {machine['python']}, {machine['date']}"
    )


def _first(path: str, key: str) -> str:
    """Return what follows `key :` in a file of the kernel."""
    for line in pathlib.Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown 0"


def _mount(path: pathlib.Path) -> tuple[pathlib.Path, str, str]:
    """Return mount point, type and device of the file system that a path lies on."""
    found = (pathlib.Path("/"), "unknown", "unknown")
    for line in pathlib.Path("/proc/mounts").read_text().splitlines():
        device, point, kind = line.split()[:3]
        mount = pathlib.Path(point)
        if path.is_relative_to(mount) and len(mount.parts) >= len(found[0].parts):
            found = (mount, kind, device)
    return found


def _disk(mount: pathlib.Path, device: str) -> str:
    """Return size and device of the file system."""
    space = os.statvfs(mount)
    return f"{space.f_frsize * space.f_blocks / 1e9:.0f} GB {pathlib.Path(device).name}"
