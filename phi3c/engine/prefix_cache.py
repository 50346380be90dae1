"""Full KV pages of earlier sequences, found again by what their tokens are.

A page is known by a chain of digests: its own tokens, all tokens before it, and what else changes
keys and values (`salt`: LongRoPE's factor set, an adapter's generation). Pages that only the prefix
cache holds are given up in the order of their last use, the ends of chains first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from phi3c.runtime.kv_cache import PagedKVCache

__all__ = ["Digests", "PrefixCache"]

Digests = dict[bytes, list[bytes]]  # salt → of each page of a sequence


@dataclass
class _Entry:
    page: int
    parent: bytes
    children: set[bytes] = field(default_factory=set)


class PrefixCache:
    """The pages that it holds, by the digests of their chains.

    window: of a model with a sliding window. There a beginning is known if those of its pages are
    that the token after it sees.

    digests, wherever it is asked for: what the caller keeps for one sequence, empty at first, so
    that no page of it is digested twice. Its tokens may grow, but not change.
    """

    def __init__(self, cache: PagedKVCache, window: int | None = None) -> None:
        self._cache = cache
        self._window = window
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def pages(self) -> list[int]:
        """Every page that is held."""
        return [entry.page for entry in self._entries.values()]

    @property
    def num_idle(self) -> int:
        """Pages that nobody else holds."""
        return sum(map(self._is_idle, self._entries.values()))

    def find(self, tokens: Sequence[int], salt: bytes, digests: Digests) -> tuple[int, list[int]]:
        """The longest known beginning of `tokens`, short of their last one.

        (pages at its front that its window has left, the pages after them)
        """
        keys, known, end = [], 0, 0
        for key in self._keys(tokens, (len(tokens) - 1) // self._cache.page_size, salt, digests):
            keys.append(key)
            known = known + 1 if key in self._entries else 0
            if known >= len(keys) - self._unseen(len(keys)):
                end = len(keys)
            elif self._window is None:
                break
        first = self._unseen(end)
        for key in keys[first:end]:
            self._entries.move_to_end(key)
        return first, [self._entries[key].page for key in keys[first:end]]

    def key(self, tokens: Sequence[int], page: int, salt: bytes, digests: Digests) -> bytes:
        """What page number `page` of `tokens`, which fill it, is known by."""
        return list(self._keys(tokens, page + 1, salt, digests))[-1]

    def keep(
        self,
        tokens: Sequence[int],
        dropped: int,
        pages: Sequence[int],
        salt: bytes,
        digests: Digests,
    ) -> None:
        """Remember a sequence's full pages; the first of them is its page number `dropped`."""
        keys = list(self._keys(tokens, dropped + len(pages), salt, digests))
        for i, page in enumerate(pages, dropped):
            if keys[i] in self._entries:
                self._entries.move_to_end(keys[i])
                continue
            self._cache.hold_pages([page])
            parent = keys[i - 1] if i else salt
            self._entries[keys[i]] = _Entry(page, parent)
            if parent in self._entries:
                self._entries[parent].children.add(keys[i])

    def evict(self, count: int) -> int:
        """Gives up to `count` idle pages back to the cache; returns how many."""
        evicted = 0
        while evicted < count and (key := self._least_needed()) is not None:
            evicted += self._is_idle(self._entries[key])
            self._forget(key)
        return evicted

    def clear(self) -> None:
        """Gives every page back."""
        self._cache.drop_pages(self.pages)
        self._entries.clear()

    def _least_needed(self) -> bytes | None:
        """The next to give up on the way to an idle page, None if there is none.

        The least recently used; of a chain the end, without which the others are still found.
        Behind a window that is not so: there the front of a chain is the first to be of no use.
        """
        inner = None
        for key, entry in self._entries.items():
            if self._is_idle(entry):
                if self._window is not None or not entry.children:
                    return key
                inner = inner or key
        # A sequence with a copy of its own may hold what follows: that stays the sequence's.
        while inner is not None and (children := self._entries[inner].children):
            inner = next(iter(children))
        return inner

    def _unseen(self, pages: int) -> int:
        """How many of so many pages the token after them does not see."""
        if self._window is None:
            return 0
        size = self._cache.page_size
        return max(0, (pages * size - self._window + 1) // size)

    def _is_idle(self, entry: _Entry) -> bool:
        return self._cache.page_owners(entry.page) == 1

    def _forget(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._cache.drop_pages([entry.page])
        if entry.parent in self._entries:
            self._entries[entry.parent].children.discard(key)

    def _keys(
        self, tokens: Sequence[int], count: int, salt: bytes, digests: Digests
    ) -> Iterator[bytes]:
        known, size = digests.setdefault(salt, []), self._cache.page_size
        yield from known[:count]
        for page in range(len(known), count):
            before = known[-1] if known else salt
            own = np.asarray(tokens[page * size : (page + 1) * size], np.int32).tobytes()
            known.append(hashlib.blake2b(before + own, digest_size=16).digest())
            yield known[-1]
