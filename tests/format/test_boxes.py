"""Where the bytes of a part lie in the whole: compared with what numpy cuts out."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.format.boxes import Run, fill, fits, runs


@st.composite
def parts(draw: st.DrawFn):
    whole = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    offsets = tuple(draw(st.integers(0, n)) for n in whole)
    shape = tuple(draw(st.integers(0, n - o)) for o, n in zip(offsets, whole, strict=True))
    return whole, offsets, shape


@settings(max_examples=400)
@given(parts(), st.sampled_from([1, 2, 4]))
def test_the_runs_of_a_box_are_its_bytes_in_order(part, itemsize: int) -> None:
    whole, offsets, shape = part
    data = np.arange(int(np.prod(whole)) * itemsize, dtype=np.uint16).reshape(*whole, itemsize)
    cut = data[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))].reshape(-1)
    found = list(runs(shape, (offsets, whole), None, itemsize))
    assert sum(r.size for r in found) == cut.size
    flat = data.reshape(-1)
    for run in found:
        assert np.array_equal(flat[run.at : run.at + run.size], cut[run.source : run.source + run.size])
    assert [r.at for r in found] == sorted(r.at for r in found)
    assert all(a.source + a.size == b.source for a, b in itertools.pairwise(found))
    if shape[1:] == whole[1:] and cut.size:
        assert len(found) == 1, "rows lie together"


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=5),
    st.integers(1, 3),
    st.booleans(),
)
def test_the_runs_of_several_stretches_of_rows(
    stretches: list[tuple[int, int]], columns: int, cut: bool
) -> None:
    rows, position = [], 0
    for gap, size in stretches:
        rows.append((position + gap, position + gap + size))
        position += gap + size
    whole = (position + 1, columns + cut)
    data = np.arange(whole[0] * whole[1]).reshape(whole)
    expected = np.concatenate([data[a:b, :columns] for a, b in rows])
    box = ((rows[0][0], 0), whole)
    assert fits(expected.shape, box, tuple(rows), 2**62)
    found = list(runs(expected.shape, box, tuple(rows), 1))
    taken = np.concatenate([data.reshape(-1)[r.at : r.at + r.size] for r in found])
    assert np.array_equal(taken, expected.reshape(-1))


spans = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=8)


def placed(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out, position = [], 0
    for gap, size in found:
        out.append((position + gap, position + gap + size))
        position += gap + size
    return out


@settings(max_examples=500)
@given(spans, spans)
def test_gaps_are_filled_once_and_only_where_something_is_given(
    left: list[tuple[int, int]], given_spans: list[tuple[int, int]]
) -> None:
    gaps, there = placed(left), placed(given_spans)
    source, given_runs = 0, []
    for a, b in there:
        given_runs.append(Run(a, source, b - a))
        source += b - a
    used, rest = fill(gaps, given_runs)
    open_bytes = {i for a, b in gaps for i in range(a, b)}
    from_source = {r.at + i: r.source + i for r in given_runs for i in range(r.size)}
    filled = [(r.at + i, r.source + i) for r in used for i in range(r.size)]
    assert dict(filled) == {at: s for at, s in from_source.items() if at in open_bytes}
    assert len(filled) == len(dict(filled))
    assert {i for a, b in rest for i in range(a, b)} == open_bytes - from_source.keys()
    assert all(a < b for a, b in rest)
