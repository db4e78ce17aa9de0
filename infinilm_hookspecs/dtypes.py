"""Names, sizes and containment of the dtypes a checkpoint may hold. Names are torch's, without the prefix."""

from __future__ import annotations

ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
}
"""Bytes of one element."""

# (bits of precision, exponent of the smallest value, exponent of the largest): IEEE 754, OCP 8-bit floating point 1.0,
# OCP microscaling formats 1.0, and for fnuz https://onnx.ai/onnx/technical/float8.html
_FLOATS = {
    "float8_e4m3fn": (4, -9, 8),
    "float8_e4m3fnuz": (4, -10, 7),
    "float8_e5m2": (3, -16, 15),
    "float8_e5m2fnuz": (3, -17, 15),
    "float8_e8m0fnu": (0, -127, 127),  # powers of two, and not even 0: it contains nothing but itself
    "float16": (11, -24, 15),
    "bfloat16": (8, -133, 127),
    "float32": (24, -149, 127),
    "float64": (53, -1074, 1023),
}
_WITHOUT_NEGATIVE_ZERO = {"float8_e4m3fnuz", "float8_e5m2fnuz"}  # nor infinities

# (bits of magnitude, signed)
_INTEGERS = {
    "bool": (1, False),
    "uint8": (8, False),
    "uint16": (16, False),
    "uint32": (32, False),
    "uint64": (64, False),
    "int8": (7, True),
    "int16": (15, True),
    "int32": (31, True),
    "int64": (63, True),
}


def dtype_name(dtype: object) -> str:
    """Return the name of a dtype given by name or as a `torch.dtype`. Raises `ValueError` for an unknown one."""
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_SIZES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(ITEM_SIZES)}")
    return name


def is_lossless(source: str, target: str) -> bool:
    """Return whether every value of dtype `source` is a value of dtype `target`."""
    if source == target:
        return True
    if target == "complex64":
        return is_lossless(source, "float32")
    if source in _INTEGERS and target in _INTEGERS:
        bits, signed = _INTEGERS[source]
        target_bits, target_signed = _INTEGERS[target]
        return bits <= target_bits and (target_signed or not signed)
    if source in _INTEGERS and target in _FLOATS:
        return _INTEGERS[source][0] <= _FLOATS[target][0]
    if source in _FLOATS and target in _FLOATS and target not in _WITHOUT_NEGATIVE_ZERO:
        bits, low, high = _FLOATS[source]
        target_bits, target_low, target_high = _FLOATS[target]
        return bits <= target_bits and low >= target_low and high <= target_high
    return False
