"""Memory layouts of the CPU kernels, and the reversible step from plain arrays to them.

Linear weights: Hugging Face's `[out, in]` becomes panels `[ceil(out/16), in, 16]`, sixteen output
features side by side, so that one vector load serves a broadcast input value. Missing rows of the
last panel are zero.

KV blocks: keys `[head_dim, 16]`, values `[16, head_dim]`, sixteen tokens to a block: scores of
sixteen keys are one vector, and so are the values of one token.
"""

from __future__ import annotations

import numpy as np

from ..layout import GROUP, PANEL

_QUADS = GROUP // 4  # four consecutive input features, a byte each


def panel_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Shape of a linear's weight as panels."""
    return (-(-out_features // PANEL), in_features, PANEL)


def pack_panels(weight: np.ndarray) -> np.ndarray:
    """`[out, in]` → `[ceil(out/16), in, 16]`, same dtype."""
    out_features, in_features = weight.shape
    panels = panel_shape(out_features, in_features)[0]
    if out_features % PANEL:
        rows = panels * PANEL - out_features
        weight = np.concatenate([weight, np.zeros((rows, in_features), weight.dtype)])
    return np.ascontiguousarray(weight.reshape(panels, PANEL, in_features).swapaxes(1, 2))


def unpack_panels(panels: np.ndarray, out_features: int) -> np.ndarray:
    """The inverse of `pack_panels`: `[panels, in, 16]` → `[out_features, in]`."""
    count, in_features, _ = panels.shape
    rows = panels.swapaxes(1, 2).reshape(count * PANEL, in_features)
    return np.ascontiguousarray(rows[:out_features])


def group_shapes(
    out_features: int, in_features: int, bits: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a group-quantized weight: q (uint32), scale."""
    panels, groups = -(-out_features // PANEL), in_features // GROUP
    return (panels, groups, bits, PANEL), (panels, groups, PANEL)


def pack_groups(q: np.ndarray, bits: int) -> np.ndarray:
    """q `[out, in]` uint8 → uint32 `[panels, in/32, bits, 16]`.

    A quad is four consecutive input features of one output row, a byte each, as integer dot
    products want them. 8 bits: word t is quad t. 4 bits: word t holds quad 2t in the low nibbles
    of its bytes and quad 2t+1 in the high ones. 3 bits: words 0 and 1 hold the low two bits of four
    quads each, word 2 the high bit of all eight.
    """
    out_features, in_features = q.shape
    panels, groups = -(-out_features // PANEL), in_features // GROUP
    padded = np.zeros((panels * PANEL, in_features), np.uint8)
    padded[:out_features] = q
    quads = padded.reshape(panels, PANEL, groups, _QUADS, 4).transpose(3, 0, 2, 1, 4)
    words = np.empty((bits, panels, groups, PANEL, 4), np.uint8)
    if bits == 8:
        words[:] = quads
    elif bits == 4:
        words[:] = quads[0::2] | quads[1::2] << 4
    else:
        assert bits == 3, bits
        for j in range(2):
            words[j] = sum((quads[4 * j + i] & 3) << 2 * i for i in range(4))
        words[2] = sum((quads[t] >> 2) << t for t in range(_QUADS))
    words = np.ascontiguousarray(words.transpose(1, 2, 0, 3, 4))
    return words.view("<u4").reshape(panels, groups, bits, PANEL)


def unpack_groups(words: np.ndarray, bits: int, out_features: int) -> np.ndarray:
    """The inverse of `pack_groups`: uint8 `[out_features, in]`."""
    panels, groups = words.shape[:2]
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(panels, groups, bits, PANEL, 4)
    octets = octets.transpose(2, 0, 1, 3, 4)
    if bits == 8:
        quads = list(octets)
    elif bits == 4:
        quads = [octets[t // 2] >> 4 * (t % 2) & 15 for t in range(_QUADS)]
    else:
        low = [octets[t // 4] >> 2 * (t % 4) & 3 for t in range(_QUADS)]
        quads = [low[t] | (octets[2] >> t & 1) << 2 for t in range(_QUADS)]
    rows = np.stack(quads).transpose(1, 3, 2, 0, 4)  # panels, 16, groups, quads, 4
    return np.ascontiguousarray(rows).reshape(panels * PANEL, -1)[:out_features]


def pack_scales(scale: np.ndarray) -> np.ndarray:
    """`[out, groups]` → `[panels, groups, 16]`; missing rows of the last panel are zero."""
    out_features, groups = scale.shape
    panels = -(-out_features // PANEL)
    padded = np.zeros((panels * PANEL, groups), scale.dtype)
    padded[:out_features] = scale
    return np.ascontiguousarray(padded.reshape(panels, PANEL, groups).swapaxes(1, 2))


def unpack_scales(scale: np.ndarray, out_features: int) -> np.ndarray:
    """The inverse of `pack_scales`."""
    panels, groups, _ = scale.shape
    rows = scale.swapaxes(1, 2).reshape(panels * PANEL, groups)
    return np.ascontiguousarray(rows[:out_features])
