"""Group quantization in numpy: the reference for every packed layout.

A group is `group` consecutive input features of one output row: w ≈ scale · (q − zero), with q an
unsigned integer of `bits` bits and one scale a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import SchemeError


@dataclass(frozen=True)
class GroupedRows:
    """Rows that a source stores quantized: w = scale · q.

    q: `[rows, in]` int8; scale: `[rows, in/group]`, a float of any width.
    """

    q: np.ndarray
    scale: np.ndarray

    def values(self) -> np.ndarray:
        """float32 `[rows, in]`."""
        groups = self.q.astype(np.float32).reshape(*self.scale.shape, -1)
        return (groups * self.scale.astype(np.float32)[..., None]).reshape(self.q.shape)


@dataclass(frozen=True)
class GroupQuantization:
    """bits: of a stored value; group: input features to a scale; scale_dtype: of the scales.

    search: whether scales are searched for the least squared error, over all 2**bits levels.
    Without it a scale is max|w| over the largest level, and the lowest level stays unused, as in
    MLC-LLM's `_1` schemes.
    """

    bits: int
    group: int
    scale_dtype: str
    search: bool = False

    @property
    def zero(self) -> int:
        """The stored value that means 0."""
        return 2 ** (self.bits - 1)

    def check(self, name: str, in_features: int) -> None:
        """Raises SchemeError unless whole groups fill a row."""
        if in_features % self.group:
            raise SchemeError(
                f"{name}: found {in_features} input features; accepted: a multiple of the group "
                f"size {self.group}"
            )

    def quantize(self, rows: np.ndarray | GroupedRows) -> tuple[np.ndarray, np.ndarray]:
        """`[out, in]` → q `[out, in]` uint8, scale `[out, in/group]` of scale_dtype.

        Rows that are quantized already keep their values, if the levels and scales hold them.
        """
        if isinstance(rows, GroupedRows):
            kept = self._take_over(rows)
            return self.quantize(rows.values()) if kept is None else kept
        out_features, in_features = rows.shape
        groups = rows.astype(np.float32).reshape(out_features, in_features // self.group, -1)
        lowest = -self.zero if self.search else 1 - self.zero
        with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses infinite scales
            if self.search:
                scale = searched_scale(groups, self.zero).astype(self.scale_dtype)
            else:
                scale = (np.abs(groups).max(axis=-1) / (self.zero - 1)).astype(self.scale_dtype)
        # Divide by the scale that is stored, not by the one before rounding.
        levels = groups * inverse(scale)[..., None]
        np.rint(levels, out=levels)
        np.clip(levels, lowest, self.zero - 1, out=levels)
        levels += self.zero
        return levels.astype(np.uint8).reshape(out_features, in_features), scale

    def dequantize(self, q: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The inverse: float32 `[out, in]`."""
        groups = q.astype(np.float32).reshape(*scale.shape, self.group) - self.zero
        return (groups * scale.astype(np.float32)[..., None]).reshape(q.shape)

    def _take_over(self, rows: GroupedRows) -> tuple[np.ndarray, np.ndarray] | None:
        """The same values in this form, or None where they do not fit."""
        q, scale = rows.q, rows.scale.astype(self.scale_dtype)
        same_groups = q.shape[1] == self.group * scale.shape[1]
        if not same_groups or not np.array_equal(scale, rows.scale):
            return None
        if q.min() < -self.zero or q.max() >= self.zero:
            return None
        return (q.astype(np.int16) + self.zero).astype(np.uint8), scale


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale as float32, 0 where the scale is 0."""
    scale = scale.astype(np.float32)
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def searched_scale(groups: np.ndarray, zero: int) -> np.ndarray:
    """groups `[..., group]` float32 → the scale of each for levels −zero … zero−1, float32.

    The value of largest magnitude is put, in turn, on several places at and around the lowest
    level, which the others have one of more: a scale is negative where that value is positive. For
    given levels q the best scale is Σwq / Σq², which leaves the error Σw² − (Σwq)² / Σq²; the
    candidate with the least error wins.
    """
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    scale = np.zeros_like(largest)
    gain = np.zeros_like(largest)
    levels = np.empty_like(groups)
    for place in _PLACES:
        candidate = largest / np.float32(-zero * place)
        np.multiply(groups, inverse(candidate)[..., None], out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, -zero, zero - 1, out=levels)
        product = np.einsum("...i,...i", groups, levels)
        square = np.einsum("...i,...i", levels, levels)
        better = product**2 > gain * square
        scale = np.where(better, product * inverse(square), scale)
        gain = np.where(better, product**2 * inverse(square), gain)
    return scale


# Of the lowest level. More of them, or places on the other side too, gain next to nothing.
_PLACES = (1.0, 0.94, 1.06, 0.88, 1.12, 0.82, 1.18)


def rounded_activations(x: np.ndarray, group: int = 32) -> np.ndarray:
    """x `[..., features]` with the values that int8 keeps of it, float32.

    A group of consecutive features has the scale max|x| / 127: the twin of the `quantize_rows`
    kernel.
    """
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, group)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    return (np.rint(groups * inverse(scale)) * scale).reshape(x.shape)


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
