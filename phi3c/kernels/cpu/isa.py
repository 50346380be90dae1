"""The CPU instruction sets the kernels are shaped for.

A kernel's arithmetic is the same everywhere; what differs is how many float32 values a register
holds and how many registers a tile may use. LLVM splits or joins the 16-wide vectors of the weight
and page layouts (layout.py), so an artifact's parameters do not depend on the instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass

from .int8_dot import Dot, PlainDot, Pmaddubsw, Sdot, Usdot, Vpdpbusd


@dataclass(frozen=True)
class Isa:
    """Register shape of one instruction set.

    lanes: float32 values in a vector register.
    linear_rows, linear_panels: the register tile of a linear, rows × 16-column panels.
    dot: the integer dot product; int8_rows: rows of an int8 linear's register tile.
    attention_rows: query rows that share one pass over a block of keys.
    """

    name: str
    lanes: int
    linear_rows: int
    linear_panels: int
    attention_rows: int
    dot: Dot
    int8_rows: int


_WIDE = dict(lanes=16, linear_rows=8, linear_panels=2, attention_rows=8)
_AVX2 = dict(lanes=8, linear_rows=6, linear_panels=1, attention_rows=4)
_NEON = dict(lanes=4, linear_rows=4, linear_panels=1, attention_rows=4)

AVX512_VNNI = Isa("avx512-vnni", **_WIDE, dot=Vpdpbusd(16), int8_rows=8)
AVX512 = Isa("avx512", **_WIDE, dot=Pmaddubsw(), int8_rows=4)
AVX_VNNI = Isa("avx-vnni", **_AVX2, dot=Vpdpbusd(8), int8_rows=6)
AVX2 = Isa("avx2", **_AVX2, dot=Pmaddubsw(), int8_rows=4)
NEON_I8MM = Isa("neon-i8mm", **_NEON, dot=Usdot(), int8_rows=4)
NEON_DOTPROD = Isa("neon-dotprod", **_NEON, dot=Sdot(), int8_rows=8)
NEON = Isa("neon", **_NEON, dot=PlainDot(4), int8_rows=4)
PORTABLE = Isa(
    "portable",
    lanes=4,
    linear_rows=2,
    linear_panels=1,
    attention_rows=2,
    dot=PlainDot(4),
    int8_rows=2,
)


def vector_lanes(isa: Isa, extent: int) -> int:
    """The widest vector of the instruction set that divides `extent` evenly."""
    lanes = isa.lanes
    while extent % lanes:
        lanes //= 2
    return lanes
