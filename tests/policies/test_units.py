"""Sizes and durations, as written and as shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import PolicyError
from holdfast.core.units import (
    exact_bytes,
    exact_seconds,
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_seconds,
)

PROFILE = settings(derandomize=True, max_examples=150, deadline=None, database=None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (7, 7),
        ("7", 7),
        ("200GB", 200_000_000_000),
        ("200 gb", 200_000_000_000),
        ("200G", 200_000_000_000),
        ("1.5GiB", 1_610_612_736),
        ("1KiB", 1024),
        ("1kB", 1000),
        (".5 MB", 500_000),
        ("2e3 B", 2000),
        ("3TiB", 3 * 1024**4),
        ("123456789012345678901 B", 123456789012345678901),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "wrong",
    ["", "GB", "-1GB", "1 XB", "1 GB of disk", "1,5GB", "nan", "1e999GB", 10**400, -1, 1.5, True, None],
)
def test_sizes_that_are_refused(wrong: object) -> None:
    with pytest.raises(PolicyError, match=r"size .* is not understood; expected bytes"):
        parse_bytes(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (30, 30.0),
        (0.25, 0.25),
        ("90", 90.0),
        ("30m", 1800.0),
        ("2h", 7200.0),
        ("1.5d", 129600.0),
        ("1w", 604800.0),
    ]
    + [("250ms", 0.25), ("5 min", 300.0), ("10sec", 10.0), ("24H", 86400.0)]
    + [("1h30m", 5400.0), (" 1d 2h ", 93600.0)],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "wrong",
    ["", "h", "2 fortnights", "-2h", "2h 30", "1 2h", -1, float("nan"), float("inf"), 10**400, True, None],
)
def test_durations_that_are_refused(wrong: object) -> None:
    with pytest.raises(PolicyError, match=r"duration .* expected seconds as a number"):
        parse_seconds(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_999, "1.0 MB"),
        (200 * 10**9, "200.0 GB"),
    ]
    + [(5 * 10**18, "5000.0 PB")],
)
def test_shown_sizes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0005, "0ms"), (0.25, "250ms"), (1, "1s"), (59.4, "59.4s"), (60, "1m"), (5400, "1h 30m")]
    + [(3661, "1h 1m"), (86400, "1d"), (90000, "1d 1h"), (86460, "1d"), (-90, "-1m 30s")],
)
def test_shown_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@PROFILE
@given(st.integers(0, 10**18))
def test_a_shown_size_is_read_back_within_its_precision(size: int) -> None:
    assert abs(parse_bytes(format_bytes(size)) - size) <= max(0.5, size * 0.051)


@PROFILE
@given(st.floats(0, 50), st.sampled_from(["", "s", "m", "h", "d"]))
def test_units_scale(number: float, unit: str) -> None:
    factor = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
    assert parse_seconds(f"{number:.6f}{unit}") == pytest.approx(float(f"{number:.6f}") * factor)


@PROFILE
@given(st.integers(0, 10**18), st.one_of(st.floats(0, 1e9), st.integers(0, 10**6).map(float)))
def test_exact_text_is_read_back_exactly(size: int, seconds: float) -> None:
    assert parse_bytes(exact_bytes(size)) == size
    assert parse_seconds(exact_seconds(seconds)) == seconds


def test_exact_text_is_short_where_it_can_be() -> None:
    assert (exact_bytes(200 * 10**9), exact_bytes(1_234_567)) == ("200.0 GB", 1_234_567)
    assert (exact_seconds(5400), exact_seconds(5400.5)) == ("1h 30m", 5400.5)
