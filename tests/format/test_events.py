"""Run-log segments: whole lines are exact or refused, a line that was cut off is as if it had never been begun."""

from __future__ import annotations

import blake3
import pytest

from holdfast.core.errors import IntegrityError, InvalidFormat
from holdfast.format.events import (
    Observed,
    Removed,
    Resumed,
    Saved,
    Started,
    Verdicted,
    Verified,
    decode_events,
    encode_event,
)
from holdfast.format.sealed import seal

EVENTS = [
    Started(1.5, 3, "höst", 42),
    Resumed(2.0, 7, "ab12", "because"),
    Observed((8, 1, 64, 0, 0.1), {"loss": 0.1 + 0.2, "odd": "nan"}),
    Observed((7, 0, 0, 0, 0.0), {"late": -0.0}, "ab12"),
    Saved(3.0, (8, 1, 64, 0, 0.1), "cd34", ["every 2 steps", "new\nline"]),
    Verdicted(8, "stop", "no improvement"),
    Removed(4.0, 7, "ab12", "removed", []),
    Verified(5.0, 8, "cd34"),
]
LINES = [encode_event(e) for e in EVENTS]
SEGMENT = b"".join(LINES)


def test_events_come_back_in_order() -> None:
    assert decode_events(SEGMENT, "log") == EVENTS
    assert decode_events(b"", "log") == []
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in LINES)


def test_a_torn_tail_is_ignored_wherever_the_write_stopped() -> None:
    ends = [0]
    for line in LINES:
        ends.append(ends[-1] + len(line))
    for size in range(len(SEGMENT) + 1):
        whole = sum(end <= size for end in ends[1:])
        assert decode_events(SEGMENT[:size], "log") == EVENTS[:whole]


def test_every_flipped_bit_in_a_whole_line_is_refused() -> None:
    """Only the very last newline is different: without it the last line is one that was cut off."""
    for position in range(len(SEGMENT) - 1):
        for bit in range(8):
            changed = bytearray(SEGMENT)
            changed[position] ^= 1 << bit
            with pytest.raises(IntegrityError):
                decode_events(bytes(changed), "log")
    for bit in range(8):
        assert decode_events(SEGMENT[:-1] + bytes([ord("\n") ^ 1 << bit]), "log") == EVENTS[:-1]


@pytest.mark.parametrize("junk", [b"\n", b"\0\0\0\n", b"{}\n", b"hello\n", LINES[0][:-2] + b"\n"])
def test_a_line_that_is_not_ours_is_refused_by_its_number(junk: bytes) -> None:
    with pytest.raises(IntegrityError, match="log/a, line 3"):
        decode_events(LINES[0] + LINES[1] + junk + LINES[2], "log/a")


@pytest.mark.parametrize(
    "body",
    [
        b'{"event":"unheard of"}', b'{"time":1.0}', b'{"event":"verified","time":"x","step":1,"attempt":"a"}',
        b'{"event":"verified","time":1.0,"step":1.5,"attempt":"a"}', b'{"event":"verified","time":NaN,"step":1,"attempt":"a"}',
        b'{"event":"verified","time":1.0,"step":1,"attempt":"\xff"}', b'{"event":"observed","clock":[1,2],"metrics":{}}',
        b'{"event":"verified","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)  # fmt: skip
def test_a_sealed_line_outside_the_grammar_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidFormat):
        decode_events(seal(body, 16), "log")


def test_a_later_version_may_add_fields() -> None:
    body = b'{"event":"verified","time":1.0,"step":1,"attempt":"a","by":"scrub"}'
    assert decode_events(seal(body, 16), "log") == [Verified(1.0, 1, "a")]


def test_the_bytes_of_a_line_are_fixed() -> None:
    head = b'{"event":"resumed","time":2.0,"step":7,"attempt":"ab12","note":"because"'
    assert LINES[1] == head + b',"digest":"' + blake3.blake3(head).hexdigest()[:16].encode() + b'"}\n'
