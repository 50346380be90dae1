"""Reads group-quantized weights (layout.py, `pack_groups`) inside a kernel."""

from tvm.script import tirx as T

_NIBBLES, _PAIRS, _BITS = 0x0F0F0F0F, 0x03030303, 0x01010101


def quad(W, panel, group, t, row, bits: int):
    """Quad t of a group of one row: a uint32 expression of four bytes, each a stored value."""
    if bits == 8:
        return W[panel, group, t, row]
    if bits == 4:
        shift = T.Cast("uint32", t % 2 * 4)
        return T.bitwise_and(T.shift_right(W[panel, group, t // 2, row], shift), T.uint32(_NIBBLES))
    low = T.shift_right(W[panel, group, t // 4, row], T.Cast("uint32", t % 4 * 2))
    high = T.shift_right(W[panel, group, 2, row], T.Cast("uint32", t))
    return T.bitwise_or(
        T.bitwise_and(low, T.uint32(_PAIRS)),
        T.shift_left(T.bitwise_and(high, T.uint32(_BITS)), T.uint32(2)),
    )


def value(W, panel, group, k, row, bits: int, zero: int):
    """Stored value of input feature k of a group, less the zero point: a float32 expression."""
    octets = quad(W, panel, group, k // 4, row, bits)
    octet = T.bitwise_and(T.shift_right(octets, T.Cast("uint32", k % 4 * 8)), T.uint32(255))
    return T.Cast("float32", T.Cast("int32", octet) - zero)


def near_one(octets, b, bits: int):
    """Byte b of a quad, a stored value below 2^bits, as the float32 1 + value / 2^bits.

    Its top mantissa bits: a shift and a logical operation, where a conversion takes one more.
    """
    octet = T.bitwise_and(T.shift_right(octets, T.Cast("uint32", b * 8)), T.uint32(2**bits - 1))
    mantissa = T.shift_left(octet, T.uint32(23 - bits))
    return T.reinterpret("float32", T.bitwise_or(mantissa, T.uint32(0x3F800000)))
