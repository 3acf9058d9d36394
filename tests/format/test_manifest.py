"""Manifests: round trip, and refusal of everything that is not one."""

from __future__ import annotations

import math

import msgspec
import pytest

from holdfast.core.clock import Clock
from holdfast.core.errors import IntegrityError, InvalidFormat, Truncated, UnsupportedVersion
from holdfast.format.manifest import (
    FORMAT_VERSION,
    FileEntry,
    Manifest,
    Part,
    clock_from_doc,
    clock_to_doc,
    decode_manifest,
    encode_manifest,
    floats_from_doc,
    floats_to_doc,
)
from holdfast.format.sealed import seal, unseal
from holdfast.format.values import TensorLeaf, encode_value

FILE = FileEntry("data/000000000007-ab12cd34/model.safetensors", 8192, 4096, "0f" * 32)
TREE = {"w": TensorLeaf("model/w", "torch.Parameter"), "lr": 0.1, 3: (1, None)}
MANIFEST = Manifest(
    format=FORMAT_VERSION, run="r1", step=7, attempt="ab12cd34", generation=2, time=1.7e9,
    clock=(7, 1, 448, 0, 12.25),
    parts={
        "model": Part(msgspec.Raw(msgspec.json.encode(encode_value(TREE))), "module", [FILE], {"model/tied": "model/w"}),
        "größe": Part(msgspec.Raw(b"[1,2]")),
    },
    metrics={"loss": 0.1, "bad": "nan"}, reasons=["every 7 steps"], parent="00ff00ff", new_bytes=8192, exact=False,
    demoted=True, world_size=4, environment={"torch": "2.13"}, loop={"batch": 3},
)  # fmt: skip
RAW = encode_manifest(MANIFEST)


def fields() -> dict[str, object]:
    return msgspec.json.decode(unseal(RAW, "m"))


def resealed(**changes: object) -> bytes:
    return seal(msgspec.json.encode(fields() | changes))


def with_file(**changes: object) -> bytes:
    body = fields()
    body["parts"]["model"]["files"][0].update(changes)
    return seal(msgspec.json.encode(body))


def test_a_manifest_comes_back_as_it_was() -> None:
    found = decode_manifest(RAW, "m")
    assert encode_manifest(found) == RAW
    assert found.parts["model"].values("model") == TREE
    assert found.parts["größe"].values("größe") == [1, 2]
    assert found.parts["model"].files == [FILE]
    assert found.parts["model"].aliases == {"model/tied": "model/w"}
    for field in Manifest.__struct_fields__:
        if field != "parts":
            assert getattr(found, field) == getattr(MANIFEST, field)


def test_what_a_manifest_needs_is_counted_once_per_file() -> None:
    shared = msgspec.structs.replace(
        MANIFEST, parts={"a": MANIFEST.parts["model"], "b": MANIFEST.parts["model"]}
    )
    assert shared.stored_bytes == 8192
    assert shared.file_keys == {FILE.key}
    assert MANIFEST.part_of("model/layer/0/w") == "model"
    with pytest.raises(InvalidFormat, match="no part"):
        MANIFEST.part_of("optimizer/0")


def test_clocks_and_metrics_are_exact() -> None:
    clock = Clock(5, 1, 2**53 + 1, 10**15, 0.1 + 0.2)
    assert clock_from_doc(msgspec.json.decode(msgspec.json.encode(clock_to_doc(clock)))) == clock
    metrics = {
        "a": 0.1 + 0.2,
        "nan": math.nan,
        "inf": math.inf,
        "-inf": -math.inf,
        "tiny": 5e-324,
        "zero": -0.0,
    }
    found = floats_from_doc(msgspec.json.decode(msgspec.json.encode(floats_to_doc(metrics))))
    assert repr(found) == repr(metrics)
    with pytest.raises(InvalidFormat, match="not a number"):
        floats_from_doc({"a": "large"})


@pytest.mark.parametrize("version", [0, 3, 99, 10**30])
def test_an_unknown_version_is_refused_with_what_to_do(version: int) -> None:
    for extra in ({}, {"invented": {"later": [1]}}):
        with pytest.raises(
            UnsupportedVersion, match=rf"^m: has format version {version}; .*pip install --upgrade holdfast"
        ):
            decode_manifest(resealed(format=version, **extra), "m")


