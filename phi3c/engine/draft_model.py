"""Drafts from a small model of the same vocabulary, which follows sequences in its own KV cache.

A draft is the chain of the tokens that win the draft model's own race (sampler.py), and beside each
of them, as leaves, the runners-up: the first of a race are draws without replacement (Kool et al.
2019, "Stochastic Beams and Where to Find Them"). Only the chain goes through the draft model, so a
wider draft costs nothing here.

The draft model is behind after a prompt or a preemption; it catches up a chunk a step, and a
sequence has drafts as soon as it has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phi3c.engine.draft import NO_DRAFT, Draft
from phi3c.engine.scheduler import deal
from phi3c.engine.sequence import Sequence
from phi3c.errors import CacheFullError, InputError, SequenceError
from phi3c.runtime.compiled import CompiledPhi3
from phi3c.runtime.logit_row import LogitRow

__all__ = ["DraftModel"]


@dataclass(frozen=True)
class DraftModel:
    """depth: tokens in a chain; width: guesses at each of them. adaptive: shorter drafts, or none,
    where they do not pay."""

    model: CompiledPhi3
    depth: int = 5
    width: int = 1
    adaptive: bool = True

    def __post_init__(self) -> None:
        for name in ("depth", "width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name}: found {value!r}; accepted: an integer of 1 or more")

    def start(self, model: CompiledPhi3, cache_tokens: int) -> DraftModelDrafter:
        """What drafts for one engine. Raises InputError (another vocabulary), OutOfMemoryError."""
        _check_vocabulary(self.model, model)
        return DraftModelDrafter(self, cache_tokens)


@dataclass
class _Followed:
    """What the draft model's cache holds of a sequence: its first `known` tokens, then guesses."""

    long_factors: bool
    known: int = 0
    guessed: list[int] = field(default_factory=list)

    def catch_up(self, tokens: Seq[int]) -> int:
        """Count the guesses that came true as known; returns how many are to be dropped."""
        most = len(tokens) - 1 - self.known  # the last token is computed, for its logits
        right = 0
        while right < min(most, len(self.guessed)):
            if self.guessed[right] != tokens[self.known + right]:
                break
            right += 1
        dropped = len(self.guessed) - right
        if most < 0:  # preempted before it sampled, and back with all its pages
            dropped -= most
            self.known += most
        self.known += right
        self.guessed = []
        return dropped


