"""Which sequences compute how many tokens in the next forward.

Decoding sequences come first, a token each. What is left of the forward's tokens is dealt to the
prompts, priority by priority: each gets what it needs up to an equal share, so that a long prompt
neither blocks short ones nor waits for them. Sequences wait in the order of priority and arrival;
where pages run out, the last in that order is sent back to wait and computed again later
(preemption by recompute). One that waits takes place and pages of running ones of lower priority,
never of its equals: so two can not send each other back in turns. One whose beginning a running
sequence is just computing waits for those pages. One whose adapter finds no free slot waits for the
slot in use that is likely to be left first: behind it nobody begins with the adapter that is there,
nor with one that is in no slot, while the adapters in the other slots go on serving whoever comes.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol

from phi3c.config import Phi3Config
from phi3c.engine.draft import NO_DRAFT, Draft
from phi3c.engine.prefix_cache import PrefixCache
from phi3c.engine.sequence import Sequence
from phi3c.manifest import Limits
from phi3c.runtime.kv_cache import PagedKVCache

__all__ = ["Part", "Scheduler"]


@dataclass(frozen=True)
class Part:
    """The next `count` tokens of a sequence, and a draft of what may come after them."""

    sequence: Sequence
    count: int
    draft: Draft = NO_DRAFT

    @property
    def size(self) -> int:
        return self.count + len(self.draft)

    @property
    def tokens(self) -> list[int]:
        start = self.sequence.computed
        return [*self.sequence.tokens[start : start + self.count], *self.draft.tokens]

    @property
    def parents(self) -> list[int]:
        """For each token the one before it, as `PagedKVCache.begin_forward` has it."""
        return [*range(-1, self.count - 1), *(self.count + p for p in self.draft.parents)]

    @property
    def complete(self) -> bool:
        """Whether logits of its last token are the next token's."""
        return self.count == self.sequence.pending


class AdapterSource(Protocol):
    """Puts adapters into slots: CompiledPhi3, which says more of these."""

    def acquire_adapter(self, name: str) -> int | None: ...

    def release_adapter(self, name: str) -> None: ...