@pytest.mark.parametrize("version", ["1", 1.5, None, True, [1]])
def test_a_version_that_is_no_number_is_refused(version: object) -> None:
    with pytest.raises(InvalidFormat):
        decode_manifest(resealed(format=version), "m")


REQUIRED = ["format", "run", "step", "attempt", "generation", "time", "clock", "parts"]


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_refused(field: str) -> None:
    body = fields()
    del body[field]
    with pytest.raises(InvalidFormat):
        decode_manifest(seal(msgspec.json.encode(body)), "m")


@pytest.mark.parametrize(
    "changes",
    [
        {"unknown": 1}, {"step": "7"}, {"step": 7.5}, {"time": "now"}, {"clock": [1, 2, 3]}, {"clock": [1, 2, 3, 4, "x"]},
        {"parts": []}, {"parts": {"a": {"files": {}}}}, {"parts": {"a": {"other": 1}}}, {"parts": {"": {}}},
        {"parts": {"a\u0000": {}}}, {"parts": {"e\u0301": {}}}, {"parts": {"a" * 1025: {}}}, {"metrics": {"a": None}},
        {"reasons": "text"}, {"environment": {"a": 1}}, {"loop": {"batch": 1.5}}, {"exact": 1}, {"parent": 5},
    ],
)  # fmt: skip
def test_fields_of_another_shape_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidFormat):
        decode_manifest(resealed(**changes), "m")


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "/etc/passwd"}, {"key": "data/../run.json"}, {"key": "data//a"}, {"key": "data/./a"}, {"key": "data/a/"},
        {"key": "data"}, {"key": "data\\a"}, {"key": "checkpoints/000000000007.json"}, {"key": "run.json"}, {"key": ""},
        {"key": "data/a\u0000"}, {"key": "data/.hidden"}, {"key": "data/a b"}, {"key": "data/" + "a" * 256}, {"key": "data/ü"},
        {"header_size": 0}, {"header_size": -1}, {"header_size": 8193}, {"size": -1}, {"size": 4095},
        {"size": 2**62, "header_size": 2**61}, {"header_digest": "0f"}, {"header_digest": "zz" * 32},
        {"header_digest": "0F" * 32},
        {"extra": 1},
    ],
)  # fmt: skip
def test_file_entries_that_lead_elsewhere_or_nowhere_are_refused(changes: dict[str, object]) -> None:
    assert decode_manifest(with_file(), "m").parts["model"].files == [FILE]
    with pytest.raises(InvalidFormat):
        decode_manifest(with_file(**changes), "m")


TWINS = [
    (b'"step":7', b'"step":6,"step":7'), (b'"parts":{', b'"parts":{"model":{},'), (b'"kind":"module"', b'"kind":"x","kind":"module"'),
    (b'"run":"r1"', b'"run":"r1","ru\\u006e":"r1"'), (b'"run":', b'"run": '),
]  # fmt: skip


@pytest.mark.parametrize(("once", "twice"), TWINS)
def test_a_key_that_occurs_twice_is_refused(once: bytes, twice: bytes) -> None:
    body = unseal(RAW, "m")
    assert body.count(once) == 1
    with pytest.raises(InvalidFormat):
        decode_manifest(seal(body.replace(once, twice)), "m")


def test_every_truncation_and_every_flipped_bit_is_refused() -> None:
    for size in range(len(RAW)):
        with pytest.raises(Truncated):
            decode_manifest(RAW[:size], "m")
    for position in range(len(RAW)):
        for bit in (0, 3, 7):
            changed = bytearray(RAW)
            changed[position] ^= 1 << bit
            with pytest.raises(IntegrityError):
                decode_manifest(bytes(changed), "m")


@pytest.mark.parametrize(
    "tree",
    [
        b'{"$unknown":1}',
        b'{"a":{"$tensor":["x"]}}',
        b'["\xff"]',
        b'{"a":1,"a":2}',
        b'[{"b":{"a":1,"a":1}}]',
        b'["\\ud800"]',
        b"[NaN]",
        b"[" * 300 + b"]" * 300,
    ],
)
def test_a_value_tree_outside_the_grammar_is_refused_when_asked_for(tree: bytes) -> None:
    with pytest.raises(InvalidFormat):
        Part(msgspec.Raw(tree)).values("p")
