"""The page pool against a dict of owner → pages, under random use."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from phi3c.errors import CacheFullError
from phi3c.runtime.page_pool import PagePool


class PoolMachine(RuleBasedStateMachine):
    """Every owner holds a list of pages; no page is in it twice."""

    @initialize(num_pages=st.integers(0, 12))
    def start(self, num_pages):
        self.pool = PagePool(num_pages)
        self.num_pages = num_pages
        self.held: dict[int, list[int]] = {}
        self.next_owner = 0
        self.kept: set[int] = set()

    def owners(self) -> Counter:
        """Page → how many owners the model says it has."""
        counts = Counter(page for pages in self.held.values() for page in pages)
        counts.update(self.kept)
        return counts

    def new_owner(self, pages: list[int]) -> None:
        self.held[self.next_owner] = pages
        self.next_owner += 1

    @rule(count=st.integers(0, 14))
    def allocate(self, count):
        before = self.owners()
        free = self.num_pages - len(before)
        if count > free:
            with pytest.raises(CacheFullError, match=f"{count} more pages.*{free} of"):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert len(pages) == len(set(pages)) == count
        assert not set(pages) & set(before), "a page that somebody holds was handed out"
        self.new_owner(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data):
        pages = data.draw(st.sampled_from(list(self.held.values())))
        shared = data.draw(st.lists(st.sampled_from(pages), unique=True) if pages else st.just([]))
        self.pool.share(shared)
        self.new_owner(shared)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release_some(self, data):
        pages = data.draw(st.sampled_from(list(self.held.values())))
        count = data.draw(st.integers(0, len(pages)))
        self.pool.release(pages[:count])
        del pages[:count]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release_all(self, data):
        owner = data.draw(st.sampled_from(list(self.held)))
        self.pool.release(self.held.pop(owner))

    @rule(data=st.data())
    def hold_or_drop(self, data):
        if pages := sorted(self.owners()):
            page = data.draw(st.sampled_from(pages))
            if page in self.kept:
                self.pool.drop(page)
            else:
                self.pool.hold(page)
            self.kept ^= {page}

    @invariant()
    def counts_agree(self):
        owners = self.owners()
        assert self.pool.num_pages == self.num_pages
        assert self.pool.num_free == self.num_pages - len(owners)
        for page in range(self.num_pages):
            assert self.pool.owners(page) == owners[page]
            assert self.pool.is_shared(page) == (owners[page] > 1)
            assert self.pool.is_held(page) == (page in self.kept)
        assert self.pool.num_idle == sum(owners[page] == 1 for page in self.kept)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_every_page_is_handed_out_once():
    pool = PagePool(5)
    assert sorted(pool.allocate(2) + pool.allocate(3)) == [0, 1, 2, 3, 4]


def test_a_full_pool_takes_none():
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(CacheFullError, match="3 more pages needed, 2 of 3 free"):
        pool.allocate(3)
    assert pool.num_free == 2
    assert len(pool.allocate(2)) == 2


def test_a_shared_page_is_free_after_its_last_owner():
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.share(pages)
    pool.release(pages)
    assert pool.num_free == 0 and not pool.is_shared(pages[0])
    pool.release(pages)
    assert pool.num_free == 1


def test_a_free_page_cannot_be_shared_or_released():
    pool = PagePool(2)
    for misuse in (pool.share, pool.release):
        with pytest.raises(AssertionError):
            misuse([0])
