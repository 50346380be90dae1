"""The CPU instruction sets the kernels are shaped for.

A kernel's arithmetic is the same everywhere; what differs is how many float32 values a register
holds and how many registers a tile may use. LLVM splits or joins the 16-wide vectors of the weight
and page layouts (layout.py), so an artifact's parameters do not depend on the instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """Register shape of one instruction set.

    lanes: float32 values in a vector register.
    linear_rows, linear_panels: the register tile of a linear, rows × 16-column panels.
    attention_rows: query rows that share one pass over a block of keys.
    """

    name: str
    lanes: int
    linear_rows: int
    linear_panels: int
    attention_rows: int


AVX512 = Isa("avx512", lanes=16, linear_rows=8, linear_panels=2, attention_rows=8)
AVX2 = Isa("avx2", lanes=8, linear_rows=6, linear_panels=1, attention_rows=4)
NEON = Isa("neon", lanes=4, linear_rows=4, linear_panels=1, attention_rows=4)
PORTABLE = Isa("portable", lanes=4, linear_rows=2, linear_panels=1, attention_rows=2)


def vector_lanes(isa: Isa, extent: int) -> int:
    """The widest vector of the instruction set that divides `extent` evenly."""
    lanes = isa.lanes
    while extent % lanes:
        lanes //= 2
    return lanes
