"""Drafts out of the sequence's own tokens: what followed when they last read as they do now.

The last few tokens are looked for in prompt and answer, the longest match first, and what came
after it is the draft (prompt lookup decoding, Saxena 2023; an n-gram form of Yang et al. 2023,
"Inference with Reference"). It costs next to nothing, and pays where an answer repeats: code,
quotations, extraction, summaries.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from phi3c.engine.draft import Draft
from phi3c.engine.sequence import Sequence
from phi3c.errors import InputError
from phi3c.runtime.compiled import CompiledPhi3

__all__ = ["PromptLookup"]

_TOKEN = np.dtype(np.int32)
_TRIES = 4  # places looked at for each branch, as most of them go on alike


@dataclass(frozen=True)
class PromptLookup:
    """tokens: in a chain; shortest, longest: tokens that must match; branches: different chains in
    a draft. adaptive: shorter drafts, or none, where they do not pay.
    """

    tokens: int = 8
    longest: int = 4
    shortest: int = 2
    branches: int = 1
    adaptive: bool = True

    def __post_init__(self) -> None:
        for name in ("tokens", "longest", "shortest", "branches"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name}: found {value!r}; accepted: an integer of 1 or more")
        if self.shortest > self.longest:
            raise InputError(
                f"shortest: found {self.shortest}; accepted: up to longest, {self.longest}"
            )

    def start(self, model: CompiledPhi3, cache_tokens: int) -> PromptLookupDrafter:
        """What drafts for one engine."""
        return PromptLookupDrafter(self)


class PromptLookupDrafter:
    """A `Drafter` (speculation.py)."""

    def __init__(self, options: PromptLookup) -> None:
        self.depth = options.tokens
        self._options = options
        self._histories: WeakKeyDictionary[Sequence, bytearray] = WeakKeyDictionary()

    def nodes(self, depth: int) -> int:
        """The most tokens in a draft of this depth."""
        return depth * self._options.branches

    def propose(self, wanted: Seq[tuple[Sequence, int]]) -> list[Draft]:
        """A draft of at most the depth for each sequence; empty where nothing matches."""
        return [Draft.of_paths(self._paths(sequence, depth)) for sequence, depth in wanted]

    def forget(self, sequence: Sequence) -> None:
        self._histories.pop(sequence, None)

    def _paths(self, sequence: Sequence, depth: int) -> list[list[int]]:
        tokens = sequence.tokens
        # Tokens as bytes, because C searches those.
        history = self._histories.setdefault(sequence, bytearray())
        history += np.asarray(tokens[len(history) // _TOKEN.itemsize :], _TOKEN).tobytes()
        paths: list[list[int]] = []
        for length in range(min(self._options.longest, len(tokens) - 1), 0, -1):
            if length < self._options.shortest:
                break
            suffix = history[-length * _TOKEN.itemsize :]
            end = len(history) - _TOKEN.itemsize  # short of the suffix itself
            for _ in range(_TRIES * self._options.branches):
                if len(paths) == self._options.branches:
                    return paths
                if (at := _rfind(history, suffix, end)) < 0:
                    break
                path = _continuation(tokens, at + length, depth)
                if path not in paths:
                    paths.append(path)
                end = (at + length - 1) * _TOKEN.itemsize
        return paths


def _rfind(history: bytearray, suffix: bytearray, end: int) -> int:
    """Index of the last token where `suffix` lies before byte `end`; −1: nowhere."""
    at = history.rfind(suffix, 0, end)
    while at > 0 and at % _TOKEN.itemsize:  # parts of two tokens that look like one
        at = history.rfind(suffix, 0, at + len(suffix) - 1)
    return at // _TOKEN.itemsize


def _continuation(tokens: list[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start`; past the end they go on from the copy, as a repetition does."""
    path = tokens[start : start + count]
    while len(path) < count:
        path.append(path[len(path) - (len(tokens) - start)])
    return path
