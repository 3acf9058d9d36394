"""The environment fingerprint: what, besides the state, decides whether two runs are numerically the same."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from pathlib import Path

__all__ = ["differences", "fingerprint"]

_PACKAGES = (
    "torch", "numpy", "jax", "jaxlib", "flax", "optax", "keras", "torchvision", "transformers", "lightning",
)  # fmt: skip
_IGNORED = ("git", "host")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # whatever else a file holds stays out of a manifest
MAX_LINE_CHARS = 1024


def fingerprint() -> dict[str, str]:
    """Return versions and determinism flags of what is loaded now.

    Imports nothing and starts no process: this runs at every save, while the loop waits or behind it, and a fork on a
    thread can deadlock with the fork of a data-loading worker.
    """
    system = os.uname()
    found = {
        "python": sys.version.split()[0],
        "platform": f"{system.sysname} {system.release}",
        "machine": system.machine,
    }
    for name in _PACKAGES:
        module = sys.modules.get(name)
        version = getattr(module, "__version__", None)
        if version is not None:
            found[name] = str(version)
    found |= _torch_flags() | _jax_flags()
    with contextlib.suppress(OSError):  # the working directory may be gone
        commit = _git_commit(os.getcwd())
        if commit:
            found["git"] = commit
    found["host"] = system.nodename
    return found


def differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return a sentence for each entry that differs and can change numbers."""
    return [
        f"{key} was {then[key]} at the save and is {now[key]} now"
        for key in sorted(then.keys() & now.keys())
        if then[key] != now[key] and key not in _IGNORED
    ]


def _torch_flags() -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    flags: dict[str, str] = {}
    with contextlib.suppress(AttributeError):
        flags["torch.default_dtype"] = str(torch.get_default_dtype())
        flags["torch.deterministic"] = str(torch.are_deterministic_algorithms_enabled())
        flags["torch.threads"] = str(torch.get_num_threads())
        flags["torch.matmul_precision"] = str(torch.get_float32_matmul_precision())
        flags["torch.cudnn.benchmark"] = str(torch.backends.cudnn.benchmark)
        flags["torch.cuda"] = str(torch.version.cuda)
    return flags


def _jax_flags() -> dict[str, str]:
    config = getattr(sys.modules.get("jax"), "config", None)
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable")
    flags = {name.replace("_", ".", 1): str(getattr(config, name)) for name in names if hasattr(config, name)}
    if config is not None and "XLA_FLAGS" in os.environ:
        flags["jax.xla_flags"] = os.environ["XLA_FLAGS"][:MAX_LINE_CHARS]
    return flags


def _first_line(path: Path) -> str:
    with path.open() as file:
        return file.readline(MAX_LINE_CHARS).strip()


@functools.cache
def _git_commit(directory: str) -> str:
    """Return the commit of the repository around a directory, without running git.

    It is looked up once: the code that runs was imported at the beginning, and a commit that is made or checked out
    while it runs is not the code that made the checkpoint.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError):
        here = Path(directory)
        for above in (here, *here.parents):
            git = above / ".git"
            if (git / "HEAD").is_file():
                said = _first_line(git / "HEAD")
                if said.startswith("ref: refs/") and ".." not in said:
                    said = _first_line(git / said.removeprefix("ref: "))
                return said if _COMMIT.fullmatch(said) else ""
    return ""
