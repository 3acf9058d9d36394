"""The element types holdfast stores, by canonical name, and how safetensors carries each.

The canonical name is the torch/numpy spelling without a prefix. Where safetensors has no code for a type, its bytes
travel under a carrier code and the canonical name is kept in the file's metadata.
Source: the dtype list of the safetensors format, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CARRIERS", "DTYPES", "DType"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type: `itemsize` in bytes, the safetensors code that carries it, and how many carrier elements
    make one element (2 for complex numbers carried as pairs of floats)."""

    name: str
    itemsize: int
    carrier: str
    carrier_per_element: int = 1

    @property
    def native(self) -> bool:
        """Whether the safetensors code alone says what the type is."""
        return CARRIERS[self.carrier] == self.name and self.carrier_per_element == 1


# safetensors code -> the canonical type it stands for
CARRIERS: dict[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("bool", 1, "BOOL"),
        DType("uint8", 1, "U8"),
        DType("int8", 1, "I8"),
        DType("float8_e5m2", 1, "F8_E5M2"),
        DType("float8_e4m3fn", 1, "F8_E4M3"),
        DType("float8_e8m0fnu", 1, "U8"),
        DType("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
        DType("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"),
        DType("float4_e2m1fn_x2", 1, "U8"),
        DType("int16", 2, "I16"),
        DType("uint16", 2, "U16"),
        DType("float16", 2, "F16"),
        DType("bfloat16", 2, "BF16"),
        DType("int32", 4, "I32"),
        DType("uint32", 4, "U32"),
        DType("float32", 4, "F32"),
        DType("complex32", 4, "F16", 2),
        DType("complex64", 8, "C64"),
        DType("float64", 8, "F64"),
        DType("int64", 8, "I64"),
        DType("uint64", 8, "U64"),
        DType("complex128", 16, "F64", 2),
    )
}
