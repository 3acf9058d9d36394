"""Make `tests/golden/v1`, a run in format version 1, once. Refuses to touch one that exists: golden files stay.

    PYTHONPATH=src python tests/golden/make_v1.py

What it holds is written down a second time, as literals, in `expected_v1.py`; the test compares the two.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import socket
import struct
import sys
import uuid

import numpy as np
import torch

from holdfast import Run
from holdfast.core.clock import Clock
from holdfast.core.dtypes import DTYPES
from holdfast.format.events import Observed, Resumed, Verdicted
from holdfast.loop import session as session_module
from holdfast.loop.session import SaveOrder, Session
from holdfast.saving.arena import Arena
from holdfast.saving.snapshot import take_snapshot
from holdfast.stores import LocalStore
from holdfast.testing import MockClock

ROOT = pathlib.Path(__file__).parent / "v1"
NOW = 1_700_000_000.0


class Color(enum.Enum):
    RED = "r"


@dataclasses.dataclass
class Point:
    x: int
    y: list[float]


Pair = collections.namedtuple("Pair", "left right")


class Tied(torch.nn.Module):
    """Two names of one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(3, 2, bias=False)
        self.decoder = torch.nn.Linear(3, 2, bias=False)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("mean", torch.tensor([0.5, -0.25, 4.0]))
        with torch.no_grad():
            self.encoder.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))


def of_every_dtype() -> dict[str, torch.Tensor]:
    """Six elements of each type, made of the bytes 0, 7, 14, ... (booleans: of ones and zeros)."""
    made = {}
    for position, (name, dtype) in enumerate(DTYPES.items()):
        raw = bytes((7 * i + position) % 256 for i in range(6 * dtype.itemsize))
        if name == "bool":
            raw = b"\1\0\0\1\1\0"
        made[name] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(getattr(torch, name)).view(2, 3)
    return made


def layouts() -> dict[str, object]:
    whole = torch.arange(24, dtype=torch.int32).view(2, 3, 4)
    return {
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "permuted": whole.permute(2, 0, 1),
        "channels_last": torch.arange(16, dtype=torch.float32)
        .view(1, 2, 2, 4)
        .contiguous(memory_format=torch.channels_last),
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "every_second": torch.arange(6)[::2],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "reversed": np.arange(4, dtype=np.uint8)[::-1],
        "numpy_scalar": np.float32(1.5),
    }


def values() -> dict[object, object]:
    nan = struct.unpack(">d", bytes.fromhex("7ff8deadbeef0001"))[0]
    return {
        "none": None, "true": True, "int": -7, "big": -(2**100), "float": 0.1, "minus_zero": -0.0, "nan": nan,
        "inf": float("-inf"), "tiny": 5e-324, "complex": complex(1.5, -0.0), "text": "naïve \N{GRINNING FACE}\n",
        "surrogate": "a\udc80", "bytes": b"\x00\xff", "bytearray": bytearray(b"ab"), "tuple": (1, (2,), []),
        "list": [1, "a", None], "set": {3, 1, 2}, "frozenset": frozenset({(1, 2)}), "range": range(0, 2**70, 5),
        "slice": slice(1, None, -2), "int_keys": {1: "a", (2, "b"): 3.0, None: 4}, "dollar": {"$tensor": 1},
        "ordered": collections.OrderedDict(z=1, a=2), "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2], maxlen=5), "default": collections.defaultdict(list, {"k": [1]}),
        "datetime": datetime.datetime(2024, 2, 29, 12, 30, 1, 5, datetime.timezone(datetime.timedelta(hours=-3))),
        "date": datetime.date(1, 1, 1), "time": datetime.time(23, 59, 59, 999999), "delta": datetime.timedelta(-1, 5, 7),
        "decimal": decimal.Decimal("-0.10E+3"), "fraction": fractions.Fraction(-22, 7), "uuid": uuid.UUID(int=5),
        "path": pathlib.PurePosixPath("a/../b"), "enum": Color.RED, "dataclass": Point(1, [2.0]), "named": Pair(1, "r"),
        "numpy_dtype": np.dtype("<f4"), "torch_size": torch.Size([2, 3]), "torch_dtype": torch.bfloat16,
        "torch_device": torch.device("cpu"),
    }  # fmt: skip


def main() -> None:
    if ROOT.exists():
        sys.exit(f"{ROOT} exists; golden files are never made again")
    session_module.fingerprint = lambda: {"python": "3.11.7", "torch": "2.13.0"}  # type: ignore[assignment]
    socket.gethostname = lambda: "golden"  # type: ignore[assignment]
    store, clock = LocalStore(ROOT), MockClock(NOW)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    large = np.arange(65536, dtype=np.uint8)
    state = {
        "model": model, "optimizer": optimizer, "dtypes": of_every_dtype(), "layouts": layouts(), "values": values(),
        "frozen": {"large": large, "größe/√": np.array([1, 2, 3], np.uint16)},
    }  # fmt: skip
    session = Session(store, clock)
    for step in (10, 20):
        order = SaveOrder(
            Clock(step, step // 10, step * 64, step * 1000, step + 0.125),
            {"loss": 1.0 / step, "val": float("nan") if step == 10 else -0.0},
            (f"every {step} steps", "asked for"), ("deployed",) if step == 10 else (), {"batch": 3},
        )  # fmt: skip
        session.log.record(
            Observed(
                (step, step // 10, step * 64, step * 1000, step + 0.125), {"loss": 1.0 / step, "x": "inf"}
            )
        )
        session.persist(take_snapshot(state, Arena(), rng=False).image, order)
        clock.advance(60)
        model.encoder.weight.grad = torch.ones(2, 3)
        optimizer.step()
    session.log.record(Observed((25, 2, 0, 0, 25.0), {"loss": 0.5}))
    session.log.record(Verdicted(25, "stop", "abandoned"))
    session.log.record(Resumed(clock.now(), 20, session.parent or ""))
    session.publish_best(20)
    session.close()
    Run(store, time=clock).observe(10, "late", 0.75)


if __name__ == "__main__":
    main()
