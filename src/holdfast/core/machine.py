"""What this machine, or the container we run in, has to give."""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["available_memory"]


def available_memory(root: Path = Path("/")) -> int | None:
    """Return how many bytes of memory this process may still take, or None where that cannot be known (no /proc).

    The least of what the kernel calls available and what each control group around this process leaves, its page
    cache counted as free. Source: proc(5) MemAvailable; kernel documentation of cgroup v1 and v2 memory controllers.
    """
    found = [_meminfo(root)]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                found += _left(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                found += _left(root / "sys/fs/cgroup/memory", path, *names)
    return min((f for f in found if f is not None), default=None)


def _meminfo(root: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _left(base: Path, path: str, limit: str, usage: str, cache: str) -> list[int]:
    """Return what the group at `path`, and each group above it, leaves; a group without a limit says nothing.

    In a container the path may be the host's, which is not to be seen inside: then the base speaks for us.
    """
    group = base / path.lstrip("/")
    found: list[int] = []
    for directory in [d for d in (group, *group.parents) if d == base or base in d.parents]:
        with contextlib.suppress(OSError, ValueError):  # no limit is "max", or no number that fits a machine
            most, used = int((directory / limit).read_text()), int((directory / usage).read_text())
            freeable = 0
            with contextlib.suppress(OSError, ValueError):
                freeable = dict(_stat_lines(directory / "memory.stat")).get(cache, 0)
            found.append(max(0, most - used + freeable))
    return found


def _stat_lines(path: Path) -> list[tuple[str, int]]:
    return [(line.split()[0], int(line.split()[1])) for line in path.read_text().splitlines() if line]
