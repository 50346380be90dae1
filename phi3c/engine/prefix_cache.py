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

__all__ = ["PrefixCache"]


@dataclass
class _Entry:
    page: int
    parent: bytes
    children: set[bytes] = field(default_factory=set)


class PrefixCache:
    """The pages that it holds, by the digests of their chains."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache
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

    def find(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        """The pages of the longest known beginning of `tokens`, short of their last token."""
        most = (len(tokens) - 1) // self._cache.page_size
        pages = []
        for key in self._keys(tokens, most, salt):
            entry = self._entries.get(key)
            if entry is None:
                break
            self._entries.move_to_end(key)
            pages.append(entry.page)
        return pages

    def keep(self, tokens: Sequence[int], dropped: int, pages: Sequence[int], salt: bytes) -> None:
        """Remember a sequence's full pages; the first of them is its page number `dropped`.

        After pages that left the window, only what continues a known chain can be found again.
        """
        parent = salt
        for i, key in enumerate(self._keys(tokens, dropped + len(pages), salt)):
            if key in self._entries:
                self._entries.move_to_end(key)
            elif i < dropped:
                return
            else:
                self._cache.hold_pages([pages[i - dropped]])
                self._entries[key] = _Entry(pages[i - dropped], parent)
                if parent in self._entries:
                    self._entries[parent].children.add(key)
            parent = key

    def evict(self, count: int) -> int:
        """Gives up to `count` idle pages back to the cache; returns how many.

        An idle page may be followed by pages that a sequence holds, which has left the idle one
        behind its window: those are forgotten first, and stay the sequence's.
        """
        evicted = 0
        while evicted < count:
            idle = [key for key, entry in self._entries.items() if self._is_idle(entry)]
            if not idle:
                break
            ends = (key for key in idle if not self._entries[key].children)
            key = next(ends, idle[0])
            while children := self._entries[key].children:
                key = next(iter(children))
            evicted += self._is_idle(self._entries[key])
            self._forget(key)
        return evicted

    def clear(self) -> None:
        """Gives every page back."""
        self._cache.drop_pages(self.pages)
        self._entries.clear()

    def _is_idle(self, entry: _Entry) -> bool:
        return self._cache.page_owners(entry.page) == 1

    def _forget(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._cache.drop_pages([entry.page])
        if entry.parent in self._entries:
            self._entries[entry.parent].children.discard(key)

    def _keys(self, tokens: Sequence[int], count: int, salt: bytes) -> Iterator[bytes]:
        size, key = self._cache.page_size, salt
        ids = np.asarray(tokens[: count * size], np.int32)
        for start in range(0, count * size, size):
            own = ids[start : start + size].tobytes()
            key = hashlib.blake2b(key + own, digest_size=16).digest()
            yield key
