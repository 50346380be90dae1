"""Full KV pages of earlier sequences, found again by what their tokens are.

A page is known by a chain of digests: its own tokens, all tokens before it, and what else changes
keys and values (`salt`: LongRoPE's factor set, an adapter's generation). Pages that only the prefix
cache holds are given up in the order of their last use, of a chain the end first: without it the
others are still found. Behind a window the front goes first, which is the first to be of no use.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from phi3c.runtime.kv_cache import PagedKVCache

__all__ = ["Digests", "PrefixCache"]

Digests = dict[bytes, list[bytes]]  # salt → of each page of a sequence


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
        self._pages: OrderedDict[bytes, int] = OrderedDict()  # the first to be given up first

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def pages(self) -> list[int]:
        """Every page that is held."""
        return list(self._pages.values())

    def find(self, tokens: Sequence[int], salt: bytes, digests: Digests) -> tuple[int, list[int]]:
        """The longest known beginning of `tokens`, short of their last one.

        (pages at its front that its window has left, the pages after them)
        """
        keys, known, end = [], 0, 0
        for key in self._keys(tokens, (len(tokens) - 1) // self._cache.page_size, salt, digests):
            keys.append(key)
            known = known + 1 if key in self._pages else 0
            if known >= len(keys) - self._unseen(len(keys)):
                end = len(keys)
            elif self._window is None:
                break
        first = self._unseen(end)
        for key in self._in_order(keys[first:end]):
            self._pages.move_to_end(key)
        return first, [self._pages[key] for key in keys[first:end]]

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
        keys = list(self._keys(tokens, dropped + len(pages), salt, digests))[dropped:]
        for key, page in self._in_order(list(zip(keys, pages, strict=True))):
            if key not in self._pages:
                self._cache.hold_page(page)
                self._pages[key] = page
            self._pages.move_to_end(key)

    def forget(self, tokens: Sequence[int], salt: bytes, digests: Digests) -> None:
        """Nothing of `tokens` is known any more, whoever computed it."""
        for key in self._keys(tokens, len(tokens) // self._cache.page_size, salt, digests):
            if key in self._pages:
                self._cache.drop_page(self._pages.pop(key))

    def evict(self, count: int) -> int:
        """Gives up to `count` idle pages back to the cache; returns how many."""
        evicted = 0
        while evicted < count and self._cache.num_idle_pages:
            key, page = next(iter(self._pages.items()))
            if self._cache.is_idle(page):
                del self._pages[key]
                self._cache.drop_page(page)
                evicted += 1
            else:  # in use now; and so it is not looked at again and again
                self._pages.move_to_end(key)
        return evicted

    def clear(self) -> None:
        """Gives every page back."""
        while self._pages:
            self._cache.drop_page(self._pages.popitem()[1])

    def _in_order(self, chain: list) -> list:
        """The parts of a chain, the first to be given up first."""
        return chain if self._window is not None else chain[::-1]

    def _unseen(self, pages: int) -> int:
        """How many of so many pages the token after them does not see."""
        if self._window is None:
            return 0
        size = self._cache.page_size
        return max(0, (pages * size - self._window + 1) // size)

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
