"""Sealed JSON: one changed, missing or added byte is refused, whichever it is."""

from __future__ import annotations

import blake3
import msgspec
import pytest

from holdfast.core.errors import DigestMismatch, IntegrityError, InvalidFormat, Truncated
from holdfast.format.sealed import LINE_DIGEST_CHARS, seal, unseal

BODY = b'{"format":1,"name":"caf\xc3\xa9","n":[1,2.5,null],"nested":{"digest":"00"}}'
LENGTHS = {"document": 64, "line": LINE_DIGEST_CHARS}


@pytest.fixture(params=LENGTHS)
def chars(request: pytest.FixtureRequest) -> int:
    return LENGTHS[request.param]


def test_what_was_sealed_comes_out(chars: int) -> None:
    sealed = seal(BODY, chars)
    assert unseal(sealed, "x", chars) == BODY
    assert sealed.endswith(b'"}\n')
    read_by_anyone = msgspec.json.decode(sealed)
    assert len(read_by_anyone.pop("digest")) == chars
    assert read_by_anyone == msgspec.json.decode(BODY)


def test_the_sealed_form_is_fixed() -> None:
    digest = "2aa751acd2d96565a9b70266758697bb92b56a61a2075975cd0fa135c79bc220"  # BLAKE3 of {"a":1
    assert seal(b'{"a":1}') == b'{"a":1,"digest":"%s"}\n' % digest.encode()
    assert seal(b'{"a":1}', 16) == b'{"a":1,"digest":"%s"}\n' % digest[:16].encode()


def test_every_flipped_bit_is_refused(chars: int) -> None:
    sealed = seal(BODY, chars)
    for position in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[position] ^= 1 << bit
            with pytest.raises(IntegrityError):
                unseal(bytes(changed), "x", chars)


def test_every_truncation_at_either_end_is_refused(chars: int) -> None:
    sealed = seal(BODY, chars)
    for size in range(len(sealed)):
        with pytest.raises(Truncated, match=r"x: .* cut off"):
            unseal(sealed[:size], "x", chars)
        if size:
            with pytest.raises(IntegrityError):
                unseal(sealed[size:], "x", chars)


def test_every_removed_doubled_or_inserted_byte_is_refused(chars: int) -> None:
    sealed = seal(BODY, chars)
    for i in range(len(sealed)):
        for changed in (
            sealed[:i] + sealed[i + 1 :],
            sealed[:i] + sealed[i : i + 1] + sealed[i:],
            sealed[:i] + b" " + sealed[i:],
        ):
            if changed != sealed:
                with pytest.raises(IntegrityError):
                    unseal(changed, "x", chars)


def test_bytes_after_the_seal_are_refused(chars: int) -> None:
    sealed = seal(BODY, chars)
    for extra in (b"\n", b" ", b"\0", sealed):
        with pytest.raises(IntegrityError):
            unseal(sealed + extra, "x", chars)


def test_a_digest_in_capitals_is_another_text() -> None:
    sealed = seal(BODY)
    with pytest.raises(DigestMismatch):
        unseal(sealed[:-67] + sealed[-67:].upper(), "x")


def test_a_seal_of_one_length_is_not_one_of_the_other() -> None:
    with pytest.raises(IntegrityError):
        unseal(seal(BODY, 16), "x", 64)
    with pytest.raises(IntegrityError):
        unseal(seal(BODY, 64), "x", 16)


def test_only_an_object_can_be_sealed_or_unsealed() -> None:
    for body in (b"", b"{}", b"[1]", b"null", b'{"a":1} ', b' {"a":1}'):
        with pytest.raises(ValueError, match="JSON object"):
            seal(body)
    for head in (b"[1", b" {", b"x"):
        sealed = head + b',"digest":"' + blake3.blake3(head).hexdigest().encode() + b'"}\n'
        with pytest.raises(InvalidFormat, match="JSON object"):
            unseal(sealed, "x")


def test_the_message_names_the_object() -> None:
    with pytest.raises(DigestMismatch, match=r"^tags/best\.json: "):
        unseal(seal(BODY).replace(b"2.5", b"2.6"), "tags/best.json")
