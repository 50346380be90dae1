"""Error of ways to round a group of weights to four bits: how `q4f16_hq` was chosen.

    python benchmarks/four_bits.py

Root of the relative squared error, in percent, for Gaussian weights and for Student's t with five
degrees of freedom; scales (and minima) are float16.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from phi3c.quantization.group import inverse, searched_scale

Rounding = Callable[[np.ndarray], np.ndarray]  # groups [n, 32] → their rounded values


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def scaled(groups: np.ndarray, scale: np.ndarray, lowest: int) -> np.ndarray:
    scale = half(scale)[:, None]
    return np.clip(np.rint(groups * inverse(scale)), lowest, 7) * scale


def signed_top(groups: np.ndarray) -> np.ndarray:
    return np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)[:, 0]


def fitted(groups: np.ndarray) -> np.ndarray:
    levels = np.clip(np.rint(groups * inverse(signed_top(groups) / -8)[:, None]), -8, 7)
    return scaled(groups, (groups * levels).sum(1) / (levels**2).sum(1), -8)


def asymmetric(groups: np.ndarray) -> np.ndarray:
    low, high = groups.min(1), groups.max(1)
    step, low = half((high - low) / 15)[:, None], half(low)[:, None]
    return np.clip(np.rint((groups - low) / step), 0, 15) * step + low


def sixteens(groups: np.ndarray) -> np.ndarray:
    small = groups.reshape(-1, 16)
    return scaled(small, signed_top(small) / -8, -8).reshape(groups.shape)


WAYS: dict[str, tuple[float, Rounding]] = {
    "symmetric, 15 levels (_1)": (4.5, lambda g: scaled(g, np.abs(g).max(1) / 7, -7)),
    "16 levels, signed scale (Q4_0)": (4.5, lambda g: scaled(g, signed_top(g) / -8, -8)),
    "the same, fitted": (4.5, fitted),
    "searched (_hq)": (4.5, lambda g: scaled(g, searched_scale(g, 8), -8)),
    "asymmetric": (5.0, asymmetric),
    "Q4_0 in groups of 16": (5.0, sixteens),
}


def main() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "Gaussian": rng.standard_normal((20000, 32)).astype(np.float32),
        "t": rng.standard_t(5, (20000, 32)).astype(np.float32),
    }
    print(f"{'':32}{'bits':>6}" + "".join(f"{name:>10}" for name in weights))
    for name, (bits, rounding) in WAYS.items():
        errors = [np.sqrt(((rounding(g) - g) ** 2).sum() / (g**2).sum()) for g in weights.values()]
        print(f"{name:32}{bits:6}" + "".join(f"{100 * e:9.2f}%" for e in errors))


if __name__ == "__main__":
    main()
