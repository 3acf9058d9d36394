"""What the golden run of format version 1 holds, written down by hand: literals and bytes, nothing read from a file.

Imports no framework, so that it can check a reader in a process that has none.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import math
import pathlib
import struct
import uuid

import holdfast
from holdfast.core.clock import Clock
from holdfast.state.records import EnumMember, Record

ROOT = pathlib.Path(__file__).parent / "v1"

# Six elements of each type in a 2 x 3 tensor, byte for byte.
DTYPES = {
    "bool": "010000010100",
    "uint8": "01080f161d24",
    "int8": "020910171e25",
    "float8_e5m2": "030a11181f26",
    "float8_e4m3fn": "040b12192027",
    "float8_e8m0fnu": "050c131a2128",
    "float8_e5m2fnuz": "060d141b2229",
    "float8_e4m3fnuz": "070e151c232a",
    "float4_e2m1fn_x2": "080f161d242b",
    "int16": "0910171e252c333a41484f56",
    "uint16": "0a11181f262d343b42495057",
    "float16": "0b121920272e353c434a5158",
    "bfloat16": "0c131a21282f363d444b5259",
    "int32": "0d141b222930373e454c535a61686f767d848b9299a0a7ae",
    "uint32": "0e151c232a31383f464d545b626970777e858c939aa1a8af",
    "float32": "0f161d242b323940474e555c636a71787f868d949ba2a9b0",
    "complex32": "10171e252c333a41484f565d646b727980878e959ca3aab1",
    "complex64": (
        "11181f262d343b424950575e656c737a81888f969da4abb2b9c0c7ced5dce3eaf1f8ff060d141b222930373e454c535a"
    ),
    "float64": (
        "121920272e353c434a51585f666d747b828990979ea5acb3bac1c8cfd6dde4ebf2f900070e151c232a31383f464d545b"
    ),
    "int64": (
        "131a21282f363d444b525960676e757c838a91989fa6adb4bbc2c9d0d7dee5ecf3fa01080f161d242b323940474e555c"
    ),
    "uint64": (
        "141b222930373e454c535a61686f767d848b9299a0a7aeb5bcc3cad1d8dfe6edf4fb020910171e252c333a41484f565d"
    ),
    "complex128": (
        "151c232a31383f464d545b626970777e858c939aa1a8afb6bdc4cbd2d9e0e7eef5fc030a11181f262d343b42"
        "4950575e656c737a81888f969da4abb2b9c0c7ced5dce3eaf1f8ff060d141b222930373e454c535a61686f76"
        "7d848b9299a0a7ae"
    ),
}

# name: (dtype, shape, strides in elements or None for C order, bytes in C order)
LAYOUTS = {
    "transposed": ("float32", (3, 2), (1, 3), "00000000000040400000803f00008040000000400000a040"),
    "permuted": ("int32", (4, 2, 3), (1, 12, 4), "".join(
        f"{n:02x}000000" for n in (0, 4, 8, 12, 16, 20, 1, 5, 9, 13, 17, 21, 2, 6, 10, 14, 18, 22, 3, 7, 11, 15, 19, 23)
    )),
    "channels_last": ("float32", (1, 2, 2, 4), (16, 1, 8, 2), (
        "000000000000803f0000004000004040000080400000a0400000c0400000e040"
        "0000004100001041000020410000304100004041000050410000604100007041"
    )),
    "expanded": ("float32", (2, 3), (1, 0), "0000803f0000803f0000803f000000400000004000000040"),
    "every_second": ("int64", (3,), (2,), "000000000000000002000000000000000400000000000000"),
    "empty": ("float32", (0, 3), None, ""),
    "scalar": ("float32", (), None, "00002040"),
    "fortran": ("int16", (2, 3), (1, 2), "000001000200030004000500"),
    "reversed": ("uint8", (4,), None, "03020100"),
    "numpy_scalar": ("float32", (), None, "0000c03f"),
}  # fmt: skip

WEIGHT = {
    10: "0000803f0000004000004040000080400000a0400000c040",
    20: "6666663f3333f33f9a9939409a997940cdcc9c40cdccbc40",
}
MEAN = "0000003f000080be00008040"
MOMENTUM = "0000803f" * 6
LARGE = bytes(range(256)) * 256

NAN = struct.unpack(">d", bytes.fromhex("7ff8deadbeef0001"))[0]
VALUES = {
    "none": None, "true": True, "int": -7, "big": -1267650600228229401496703205376, "float": 0.1, "minus_zero": -0.0,
    "nan": NAN, "inf": -math.inf, "tiny": 5e-324, "complex": complex(1.5, -0.0), "text": "na\xefve \U0001f600\n",
    "surrogate": "a\udc80", "bytes": b"\x00\xff", "bytearray": bytearray(b"ab"), "tuple": (1, (2,), []),
    "list": [1, "a", None], "set": {1, 2, 3}, "frozenset": frozenset({(1, 2)}), "range": range(0, 1180591620717411303424, 5),
    "slice": slice(1, None, -2), "int_keys": {1: "a", (2, "b"): 3.0, None: 4}, "dollar": {"$tensor": 1},
    "ordered": collections.OrderedDict([("z", 1), ("a", 2)]), "counter": collections.Counter({"a": 2, "b": 1}),
    "deque": collections.deque([1, 2], maxlen=5), "default": collections.defaultdict(list, {"k": [1]}),
    "datetime": datetime.datetime(2024, 2, 29, 12, 30, 1, 5, datetime.timezone(datetime.timedelta(hours=-3))),
    "date": datetime.date(1, 1, 1), "time": datetime.time(23, 59, 59, 999999), "delta": datetime.timedelta(-1, 5, 7),
    "decimal": decimal.Decimal("-0.10E+3"), "fraction": fractions.Fraction(-22, 7),
    "uuid": uuid.UUID("00000000-0000-0000-0000-000000000005"), "path": pathlib.PurePosixPath("a/../b"),
    "enum": EnumMember("__main__.Color", "RED", "r"), "dataclass": Record("__main__.Point", {"x": 1, "y": [2.0]}),
    "named": Record("__main__.Pair", {"left": 1, "right": "r"}),
}  # fmt: skip
WITHOUT_TORCH = {
    "torch_size": (2, 3), "torch_dtype": Record("torch.dtype", {"value": "bfloat16"}),
    "torch_device": Record("torch.device", {"value": "cpu"}),
}  # fmt: skip


def text_of(value: object) -> str:
    """What tells values apart that compare equal, and NaN from NaN: types, order, signs and bits."""
    if isinstance(value, float):
        return struct.pack(">d", value).hex()
    if isinstance(value, complex):
        return f"complex({text_of(value.real)}, {text_of(value.imag)})"
    if isinstance(value, dict):
        inside = [f"{text_of(k)}: {text_of(v)}" for k, v in value.items()]
    elif isinstance(value, (set, frozenset)):
        inside = sorted(map(text_of, value))
    elif isinstance(value, (list, tuple, collections.deque)):
        inside = [text_of(v) for v in value]
    else:
        return repr(value)
    bound = getattr(value, "maxlen", None) or getattr(value, "default_factory", None)
    return f"{type(value).__name__}({', '.join(inside)}){bound or ''}"


def check_values(found: dict[str, object], expected: dict[str, object]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert text_of(found[name]) == text_of(value), name


def check_tensor(
    checkpoint: holdfast.Checkpoint, name: str, dtype: str, shape: tuple[int, ...], raw: bytes
) -> None:
    view = checkpoint[name]
    assert (view.dtype, view.shape, view.nbytes) == (dtype, shape, len(raw)), name
    assert view.read().tobytes() == raw, name


def check_run() -> None:
    """Check all that can be read without a framework."""
    run = holdfast.Run(ROOT)
    assert run.steps == [10, 20]
    assert run.tags == {"best": 20, "deployed": 10}
    assert not any(run.verify().values())
    for step in (10, 20):
        check_checkpoint(run[step], step)
    assert [type(e).__name__ for e in run.events()] == [
        "Started", "Observed", "Saved", "Observed", "Saved", "Resumed", "Observed",
    ]  # fmt: skip
    first, second = Clock(10, 1, 640, 10000, 10.125), Clock(20, 2, 1280, 20000, 20.125)
    assert [(o.metric, o.value, o.clock) for o in run.observations()] == [
        ("loss", 0.1, first), ("x", math.inf, first), ("loss", 0.05, second), ("x", math.inf, second),
    ]  # fmt: skip
    late = {r.step: r.metrics.get("late") for r in run.records()}
    assert late == {10: 0.75, 20: None}


def check_checkpoint(checkpoint: holdfast.Checkpoint, step: int) -> None:
    assert checkpoint.parts == ["model", "optimizer", "dtypes", "layouts", "values", "frozen"]
    assert checkpoint.clock == Clock(step, step // 10, step * 64, step * 1000, step + 0.125)
    assert checkpoint.time == 1_700_000_000.0 + (step - 10) * 6
    assert checkpoint.reasons == (f"every {step} steps", "asked for")
    assert checkpoint.environment == {"python": "3.11.7", "torch": "2.13.0"}
    assert text_of(checkpoint.metrics["val"]) == {10: "7ff8000000000000", 20: "8000000000000000"}[step]
    for name, raw in DTYPES.items():
        check_tensor(checkpoint, f"dtypes/{name}", name, (2, 3), bytes.fromhex(raw))
    for name, (dtype, shape, stride, raw) in LAYOUTS.items():
        check_tensor(checkpoint, f"layouts/{name}", dtype, shape, bytes.fromhex(raw))
        assert checkpoint[f"layouts/{name}"].spec.stride == stride, name
    for name in ("model/encoder.weight", "model/decoder.weight"):
        check_tensor(checkpoint, name, "float32", (2, 3), bytes.fromhex(WEIGHT[step]))
    check_tensor(checkpoint, "model/mean", "float32", (3,), bytes.fromhex(MEAN))
    check_tensor(checkpoint, "frozen/large", "uint8", (65536,), LARGE)
    check_tensor(checkpoint, "frozen/gr\xf6\xdfe/\u221a", "uint16", (3,), bytes.fromhex("010002000300"))
    loaded = holdfast.load(ROOT, step=step, as_="numpy")
    check_values(loaded["values"], VALUES | {"numpy_dtype": loaded["values"]["numpy_dtype"]} | WITHOUT_TORCH)
    assert loaded["values"]["numpy_dtype"].str == "<f4"
    assert loaded["model"]["encoder.weight"] is loaded["model"]["decoder.weight"], "ties survive"
    (group,) = loaded["optimizer"]["param_groups"]
    assert (group["lr"], group["momentum"], group["params"]) == (0.1, 0.5, ["model/encoder.weight"])
    state = loaded["optimizer"]["state"]
    assert [v["momentum_buffer"].tobytes().hex() for v in state.values()] == {10: [], 20: [MOMENTUM]}[step]


if __name__ == "__main__":
    check_run()
