"""How a data region is cut into digest blocks: a part of the format, since the cut itself is never stored."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal

import blake3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.format.digest import Block, BlockDigests, cut_blocks, digest

KIB, MIB = 1 << 10, 1 << 20
OWN, GROUP, LARGEST = 64 * KIB, 1 * MIB, 64 * MIB
LARGEST_OF = {1: LARGEST, 2: 4 * MIB}

sizes = st.one_of(
    st.integers(0, 100), st.integers(OWN - 2, OWN + 2), st.integers(0, GROUP + 1), st.integers(LARGEST - 2, LARGEST + 2),
    st.integers(4 * MIB - 2, 4 * MIB + 2), st.integers(0, 1 << 33),
)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    if draw(st.booleans()):
        size = draw(sizes)
        return size, draw(st.sampled_from([(), (size,), (1, size)])) if size else (0,)
    row = draw(st.one_of(st.integers(1, 9), st.integers(1, 4 * MIB), st.integers(LARGEST - 1, 2 * LARGEST)))
    rows = draw(st.integers(0, 70))
    return rows * row, (rows, row)


@settings(max_examples=400)
@given(st.lists(tensors(), max_size=12), st.sampled_from([1, 2]))
def test_blocks_cover_the_region_without_holes_and_keep_the_rules(given_tensors, version: int) -> None:
    blocks, largest = cut_blocks(given_tensors, version), LARGEST_OF[version]
    starts = [0]
    for nbytes, _ in given_tensors:
        starts.append(starts[-1] + nbytes)
    assert [b.start for b in blocks] == [0, *[b.end for b in blocks]][: len(blocks)]
    assert (blocks[-1].end if blocks else 0) == starts[-1]
    for b in blocks:
        assert 0 < b.end - b.start <= largest
        covered = [
            i for i, (n, _) in enumerate(given_tensors) if n and starts[i] < b.end and starts[i + 1] > b.start
        ]
        assert (b.first, b.last) == (covered[0], covered[-1])
        nbytes, shape = given_tensors[b.first]
        if nbytes >= OWN:
            assert covered == [b.first], "a large tensor shares no block"
            row = nbytes // shape[0] if shape else nbytes
            if row <= largest:
                assert (b.start - starts[b.first]) % row == 0, "a block begins at the beginning of a row"
        else:
            assert b.end - b.start <= GROUP
            assert all(given_tensors[i][0] < OWN for i in covered)
            assert (b.start, b.end) == (starts[b.first], starts[b.last + 1]), "a small tensor is never cut"


@settings(max_examples=200)
@given(st.lists(st.integers(0, OWN - 1), max_size=60))
def test_small_neighbours_share_a_block_until_it_is_full(small: list[int]) -> None:
    blocks = cut_blocks([(n, (n,)) for n in small], 2)
    for one, after in itertools.pairwise(blocks):
        assert one.end - one.start + small[after.first] > GROUP, "two blocks where one had room"


@pytest.mark.parametrize(
    ("shape", "itemsize", "lengths", "version"),
    [
        ((16 * KIB,), 4, [64 * KIB], 1),
        ((16 * KIB - 1,), 4, [64 * KIB - 4], 1),
        ((32 * MIB,), 4, [64 * MIB, 64 * MIB], 1),
        ((3, 24 * MIB), 1, [48 * MIB, 24 * MIB], 1),
        ((3, 40 * MIB), 1, [40 * MIB] * 3, 1),
        ((2, 65 * MIB), 1, [64 * MIB, 64 * MIB, 2 * MIB], 1),
        ((), 2 * 64 * MIB, [64 * MIB, 64 * MIB], 1),
        ((64 * MIB // 3 + 1, 3), 1, [64 * MIB - 1, 3], 1),
        ((MIB + 1,), 4, [4 * MIB, 4], 2),
        ((3, 3 * MIB), 1, [3 * MIB] * 3, 2),
        ((2, 5 * MIB), 1, [4 * MIB, 4 * MIB, 2 * MIB], 2),
        ((4 * MIB // 3 + 1, 3), 1, [4 * MIB - 1, 3], 2),
    ],
)
def test_large_tensors_are_cut_at_rows(
    shape: tuple[int, ...], itemsize: int, lengths: list[int], version: int
) -> None:
    blocks = cut_blocks([(math.prod(shape) * itemsize, shape)], version)
    assert [b.end - b.start for b in blocks] == lengths


def test_a_large_tensor_ends_the_group_before_it_and_empty_ones_belong_nowhere() -> None:
    found = cut_blocks(
        [(0, (0,)), (10, (10,)), (0, (0, 3)), (20, ()), (OWN, (OWN,)), (5, (5,)), (0, (0,))], 2
    )
    assert found == [Block(0, 30, 1, 3), Block(30, 30 + OWN, 4, 4), Block(30 + OWN, 35 + OWN, 5, 5)]
    assert cut_blocks([], 2) == cut_blocks([(0, (0,))], 2) == []


@pytest.mark.parametrize("size", [0, 1, 1024, 1025, 65_536, MIB - 1, MIB, MIB + 1])
def test_the_digest_is_plain_blake3(size: int) -> None:
    data = bytes(i % 251 for i in range(size))  # the input of the official test vectors
    assert digest(data) == blake3.blake3(data).digest() == digest(memoryview(bytearray(data)))
    vectors = {
        0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
        1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    }
    assert digest(data).hex() == vectors.get(size, digest(data).hex())


def test_a_forked_child_can_digest_what_its_parent_digested_in_threads() -> None:
    data = bytes(4 * MIB)
    expected = digest(data)
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a child that waits for threads which the fork left behind would wait for ever
        os._exit(0 if digest(data) == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 7, 300, 65_535, 65_536, 200_000, 1 << 20]), max_size=12),
    st.lists(st.sampled_from([1, 13, 4096, 100_000, 1 << 20]), min_size=1),
    st.sets(st.integers(0, 20)),
)
def test_blocks_are_digested_as_their_bytes_go_by(
    sizes: list[int], pieces: list[int], known: set[int]
) -> None:
    data = memoryview(random.Random(sum(sizes)).randbytes(sum(sizes)))
    blocks = cut_blocks([(n, (n,)) for n in sizes], 2)
    expected = [digest(data[b.start : b.end]) for b in blocks]
    given_digests = {i: bytes([i]) * 32 for i in known if i < len(blocks)}
    passing = BlockDigests(blocks, given_digests)
    position = 0
    for size in itertools.cycle(pieces):
        if position >= len(data):
            break
        passing.update(data[position : position + size])
        position += size
    assert passing.digests == [given_digests.get(i, d) for i, d in enumerate(expected)]