class Scheduler:
    """Sequences that wait, and those that have pages.

    cached_tokens, refound_tokens: found in the prefix cache instead of computed (metrics.py).
    """

    def __init__(
        self,
        cache: PagedKVCache,
        prefixes: PrefixCache | None,
        config: Phi3Config,
        limits: Limits,
        adapters: AdapterSource,
    ) -> None:
        self.waiting: list[Sequence] = []  # in their order
        self.running: list[Sequence] = []
        self.preemptions = self.cached_tokens = self.refound_tokens = 0
        self._cache = cache
        self._prefixes = prefixes
        self._config = config
        self._limits = limits
        self._adapters = adapters
        self._step = 0

    def wait(self, sequence: Sequence) -> None:
        """It has its turn when there is room."""
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

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
        """Make room where a forward found too few pages: idle prefixes first, then drafts, then a
        sequence."""
        if self._prefixes is not None:
            pages = sum(-(-part.size // self._cache.page_size) for part in parts)
            if self._prefixes.evict(pages):
                return list(parts)
        if any(part.draft for part in parts):
            return [replace(part, draft=NO_DRAFT) for part in parts]
        if self._prefixes is not None and self._config.sliding_window is not None:
            if len(self._prefixes):
                # Pages that are about to leave a window are not free while the prefixes hold them.
                self._prefixes.clear()
                return list(parts)
        assert len(self.running) > 1, "a request that can never fit was not refused"
        victim = max(self.running, key=lambda s: s.order)
        self.preempt(victim)
        return [part for part in parts if part.sequence is not victim]

    def ran(self, parts: Iterable[Part]) -> None:
        """The forward of these parts is in the cache."""
        for part in parts:
            sequence, prompt = part.sequence, len(part.sequence.handle.prompt_ids)
            in_prompt = sequence.computed < prompt
            sequence.computed += part.count
            sequence.served = self._step
            if in_prompt:  # others may wait for it
                self._keep(sequence, min(sequence.computed, prompt))

    def accept(self, nodes: Mapping[Part, int]) -> None:
        """Keep, of each part's draft, the path to a node (−1: none of it)."""
        if nodes:
            ids = [part.sequence.id for part in nodes]
            leaves = [part.count + node for part, node in nodes.items()]
            self._cache.commit_accepted_token_tree_nodes(ids, leaves)
        for part, node in nodes.items():
            part.sequence.computed += part.draft.depth(node)

    def take_back(self) -> None:
        """Compute again the last token of whoever has nothing else to compute: the step that
        computed it was interrupted before it sampled."""
        for sequence in self.running:
            if sequence.pending == 0:
                self._cache.popn(sequence.id, 1)
                sequence.computed -= 1

    def draft_budget(self, parts: Iterable[Part]) -> int:
        """Tokens of a forward that these parts leave."""
        return self._limits.prefill_chunk_size - sum(part.size for part in parts)

    def draft_room(self, sequence: Sequence, depth: int) -> int:
        """How deep a draft may go, at most `depth`: short of the answer's last token, which is
        never computed, and with short factors to the end of the original context."""
        depth = min(depth, sequence.left - 1)
        if not sequence.long_factors:
            while depth > 0 and self._config.needs_long_factors(len(sequence.tokens) + depth):
                depth -= 1
        return depth

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """A new sequence that begins as all the tokens of `parent` in the cache, or waits."""
        if len(self.running) < self._limits.max_batch_size:
            self._cache.fork_sequence(parent.id, child.id)
            child.computed, child.long_factors = parent.computed, parent.long_factors
            child.served = parent.served
            took = self._take_slot(child)
            assert took, "the parent's adapter is in a slot"
            self.running.append(child)
        else:
            self.wait(child)

    def preempt(self, sequence: Sequence) -> None:
        """Back to waiting, without pages."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._take_pages(sequence)
        self._leave_slot(sequence)
        self.wait(sequence)

    def remove(self, sequence: Sequence, keep_prefix: bool = True) -> None:
        """It has ended: its pages are free or kept as a prefix; or nothing of it is kept."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._take_pages(sequence, keep_prefix)
        else:
            self.waiting.remove(sequence)
        self._leave_slot(sequence)

    def _in_turn(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        return sorted(sequences, key=lambda s: (s.served, s.order))

    def _admit(self) -> None:
        held = 0  # whose places nobody behind them takes
        draining: set[int] = set()  # slots that ones that go first wait for
        for first in list(self.waiting):
            if len(self.running) + held >= self._limits.max_batch_size and not self._below(first):
                return
            if draining and self._waits_behind(first, draining):
                continue
            if self._is_being_computed(first):
                held += 1
                continue
            yielding = self._yielding(first)
            if yielding is None:
                return
            if first.handle.adapter is not None:
                if not self._make_slot(first):
                    self._drain(draining)
                    continue
                yielding = self._yielding(first)  # some may have gone for the slot
                assert yielding is not None, "with fewer running ones there is no less room"
            for sequence in yielding:
                self.preempt(sequence)
            self.waiting.remove(first)
            self.running.append(first)
            self._give_pages(first)

    def _waits_behind(self, sequence: Sequence, draining: set[int]) -> bool:
        """Whether its adapter needs a slot that one that goes first waits for, or another one."""
        adapter = sequence.handle.adapter
        if adapter is None or adapter.pinned:  # whose slot nobody waits for
            return False
        slot = next((s.slot for s in self.running if s.handle.adapter is adapter), None)
        if slot is None:
            self._drain(draining)
        return slot is None or slot in draining

    def _drain(self, draining: set[int]) -> None:
        """Another slot in use takes no more sequences: the one whose last has the least to do.

        It is chosen anew in each step. That least amount shrinks in every step that serves these,
        as nobody joins them, so some slot will be free.
        """
        work: dict[int, int] = {}
        for s in self.running:
            if s.slot >= 0 and s.slot not in draining and not s.handle.adapter.pinned:
                work[s.slot] = max(work.get(s.slot, 0), s.left + s.pending)
        if work:
            draining.add(min(work, key=work.__getitem__))

    def _make_slot(self, sequence: Sequence) -> bool:
        """Its adapter is in a slot, for which those of another may go, if all of them are of lower
        priority: of the adapter that the latest of these has."""
        if self._take_slot(sequence):
            return True
        below = sorted(self._below(sequence), key=lambda s: s.order, reverse=True)
        others = {s.slot for s in self.running if s not in below}
        for latest in below:
            if latest.slot in others or latest.slot < 0 or latest.handle.adapter.pinned:
                continue
            for user in [s for s in below if s.slot == latest.slot]:
                self.preempt(user)
            return self._take_slot(sequence)
        return False

    def _take_slot(self, sequence: Sequence) -> bool:
        adapter = sequence.handle.adapter
        if adapter is None or sequence.slot >= 0:  # a step was interrupted behind this
            return True
        slot = self._adapters.acquire_adapter(adapter.name)
        sequence.slot = -1 if slot is None else slot
        return slot is not None

    def _leave_slot(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self._adapters.release_adapter(sequence.handle.adapter.name)
            sequence.slot = -1

    def pages_of(self, tokens: int) -> int:
        """The most pages that a sequence of so many tokens holds; a window's leave behind it."""
        size = self._cache.page_size
        if self._config.sliding_window is not None:
            kept = self._config.sliding_window + self._limits.prefill_chunk_size
            tokens = min(tokens, kept + 2 * size)  # both ends may lie within a page
        return -(-tokens // size)

    def _yielding(self, sequence: Sequence) -> list[Sequence] | None:
        """The fewest running ones of lower priority that must go for it to run; None: it waits."""
        below = sorted(self._below(sequence), key=lambda s: s.order, reverse=True)
        for count in range(len(below) + 1):
            left = len(self.running) - count
            if left == 0:
                return below
            if left < self._limits.max_batch_size and self._has_room(sequence, below[:count]):
                return below[:count]
        return None

    def _below(self, sequence: Sequence) -> list[Sequence]:
        return [s for s in self.running if _rank(s) > _rank(sequence)]

    def _has_room(self, sequence: Sequence, without: Seq[Sequence]) -> bool:
        """Whether all its tokens and one more fit beside those of all others but `without`."""
        known, room = self._known_prefix(sequence)[1], self._cache.num_free_pages
        needed = self.pages_of(len(sequence.tokens) + 1) - len(known)
        for other in self.running:
            if other not in without:  # what it holds, and what it is about to
                held = len(self._cache.sequence_pages(other.id))
                needed += max(0, self.pages_of(len(other.tokens) + 1) - held)
        if needed <= room or self._prefixes is None and not without:
            return needed <= room
        room += self._cache.num_idle_pages - sum(map(self._cache.is_idle, known))  # those stay
        owners = Counter(p for s in without for p in self._cache.sequence_pages(s.id))
        for page in owners.keys() - known:
            held = self._cache.is_held(page)
            room += owners[page] + held == self._cache.page_owners(page)
        return needed <= room

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running one that does not go after it is to compute its next page too."""
        if self._prefixes is None:
            return False
        dropped, pages = self._known_prefix(sequence)
        at, long = dropped + len(pages), self._config.needs_long_factors(len(sequence.tokens))
        end, key = (at + 1) * self._cache.page_size, None
        if end >= len(sequence.tokens):
            return False
        for other in self.running:
            if other.long_factors != long or _rank(other) > _rank(sequence):
                continue
            if other.computed < end <= len(other.handle.prompt_ids):
                key = key or self._digest(sequence, at, long)
                if self._digest(other, at, long) == key:
                    return True
        return False

    def _digest(self, sequence: Sequence, page: int, long_factors: bool) -> bytes:
        return self._prefixes.key(
            sequence.tokens, page, _salt(sequence, long_factors), sequence.digests
        )

    def _known_prefix(self, sequence: Sequence) -> tuple[int, list[int]]:
        """(pages that left the window, the pages after them)"""
        if self._prefixes is None:
            return 0, []
        long = self._config.needs_long_factors(len(sequence.tokens))
        return self._prefixes.find(sequence.tokens, _salt(sequence, long), sequence.digests)

    def _give_pages(self, sequence: Sequence) -> None:
        """Add it to the cache, with the pages of a known prefix."""
        long = self._config.needs_long_factors(len(sequence.tokens))
        dropped, pages = self._known_prefix(sequence)
        length = self._limits.context_length if long else None
        self._cache.add_sequence(sequence.id, length, pages, dropped)
        sequence.long_factors = long
        sequence.computed = (dropped + len(pages)) * self._cache.page_size
        if sequence.index or sequence.admitted:
            self.refound_tokens += sequence.computed
        else:
            self.cached_tokens += sequence.computed
            sequence.handle.cached_tokens = sequence.computed
        sequence.admitted = True

    def _take_pages(self, sequence: Sequence, keep_prefix: bool = True) -> None:
        if keep_prefix:
            self._keep(sequence, sequence.computed)
        elif self._prefixes is not None:
            salt = _salt(sequence, sequence.long_factors)
            self._prefixes.forget(sequence.tokens, salt, sequence.digests)
        self._cache.remove_sequence(sequence.id)
        sequence.computed = 0

    def _keep(self, sequence: Sequence, tokens: int) -> None:
        """Its full pages of the first `tokens` are known from now on."""
        if self._prefixes is None:
            return
        dropped, pages = self._cache.full_pages(sequence.id)
        pages = pages[: max(0, tokens // self._cache.page_size - dropped)]
        if pages:
            salt = _salt(sequence, sequence.long_factors)
            self._prefixes.keep(sequence.tokens, dropped, pages, salt, sequence.digests)


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


def _salt(sequence: Sequence, long_factors: bool) -> bytes:
    """What changes its keys and values beside its tokens."""
    factors = "long" if long_factors else "short"
    adapter = sequence.handle.adapter
    return f"{factors} {adapter.generation if adapter else 0}".encode()
