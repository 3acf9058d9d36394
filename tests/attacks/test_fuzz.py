"""Fuzzing: valid headers, manifests and log lines with random changes, sealed again. Only our own errors may come out.

The same two thousand cases on every machine. What a reader accepts must be a value that is written the same way again.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from forge import (
    MANIFESTS,
    body_of,
    bounded,
    check_only_ours,
    header_of,
    padded,
    put,
    raw_seal,
    run,
    state,
    with_header,
    with_tree,
)

import holdfast
from holdfast.core.errors import HoldfastError
from holdfast.format.datafile import decode_header, encode_header
from holdfast.format.events import decode_events
from holdfast.format.manifest import decode_manifest, encode_manifest
from holdfast.format.values import decode_value, encode_value
from holdfast.stores import Store

TOKENS = [
    b"0", b"-1", b"1", b"255", b"65536", b"2147483648", b"4294967296", b"9223372036854775807", b"9223372036854775808",
    b"18446744073709551616", b"1e308", b"1e309", b"-0.0", b"0.5", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b'"a"', b"[[]]",
    b'{"$tensor":["a/w","numpy.ndarray"]}', b'{"$t":"n"}', b'{"$int":"0xff"}', b'{"$dict":[]}', b'{"$typed":["enum",{}]}', b'{"$bytes":"AA=="}',
    b'"\\u0000"', b'"\\ud800"', b"\xff", b"\xc3\xa9", b'"../x"', b'"data/x"', b"U8", b"F64", b"BOOL", b"F8_E4M3", b"[1,2]", b",", b":",
]  # fmt: skip
STRUCTURE = b'[]{},:"'


def mutate(data: bytes, source: random.Random) -> bytes:
    """Return `data` with one to three changes."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 3)):
        source.choice([flip, cut, double, insert, replace_number, swap_pieces, replace_value])(
            changed, source
        )
    return bytes(changed)


def flip(data: bytearray, source: random.Random) -> None:
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)


def cut(data: bytearray, source: random.Random) -> None:
    start = source.randrange(len(data))
    del data[start : start + source.choice([1, 1, 2, 5, 30])]
    data += b"}" * (not data)


def double(data: bytearray, source: random.Random) -> None:
    start = source.randrange(len(data))
    data[start:start] = data[start : start + source.choice([1, 4, 20, 60])]


def insert(data: bytearray, source: random.Random) -> None:
    start = source.randrange(len(data))
    data[start:start] = source.choice(TOKENS)


def _numbers(data: bytearray) -> list[tuple[int, int]]:
    spans, start = [], None
    for i, byte in enumerate(bytes(data) + b" "):
        digit = byte in b"0123456789"
        if digit and start is None:
            start = i
        elif not digit and start is not None:
            spans.append((start, i))
            start = None
    return spans


def replace_number(data: bytearray, source: random.Random) -> None:
    spans = _numbers(data)
    if spans:
        start, end = source.choice(spans)
        value = int(data[start:end][:30])
        data[start:end] = source.choice(
            [b"%d" % (value + d) for d in (-8, -1, 1, 8)] + [b"%d" % (value * 2), *TOKENS[:12]]
        )


def swap_pieces(data: bytearray, source: random.Random) -> None:
    places = [i for i, byte in enumerate(data) if byte in STRUCTURE]
    if len(places) > 3:
        a, b, c = sorted(source.sample(places, 3))
        data[a:c] = data[b:c] + data[a:b]


def replace_value(data: bytearray, source: random.Random) -> None:
    """Put a token in place of what stands between two marks of structure."""
    places = [i for i, byte in enumerate(data) if byte in STRUCTURE]
    i = source.randrange(max(1, len(places) - 1))
    if len(places) > 1:
        data[places[i] + 1 : places[i + 1]] = source.choice(TOKENS)


