"""Memory layouts of the GPU kernels, and the reversible step from plain arrays to them.

Plain weights stay row-major, `[out, in]`, as Hugging Face has them: neighbouring threads read
neighbouring input features. Group-quantized ones are row-major as well: a group of 32 values is
`bits` 32-bit words.

KV blocks are as on the CPU: keys `[head_dim, 16]`, values `[16, head_dim]`.
"""

from __future__ import annotations

import numpy as np

from ..layout import GROUP


def group_shapes(
    out_features: int, in_features: int, bits: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a group-quantized weight: q (uint32), scale."""
    groups = in_features // GROUP
    return (out_features, groups, bits), (out_features, groups)


def pack_groups(q: np.ndarray, bits: int) -> np.ndarray:
    """q `[out, in]` uint8 → uint32 `[out, in/32, bits]`.

    8 bits: word t holds values 4t … 4t+3, a byte each, low byte first. 4 bits: values 8t … 8t+7, a
    nibble each, low first. 3 bits: words 0 and 1 hold the low two bits of 16 values each, word 2
    the high bit of all 32, low first.
    """
    out_features, in_features = q.shape
    values = q.reshape(out_features, in_features // GROUP, GROUP).astype(np.uint32)
    if bits in (4, 8):
        return _joined(values, bits)
    assert bits == 3, bits
    return np.concatenate([_joined(values & 3, 2), _joined(values >> 2, 1)], axis=2)


def unpack_groups(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack_groups`: uint8 `[out, in]`."""
    if bits in (4, 8):
        values = _split(words, bits)
    else:
        values = _split(words[..., :2], 2) | _split(words[..., 2:], 1) << 2
    return np.ascontiguousarray(values.reshape(len(words), -1).astype(np.uint8))


def _joined(values: np.ndarray, bits: int) -> np.ndarray:
    """`[…, 32]` values below 2^bits → `[…, bits]` words, low bits first."""
    per_word = 32 // bits
    parts = values.reshape(*values.shape[:-1], bits, per_word)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    return np.bitwise_or.reduce(parts << shifts, axis=-1)


def _split(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_joined`."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    values = words[..., None] >> shifts & np.uint32(2**bits - 1)
    return values.reshape(*words.shape[:-1], GROUP)
