"""What changed between two checkpoints, against numpy on the live arrays."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import holdfast
from holdfast.analysis.diff import Difference, TensorChange, compare
from holdfast.analysis.values import ABSENT, changed_values, short
from holdfast.catalog.content import DataFile
from holdfast.core.errors import NoCheckpoint
from holdfast.format.values import TensorLeaf, Typed
from holdfast.stores import MemoryStore


def between(before: Mapping[str, object], after: Mapping[str, object], **options: str) -> Difference:
    """Compare two states saved as two runs, so that nothing is shared."""
    return compare(holdfast.save(MemoryStore(), before), holdfast.save(MemoryStore(), after), **options)


def only(found: Difference) -> TensorChange:
    (change,) = found.tensors
    return change


def test_the_numbers() -> None:
    old = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    new = np.array([[1.0, 2.0], [3.5, -4.0]], np.float32)
    change = only(between({"m": {"x": old}}, {"m": {"x": new}}))
    assert (change.name, change.part, change.kind) == ("m/x", "m", "changed")
    assert change.max_delta == 8.0
    assert change.relative == pytest.approx(math.sqrt(64.25) / math.sqrt(30))
    assert change.fraction == 0.5
    assert change.cosine == pytest.approx((1 + 4 + 10.5 - 16) / math.sqrt(30 * 33.25))


@given(st.data(), st.sampled_from([np.float32, np.float16, np.int8, np.uint64, np.bool_, np.complex64]))
@settings(max_examples=100, deadline=None)
def test_any_two_arrays(data: st.DataObject, dtype: type) -> None:
    old = data.draw(hnp.arrays(dtype, (4, 5)))
    new = old.copy()
    touched = data.draw(st.lists(st.integers(0, 19), max_size=5))
    new.reshape(-1)[touched] = data.draw(hnp.arrays(dtype, (len(touched),)))
    bits = old.reshape(-1)[:, None].view(np.uint8) != new.reshape(-1)[:, None].view(np.uint8)
    found = between({"m": {"x": old}}, {"m": {"x": new}})
    if not bits.any():
        assert (found.tensors, found.same) == ((), 1)
        return
    change = only(found)
    wide = np.complex128 if np.issubdtype(dtype, np.complexfloating) else np.float64
    a, b = old.astype(wide), new.astype(wide)
    both = np.isfinite(a) & np.isfinite(b)
    assert change.fraction == bits.any(axis=1).sum() / 20
    assert change.lost_finite == int((np.isfinite(a) & ~np.isfinite(b)).sum())
    assert change.max_delta == pytest.approx(np.abs(b[both] - a[both]).max(initial=0.0))


def test_bits_count_and_not_only_values() -> None:
    change = only(between({"m": {"x": np.array([0.0, np.nan])}}, {"m": {"x": np.array([-0.0, np.nan])}}))
    assert (change.fraction, change.max_delta, change.relative) == (0.5, 0.0, 0.0)


def test_a_norm_of_zero() -> None:
    change = only(between({"m": {"x": np.zeros(3)}}, {"m": {"x": np.ones(3)}}))
    assert change.relative == math.inf
    assert math.isnan(change.cosine)


def test_new_nan_is_counted() -> None:
    change = only(between({"m": {"x": np.ones(4)}}, {"m": {"x": np.array([1, np.nan, np.inf, 1.5])}}))
    assert (change.lost_finite, change.max_delta) == (2, 0.5)


def test_what_came_and_went_is_in_front_and_the_rest_by_relative_change() -> None:
    old = {
        "m": {
            "gone": np.ones(2),
            "shape": np.ones(3),
            "type": np.ones(3),
            "little": np.ones(3),
            "much": np.ones(3),
        }
    }
    new = {"m": {"new": np.ones(2), "shape": np.ones(4), "type": np.ones(3, np.float32), "little": np.full(3, 1.1), "much": np.full(3, 9.0)}}  # fmt: skip
    found = between(old, new)
    assert [(c.kind, c.name) for c in found.tensors] == [
        ("removed", "m/gone"), ("added", "m/new"), ("shape", "m/shape"), ("dtype", "m/type"), ("changed", "m/much"), ("changed", "m/little"),
    ]  # fmt: skip


def test_equal_tensors_are_told_by_their_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"m": {"big": np.ones((300, 300)), "small": np.arange(7)}}
    first, second = holdfast.save(MemoryStore(), state), holdfast.save(MemoryStore(), state)
    monkeypatch.setattr(DataFile, "read_block", lambda *_: pytest.fail("a byte was read"))
    found = compare(first, second)
    assert (found.tensors, found.same, found.read_bytes) == ((), 2, 0)


def test_small_tensors_are_equal_whatever_they_share_a_block_with() -> None:
    found = between({"m": {"a": np.ones(3), "b": np.ones(5)}}, {"m": {"a": np.ones(3), "b": np.zeros(5)}})
    assert (only(found).name, found.same) == ("m/b", 1)
    found = between({"m": {"a": np.ones(3), "b": np.ones(5)}}, {"m": {"b": np.ones(5)}})
    assert (only(found).kind, found.same) == ("removed", 1)


def test_the_same_block_with_other_tensors_in_it() -> None:
    before, after = (
        {"a": np.array([1, 2]), "b": np.array([3, 4])},
        {"b": np.array([1, 2]), "a": np.array([3, 4])},
    )
    found = between({"m": before}, {"m": after})
    assert [(c.name, c.max_delta) for c in found.tensors] == [("m/a", 2.0), ("m/b", 2.0)]


def test_each_block_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(value: float) -> dict[str, object]:
        return {"m": {f"x{i}": np.full(100, value) for i in range(50)} | {"big": np.full((3, 70_000), value)}}

    first, second = holdfast.save(MemoryStore(), state(1)), holdfast.save(MemoryStore(), state(2))
    read: list[tuple[str, int]] = []
    whole = DataFile.read_block
    monkeypatch.setattr(
        DataFile, "read_block", lambda self, i: (read.append((self.entry.key, i)), whole(self, i))[1]
    )
    assert len(compare(first, second).tensors) == 51
    assert len(read) == len(set(read))


def test_tied_tensors_are_one() -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 3, bias=False)
    model = torch.nn.Sequential(layer, layer)
    store = MemoryStore()
    first = holdfast.save(store, {"model": model})
    with torch.no_grad():
        layer.weight += 1
    assert only(compare(first, holdfast.save(store, {"model": model}))).name == "model/0.weight"


def test_only_one_part() -> None:
    old, new = (
        {"a": {"x": np.ones(2), "v": 1}, "b": {"x": np.ones(2), "v": 1}},
        {"a": {"x": np.zeros(2), "v": 2}},
    )
    found = between(old, new | {"b": {"x": np.zeros(2), "v": 2}}, part="b")
    assert ([c.name for c in found.tensors], [v.path for v in found.values]) == (["b/x"], ["b/v"])
    found = between(old, new, part="b")
    assert ([c.kind for c in found.tensors], [(v.path, v.after) for v in found.values]) == (
        ["removed"],
        [("b/v", ABSENT)],
    )
    with pytest.raises(NoCheckpoint, match="no part 'c'"):
        between(old, new, part="c")


def test_progress_adds_up() -> None:
    state = {"m": {"x": np.zeros((2, 100_000)), "y": np.zeros(3)}}
    other = {"m": {"x": np.ones((2, 100_000)), "y": np.zeros(3)}}
    done: list[int] = []
    compare(holdfast.save(MemoryStore(), state), holdfast.save(MemoryStore(), other), progress=done.append)
    assert sum(done) == 2 * 100_000 * 8 + 24


def test_memory_is_bounded_by_blocks(tmp_path: Path) -> None:
    rows = np.zeros((130, 1 << 20), np.uint8)  # 130 MiB, so three blocks of at most 64 MiB
    first = holdfast.save(tmp_path / "a", {"m": {"x": rows}})
    rows[::7] += 1
    second = holdfast.save(tmp_path / "b", {"m": {"x": rows}})
    del rows
    assert first.reader.specs.keys() == second.reader.specs.keys()
    tracemalloc.start()
    found = compare(first, second)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert only(found).max_delta == 1.0
    assert peak < (2 * 64 + 16) << 20  # a block of each, and little more


@pytest.mark.parametrize(
    ("before", "after", "want"),
    [
        (1, 1, []),
        (1, 2, [("v", 1, 2)]),
        (1, 1.0, [("v", 1, 1.0)]),
        (True, 1, [("v", True, 1)]),
        (math.nan, math.nan, []),
        (0.0, -0.0, [("v", 0.0, -0.0)]),
        ({"a": 1, "b": 2}, {"a": 1, "c": 2}, [("v/b", 2, ABSENT), ("v/c", ABSENT, 2)]),
        ([1, 2], [1, 3], [("v/1", 2, 3)]),
        ([1, 2], [1, 2, 3], [("v", [1, 2], [1, 2, 3])]),
        ([1], (1,), [("v", [1], (1,))]),
        (list(range(99)), list(range(1, 100)), [("v", list(range(99)), list(range(1, 100)))]),
        ([math.nan] * 17, [float("nan")] * 17, []),
        ([0.0] * 17, [-0.0] * 17, [("v", [0.0] * 17, [-0.0] * 17)]),
        ((1,) * 17, (True,) * 17, [("v", (1,) * 17, (True,) * 17)]),
        ({"a": {}}, {}, [("v/a", {}, ABSENT)]),
        ([{"lr": 1}] * 20, [{"lr": 1}] * 19 + [{"lr": 2}], [("v/19/lr", 1, 2)]),
        (Typed("torch.dtype", "a"), Typed("torch.dtype", "b"), [("v", "a", "b")]),
        (Typed("a", 1), Typed("b", 1), [("v", Typed("a", 1), Typed("b", 1))]),
        (TensorLeaf("v", "x"), TensorLeaf("v", "y"), []),
        (TensorLeaf("v", "x"), 3, [("v", ABSENT, 3)]),
        ({"t": TensorLeaf("v", "x"), "n": 1}, ABSENT, [("v/n", 1, ABSENT)]),
        ({1, 2}, {2, 1}, []),
        ({1: "a"}, {1: "b"}, [("v/1", "a", "b")]),
    ],
)
def test_values(before: object, after: object, want: list[tuple[str, object, object]]) -> None:
    found = [(c.path, c.before, c.after) for c in changed_values(before, after, "v")]
    assert repr(found) == repr(want)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.1234567891, "0.123457"), ("x" * 50, "'" + "x" * 38 + "…"), (list(range(17)), "list of 17"), ([1], "[1]"),
        (b"x" * 99, "bytes of 99"), (Typed("torch.dtype", "float32"), "torch.dtype('float32')"), (TensorLeaf("a", "b"), "tensor"),
        (ABSENT, "absent"), (None, "None"),
    ],
)  # fmt: skip
def test_short(value: object, said: str) -> None:
    assert short(value) == said
