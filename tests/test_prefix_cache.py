"""Which pages of earlier sequences are found again, and which are given up first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3c.engine.prefix_cache import PrefixCache

SALT = b"salt"


class Pages:
    """As much of a KV cache as a prefix cache knows: pages of 4 tokens and their owners."""

    page_size = 4

    def __init__(self) -> None:
        self.owners: dict[int, int] = {}
        self.held: set[int] = set()

    def page_owners(self, page: int) -> int:
        return self.owners.get(page, 0)

    def is_idle(self, page: int) -> bool:
        return page in self.held and self.owners[page] == 1

    @property
    def num_idle_pages(self) -> int:
        return sum(map(self.is_idle, self.held))

    def hold_page(self, page: int) -> None:
        self.held.add(page)
        self.owners[page] += 1

    def drop_page(self, page: int) -> None:
        self.held.remove(page)
        self.owners[page] -= 1

    def keep(self, prefixes: PrefixCache, tokens, dropped: int, pages: Sequence[int]) -> None:
        """Pages of a sequence that ends with this."""
        for page in pages:
            self.owners[page] = self.owners.get(page, 0) + 1
        prefixes.keep(tokens, dropped, pages, SALT, {})
        for page in pages:
            self.owners[page] -= 1


@pytest.fixture
def pages() -> Pages:
    return Pages()


def find(prefixes: PrefixCache, tokens, salt: bytes = SALT) -> tuple[int, list[int]]:
    return prefixes.find(tokens, salt, {})


def test_a_beginning_is_found_up_to_its_last_token(pages):
    prefixes = PrefixCache(pages)
    pages.keep(prefixes, list(range(13)), 0, [7, 8, 9])
    assert find(prefixes, range(13)) == (0, [7, 8, 9])
    assert find(prefixes, range(12)) == (0, [7, 8])  # one token is to be computed
    assert find(prefixes, [*range(8), 0, 0, 0, 0, 0]) == (0, [7, 8])
    assert find(prefixes, [1, *range(1, 13)]) == (0, [])  # nothing after another beginning
    assert find(prefixes, range(13), b"other") == (0, [])


def test_the_end_of_the_least_recently_used_chain_goes_first(pages):
    prefixes = PrefixCache(pages)
    pages.keep(prefixes, list(range(8)), 0, [1, 2])
    pages.keep(prefixes, list(range(100, 108)), 0, [3, 4])
    find(prefixes, range(9))
    for gone in (4, 3, 2, 1):
        assert prefixes.evict(1) == 1 and pages.page_owners(gone) == 0
    assert prefixes.evict(1) == 0 and len(prefixes) == 0


def test_what_a_sequence_holds_is_not_given_up(pages):
    prefixes = PrefixCache(pages)
    pages.keep(prefixes, list(range(8)), 0, [1, 2])
    pages.owners[1] += 1
    assert pages.num_idle_pages == 1 and prefixes.evict(5) == 1
    assert find(prefixes, range(9)) == (0, [1]) and prefixes.evict(5) == 0


def test_an_idle_page_before_one_that_is_held_can_be_given_up(pages):
    """The sequence that holds the second has a copy of its own of the first, known in its turn."""
    prefixes = PrefixCache(pages)
    pages.keep(prefixes, list(range(8)), 0, [1, 2])
    pages.owners[2] += 1
    assert prefixes.evict(1) == 1
    assert pages.page_owners(1) == 0 and pages.page_owners(2) == 2
    assert find(prefixes, range(9)) == (0, [])
    pages.owners[2] -= 1
    pages.keep(prefixes, list(range(8)), 0, [5, 2])
    assert find(prefixes, range(9)) == (0, [5, 2])


def test_what_a_failed_sequence_computed_is_forgotten(pages):
    prefixes = PrefixCache(pages)
    pages.keep(prefixes, list(range(8)), 0, [1, 2])
    pages.keep(prefixes, [*range(4), 9, 9, 9, 9], 0, [1, 3])
    prefixes.forget(list(range(8)), SALT, {})
    assert find(prefixes, range(9)) == (0, []) and pages.held == {3}
    assert prefixes.evict(5) == 1 and not pages.held


def test_pages_in_use_are_passed_once_not_for_every_page_given_up(pages, monkeypatch):
    prefixes = PrefixCache(pages)
    for first in range(0, 2000, 4):
        pages.keep(prefixes, [first] * 4, 0, [first])
        pages.owners[first] += first < 1000
    looked, is_idle = [], Pages.is_idle
    monkeypatch.setattr(Pages, "num_idle_pages", 1)
    monkeypatch.setattr(Pages, "is_idle", lambda self, p: looked.append(p) or is_idle(self, p))
    assert all(prefixes.evict(1) == 1 for _ in range(100))
    assert len(looked) < 400


def test_a_window_is_found_without_what_it_left(pages):
    prefixes = PrefixCache(pages, window=6)
    tokens = list(range(41))
    pages.keep(prefixes, tokens[:40], 5, [5, 6, 7, 8, 9])
    # The 41st token sees five before it: of pages of four, 8 and 9.
    assert find(prefixes, tokens) == (8, [8, 9])
    assert find(prefixes, [*tokens[:30], 0, 0, 0]) == (5, [5, 6])
    assert find(prefixes, [*tokens[:26], 0, 0, 0]) == (0, [])  # needs page 4 as well
    assert find(prefixes, [1, *tokens[1:]]) == (0, [])


def test_the_front_of_a_window_goes_first(pages):
    prefixes = PrefixCache(pages, window=6)
    pages.keep(prefixes, list(range(24)), 0, [0, 1, 2, 3, 4, 5])
    assert prefixes.evict(3) == 3
    assert find(prefixes, range(25)) == (4, [4, 5])


@given(
    window=st.sampled_from([None, 1, 2, 4, 5, 9, 30]),
    sequences=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), max_size=6),
    asked=st.lists(st.integers(0, 1), min_size=1, max_size=40),
    evicted=st.integers(0, 10),
)
def test_what_is_found_is_what_was_kept(window, sequences, asked, evicted):
    """Each page holds the tokens it was kept for, after those before; the window is whole."""
    pages, content = Pages(), {}
    prefixes = PrefixCache(pages, window)
    for tokens in sequences:
        made = range(len(content), len(content) + len(tokens) // 4)
        content |= {page: tuple(tokens[: 4 * (i + 1)]) for i, page in enumerate(made)}
        pages.keep(prefixes, tokens, 0, list(made))
    idle = pages.num_idle_pages
    assert prefixes.evict(evicted) == min(evicted, idle)
    dropped, found = find(prefixes, asked)
    end = dropped + len(found)
    assert 4 * end < len(asked)
    for i, page in enumerate(found, dropped):
        assert content[page] == tuple(asked[: 4 * (i + 1)]) and pages.page_owners(page) == 1
    assert 4 * dropped <= max(0, 4 * end - (window or 10**6) + 1)
