"""Slow twins of the kernels: numpy, float64, one token at a time.

They read and write the memory layouts by indexing, and share no code with phi3c.kernels.
Legend: n = tokens, pages `[blocks, 2, kv_heads, head_dim·16]`, a slot is block·16 + offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 16  # tokens in a KV block, and output features in a weight panel


# Weights


def unpacked(panels: np.ndarray, out_features: int) -> np.ndarray:
    """`[panels, in, 16]` → `[out, in]`: row r is column r % 16 of panel r // 16."""
    rows = [panels[r // BLOCK, :, r % BLOCK] for r in range(out_features)]
    return np.array(rows, np.float64)


def embedding(ids: np.ndarray, panels: np.ndarray) -> np.ndarray:
    return np.array([panels[i // BLOCK, :, i % BLOCK] for i in ids], np.float64)


def linear(x, panels, out_features: int, residual=None) -> np.ndarray:
    return row_major_linear(x, unpacked(panels, out_features), residual)


def row_major_linear(x, weight, residual=None) -> np.ndarray:
    """Of a weight `[out, in]`."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    return y if residual is None else y + residual


def group_weight(words: np.ndarray, scale: np.ndarray, bits: int, zero: int) -> np.ndarray:
    """`[out, in]` of a GPU's groups: words `[out, groups, bits]`, scale `[out, groups]`."""

    def bit_field(word, index: int, width: int) -> int:
        return int(word) >> index * width & (1 << width) - 1

    def stored(group, k: int) -> int:
        if bits == 3:
            return bit_field(group[k // 16], k % 16, 2) | bit_field(group[2], k, 1) << 2
        per_word = 32 // bits
        return bit_field(group[k // per_word], k % per_word, bits)

    out, groups, _ = words.shape
    q = [[stored(words[o, k // 32], k % 32) for k in range(groups * 32)] for o in range(out)]
    return (np.array(q, np.float64) - zero) * np.repeat(scale.astype(np.float64), 32, axis=1)


# Rows


def take_rows(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.array([x[p] for p in positions], np.float64)


def last_row(x: np.ndarray) -> np.ndarray:
    return x[-1:].astype(np.float64)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * weight


def block_maxima(logits: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest logit of each block of `[n, vocab]` and its token id, `[n, blocks]`; a NaN before
    all, the lowest id of equals."""
    tops = np.zeros((len(logits), blocks), np.float32)
    ids = np.zeros((len(logits), blocks), np.int64)
    for i, row in enumerate(logits):
        for block in range(blocks):
            tokens = range(block, len(row), blocks)
            ids[i, block] = max(tokens, key=lambda t: (np.isnan(row[t]), row[t], -t))
            tops[i, block] = row[ids[i, block]]
    return tops, ids


def silu_mul(gate_up: np.ndarray) -> np.ndarray:
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    with np.errstate(over="ignore"):
        return up * gate / (1 + np.exp(-gate))


# Adapters: pools a `[slots, max_rank, in]`, b `[slots, panels, max_rank, 16]`


def shrink(x: np.ndarray, a: np.ndarray, slot, rank) -> np.ndarray:
    """`[n, max_rank]`; what is past a row's rank is 0."""
    h = np.matmul(np.take(a, slot, axis=0).astype(np.float64), x[:, :, None])[:, :, 0]
    return np.where(np.arange(a.shape[1]) < np.asarray(rank)[:, None], h, 0)


def expand(h: np.ndarray, b: np.ndarray, slot, rank, out_features: int) -> np.ndarray:
    """`[n, out]`: what the adapters add to a linear's output."""
    columns = b.swapaxes(2, 3).reshape(len(b), -1, b.shape[2])  # [slots, panels·16, max_rank]
    used = np.where(np.arange(b.shape[2]) < np.asarray(rank)[:, None], h, 0)
    y = np.matmul(np.take(columns, slot, axis=0).astype(np.float64), used[:, :, None])
    return y[:, :out_features, 0]


# Rotary embedding


def rope_table(positions, factor_set, inv_freq, attention_factor: float) -> np.ndarray:
    """The angle is rounded to float32, as in transformers; its cosine and sine are not."""
    angles = np.array(
        [np.float32(p) * inv_freq[s] for p, s in zip(positions, factor_set, strict=True)],
        np.float32,
    ).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * attention_factor


def rotated(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """One head's vector: of its first `len(table)` dimensions, i turns with i + half."""
    half = len(table) // 2
    x = x.astype(np.float64)
    y = x.copy()
    for i in range(half):
        cos, sin = float(table[i]), float(table[half + i])
        y[i] = x[i] * cos - x[half + i] * sin
        y[half + i] = x[half + i] * cos + x[i] * sin
    return y


def rope_append(qkv, table, slots, pages, heads: int, kv_heads: int, head_dim: int):
    """→ (q, pages after the append); q is scaled for powers of two."""
    pages = pages.copy()
    q = np.zeros((len(qkv), heads * head_dim))
    scale = np.log2(np.e) / np.sqrt(head_dim)
    for t, slot in enumerate(slots):
        vectors = qkv[t].reshape(heads + 2 * kv_heads, head_dim)
        q[t] = np.concatenate([rotated(v, table[t]) * scale for v in vectors[:heads]])
        keys, values = keys_and_values(pages, slot)
        for h in range(kv_heads):
            keys[h] = rotated(vectors[heads + h], table[t])
            values[h] = vectors[heads + kv_heads + h]
    return q, pages


# The paged cache


def keys_and_values(pages: np.ndarray, slot: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of a slot's keys and values, `[kv_heads, head_dim]` each."""
    block, offset = divmod(int(slot), BLOCK)
    kv_heads, features = pages.shape[2:]
    keys = pages[block, 0].reshape(kv_heads, features // BLOCK, BLOCK)
    values = pages[block, 1].reshape(kv_heads, BLOCK, features // BLOCK)
    return keys[:, :, offset], values[:, offset, :]


def copy_slots(pages: np.ndarray, source, target) -> np.ndarray:
    """Pages after the copies, made one after another."""
    pages = pages.copy()
    for s, t in zip(source, target, strict=True):
        for new, old in zip(keys_and_values(pages, t), keys_and_values(pages, s), strict=True):
            new[:] = old
    return pages


@dataclass(frozen=True)
class PagedSequence:
    """A sequence's part of a forward.

    length: tokens before it; parents: of its new tokens, −1 for the context; start: position of
    the first token that is still held; blocks: where the tokens from `start` on lie, in order.
    """

    length: int
    parents: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]

    def slot(self, index: int) -> int:
        """Of the index-th token: old ones first, then the new ones in their order."""
        assert index >= self.start, "the window reaches tokens that were dropped"
        block, offset = divmod(index - self.start, BLOCK)
        return self.blocks[block] * BLOCK + offset

    def path(self, token: int) -> list[int]:
        """The new tokens from the context to `token`."""
        return [] if token < 0 else [*self.path(self.parents[token]), token]

    def visible_slots(self, token: int, window: int | None) -> list[int]:
        """Of the last `window` tokens before and including a new token, on its own path."""
        indices = [*range(self.length), *(self.length + t for t in self.path(token))]
        indices = indices[-window:] if window else indices
        return [self.slot(i) for i in indices]


def attention(q, pages, sequences: list[PagedSequence], window: int | None, head_dim: int):
    """Both attention kernels: q `[n, heads·head_dim]` of all new tokens, scaled → that shape."""
    out = np.zeros(q.shape)
    queries = [(s, token) for s in sequences for token in range(len(s.parents))]
    for row, (sequence, token) in enumerate(queries):
        slots = sequence.visible_slots(token, window)
        kv = [keys_and_values(pages, slot) for slot in slots]
        keys = np.array([k for k, _ in kv], np.float64)  # [visible, kv_heads, head_dim]
        values = np.array([v for _, v in kv], np.float64)
        group = q.shape[1] // head_dim // keys.shape[1]
        for h, query in enumerate(q[row].astype(np.float64).reshape(-1, head_dim)):
            scores = keys[:, h // group] @ query
            weights = np.exp2(scores - scores.max())
            head = weights / weights.sum() @ values[:, h // group]
            out[row, h * head_dim : (h + 1) * head_dim] = head
    return out
