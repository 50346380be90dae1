"""Which sequence holds which pages: the host side of the KV cache, without tensors.

A sequence's tokens lie in its pages in order; `dropped` pages at its front have left the sliding
window and are freed. Forked sequences share pages; a shared page is copied before it is written.
Every change is planned and checked first, so that an error changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from ..config import Phi3Config
from ..errors import (
    CacheFullError,
    ContextLengthError,
    InputError,
    RopeFactorError,
    SequenceError,
)
from .page_pool import PagePool
from .token_tree import TokenTree, chain, token_tree


@dataclass
class Sequence:
    """length: committed tokens. long_factors: LongRoPE's set, fixed at the first token."""

    length: int
    long_factors: bool
    pages: list[int] = field(default_factory=list)
    dropped: int = 0
    base: int = 0  # length before the last forward
    tree: TokenTree | None = None  # new tokens of the last forward, until something else happens
    uncommitted: bool = False  # the tree has branches, and no path was accepted yet


@dataclass(frozen=True)
class Append:
    """A sequence's part of a forward."""

    seq_id: int
    sequence: Sequence
    tree: TokenTree


@dataclass(frozen=True)
class Copy:
    """Token slots (page·page_size + offset) to copy, in order."""

    source: list[int]
    target: list[int]


class PageTable:
    """Sequences and their pages.

    max_append: new tokens in a forward; context_length: tokens in a sequence.
    """

    def __init__(
        self,
        config: Phi3Config,
        num_pages: int,
        page_size: int,
        max_batch_size: int,
        max_append: int,
        context_length: int,
    ):
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self.sequences: dict[int, Sequence] = {}
        self._config = config
        self._max_batch_size = max_batch_size
        self._max_append = max_append
        self._context_length = context_length

    def add(
        self, seq_id: int, max_length: int | None, pages: Seq[int] = (), dropped: int = 0
    ) -> None:
        """A sequence whose first tokens fill `dropped` pages that left its window, and then
        `pages`, which it shares; none: an empty one.

        Long factors if `max_length` passes the original context.
        """
        self._check_new(seq_id)
        if max_length is not None and not 1 <= max_length <= self._context_length:
            raise ContextLengthError(
                f"max_length of sequence {seq_id}: found {max_length}; accepted: 1 to "
                f"{self._context_length}, the context length of this artifact"
            )
        long_factors = self._config.needs_long_factors(max_length or 0)
        length = (dropped + len(pages)) * self.page_size
        sequence = Sequence(length, long_factors, list(pages), dropped)
        self._check_window(seq_id, sequence, length)
        self.pool.share(list(pages))
        self.sequences[seq_id] = sequence

    def remove(self, seq_id: int) -> None:
        """Forget the sequence; pages that nobody shares are free again."""
        self.pool.release(self._get(seq_id).pages)
        del self.sequences[seq_id]

    def fork(self, parent_id: int, child_id: int, position: int) -> None:
        """A new sequence with the parent's first `position` tokens (−1: all), pages shared."""
        self._check_new(child_id)
        parent = self._committed(parent_id)
        length = parent.length if position == -1 else position
        if not 0 <= length <= parent.length:
            raise SequenceError(
                f"fork position of sequence {parent_id}: found {position}; accepted: -1 or 0 to "
                f"{parent.length}"
            )
        self._check_window(parent_id, parent, length)
        dropped = min(parent.dropped, self._pages_for(length))
        pages = parent.pages[: self._pages_for(length) - dropped]
        self.pool.share(pages)
        self.sequences[child_id] = Sequence(length, parent.long_factors, list(pages), dropped)

    def popn(self, seq_id: int, n: int) -> None:
        """Drop the last n tokens."""
        sequence = self._committed(seq_id)
        if not 0 <= n <= sequence.length:
            raise SequenceError(
                f"popn of sequence {seq_id}: found {n} tokens; accepted: 0 to {sequence.length}"
            )
        self._check_window(seq_id, sequence, sequence.length - n)
        self._truncate(sequence, sequence.length - n)
        sequence.tree = None

    def begin(
        self, seq_ids: Seq[int], append_lengths: Seq[int], parents: Seq[int] | None
    ) -> tuple[list[Append], Copy]:
        """Make room for a forward's tokens.

        Returns the parts and the copies to make before it runs (shared pages about to be written).
        Raises CacheFullError, ContextLengthError, RopeFactorError, SequenceError or InputError,
        and then has changed nothing.
        """
        trees = self._trees(seq_ids, append_lengths, parents)
        appends = [Append(i, self._committed(i), t) for i, t in zip(seq_ids, trees, strict=True)]
        for append in appends:
            self._check_length(append)
        drops = [self._droppable(a) for a in appends]
        news = [self._new_pages(a) for a in appends]
        released = self._released(appends, drops)
        needed = sum(news) + self._copies(appends, released)
        freed = sum(self.pool.owners(page) == n for page, n in released.items())
        if needed > self.pool.num_free + freed:
            raise CacheFullError(
                f"KV cache is full: {sum(append_lengths)} tokens need {needed} more pages of "
                f"{self.page_size} tokens, {self.pool.num_free} of {self.pool.num_pages} are free"
            )
        for append, drop in zip(appends, drops, strict=True):
            self._drop(append.sequence, drop)
        source: list[int] = []
        target: list[int] = []
        for append, new in zip(appends, news, strict=True):
            sequence = append.sequence
            if self._partly_filled(sequence) and self.pool.is_shared(sequence.pages[-1]):
                self._own_last_page(sequence, source, target)
            sequence.pages += self.pool.allocate(new)
            sequence.base, sequence.tree = sequence.length, append.tree
        return appends, Copy(source, target)

    def end(self, appends: list[Append]) -> None:
        """The forward has run: chains count as committed, trees wait for `commit`."""
        for append in appends:
            sequence = append.sequence
            if append.tree.parents is None:
                sequence.length = sequence.base + append.tree.size
            else:
                sequence.uncommitted = True

    def abort(self, appends: list[Append]) -> None:
        """The forward did not run: give back the room that was made for it."""
        for append in appends:
            append.sequence.tree = None
            self._truncate(append.sequence, append.sequence.base)

    def commit(self, seq_ids: Seq[int], leaves: Seq[int]) -> Copy:
        """Keep the path to each leaf (−1: nothing) of the last forward's tokens, drop the rest.

        Returns the slots to compact. Raises SequenceError or InputError, changing nothing.
        """
        if len(seq_ids) != len(leaves) or len(set(seq_ids)) != len(seq_ids):
            raise InputError(
                f"commit: found {len(seq_ids)} sequences and {len(leaves)} leaves; accepted: one "
                "leaf for each of different sequences"
            )
        for seq_id, leaf in zip(seq_ids, leaves, strict=True):
            tree = self._get(seq_id).tree
            if tree is None:
                raise SequenceError(f"sequence {seq_id} has no forward to commit")
            if not -1 <= leaf < tree.size:
                raise InputError(
                    f"leaf of sequence {seq_id}: found {leaf}; accepted: -1 to {tree.size - 1}"
                )
        source: list[int] = []
        target: list[int] = []
        for seq_id, leaf in zip(seq_ids, leaves, strict=True):
            sequence = self.sequences[seq_id]
            path = sequence.tree.path(leaf)
            for i, token in enumerate(path):
                if token != i:
                    source.append(self.slot(sequence, sequence.base + token))
                    target.append(self.slot(sequence, sequence.base + i))
            sequence.tree, sequence.uncommitted = None, False
            self._truncate(sequence, sequence.base + len(path))
        return Copy(source, target)

    def pages(self, seq_id: int) -> list[int]:
        """All that the sequence holds."""
        return list(self._get(seq_id).pages)

    def slot(self, sequence: Sequence, index: int) -> int:
        """Where the index-th token of the sequence lies: page·page_size + offset."""
        page = sequence.pages[index // self.page_size - sequence.dropped]
        return page * self.page_size + index % self.page_size

    def slots(self, sequence: Sequence, first: int, count: int) -> np.ndarray:
        """Where `count` tokens from the first-th on lie, `[count]`."""
        if count == 1:  # most often, and then quicker
            return np.array([self.slot(sequence, first)])
        index = np.arange(first, first + count)
        pages = np.asarray(sequence.pages)[index // self.page_size - sequence.dropped]
        return pages * self.page_size + index % self.page_size

    def full_pages(self, seq_id: int) -> tuple[int, list[int]]:
        """(pages that left the window, the pages after them that committed tokens fill)."""
        sequence = self._committed(seq_id)
        full = sequence.length // self.page_size - sequence.dropped
        return sequence.dropped, sequence.pages[: max(0, full)]

    def length(self, seq_id: int) -> int:
        """Committed tokens of the sequence."""
        return self._get(seq_id).length

    # Checks

    def _check_new(self, seq_id: int) -> None:
        if seq_id in self.sequences:
            raise SequenceError(f"sequence {seq_id} exists already")

    def _get(self, seq_id: int) -> Sequence:
        if seq_id not in self.sequences:
            raise SequenceError(f"sequence {seq_id} does not exist")
        return self.sequences[seq_id]

    def _committed(self, seq_id: int) -> Sequence:
        sequence = self._get(seq_id)
        if sequence.uncommitted:
            raise SequenceError(
                f"sequence {seq_id} has a verified tree of which no path was committed yet"
            )
        return sequence

    def _trees(
        self, seq_ids: Seq[int], append_lengths: Seq[int], parents: Seq[int] | None
    ) -> list[TokenTree]:
        if not seq_ids or len(seq_ids) != len(append_lengths):
            raise InputError(
                f"forward: found {len(seq_ids)} sequences and {len(append_lengths)} append "
                "lengths; accepted: as many of one as of the other, at least one"
            )
        if len(set(seq_ids)) != len(seq_ids):
            raise SequenceError(f"forward: a sequence is named twice in {list(seq_ids)}")
        if len(seq_ids) > self._max_batch_size:
            raise InputError(
                f"forward: found {len(seq_ids)} sequences; accepted: up to {self._max_batch_size} "
                "(max_batch_size)"
            )
        total = sum(append_lengths)
        if min(append_lengths) < 1 or total > self._max_append:
            raise InputError(
                f"forward: found append lengths {list(append_lengths)}; accepted: each at least 1, "
                f"together up to {self._max_append} (prefill_chunk_size)"
            )
        if parents is None:
            return [chain(n) for n in append_lengths]
        if len(parents) != total:
            raise InputError(
                f"tree_parents: found {len(parents)} entries; accepted: {total}, one a new token"
            )
        trees, start = [], 0
        for n in append_lengths:
            trees.append(token_tree(parents[start : start + n]))
            start += n
        return trees

    def _check_length(self, append: Append) -> None:
        total = append.sequence.length + append.tree.height
        if total > self._context_length:
            raise ContextLengthError(
                f"sequence {append.seq_id} would have {total} tokens; accepted: up to "
                f"{self._context_length}, the context length of this artifact"
            )
        if self._config.needs_long_factors(total) and not append.sequence.long_factors:
            raise RopeFactorError(
                f"sequence {append.seq_id} would have {total} tokens, past "
                f"original_max_position_embeddings "
                f"{self._config.original_max_position_embeddings}, but its keys have the short "
                "LongRoPE factors; add it again with a max_length that says so, and recompute it"
            )

    def _check_window(self, seq_id: int, sequence: Sequence, length: int) -> None:
        """The next token after `length` must still find its whole window."""
        window = self._config.sliding_window
        first = sequence.dropped * self.page_size
        if window is not None and first > max(0, length - window + 1):
            raise SequenceError(
                f"sequence {seq_id} cannot go back to {length} tokens: its tokens before {first} "
                f"have left the sliding window of {window} and are freed"
            )

    # Pages

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _new_pages(self, append: Append) -> int:
        sequence = append.sequence
        held = sequence.dropped + len(sequence.pages)
        return self._pages_for(sequence.length + append.tree.size) - held

    def _partly_filled(self, sequence: Sequence) -> bool:
        """Whether the next token falls into a page that holds earlier ones."""
        return sequence.length % self.page_size != 0

    def _released(self, appends: list[Append], drops: list[int]) -> Counter[int]:
        """Page → how many sequences of this forward drop it."""
        return Counter(
            page for a, n in zip(appends, drops, strict=True) for page in a.sequence.pages[:n]
        )

    def _copies(self, appends: list[Append], released: Counter[int]) -> int:
        """Pages to copy before they are written; the last of several owners keeps the original."""
        writers = Counter(a.sequence.pages[-1] for a in appends if self._partly_filled(a.sequence))
        return sum(
            min(n, self.pool.owners(page) - released[page] - 1) for page, n in writers.items()
        )

    def _droppable(self, append: Append) -> int:
        """Pages at the front that no token of this forward, nor of the next few, can see.

        The last window + max_append tokens stay, so that what a forward added can be popped.
        """
        window = self._config.sliding_window
        if window is None:
            return 0
        sequence = append.sequence
        end = sequence.length + append.tree.size
        unseen = end - window - self._max_append + 1
        return max(0, unseen // self.page_size - sequence.dropped)

    def _drop(self, sequence: Sequence, pages: int) -> None:
        self.pool.release(sequence.pages[:pages])
        del sequence.pages[:pages]
        sequence.dropped += pages

    def _own_last_page(self, sequence: Sequence, source: list[int], target: list[int]) -> None:
        old = sequence.pages[-1]
        [new] = self.pool.allocate(1)
        filled = range(sequence.length % self.page_size)
        source += [old * self.page_size + i for i in filled]
        target += [new * self.page_size + i for i in filled]
        self.pool.release([old])
        sequence.pages[-1] = new

    def _truncate(self, sequence: Sequence, length: int) -> None:
        keep = max(0, self._pages_for(length) - sequence.dropped)
        self.pool.release(sequence.pages[keep:])
        del sequence.pages[keep:]
        sequence.length = length
