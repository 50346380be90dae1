"""Guesses at what a sequence will say next: a tree of tokens, which one forward verifies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["NO_DRAFT", "Draft"]


@dataclass(frozen=True)
class Draft:
    """tokens of a tree; parents[i] < i is the node before node i, −1 the sequence's last token.

    Children of one node have different tokens. A chain is a tree without branches.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    @classmethod
    def of_paths(cls, paths: Iterable[Sequence[int]]) -> Draft:
        """The tree of chains that may begin alike."""
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) → node
        for path in paths:
            node = -1
            for token in path:
                node = nodes.setdefault((node, token), len(nodes))
        return cls(tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def height(self) -> int:
        """Tokens on the longest path."""
        return max(self._depths, default=0)

    def depth(self, node: int) -> int:
        """Tokens from the sequence to the node; 0 for −1."""
        return self._depths[node] if node >= 0 else 0

    def child(self, node: int, token: int) -> int | None:
        """The node after `node` that has this token."""
        return self._children.get((node, token))

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        return {key: i for i, key in enumerate(zip(self.parents, self.tokens, strict=True))}

    @cached_property
    def _depths(self) -> list[int]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        return depths


NO_DRAFT = Draft()
