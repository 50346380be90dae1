"""Reference-counted pages of the KV cache. Knows nothing of sequences or tensors."""

from __future__ import annotations

from ..errors import CacheFullError


class PagePool:
    """Pages 0 … num_pages − 1, each free or held by one or more owners."""

    def __init__(self, num_pages: int):
        self._owners = [0] * num_pages
        self._held: set[int] = set()
        self.num_idle = 0  # held pages that nobody else owns
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the last freed is reused first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_pages(self) -> int:
        return len(self._owners)

    def allocate(self, count: int) -> list[int]:
        """`count` free pages, each with one owner. Raises CacheFullError and takes none."""
        if count > len(self._free):
            raise CacheFullError(
                f"KV cache is full: {count} more pages needed, {len(self._free)} of "
                f"{len(self._owners)} free"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more owner for each page."""
        for page in pages:
            assert self._owners[page] > 0, page
            self.num_idle -= self.is_idle(page)
            self._owners[page] += 1

    def release(self, pages: list[int]) -> None:
        """One owner less for each page; a page without owners is free again."""
        for page in pages:
            assert self._owners[page] > 0, page
            self._owners[page] -= 1
            self.num_idle += self.is_idle(page)
            if self._owners[page] == 0:
                self._free.append(page)

    def hold(self, page: int) -> None:
        """One more owner: the one who gives a page up when it is asked to."""
        assert page not in self._held, page
        self.share([page])
        self._held.add(page)

    def drop(self, page: int) -> None:
        """Of a held page that owner less."""
        self.num_idle -= self.is_idle(page)
        self._held.remove(page)
        self.release([page])

    def is_held(self, page: int) -> bool:
        return page in self._held

    def is_idle(self, page: int) -> bool:
        """Held, and nobody else owns it."""
        return self._owners[page] == 1 and page in self._held

    def is_shared(self, page: int) -> bool:
        return self._owners[page] > 1

    def owners(self, page: int) -> int:
        return self._owners[page]
