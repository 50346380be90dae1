"""Phi-3 in plain numpy, without a cache: the project's own definition of right.

Float64 throughout, but for the rotary angles, which are float32 as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .config import Phi3Config

Weights = Callable[[str], np.ndarray]  # Hugging Face name → array


def reference_logits(config: Phi3Config, weights: Weights, token_ids: np.ndarray) -> np.ndarray:
    """Token ids `[n]` of one sequence → logits of every position `[n, vocab]`, float64.

    LongRoPE's factors are chosen by n, for all positions (Ding et al. 2024; transformers' Phi-3).
    """
    c = config
    n = len(token_ids)
    embedding = _weight(weights, "model.embed_tokens.weight")  # [vocab, hidden]
    cos, sin = _rope(c, n)  # [n, rotary_dim/2]
    visible = _visible(c, n)  # [n, n]
    x = embedding[token_ids]  # [n, hidden]
    for i in range(c.num_hidden_layers):

        def w(name: str, i: int = i) -> np.ndarray:
            return _weight(weights, f"model.layers.{i}.{name}.weight")

        y = _rms_norm(x, w("input_layernorm"), c.rms_norm_eps)
        x = (
            x
            + _attention(c, y @ w("self_attn.qkv_proj").T, cos, sin, visible)
            @ w("self_attn.o_proj").T
        )
        y = _rms_norm(x, w("post_attention_layernorm"), c.rms_norm_eps)
        gate, up = np.split(y @ w("mlp.gate_up_proj").T, 2, axis=-1)  # [n, intermediate] each
        x = x + (up * gate / (1 + np.exp(-gate))) @ w("mlp.down_proj").T
    x = _rms_norm(x, _weight(weights, "model.norm.weight"), c.rms_norm_eps)
    head = embedding if c.tie_word_embeddings else _weight(weights, "lm_head.weight")
    return x @ head.T


def _weight(weights: Weights, name: str) -> np.ndarray:
    return np.asarray(weights(name)).astype(np.float64)


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rope(c: Phi3Config, n: int) -> tuple[np.ndarray, np.ndarray]:
    inv_freq = c.inv_freq(long=c.needs_long_factors(n))
    angles = np.arange(n, dtype=np.float32)[:, None] * inv_freq
    return np.cos(angles) * c.attention_factor, np.sin(angles) * c.attention_factor


def _visible(c: Phi3Config, n: int) -> np.ndarray:
    """visible[p, k]: whether the query at p sees the key at k."""
    p, k = np.arange(n)[:, None], np.arange(n)[None, :]
    return (k <= p) & (k > p - (c.sliding_window or n))


def _rotate(c: Phi3Config, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x `[heads, n, head_dim]`: the first rotary_dim of each head, in rotate_half style."""
    half = c.rotary_dim // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _attention(
    c: Phi3Config, qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, visible: np.ndarray
) -> np.ndarray:
    """qkv `[n, (heads + 2·kv_heads)·head_dim]` → `[n, heads·head_dim]`."""
    n, heads, kv_heads = len(qkv), c.num_attention_heads, c.num_key_value_heads
    parts = qkv.reshape(n, heads + 2 * kv_heads, c.head_dim).swapaxes(0, 1)  # [heads, n, dim]
    q, k, v = np.split(parts, [heads, heads + kv_heads])
    q, k = _rotate(c, q, cos, sin), _rotate(c, k, cos, sin)
    k, v = (np.repeat(x, heads // kv_heads, axis=0) for x in (k, v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(c.head_dim)  # [heads, n, n]
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ v).swapaxes(0, 1).reshape(n, heads * c.head_dim)
