"""Which sequences compute how many tokens in the next forward.

Decoding sequences come first, a token each. What is left of the forward's tokens is dealt to the
prompts, priority by priority: each gets what it needs up to an equal share, so that a long prompt
neither blocks short ones nor waits for them. Sequences wait in the order of priority and arrival;
where pages run out, the last in that order is sent back to wait and computed again later
(preemption by recompute).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from phi3c.config import Phi3Config
from phi3c.engine.prefix_cache import PrefixCache
from phi3c.engine.sequence import Sequence
from phi3c.manifest import Limits
from phi3c.runtime.kv_cache import PagedKVCache

__all__ = ["Part", "Scheduler"]


@dataclass(frozen=True)
class Part:
    """The next `count` tokens of a sequence."""

    sequence: Sequence
    count: int

    @property
    def tokens(self) -> list[int]:
        start = self.sequence.computed
        return self.sequence.tokens[start : start + self.count]

    @property
    def complete(self) -> bool:
        """Whether logits of its last token are the next token's."""
        return self.count == self.sequence.pending


class Scheduler:
    """Sequences that wait, and those that have pages.

    cached_tokens: found in the prefix cache instead of computed.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        prefixes: PrefixCache | None,
        config: Phi3Config,
        limits: Limits,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.cached_tokens = 0
        self._cache = cache
        self._prefixes = prefixes
        self._config = config
        self._limits = limits
        self._step = 0

    def plan(self) -> list[Part]:
        """The parts of the next forward, which `retreat` may make smaller."""
        self._step += 1
        for sequence in self.running:
            if self._config.needs_long_factors(len(sequence.tokens)) != sequence.long_factors:
                self._take_pages(sequence)
                self._give_pages(sequence)
        self._admit()
        parts = [Part(s, 1) for s in self._in_turn(s for s in self.running if s.pending == 1)]
        parts = parts[: self._limits.prefill_chunk_size]
        budget = self._limits.prefill_chunk_size - len(parts)
        filling = sorted((s for s in self.running if s.pending > 1), key=_rank)
        for _, level in itertools.groupby(filling, key=_rank):
            sequences = self._in_turn(level)
            counts = deal(budget, [s.pending for s in sequences])
            parts += [Part(s, n) for s, n in zip(sequences, counts, strict=True) if n]
            budget -= sum(counts)
        return parts

    def retreat(self, parts: Seq[Part]) -> list[Part]:
        """Make room where a forward found too few pages: idle prefixes first, then a sequence."""
        if self._prefixes is not None and self._prefixes.evict(len(parts)):
            return list(parts)
        assert len(self.running) > 1, "a request that can never fit was not refused"
        victim = max(self.running, key=lambda s: s.order)
        self.preempt(victim)
        return [part for part in parts if part.sequence is not victim]

    def ran(self, parts: Iterable[Part]) -> None:
        """The forward of these parts is in the cache."""
        for part in parts:
            part.sequence.computed += part.count
            part.sequence.served = self._step

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """A new sequence that begins as all the tokens of `parent` in the cache, or waits."""
        if len(self.running) < self._limits.max_batch_size:
            self._cache.fork_sequence(parent.id, child.id)
            child.computed, child.long_factors = parent.computed, parent.long_factors
            child.served = parent.served
            self.running.append(child)
        else:
            self.waiting.append(child)

    def preempt(self, sequence: Sequence) -> None:
        """Back to waiting, without pages."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._take_pages(sequence)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, keep_prefix: bool = True) -> None:
        """It has ended: its pages are free or kept as a prefix."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._take_pages(sequence, keep_prefix)

    def _in_turn(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        return sorted(sequences, key=lambda s: (s.served, s.order))

    def _admit(self) -> None:
        self.waiting.sort(key=lambda s: s.order)
        while self.waiting:
            first = self.waiting[0]
            if len(self.running) == self._limits.max_batch_size:
                last = max(self.running, key=lambda s: s.order)
                if _rank(last) <= _rank(first):
                    return
                self.preempt(last)
                self.waiting.sort(key=lambda s: s.order)
            elif self.running and not self._has_room(first):
                return
            self.waiting.remove(first)
            self.running.append(first)
            self._give_pages(first)

    def pages_of(self, tokens: int) -> int:
        """The most pages that a sequence of so many tokens holds; a window's leave behind it."""
        size = self._cache.page_size
        if self._config.sliding_window is not None:
            kept = self._config.sliding_window + self._limits.prefill_chunk_size
            tokens = min(tokens, kept + 2 * size)  # both ends may lie within a page
        return -(-tokens // size)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether all its tokens and one more fit now, beside what others hold."""
        known, room = self._known_prefix(sequence), self._cache.num_free_pages
        if self._prefixes is not None:
            room += self._prefixes.num_idle
            room -= sum(self._cache.page_owners(page) == 1 for page in known)
        return self.pages_of(len(sequence.tokens) + 1) - len(known) <= room

    def _known_prefix(self, sequence: Sequence) -> list[int]:
        if self._prefixes is None:
            return []
        long = self._config.needs_long_factors(len(sequence.tokens))
        return self._prefixes.find(sequence.tokens, _salt(long))

    def _give_pages(self, sequence: Sequence) -> None:
        """Add it to the cache, with the pages of a known prefix."""
        long = self._config.needs_long_factors(len(sequence.tokens))
        pages = self._known_prefix(sequence)
        self._cache.add_sequence(sequence.id, self._limits.context_length if long else None, pages)
        sequence.long_factors = long
        sequence.computed = len(pages) * self._cache.page_size
        self.cached_tokens += sequence.computed
        if sequence.index == 0 and not sequence.output.token_ids:
            sequence.handle.cached_tokens = sequence.computed

    def _take_pages(self, sequence: Sequence, keep_prefix: bool = True) -> None:
        if self._prefixes is not None and keep_prefix:
            full = self._cache.full_pages(sequence.id)
            self._prefixes.keep(sequence.tokens, *full, _salt(sequence.long_factors))
        self._cache.remove_sequence(sequence.id)
        sequence.computed = 0


def deal(budget: int, needs: Seq[int]) -> list[int]:
    """Shares of `budget`: what each needs up to an equal share of what smaller needs leave."""
    counts = [0] * len(needs)
    for left, i in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        share = -(-budget // (len(needs) - left))
        counts[i] = min(needs[i], share)
        budget -= counts[i]
    return counts


def _rank(sequence: Sequence) -> int:
    """The smaller goes first: the priority, turned round."""
    return sequence.order[0]


def _salt(long_factors: bool) -> bytes:
    return b"long" if long_factors else b"short"
