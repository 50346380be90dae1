"""The pools that hold adapters while a model runs, and the step from plain arrays to them.

An adapter adds B(A x) to a linear y = W x. Of every layer and target there are two pools, with a
slot for each of max_loras adapters; a smaller rank is padded with zeros to max_rank:

A `[max_loras, max_rank, in]`, a row per rank, as files have it.
B `[max_loras, ceil(out/16), max_rank, 16]`: panels of sixteen output features side by side, as in
the weights of a linear, so that a task which computes some columns reads one piece of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..config import Phi3Config
from ..errors import ConfigError

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # in the order of the pools
RANKS = (8, 16, 32, 64, 128)  # what max_rank may be
MAX_LORAS = 1024  # the most that max_loras may be
PANEL = 16  # output features in a panel of B (kernels/layout.py)

Shape = tuple[int, ...]


def target_shape(config: Phi3Config, target: str) -> tuple[int, int]:
    """(out, in) of a target's weight.

    Rows of qkv_proj: q heads, k heads, v heads; of gate_up_proj: gate, up.
    """
    c = config
    heads = c.num_attention_heads * c.head_dim
    return {
        "qkv_proj": (heads + 2 * c.num_key_value_heads * c.head_dim, c.hidden_size),
        "o_proj": (c.hidden_size, heads),
        "gate_up_proj": (2 * c.intermediate_size, c.hidden_size),
        "down_proj": (c.hidden_size, c.intermediate_size),
    }[target]


def slot_shapes(config: Phi3Config, target: str, max_rank: int) -> tuple[Shape, Shape]:
    """Shapes of one slot of a target's pools: A, B."""
    out_features, in_features = target_shape(config, target)
    return (max_rank, in_features), (-(-out_features // PANEL), max_rank, PANEL)


def layer_targets(config: Phi3Config) -> Iterator[tuple[int, str]]:
    """(layer, target) in the order of the pools."""
    return ((i, target) for i in range(config.num_hidden_layers) for target in TARGETS)


def pack_a(a: np.ndarray, max_rank: int, dtype: str) -> np.ndarray:
    """A `[r, in]` → a slot of its pool."""
    packed = np.zeros((max_rank, a.shape[1]), dtype)
    packed[: len(a)] = a
    return packed


def pack_b(b: np.ndarray, max_rank: int, dtype: str) -> np.ndarray:
    """B `[out, r]` → a slot of its pool; missing rows of the last panel are zero."""
    out_features, rank = b.shape
    panels = -(-out_features // PANEL)
    padded = np.zeros((panels * PANEL, max_rank), dtype)
    padded[:out_features, :rank] = b
    return np.ascontiguousarray(padded.reshape(panels, PANEL, max_rank).swapaxes(1, 2))


@dataclass(frozen=True)
class AdapterLayout:
    """What an artifact has room for: max_loras adapters of ranks up to max_rank.

    dtype: of the pools; bytes_per_slot: of one adapter in all of them.
    """

    max_loras: int
    max_rank: int
    dtype: str
    bytes_per_slot: int

    @classmethod
    def of(
        cls, config: Phi3Config, max_loras: int, max_rank: int, dtype: str
    ) -> AdapterLayout | None:
        """None for max_loras 0. Raises ConfigError where a pool has more than 2^31 elements."""
        if not max_loras:
            return None
        shapes = [s for _, t in layer_targets(config) for s in slot_shapes(config, t, max_rank)]
        most = (2**31 - 1) // max(map(math.prod, shapes))
        if max_loras > most:
            raise ConfigError(
                f"max_loras: found {max_loras}; accepted: up to {most} of rank {max_rank} for this "
                "model"
            )
        size = sum(map(math.prod, shapes)) * np.dtype(dtype).itemsize
        return cls(max_loras, max_rank, dtype, size)

    def pool_shapes(self, config: Phi3Config) -> list[Shape]:
        """Of all pools, in order: by layer, then by target, A before B."""
        return [
            (self.max_loras, *slot)
            for _, target in layer_targets(config)
            for slot in slot_shapes(config, target, self.max_rank)
        ]
