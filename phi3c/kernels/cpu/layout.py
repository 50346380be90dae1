"""Memory layouts of the CPU kernels, and the reversible step from plain arrays to them.

Linear weights: Hugging Face's `[out, in]` becomes panels `[ceil(out/16), in, 16]`, sixteen output
features side by side, so that one vector load serves a broadcast input value. Missing rows of the
last panel are zero.

KV blocks: keys `[head_dim, 16]`, values `[16, head_dim]`, sixteen tokens to a block: scores of
sixteen keys are one vector, and so are the values of one token.
"""

from __future__ import annotations

import numpy as np

PANEL = 16  # output features in a weight panel
KV_BLOCK = 16  # tokens in a KV block


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
