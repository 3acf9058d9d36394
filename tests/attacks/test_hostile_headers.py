"""Headers of data files that a hostile writer sealed: refused, in bounded time and memory."""

from __future__ import annotations

import base64
import json

import pytest
from forge import ALIGNMENT, check_only_ours, check_refused, header_of, padded, run, with_header

from holdfast.core.errors import InvalidFormat, Truncated

DEEP = b"[" * 100_000 + b"]" * 100_000


def good() -> dict:
    return json.loads(header_of(run())[1])


def changed(**tensors: object) -> bytes:
    """The sound header with other entries for some tensors."""
    return json.dumps(good() | tensors, separators=(",", ":")).encode()


def entry(shape: object, start: object, end: object, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def alone(
    shape: object, start: object, end: object, dtype: str = "U8", digests: int = 1, **layout: object
) -> bytes:
    """A header with one tensor "w" and so many digests."""
    metadata = {
        "format": "pt",
        "holdfast": "holdfast/1",
        "digests": base64.b64encode(bytes(32 * digests)).decode(),
    }
    if layout:
        metadata["layouts"] = json.dumps({"w": layout}, separators=(",", ":"))
    return json.dumps(
        {"__metadata__": metadata, "w": entry(shape, start, end, dtype)}, separators=(",", ":")
    ).encode()


def metadata(**changes: object) -> bytes:
    found = good()
    found["__metadata__"] |= changes
    return json.dumps(found, separators=(",", ":")).encode()


BODY = header_of(run())[1]
# In the sound header: "x" is int64[3] at 0 to 24, "w" is float32[3, 4] at 24 to 72.
BODIES: dict[str, bytes] = {
    "overlapping tensors": changed(w=entry([3, 4], 16, 64, "F32")),
    "a hole between tensors": changed(w=entry([3, 4], 32, 80, "F32")),
    "data that does not begin at the beginning": alone([8], 8, 16),
    "the same bytes twice": changed(y=entry([3], 0, 24, "I64")),
    "offsets out of the file": changed(w=entry([2**40, 4], 24, 24 + 2**44, "F32")),
    "offsets the wrong way round": changed(w=entry([3, 4], 72, 24, "F32")),
    "negative offsets": alone([8], -8, 0),
    "huge offsets": alone([2**63], 0, 2**63),
    "an exabyte with one digest": alone([2**60], 0, 2**60),
    "an exabyte of rows with one digest": alone([2**58, 4], 0, 2**60),
    "exabytes of many tensors": json.dumps(
        {"__metadata__": good()["__metadata__"]}
        | {f"t{i}": entry([2**50], i * 2**50, (i + 1) * 2**50) for i in range(500)},
        separators=(",", ":"),
    ).encode(),
    "a shape whose size overflows 64 bits to what fits": alone([2**32, 2**32, 8], 0, 0),
    "a shape whose size overflows 64 bits": alone([2**62, 2**62, 2**62], 0, 8),
    "a shape of huge numbers": alone([10**4000] * 60, 0, 8),
    "a shape of a hundred thousand dimensions": alone([2**62] * 100_000, 0, 8),
    "a shape of a hundred thousand ones": alone([1] * 100_000, 0, 1),
    "an empty shape that spans everything": alone([0, 2**62, 2**62], 0, 0, digests=0),
    "negative dimensions whose product is right": changed(w=entry([-3, -4], 24, 72, "F32")),
    "a negative dimension": changed(w=entry([-1, 4], 24, 72, "F32")),
    "a fractional dimension": changed(w=entry([3.0, 4], 24, 72, "F32")),
    "a shape that is not a list": changed(w=entry("34", 24, 72, "F32")),
    "three offsets": changed(w={"dtype": "F32", "shape": [3, 4], "data_offsets": [24, 48, 72]}),
    "a tensor that is not an object": changed(w=[1]),
    "another field": changed(w=entry([3, 4], 24, 72, "F32") | {"code": "x"}),
    "an unknown element type": changed(w=entry([3, 4], 24, 72, "PICKLE")),
    "an element type in a layout that its carrier does not carry": metadata(
        layouts='{"w":{"dtype":"complex64"}}'
    ),
    "an unknown element type in a layout": metadata(layouts='{"w":{"dtype":"object"}}'),
    "a complex number cut in half": metadata(layouts='{"w":{"dtype":"complex128"}}'),
    "a stride of another rank": alone([8], 0, 8, stride=[1, 1]),
    "a negative stride": alone([8], 0, 8, stride=[-1]),
    "a stride beyond memory": alone([1, 8], 0, 8, stride=[2**63, 1]),
    "a box outside the whole": alone([8], 0, 8, box=[[4], [8]]),
    "a box at a negative place": alone([8], 0, 8, box=[[-1], [8]]),
    "a box of another rank": alone([8], 0, 8, box=[[0, 0], [8, 8]]),
    "a box in an endless whole": alone([8], 0, 8, box=[[0], [10**30]]),
    "layouts that are no object": metadata(layouts="[1]"),
    "layouts nested deep": metadata(layouts='{"w":' + DEEP.decode() + "}"),
    "metadata that is no text": metadata(more={"a": 1}),
    "gigantic metadata": metadata(note="x" * (32 << 20)),
    "a million layouts of nothing": metadata(
        layouts=json.dumps({f"t{i}": {"stride": [1]} for i in range(200_000)})
    ),
    "no digests": metadata(digests=""),
    "too many digests": metadata(digests=base64.b64encode(bytes(32 * 1000)).decode()),
    "half a digest": metadata(digests=base64.b64encode(bytes(16)).decode()),
    "digests that are no base64": metadata(digests="!" * 44),
    "another program's file": metadata(holdfast="other/1"),
    "no metadata": BODY.replace(b"__metadata__", b"__metadota__"),
    "a tensor named twice": BODY[:-1] + b',"w":{"dtype":"F32","shape":[3,4],"data_offsets":[24,72]}}',
    "metadata twice": BODY[:-1] + b',"__metadata__":{}}',
    "a control character in a name": BODY.replace(b'"w":', b'"w\\u0000":'),
    "a line break in a name": BODY.replace(b'"w":', b'"w\\n":'),
    "a lone surrogate in a name": BODY.replace(b'"w":', b'"w\\ud800":'),
    "an empty name": BODY.replace(b'"w":', b'"":'),
    "an endless name": BODY.replace(b'"w":', b'"' + b"w" * 5000 + b'":'),
    "a name in another normal form": BODY.replace(b'"w":', '"e\N{COMBINING ACUTE ACCENT}":'.encode()),
    "bytes that are no text": BODY.replace(b'"w":', b'"\xff\xfe":'),
    "nesting instead of a tensor": BODY.replace(b"[3,4]", DEEP),
    "nesting instead of a header": DEEP,
    "objects instead of a header": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not a number": BODY.replace(b"[3,4]", b"[NaN,4]"),
    "infinity": BODY.replace(b"[3,4]", b"[3,1e999]"),
    "a huge number": BODY.replace(b"[3,4]", b"[3," + b"9" * 100_000 + b"]"),
    "no JSON": b"\x80\x04\x95pickle",
    "nothing": b"",
    "an array": b"[]",
    "trailing bytes": BODY + b"\0",
}


@pytest.mark.parametrize("attack", BODIES)
def test_a_hostile_header_is_refused(attack: str) -> None:
    store = run()
    assert BODIES[attack] != BODY
    with_header(store, padded(BODIES[attack]), bytes(data_bytes(BODIES[attack])))
    check_refused(store, InvalidFormat)


def data_bytes(body: bytes) -> int:
    """Return how much data a header asks for, where that can be given: so that the size does not give it away."""
    try:
        ends = [int(v["data_offsets"][1]) for k, v in json.loads(body).items() if k != "__metadata__"]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return 72
    return next((end for end in reversed(ends) if 0 <= end < 10**6), 72)


CLAIMS = [
    0,
    1,
    7,
    8,
    ALIGNMENT - 9,
    ALIGNMENT,
    2 * ALIGNMENT - 8,
    100_000_000,
    2**31,
    2**32,
    2**62,
    2**63,
    2**63 - 8,
    2**64 - 1,
]


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_header_that_claims_another_length_is_refused(claim: int) -> None:
    store = run()
    with_header(store, claim.to_bytes(8, "little") + padded(BODY)[8:])
    check_refused(store, InvalidFormat, Truncated)


@pytest.mark.parametrize("size", [0, 1, 8, 4095])
def test_a_file_that_is_shorter_than_a_header_is_refused(size: int) -> None:
    store = run()
    with_header(store, padded(BODY)[:size] or b"\0", b"")
    check_refused(store, InvalidFormat, Truncated)


@pytest.mark.parametrize("extra", [b"\0", b"PK\x05\x06" + bytes(18)])
def test_bytes_behind_the_data_are_refused(extra: bytes) -> None:
    """No second file can hide behind the first, as in a polyglot archive."""
    store = run()
    with_header(store, padded(BODY), header_of(store)[2] + extra)
    check_refused(store, InvalidFormat, Truncated)


def test_a_forged_header_that_is_in_order_is_just_another_value() -> None:
    """The attacks above fail for what is wrong in them, not for being forged."""
    store = run()
    with_header(store, padded(BODY))
    assert check_only_ours(store) == 0
