"""Where an answer stands in its grammar, and which tokens may come next.

A state belongs to one sequence and goes on token by token. Text is what the reader sees: where the
decoder drops the space in front of the first token, that token is matched without it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from phi3c.engine.grammar_vocabulary import GrammarVocabulary

__all__ = ["CompiledGrammar", "GrammarState"]


class CompiledGrammar:
    """A grammar for one tokenizer. It does not change: any number of sequences may share it."""

    def __init__(
        self,
        matches: Any,
        vocabulary: GrammarVocabulary,
        token_seconds: float,
    ) -> None:
        """matches: xgrammar's CompiledGrammar; token_seconds: of processor time, that one token
        may take."""
        from xgrammar import GrammarMatcher

        self.matcher = lambda: GrammarMatcher(matches)
        self.vocabulary = vocabulary
        self.token_seconds = token_seconds
        self.memory_bytes = int(matches.memory_size_bytes)
        self.first_allowed = self._first_allowed() if vocabulary.first else None

    def start(self) -> GrammarState:
        """The state of an answer without tokens."""
        return GrammarState(self)

    def _first_allowed(self) -> np.ndarray:
        """Tokens that may come first, `[vocab]` bool."""
        matcher = self.matcher()
        allowed = _allowed(matcher, self.vocabulary.size)
        for token_id, piece in self.vocabulary.first.items():
            allowed[token_id] = bool(piece) and matcher.accept_string(piece)
            if allowed[token_id]:
                matcher.rollback(1)
        return allowed & ~self.vocabulary.broken_after(0)


class GrammarState:
    """Of one sequence. `mask` the logits, then `accept` the token that was drawn from them."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.matcher()
        self._begun = False
        self._last_byte = 0
        self._seconds = 0.0  # that this token has taken

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """logits `[vocab]` float → a copy, -inf for tokens that cannot come next.

        RuntimeError if none can, or if the grammar turns out to be too slow to follow.
        """
        start = time.thread_time()
        if not self._begun and self._grammar.first_allowed is not None:
            allowed = self._grammar.first_allowed
        else:
            vocabulary = self._grammar.vocabulary
            allowed = _allowed(self._matcher, vocabulary.size)
            allowed &= ~vocabulary.broken_after(self._last_byte)
        self._seconds = time.thread_time() - start
        if not allowed.any():
            raise RuntimeError("grammar: no token can continue this answer")
        self._check_seconds()
        return np.where(allowed, logits, logits.dtype.type(-np.inf))

    def accept(self, token_id: int) -> None:
        """The next token of the answer. RuntimeError if it does not match."""
        start = time.thread_time()
        vocabulary = self._grammar.vocabulary
        piece = None if self._begun else vocabulary.first.get(token_id)
        if piece is None:
            accepted = self._matcher.accept_token(token_id)
        else:
            accepted = self._matcher.accept_string(piece)
        self._begun = True
        self._last_byte = (vocabulary.pieces[token_id] or b"\0")[-1]
        self._seconds += time.thread_time() - start
        if not accepted:
            raise RuntimeError(f"grammar: token {token_id} does not continue this answer")
        self._check_seconds()

    def _check_seconds(self) -> None:
        # An ambiguous grammar takes longer with every token, and others' tokens wait for it.
        if self._seconds > self._grammar.token_seconds:
            raise RuntimeError(
                f"grammar: one token took {self._seconds:.2f} s of masks; "
                f"accepted: up to {self._grammar.token_seconds} s"
            )


def _allowed(matcher: Any, vocab_size: int) -> np.ndarray:
    """Tokens that may come next, `[vocab]` bool."""
    bits = np.full((1, -(-vocab_size // 32)), -1, np.int32)
    matcher.fill_next_token_bitmask(bits)
    return np.unpackbits(bits.view(np.uint8)[0], count=vocab_size, bitorder="little").view(bool)
