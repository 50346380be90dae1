"""Group quantization in numpy: the reference for every packed layout.

A group is `group` consecutive input features of one output row: w ≈ scale · (q − zero), with q an
unsigned integer of `bits` bits and one scale a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import SchemeError


@dataclass(frozen=True)
class GroupQuantization:
    """Symmetric quantization to 2·zero + 1 levels, as MLC-LLM's `_1` schemes.

    bits: of a stored value; group: input features to a scale; scale_dtype: of the scales.
    """

    bits: int
    group: int
    scale_dtype: str

    @property
    def zero(self) -> int:
        """The stored value that means 0; also the largest magnitude."""
        return 2 ** (self.bits - 1) - 1

    def check(self, name: str, in_features: int) -> None:
        """Raises SchemeError unless whole groups fill a row."""
        if in_features % self.group:
            raise SchemeError(
                f"{name}: found {in_features} input features; accepted: a multiple of the group "
                f"size {self.group}"
            )

    def quantize(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`[out, in]` float → q `[out, in]` uint8, scale `[out, in/group]` of scale_dtype."""
        out_features, in_features = weight.shape
        groups = weight.astype(np.float32).reshape(out_features, in_features // self.group, -1)
        scale = (np.abs(groups).max(axis=-1) / self.zero).astype(self.scale_dtype)
        # Divide by the scale that is stored, not by the one before rounding.
        divisor = np.where(scale == 0, 1, scale).astype(np.float32)[..., None]
        q = np.clip(np.rint(groups / divisor), -self.zero, self.zero) + self.zero
        return q.astype(np.uint8).reshape(out_features, in_features), scale

    def dequantize(self, q: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The inverse: float32 `[out, in]`."""
        groups = q.astype(np.float32).reshape(*scale.shape, self.group) - self.zero
        return (groups * scale.astype(np.float32)[..., None]).reshape(q.shape)


def pack_bits(q: np.ndarray, bits: int) -> np.ndarray:
    """`[out, in]` values below 2**bits → `[out, in·bits/8]` uint8, first value in the low bits."""
    out_features, in_features = q.shape
    planes = (q[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = planes.reshape(out_features, in_features * bits)
    return np.packbits(stream, axis=1, bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, in_features: int) -> np.ndarray:
    """The inverse of `pack_bits`: uint8 `[out, in_features]`."""
    stream = np.unpackbits(packed, axis=1, bitorder="little", count=in_features * bits)
    planes = stream.reshape(len(packed), in_features, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (planes * weights).sum(axis=-1, dtype=np.uint8)
