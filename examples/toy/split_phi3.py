"""A Phi-3 model whose fused projections are separate modules, as in split checkpoints.

Adapters trained on such a model have the unfused names: ``q_proj``, ``k_proj``, ``v_proj``,
``gate_proj`` and ``up_proj``.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP


class SplitAttention(Phi3Attention):
    """Attention whose queries, keys and values have their own projections."""

    def qkv_proj(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the fused projection gives."""
        return torch.cat([self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)], dim=-1)


class SplitMLP(Phi3MLP):
    """An MLP whose gate and up projections are two."""

    def gate_up_proj(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the fused projection gives."""
        return torch.cat([self.gate_proj(hidden), self.up_proj(hidden)], dim=-1)


def _split(module: nn.Module, fused: str, parts: dict[str, int]) -> None:
    """Replaces the projection ``fused`` by ``parts``: names, in the order of its rows, and rows."""
    weight = getattr(module, fused).weight.data
    delattr(module, fused)
    for (name, rows), part in zip(parts.items(), weight.split(list(parts.values())), strict=True):
        projection = nn.Linear(weight.shape[1], rows, bias=False, dtype=weight.dtype)
        projection.weight.data.copy_(part)
        setattr(module, name, projection)


def split_projections(model: Phi3ForCausalLM) -> None:
    """Splits the fused projections of every layer in place. The function stays what it was."""
    config = model.config
    for layer in model.model.layers:
        queries = config.num_attention_heads * layer.self_attn.head_dim
        keys = config.num_key_value_heads * layer.self_attn.head_dim
        _split(layer.self_attn, "qkv_proj", {"q_proj": queries, "k_proj": keys, "v_proj": keys})
        layer.self_attn.__class__ = SplitAttention
        width = config.intermediate_size
        _split(layer.mlp, "gate_up_proj", {"gate_proj": width, "up_proj": width})
        layer.mlp.__class__ = SplitMLP
