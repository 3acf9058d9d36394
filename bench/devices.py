"""Where a state is, and how a clock waits for it: a GPU is still at work when a call returns."""

from __future__ import annotations

import torch

DEVICES = ("cuda", "cpu")


def is_here(device: str) -> bool:
    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


def free_bytes(device: str) -> int | None:
    """Return the device's own memory that can be had now, or None where that is the machine's."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else None


def finish(device: str) -> None:
    """Return when a device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def catch_up(device: str) -> None:
    """Return when a device has done what this thread gave it. Streams of others, on which a contestant may copy behind
    the training, are not waited for."""
    if device == "cuda":
        torch.cuda.current_stream().synchronize()
