"""Trees of draft tokens, as parent indices: parents[i] < i comes before i, −1 is the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError


@dataclass(frozen=True)
class TokenTree:
    """New tokens of one sequence in one forward.

    depth `[n]`: tokens between the context and the token; its position is context length + depth.
    enter, leave `[n]`: depth-first interval; j is i or an ancestor of i iff
    enter[j] <= enter[i] < leave[j].
    """

    parents: tuple[int, ...] | None  # None: a chain, each token after the one before it
    depth: np.ndarray
    enter: np.ndarray
    leave: np.ndarray

    @property
    def size(self) -> int:
        return len(self.depth)

    @property
    def height(self) -> int:
        """Tokens on the longest path."""
        return int(self.depth.max()) + 1

    def path(self, leaf: int) -> list[int]:
        """Tokens from the root of the tree to `leaf`; empty for −1."""
        if self.parents is None:
            return list(range(leaf + 1))
        path = []
        while leaf >= 0:
            path.append(leaf)
            leaf = self.parents[leaf]
        return path[::-1]


def chain(n: int) -> TokenTree:
    """n tokens, one after another: a prompt, a chunk of one, a chain of drafts."""
    index = np.arange(n, dtype=np.int32)
    return TokenTree(None, index, index, np.full(n, n, np.int32))


def token_tree(parents: Sequence[int]) -> TokenTree:
    """Raises InputError unless every parent is −1 or an earlier token."""
    parents = tuple(int(p) for p in parents)
    n = len(parents)
    for i, parent in enumerate(parents):
        if not -1 <= parent < i:
            raise InputError(f"tree_parents[{i}]: found {parent}; accepted: -1 to {i - 1}")
    if parents == tuple(range(-1, n - 1)):
        return chain(n)
    depth, size = np.zeros(n, np.int32), np.ones(n, np.int32)
    for i, parent in enumerate(parents):
        depth[i] = depth[parent] + 1 if parent >= 0 else 0
    for i in range(n - 1, -1, -1):
        if parents[i] >= 0:
            size[parents[i]] += size[i]
    # Preorder: a token enters after its parent and after the subtrees of its earlier siblings.
    enter, next_entry, roots = np.zeros(n, np.int32), np.zeros(n, np.int32), 0
    for i, parent in enumerate(parents):
        if parent >= 0:
            enter[i] = next_entry[parent]
            next_entry[parent] += size[i]
        else:
            enter[i] = roots
            roots += size[i]
        next_entry[i] = enter[i] + 1
    return TokenTree(parents, depth, enter, enter + size)
