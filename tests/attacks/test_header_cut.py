"""A header is read as two objects, cut where its metadata seems to end: no text may have that cut change its meaning.

The reference is the whole text, read as one JSON object by another parser. Source of the fear: two readers of one file
that see different tensors (CVE-2025-1944 and 1945 are that for zip files).
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from forge import bounded, header_of, padded, run
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast.core.errors import HoldfastError
from holdfast.format.datafile import decode_header, encode_header

SOUND = header_of(run(), "a")[1]
FRONT, MEMBERS = SOUND[: SOUND.index(b'"},"') + 2], SOUND[SOUND.index(b'"},"') + 3 :]


def agree(text: bytes) -> bool:
    """Return whether a header is taken; then another parser must see the same, each key once, and we write it so."""
    raw = padded(text)
    try:
        header = decode_header(raw, "f")
    except HoldfastError:
        return False
    assert encode_header(header.tensors, header.digests) == raw
    keys: list[str] = []

    def once(members: list[tuple[str, object]]) -> dict[str, object]:
        assert len({k for k, _ in members}) == len(members), "a key occurs twice"
        keys.extend(k for k, _ in members)
        return dict(members)

    seen = json.loads(raw[8:], object_pairs_hook=once)
    metadata = seen.pop("__metadata__")
    assert all(isinstance(v, str) for v in metadata.values())
    assert list(seen) == [t.name for t in header.tensors]
    for t in header.tensors:
        assert seen[t.name]["data_offsets"] == [t.start, t.end]
    return True


def test_the_sound_header_is_taken() -> None:
    assert FRONT + b"," + MEMBERS == SOUND
    assert agree(SOUND)


def replaced(old: bytes, new: bytes) -> bytes:
    assert old in SOUND
    return SOUND.replace(old, new, 1)


W = b'"w":{"dtype":"F32","shape":[3,4],"data_offsets":[24,72]}'
CUTS: dict[str, Callable[[], bytes]] = {
    "an end inside a string": lambda: replaced(b'"format":"pt"', b'"format":"pt\\"},\\"x\\":{\\""'),
    "an end inside a nested object": lambda: replaced(b'"format":"pt"', b'"format":{"a":""},"x":"pt"'),
    "metadata that ends early": lambda: replaced(b'"holdfast":', b'"x":""},"holdfast":'),
    "metadata twice, the sound one first": lambda: FRONT + b',"__metadata__":{"format":"pt"},' + MEMBERS,
    "metadata twice, the sound one last": lambda: b'{"__metadata__":{"format":"pt"},' + SOUND[1:],
    "metadata twice, both sound": lambda: FRONT + b"," + FRONT[1:] + b"," + MEMBERS,
    "metadata behind the tensors": lambda: b"{" + MEMBERS[:-1] + b"," + FRONT[1:] + b"}",
    "metadata between the tensors": lambda: b"{" + W + b"," + FRONT[1:] + b"," + MEMBERS,
    "no metadata": lambda: b"{" + MEMBERS,
    "metadata alone, and an end that is none": lambda: FRONT + b"}",
    "metadata alone, cut off": lambda: FRONT,
    "a tensor called metadata": lambda: FRONT + b"," + MEMBERS.replace(b'"w"', b'"__metadata__"'),
    "a tensor called metadata, escaped": lambda: FRONT + b"," + MEMBERS.replace(b'"w"', b'"\\u005f_metadata__"'),
    "an escaped name of the metadata": lambda: replaced(b'"__metadata__"', b'"\\u005f_metadata__"'),
    "a tensor twice": lambda: FRONT + b"," + W + b"," + MEMBERS,
    "a tensor whose name holds an end": lambda: FRONT + b"," + MEMBERS.replace(b'"w"', b'"w\\"},\\"v"'),
    "a tensor's members twice": lambda: SOUND.replace(b'"dtype":"F32"', b'"dtype":"F64","dtype":"F32"'),
    "a metadata member twice": lambda: replaced(b'"format":"pt"', b'"format":"np","format":"pt"'),
    "layouts with an end": lambda: replaced(b'"},"', b'","layouts":"{\\"w\\":{}},\\""},"'),
    "layouts with a key twice": lambda: replaced(
        b'"},"', b'","layouts":"{\\"w\\":{\\"dtype\\":\\"float32\\"},\\"w\\":{}}"},"'
    ),
    "an array": lambda: b"[" + SOUND + b"]",
    "two objects": lambda: SOUND + SOUND,
    "an object in front": lambda: b"{}" + SOUND,
    "a comma too many": lambda: FRONT + b",," + MEMBERS,
    "a comma at the end": lambda: SOUND[:-1] + b",}",
    "a space at the cut": lambda: FRONT + b", " + MEMBERS,
    "a byte order mark": lambda: b"\xef\xbb\xbf" + SOUND,
    "a zero at the cut": lambda: FRONT + b",\x00" + MEMBERS,
    "a comment at the cut": lambda: FRONT + b",/**/" + MEMBERS,
    "nesting at the cut": lambda: FRONT + b',"d":' + b"[" * 100_000 + b"]" * 100_000 + b"," + MEMBERS,
    "nesting in front of it": lambda: b'{"__metadata__":' + b'{"a":' * 100_000 + b'""' + b"}" * 100_000 + b"," + MEMBERS,
    "an endless number": lambda: SOUND.replace(b"[24,72]", b"[24," + b"7" * 100_000 + b"]"),
    "a broken encoding at the cut": lambda: FRONT + b',"\xff":{"dtype":"F32","shape":[],"data_offsets":[0,4]},' + MEMBERS,
}  # fmt: skip


@pytest.mark.parametrize("attack", CUTS)
def test_a_header_that_plays_with_the_cut_is_refused(attack: str) -> None:
    text = CUTS[attack]()
    assert text != SOUND
    with bounded():
        assert not agree(text) or attack == "a tensor whose name holds an end"


PIECES = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b'"},"', b'"}', b'},"', b'\\"', b"\\", b" ", b"\n", b'"__metadata__"', b'"__metadata__":{', b'"format":"pt"',
    b'"holdfast":"holdfast/1"', b'"digests":""', b'"layouts":""', b'"layouts":"{}"', b'"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', W, FRONT, FRONT[1:],
    MEMBERS, b"0", b"1e9", b"-1", b"null", b'"x":""', b'"x":{}',
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join))
@example(SOUND)
@settings(max_examples=600, deadline=None)
def test_pieces_of_a_header_in_any_order(text: bytes) -> None:
    agree(text)


@given(
    st.integers(0, len(SOUND)),
    st.integers(0, 12),
    st.lists(st.sampled_from(PIECES), max_size=3).map(b"".join),
)
@settings(max_examples=600, deadline=None)
def test_a_piece_in_the_place_of_another(at: int, length: int, piece: bytes) -> None:
    agree(SOUND[:at] + piece + SOUND[at + length :])