class DraftModelDrafter:
    """A `Drafter` (speculation.py)."""

    def __init__(self, options: DraftModel, cache_tokens: int) -> None:
        self.depth = options.depth
        self._model = options.model
        self._width = options.width
        self._limits = options.model.manifest.limits
        self._cache = options.model.create_paged_kv_cache(max_total_seq_len=cache_tokens)
        self._followed: dict[int, _Followed] = {}  # by the sequence's id, which is the cache's too

    def nodes(self, depth: int) -> int:
        """The most tokens in a draft of this depth."""
        return depth * self._width

    def propose(self, wanted: Seq[tuple[Sequence, int]]) -> list[Draft]:
        """A draft of at most the depth for each sequence; empty where the model is behind."""
        depths = {sequence: self._room(sequence, depth) for sequence, depth in wanted}
        ready = [sequence for sequence, depth in depths.items() if depth > 0]
        logits = self._catch_up(ready[: self._limits.max_batch_size])
        drafts = self._guess(logits, depths)
        return [drafts.get(sequence, NO_DRAFT) for sequence in depths]

    def forget(self, sequence: Sequence) -> None:
        if self._followed.pop(sequence.id, None) is not None:
            self._cache.remove_sequence(sequence.id)

    def _room(self, sequence: Sequence, depth: int) -> int:
        """The depth that the draft model's own context and LongRoPE factors allow.

        A draft's last token is never computed here.
        """
        config, tokens = self._model.config, len(sequence.tokens)
        depth = min(depth, self._limits.context_length - tokens + 1)
        if not config.needs_long_factors(tokens):
            while depth > 0 and config.needs_long_factors(tokens + depth - 1):
                depth -= 1
        return depth

    def _catch_up(self, sequences: list[Sequence]) -> dict[Sequence, LogitRow]:
        """One forward of tokens not seen yet; logits after those sequences that it ends.

        Where pages run out, sequences that do not draft now are forgotten, then the last that do.
        """
        for sequence in sequences:
            self._follow(sequence)
        while sequences:
            lengths = [len(s.tokens) - self._followed[s.id].known for s in sequences]
            counts = deal(self._limits.prefill_chunk_size, lengths)
            parts = {s: n for s, n in zip(sequences, counts, strict=True) if n}
            feeds = {}
            for sequence, count in parts.items():
                known = self._followed[sequence.id].known
                feeds[sequence] = sequence.tokens[known : known + count]
            try:
                logits = self._forward(feeds)
            except CacheFullError:
                idle = self._followed.keys() - {s.id for s in sequences}
                for seq_id in idle or {sequences.pop().id}:
                    del self._followed[seq_id]
                    self._cache.remove_sequence(seq_id)
                continue
            for sequence, count in parts.items():
                self._followed[sequence.id].known += count
            return {
                sequence: row
                for sequence, row in zip(parts, logits, strict=True)
                if self._followed[sequence.id].known == len(sequence.tokens)
            }
        return {}

    def _guess(
        self, logits: dict[Sequence, LogitRow], depths: dict[Sequence, int]
    ) -> dict[Sequence, Draft]:
        """Drafts of sequences whose next token has these logits, each of its own depth."""
        tokens: dict[Sequence, list[int]] = {sequence: [] for sequence in logits}
        parents: dict[Sequence, list[int]] = {sequence: [] for sequence in logits}
        tips = dict.fromkeys(logits, -1)  # the end of each chain
        level = 0
        while logits:
            feeds = {}
            for sequence, row in logits.items():
                try:
                    guesses = sequence.likeliest(row, self._width, ahead=level)
                except RuntimeError:  # logits that nothing can be drawn from: no guess
                    continue
                tip, tips[sequence] = tips[sequence], len(tokens[sequence])
                tokens[sequence] += guesses
                parents[sequence] += [tip] * len(guesses)
                if level + 1 < depths[sequence]:
                    feeds[sequence] = guesses[:1]
            if not feeds:
                break
            try:
                rows = self._forward(feeds)
            except CacheFullError:
                break
            for sequence, fed in feeds.items():
                self._followed[sequence.id].guessed += fed
            logits = dict(zip(feeds, rows, strict=True))
            level += 1
        return {s: Draft(tuple(tokens[s]), tuple(parents[s])) for s in tokens}

    def _follow(self, sequence: Sequence) -> None:
        """Drop what is not the sequence's from the cache, or begin anew where that cannot be."""
        long_factors = self._model.config.needs_long_factors(len(sequence.tokens))
        followed = self._followed.get(sequence.id)
        if followed is not None and followed.long_factors == long_factors:
            try:
                self._cache.popn(sequence.id, followed.catch_up(sequence.tokens))
                return
            except SequenceError:  # the window before is freed
                pass
        self.forget(sequence)
        length = self._limits.context_length if long_factors else None
        self._cache.add_sequence(sequence.id, length)
        self._followed[sequence.id] = _Followed(long_factors)

    def _forward(self, feeds: dict[Sequence, list[int]]) -> list[LogitRow]:
        """Logits after each sequence's new tokens. Raises CacheFullError."""
        counts = [len(tokens) for tokens in feeds.values()]
        embed = self._model.embed([token for tokens in feeds.values() for token in tokens])
        with self._cache.forward([sequence.id for sequence in feeds], counts):
            if max(counts) > 1:
                ends = np.cumsum(counts) - 1
                logits, _ = self._model.batch_prefill(embed, ends, self._cache)
            else:
                run = self._model.decode if len(counts) == 1 else self._model.batch_decode
                logits, _ = run(embed, self._cache)
        several = self._width > 1
        whole = [several or sequence.needs_all_logits for sequence in feeds]
        return self._model.logit_rows(logits, whole)


def _check_vocabulary(draft: CompiledPhi3, target: CompiledPhi3) -> None:
    found, accepted = draft.config.vocab_size, target.config.vocab_size
    if found != accepted:
        raise InputError(
            f"draft model {draft.artifact.path}: found vocab_size {found}; accepted: {accepted}, "
            "that of the model it drafts for"
        )
    ours, theirs = _vocabulary(draft.artifact.path), _vocabulary(target.artifact.path)
    if ours is not None and theirs is not None and ours != theirs:
        token_id = min(i for i, _ in ours.items() ^ theirs.items())
        raise InputError(
            f"draft model {draft.artifact.path}: found token {token_id} to be "
            f"{ours.get(token_id)!r}; accepted: {theirs.get(token_id)!r}, that of the model it "
            "drafts for"
        )


def _vocabulary(folder: Path) -> dict[int, str] | None:
    """Token id → token, from tokenizer.json; None if there is none that lists them."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokens = {token_id: token for token, token_id in content["model"]["vocab"].items()}
        return tokens | {token["id"]: token["content"] for token in content["added_tokens"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