@pytest.mark.parametrize("seed", range(10))
def test_mutated_headers(seed: int) -> None:
    source, (_, body, _) = random.Random(seed), header_of(run(), "a")
    accepted = 0
    with bounded():
        for _ in range(60):
            raw = padded(mutate(body, source))
            try:
                header = decode_header(raw, "f")
            except HoldfastError:
                continue
            accepted += 1
            assert encode_header(header.tensors, header.digests) == raw
    assert accepted < 30


@pytest.mark.parametrize("seed", range(10))
def test_mutated_manifests(seed: int) -> None:
    source, body = random.Random(100 + seed), body_of(run(), MANIFESTS[2])
    with bounded():
        for _ in range(60):
            raw = raw_seal(mutate(body, source))
            try:
                manifest = decode_manifest(raw, "m")
                values = [part.values(name) for name, part in manifest.parts.items()]
            except HoldfastError:
                continue
            assert decode_manifest(encode_manifest(manifest), "m").step == manifest.step
            for value in values:
                assert repr(decode_value(encode_value(value))) == repr(value)


@pytest.mark.parametrize("seed", range(5))
def test_mutated_log_lines(seed: int) -> None:
    source, store = random.Random(200 + seed), run()
    (first, *_) = store.list("log")
    bodies = [raw[:-29] + b"}" for raw in store.read(first.key).splitlines(keepends=True)]
    with bounded():
        for _ in range(40):
            body = mutate(source.choice(bodies), source).replace(b"\n", b"")
            try:
                decode_events(raw_seal(body, 16), "log")
            except HoldfastError:
                continue


def _forge_header(source: random.Random) -> Store:
    store = run()
    with_header(store, padded(mutate(header_of(store)[1], source)))
    return store


def _forge_manifest(source: random.Random) -> Store:
    store = run()
    put(store, MANIFESTS[2], raw_seal(mutate(body_of(store, MANIFESTS[2]), source)))
    return store


def _forge_tree(source: random.Random) -> Store:
    tree = (
        b'{"w":{"$tensor":["a/w","numpy.ndarray"]},"n":[1,0.5,{"$tuple":[{"$set":[1,2]},{"$frozenset":[]}]}],'
        b'"d":{"$dict":[[1,{"$deque":[[1],3]}],[{"$tuple":[2]},{"$fraction":[1,3]}]]},"r":{"$range":[0,9,2]},'
        b'"t":{"$typed":["enum",{"type":"a.B","member":"C","value":1}]},"c":{"$complex":[1.0,{"$float":"7ff8000000000000"}]},'
        b'"o":{"$ordereddict":[["a",{"$decimal":"1.5"}]]},"i":{"$int":"0xffffffffffffffffff"},"x":{"$timedelta":[1,2,3]},'
        b'"p":{"$path":"a"},"s":{"$slice":[null,1,null]},"v":{"$typed":["dataclass",{"type":"a.B","fields":{"x":1}}]},'
        b'"k":{"$typed":["defaultdict",{"factory":"list","items":{"a":1}}]},"z":{"$typed":["numpy.dtype","<f4"]}}'
    )
    store = run()
    changed = mutate(tree, source)
    try:
        with_tree(store, changed)
    except HoldfastError:  # a manifest that no longer parses cannot be made this way
        return run()
    return store


FORGERIES: dict[str, Callable[[random.Random], Store]] = {
    "header": _forge_header, "manifest": _forge_manifest, "tree": _forge_tree,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("what", FORGERIES)
def test_whole_runs_with_a_mutated_document(what: str, seed: int) -> None:
    """Every way of reading a run, end to end, with live objects too."""
    source = random.Random(1000 * list(FORGERIES).index(what) + seed)
    failed = 0
    for _ in range(35):
        store = FORGERIES[what](source)
        failed += check_only_ours(store) > 0
        assert holdfast.load(store, step=1, as_="numpy")["a"]["n"] == state(1)["a"]["n"]  # type: ignore[call-overload]
    assert failed
