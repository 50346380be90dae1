"""What an artifact takes of a machine's memory, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from .manifest import KVLayout, Limits, Manifest, WeightsManifest
from .tensor_file import tensor_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: mapped, and shared by all processes that run the artifact; kv_cache: pages;
    workspace: what the largest function plans for its intermediate results; adapters: LoRA slots.
    """

    weights: int
    kv_cache: int
    workspace: int
    adapters: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.workspace + self.adapters


def memory(manifest: Manifest, max_total_seq_len: int) -> Memory:
    """At the artifact's limits, with a KV cache of max_total_seq_len tokens."""
    return Memory(
        weights=weights_bytes(manifest),
        kv_cache=kv_bytes(manifest.kv_layout, max_total_seq_len, manifest.kv_layout.block_tokens),
        workspace=max((f.workspace_bytes for f in manifest.functions.values()), default=0),
        adapters=adapter_bytes(manifest),
    )


def weights_bytes(manifest: WeightsManifest) -> int:
    """Of all parameters."""
    return sum(tensor_bytes(info.shape, info.dtype) for info in manifest.parameters)


def adapter_bytes(manifest: Manifest) -> int:
    """Of the slots of adapters, filled or not."""
    layout = manifest.adapters
    return layout.max_loras * layout.bytes_per_slot if layout else 0


def kv_bytes(layout: KVLayout, max_total_seq_len: int, page_size: int) -> int:
    """Of the pages of `page_size` tokens that hold max_total_seq_len tokens."""
    return -(-max_total_seq_len // page_size) * page_size * layout.bytes_per_token


def default_cache_tokens(limits: Limits) -> int:
    """Tokens that a KV cache holds if nothing else is asked for."""
    return min(8192, limits.max_batch_size * limits.context_length)


def sequence_cache_tokens(manifest: Manifest, page_size: int) -> int:
    """Tokens of KV pages that one sequence of the whole context can fill.

    The runtime keeps window + chunk tokens of a sliding window; both ends may lie within a page.
    """
    limits, window = manifest.limits, manifest.config.sliding_window
    pages = -(-limits.context_length // page_size)
    if window is not None:
        pages = min(pages, -(-(window + limits.prefill_chunk_size) // page_size) + 2)
    return pages * page_size


def in_units(size: int) -> str:
    """7.64 GB; small sizes in MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
