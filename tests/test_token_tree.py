"""Token trees against ancestors found one parent at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi3c.errors import InputError
from phi3c.runtime.token_tree import chain, token_tree


def ancestors(parents: list[int], token: int) -> list[int]:
    """The tokens from the context to `token`, itself included."""
    path = []
    while token != -1:
        path.insert(0, token)
        token = parents[token]
    return path


def trees():
    """Lists of parents, each −1 or an earlier token; likely both bushy and deep."""
    bushy = st.lists(st.integers(0, 2**30), min_size=1, max_size=40).map(
        lambda numbers: [number % (i + 1) - 1 for i, number in enumerate(numbers)]
    )
    deep = st.lists(st.integers(0, 2), min_size=1, max_size=40).map(
        lambda steps: [max(-1, i - 1 - step) for i, step in enumerate(steps)]
    )
    return st.one_of(bushy, deep)


@settings(max_examples=300, deadline=None)
@given(trees())
@example([-1])
@example([-1, -1])
@example([-1, 0, 1, 2])
@example([-1, -1, 0, 0, 1, 1, 2])
def test_intervals_depths_and_paths_are_those_of_the_ancestors(parents):
    tree = token_tree(parents)
    n = len(parents)
    paths = [ancestors(parents, i) for i in range(n)]
    assert tree.size == n
    assert tree.height == max(map(len, paths))
    assert tree.depth.tolist() == [len(path) - 1 for path in paths]
    assert sorted(tree.enter.tolist()) == list(range(n)), "depth-first order visits each once"
    for i in range(n):
        assert tree.path(i) == paths[i]
        visible = [j for j in range(n) if tree.enter[j] <= tree.enter[i] < tree.leave[j]]
        assert visible == paths[i]
    assert tree.path(-1) == []
    assert {a.dtype for a in (tree.depth, tree.enter, tree.leave)} == {np.dtype(np.int32)}


@settings(max_examples=100, deadline=None)
@given(trees())
def test_a_tree_without_branches_is_a_chain(parents):
    is_chain = all(parent == i - 1 for i, parent in enumerate(parents))
    tree = token_tree(parents)
    assert (tree.parents is None) == is_chain
    assert is_chain or tree.parents == tuple(parents)


@pytest.mark.parametrize("n", [1, 2, 17])
def test_a_chain_is_the_tree_of_its_parents(n):
    expected, found = chain(n), token_tree(range(-1, n - 1))
    assert found.parents is None and expected.parents is None
    for field in ("depth", "enter", "leave"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    assert expected.leave.tolist() == [n] * n
    assert expected.path(n - 1) == list(range(n)) and expected.path(-1) == []


def test_parents_may_be_numpy_integers():
    assert token_tree(np.array([-1, 0, 0])).parents == (-1, 0, 0)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([0], r"tree_parents\[0\]: found 0; accepted: -1 to -1"),
        ([-2], r"tree_parents\[0\]: found -2"),
        ([-1, 1], r"tree_parents\[1\]: found 1; accepted: -1 to 0"),
        ([-1, 0, 3, 2], r"tree_parents\[2\]: found 3"),
        ([-1, 0, -5], r"tree_parents\[2\]: found -5"),
    ],
)
def test_a_parent_that_does_not_come_before_is_refused(parents, message):
    with pytest.raises(InputError, match=message):
        token_tree(parents)
