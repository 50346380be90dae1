"""What attention needs to know of a forward: the page table and its companions, as plain tensors.

Legend: n = new tokens of all sequences, b = sequences, m = listed KV blocks. All int32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from tvm.relax.frontend import nn


@dataclass(frozen=True)
class DecodeInputs:
    """One new token per sequence (n = b)."""

    block_indptr: nn.Tensor  # [b+1] first entry of each sequence in block_ids
    block_ids: nn.Tensor  # [m] KV blocks of each sequence, oldest first
    kv_start: nn.Tensor  # [b] position of the first listed slot
    positions: nn.Tensor  # [n] of the new tokens
    slots: nn.Tensor  # [n] where their keys and values go: block·16 + offset
    factor_set: nn.Tensor  # [n] LongRoPE factors: 0 short, 1 long


@dataclass(frozen=True)
class PrefillInputs(DecodeInputs):
    """Any number of new tokens per sequence: chunks, chains, trees."""

    query_indptr: nn.Tensor  # [b+1] first new token of each sequence
    kv_length: nn.Tensor  # [b] tokens in the cache before this forward
    enter: nn.Tensor  # [n] depth-first entry of the token in its sequence's tree
    leave: nn.Tensor  # [n] first entry after the token's subtree


_SEQUENCE_FIELDS = ("kv_start", "kv_length")
_INDPTR_FIELDS = ("block_indptr", "query_indptr")


def input_specs(
    kind: type[DecodeInputs], n: int | str, b: int | str
) -> list[tuple[str, nn.spec.Tensor]]:
    """(name, spec) of each field of `kind`, in order, for n new tokens of b sequences."""

    def extent(name: str) -> int | str:
        if name == "block_ids":
            return "m"
        if name in _INDPTR_FIELDS:
            return "b_plus_1" if isinstance(b, str) else b + 1
        return b if name in _SEQUENCE_FIELDS else n

    return [(f.name, nn.spec.Tensor([extent(f.name)], "int32")) for f in fields(kind)]
