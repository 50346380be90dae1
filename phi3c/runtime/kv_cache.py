"""The paged KV cache: page tensors, the page table over them, and the inputs of a forward.

Pages are plain tensors that the compiled functions update in place, one `[blocks, 2, kv_heads,
head_dim·16]` per layer. A page is one or more blocks of 16 tokens; the kernels see blocks only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import tvm

from ..errors import InputError, SequenceError
from ..manifest import Manifest
from ..memory import kv_bytes, memory
from .device import RunDevice
from .page_table import Append, Copy, PageTable

CopySlots = Callable[[np.ndarray, np.ndarray, object], None]


class PagedKVCache:
    """Keys and values of several sequences. Made by `CompiledPhi3.create_paged_kv_cache`."""

    def __init__(
        self,
        manifest: Manifest,
        device: RunDevice,
        copy_slots: CopySlots,
        max_batch_size: int,
        max_total_seq_len: int,
        prefill_chunk_size: int,
        page_size: int,
        support_sliding_window: bool,
    ):
        config, layout, limits = manifest.config, manifest.kv_layout, manifest.limits
        _check("max_batch_size", max_batch_size, limits.max_batch_size)
        _check("prefill_chunk_size", prefill_chunk_size, limits.prefill_chunk_size)
        _check("max_total_seq_len", max_total_seq_len, 2**31 - 1)
        if type(page_size) is not int or page_size < 1 or page_size % layout.block_tokens:
            raise InputError(
                f"page_size: found {page_size!r}; accepted: a multiple of {layout.block_tokens}"
            )
        if support_sliding_window and config.sliding_window is None:
            raise InputError(
                "support_sliding_window: found True; accepted: False, as this model's "
                "sliding_window is null"
            )
        need = memory(manifest, 0)  # of which little may be in memory yet
        parts = {"pages": kv_bytes(layout, max_total_seq_len, page_size), "weights": need.weights}
        parts |= {"workspace": need.workspace, "adapters": need.adapters}
        parts = {name: size for name, size in parts.items() if size or name != "adapters"}
        device.check_memory(f"KV cache for {max_total_seq_len} tokens", parts)
        num_pages = -(-max_total_seq_len // page_size)
        self._table = PageTable(
            config, num_pages, page_size, max_batch_size, prefill_chunk_size, limits.context_length
        )
        self._block_tokens = layout.block_tokens
        self._blocks_per_page = page_size // layout.block_tokens
        self._copy_slots = copy_slots
        self._appends: list[Append] | None = None
        self._max_loras = manifest.adapters.max_loras if manifest.adapters else 0
        self._token_slot: np.ndarray | None = None
        shape = (num_pages * self._blocks_per_page, *layout.page_shape)
        what = f"a layer's pages for {max_total_seq_len} tokens"
        device.check_buffer(what, shape, layout.dtype)
        # Not zeroed: the kernels never use a slot that no token was written to.
        self.pages = tvm.runtime.convert(
            [tvm.runtime.empty(shape, layout.dtype, device.tvm) for _ in range(layout.layers)]
        )

    # Sequences

    def add_sequence(
        self,
        seq_id: int,
        max_length: int | None = None,
        pages: Sequence[int] = (),
        dropped: int = 0,
    ) -> None:
        """An empty sequence, or one that begins with the tokens of held `pages` (`hold_page`).

        dropped: pages before those, whose tokens have left the sliding window.
        max_length: tokens it may grow to. If that passes original_max_position_embeddings, the
        sequence uses LongRoPE's long factors from its first token; else it may not pass it.
        Raises SequenceError (exists, or the window needs what is dropped), ContextLengthError.
        """
        self._idle("add_sequence")
        self._table.add(seq_id, max_length, pages, dropped)

    def remove_sequence(self, seq_id: int) -> None:
        """Forget a sequence and free the pages that no fork shares. Raises SequenceError."""
        self._idle("remove_sequence")
        self._table.remove(seq_id)

    def fork_sequence(self, parent: int, child: int, position: int = -1) -> None:
        """A new sequence of the parent's first `position` tokens (−1: all of them).

        Pages are shared and copied when one of the two writes. Raises SequenceError.
        """
        self._idle("fork_sequence")
        self._table.fork(parent, child, position)

    def popn(self, seq_id: int, n: int) -> None:
        """Drop the last n tokens. Raises SequenceError, also where a freed window is needed."""
        self._idle("popn")
        self._table.popn(seq_id, n)

    def commit_accepted_token_tree_nodes(
        self, seq_ids: Sequence[int], leaf_indices: Sequence[int]
    ) -> None:
        """Keep, of each sequence's last forward, the path from the context to a leaf (−1: none).

        leaf_indices: index of the path's last token among that forward's tokens of the sequence.
        Raises SequenceError, InputError.
        """
        self._idle("commit_accepted_token_tree_nodes")
        self._copy(self._table.commit(_ints(seq_ids), _ints(leaf_indices)))

    def sequence_length(self, seq_id: int) -> int:
        """Committed tokens. Raises SequenceError."""
        return self._table.length(seq_id)

    @property
    def page_size(self) -> int:
        return self._table.page_size

    @property
    def num_pages(self) -> int:
        return self._table.pool.num_pages

    @property
    def num_free_pages(self) -> int:
        return self._table.pool.num_free

    # Pages that outlive their sequences

    def full_pages(self, seq_id: int) -> tuple[int, list[int]]:
        """(pages at the front that left the window, the pages after them that tokens fill)."""
        return self._table.full_pages(seq_id)

    def sequence_pages(self, seq_id: int) -> list[int]:
        """Every page that a sequence holds."""
        return self._table.pages(seq_id)

    def hold_page(self, page: int) -> None:
        """Keeps a full page of a sequence, whatever becomes of it, until `drop_page`."""
        self._table.pool.hold(page)

    def drop_page(self, page: int) -> None:
        """Gives a held page back."""
        self._table.pool.drop(page)

    def is_held(self, page: int) -> bool:
        """Whether `hold_page` keeps it."""
        return self._table.pool.is_held(page)

    def is_idle(self, page: int) -> bool:
        """Whether it is held, and no sequence has it."""
        return self._table.pool.is_idle(page)

    @property
    def num_idle_pages(self) -> int:
        return self._table.pool.num_idle

    def page_owners(self, page: int) -> int:
        """Sequences and holders of a page; 0: it is free."""
        return self._table.pool.owners(page)

    # Forwards

    @contextmanager
    def forward(
        self,
        seq_ids: Sequence[int],
        append_lengths: Sequence[int],
        tree_parents: Sequence[int] | None = None,
        token_slot: Sequence[int] | None = None,
    ) -> Iterator[PagedKVCache]:
        """`begin_forward` … `end_forward`; if the block raises, its tokens are taken back."""
        self.begin_forward(seq_ids, append_lengths, tree_parents, token_slot)
        try:
            yield self
        except BaseException:
            self._abort()
            raise
        self.end_forward()

    def begin_forward(
        self,
        seq_ids: Sequence[int],
        append_lengths: Sequence[int],
        tree_parents: Sequence[int] | None = None,
        token_slot: Sequence[int] | None = None,
    ) -> None:
        """Make room for append_lengths[i] new tokens of sequence seq_ids[i].

        tree_parents: one entry per new token, the index (within its sequence's new tokens) of the
        token before it, −1 for the context; None for chains. A tree with branches must be
        committed before the sequence goes on. token_slot: the adapter's slot of each new token, −1
        for the base model; None: all −1.
        Raises CacheFullError, ContextLengthError, RopeFactorError, SequenceError or InputError;
        then nothing has changed.
        """
        self._idle("begin_forward")
        seq_ids, append_lengths = _ints(seq_ids), _ints(append_lengths)
        slots = self._checked_slots(token_slot, sum(append_lengths))
        parents = None if tree_parents is None else _ints(tree_parents)
        appends, copy = self._table.begin(seq_ids, append_lengths, parents)
        self._appends, self._token_slot = appends, slots
        try:
            self._copy(copy)
        except BaseException:
            self._abort()
            raise

    def end_forward(self) -> None:
        """The forward's tokens are now part of their sequences. Raises SequenceError."""
        self._table.end(self._current())
        self._appends = None

    @property
    def forward_lengths(self) -> list[int]:
        """New tokens of each sequence in the current forward. Raises SequenceError."""
        return [append.tree.size for append in self._current()]

    @property
    def forward_is_chain(self) -> bool:
        return all(append.tree.parents is None for append in self._current())

    @property
    def forward_token_slot(self) -> np.ndarray | None:
        """Adapter slots of the current forward's tokens `[n]` int32; None: all are the base's."""
        return self._token_slot

    def forward_inputs(self) -> dict[str, np.ndarray]:
        """The inputs of the compiled functions that describe the current forward, int32, by name.

        n = new tokens, b = sequences, m = listed blocks: block_indptr `[b+1]`, block_ids `[m]`,
        kv_start, kv_length `[b]`, query_indptr `[b+1]`, positions, slots, factor_set, enter,
        leave `[n]` (phi3c/model/attention_inputs.py says what each means to a kernel).
        """
        appends = self._current()
        table, size = self._table, self._table.page_size
        sequences = [a.sequence for a in appends]
        trees = [a.tree for a in appends]
        blocks = [self._blocks(append) for append in appends]
        inputs = {
            "block_indptr": _indptr([len(b) for b in blocks]),
            "block_ids": np.concatenate(blocks),
            "kv_start": [s.dropped * size for s in sequences],
            "kv_length": [s.base for s in sequences],
            "query_indptr": _indptr([t.size for t in trees]),
            "positions": np.concatenate(
                [s.base + t.depth for s, t in zip(sequences, trees, strict=True)]
            ),
            "slots": np.concatenate(
                [table.slots(s, s.base, t.size) for s, t in zip(sequences, trees, strict=True)]
            ),
            "factor_set": np.concatenate(
                [np.full(t.size, s.long_factors) for s, t in zip(sequences, trees, strict=True)]
            ),
            "enter": np.concatenate([t.enter for t in trees]),
            "leave": np.concatenate([t.leave for t in trees]),
        }
        return {name: np.asarray(value, np.int32) for name, value in inputs.items()}

    def _blocks(self, append: Append) -> np.ndarray:
        """Those that tokens fill: large pages may have more than a whole context takes."""
        sequence = append.sequence
        first = np.asarray(sequence.pages, np.int32)[:, None] * self._blocks_per_page
        every = (first + np.arange(self._blocks_per_page, dtype=np.int32)).ravel()
        tokens = sequence.base + append.tree.size - sequence.dropped * self._table.page_size
        return every[: -(-tokens // self._block_tokens)]

    def _checked_slots(self, token_slot: Sequence[int] | None, n: int) -> np.ndarray | None:
        """None if all are −1. Raises InputError."""
        if token_slot is None:
            return None
        slots = _ints(token_slot)
        if len(slots) != n:
            raise InputError(f"token_slot: found {len(slots)} entries; accepted: {n}, one a token")
        most = self._max_loras - 1
        if wrong := [slot for slot in slots if not -1 <= slot <= most]:
            accepted = f"-1 to {most}" if most >= 0 else "-1, as the artifact has max_loras 0"
            raise InputError(f"token_slot: found {wrong[0]}; accepted: {accepted}")
        return None if max(slots, default=-1) == -1 else np.array(slots, np.int32)

    def _current(self) -> list[Append]:
        if self._appends is None:
            raise SequenceError("no forward: call begin_forward, or use `with cache.forward(...)`")
        return self._appends

    def _abort(self) -> None:
        self._table.abort(self._current())
        self._appends = None

    def _idle(self, what: str) -> None:
        if self._appends is not None:
            raise SequenceError(f"{what}: a forward is under way; call end_forward first")

    def _copy(self, copy: Copy) -> None:
        if copy.source:
            source, target = np.asarray(copy.source, np.int32), np.asarray(copy.target, np.int32)
            self._copy_slots(source, target, self.pages)


def _ints(values: Sequence[int]) -> list[int]:
    try:
        return [int(v) for v in np.asarray(values).reshape(-1).tolist()]
    except (TypeError, ValueError):
        raise InputError(f"found {values!r}; accepted: integers") from None


def _indptr(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _check(name: str, value: int, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise InputError(f"{name}: found {value!r}; accepted: an integer from 1 to {most}")
