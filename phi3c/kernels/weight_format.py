"""What a weight is stored as, as the kernels are told of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupFormat:
    """A group-quantized weight: w = scale · (q − zero), q of `bits` bits, groups of 32."""

    bits: int
    zero: int
    scale_dtype: str


WeightFormat = str | GroupFormat  # a dtype (uint16: the bits of bfloat16), or groups


def storage_dtype(dtype: str) -> str:
    """What a plain weight of `dtype` is kept as: bfloat16 as its bits, which every target reads."""
    return "uint16" if dtype == "bfloat16" else dtype
