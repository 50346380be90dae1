"""Reads plain weights (weight_format.py, `storage_dtype`) inside a kernel."""

from tvm.script import tirx as T


def as_float32(value, dtype: str):
    """A stored value as a float32 expression; uint16 holds the upper half of a float32."""
    if dtype == "uint16":
        bits = T.shift_left(T.Cast("uint32", value), T.uint32(16))
        return T.reinterpret("float32", bits)
    return T.Cast("float32", value)
