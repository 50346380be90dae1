"""One sample of a request on its way through the engine."""

from __future__ import annotations

from phi3c.engine.detokenizer import IncrementalDetokenizer
from phi3c.engine.grammar_state import CompiledGrammar
from phi3c.engine.logprobs import logprobs
from phi3c.engine.penalties import Penalties
from phi3c.engine.prefix_cache import Digests
from phi3c.engine.request import Handle, Output, Piece
from phi3c.engine.sampler import Sampler
from phi3c.engine.tokenizer import Tokenizer
from phi3c.runtime.logit_row import LogitRow

__all__ = ["Sequence"]


class Sequence:
    """tokens: prompt and answer so far; computed: how many of them are in the KV cache.

    order: the smaller goes first. long_factors: LongRoPE's set in the cache. served: the last step
    that computed any of its tokens; sampled_at: when its last token came. digests: of its pages,
    for the prefix cache. admitted: whether it ever had pages; forks: samples made of its prompt.
    slot: of its adapter while it runs; −1: the model itself.
    """

    def __init__(
        self,
        seq_id: int,
        handle: Handle,
        arrival: int,
        max_tokens: int,
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        vocab_size: int,
        grammar: CompiledGrammar | None = None,
        index: int = 0,
    ) -> None:
        params = handle.request.params
        self.id = seq_id
        self.handle = handle
        self.index = index
        self.order = (-handle.request.priority, arrival, index)
        self.tokens = list(handle.prompt_ids)
        self.computed = 0
        self.long_factors = False
        self.served = -1
        self.sampled_at = 0.0
        self.slot = -1
        self.digests: Digests = {}
        self.admitted = False
        self.forks = 0
        self._max_tokens = max_tokens
        self._eos_token_ids = eos_token_ids
        self._sampler = Sampler(params, stream=index)
        self._grammar = grammar and grammar.start()
        self._penalties = Penalties(params, handle.prompt_ids, vocab_size)
        self._detokenizer = tokenizer and IncrementalDetokenizer(tokenizer, params.stop)
        self._told = 0  # tokens that are in a piece
        self._rest = (arrival, max_tokens, eos_token_ids, tokenizer, vocab_size, grammar)

    def another(self, seq_id: int, index: int) -> Sequence:
        """Sample `index` of the same request, from the prompt on."""
        return Sequence(seq_id, self.handle, *self._rest, index)

    @property
    def output(self) -> Output:
        return self.handle.outputs[self.index]

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet; 1 where the sequence decodes."""
        return len(self.tokens) - self.computed

    @property
    def left(self) -> int:
        """Tokens that the answer may still have."""
        return self._max_tokens - len(self.output.token_ids)

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    @property
    def needs_all_logits(self) -> bool:
        """Whether a token takes more than the largest logit."""
        params = self.handle.request.params
        more = self._penalties.active or self._grammar is not None or params.logprobs is not None
        return more or not params.greedy

    def likeliest(self, row: LogitRow, count: int, ahead: int) -> list[int]:
        """Guesses at the token after `ahead` more, from a draft model's logits.

        Penalties are those of now. RuntimeError if the logits hold NaN or +inf.
        """
        return self._sampler.likeliest(self._penalised(row), count, ahead)

    def sample(self, row: LogitRow) -> None:
        """Take the next token from these logits. RuntimeError if they hold NaN or +inf, or if the
        grammar refuses."""
        output = self.output
        row = self._penalised(row)
        masked = row if self._grammar is None else LogitRow(self._grammar.mask(row.logits))
        token_id = self._sampler.sample(masked)
        if self._grammar is not None:
            self._grammar.accept(token_id)
        if self.handle.request.params.logprobs is not None:
            output.logprobs.append(logprobs(row, token_id, self.handle.request.params.logprobs))
        self._penalties.add(token_id)
        self.tokens.append(token_id)
        output.token_ids.append(token_id)
        stopped = token_id in self._eos_token_ids
        full = len(output.token_ids) == self._max_tokens
        piece = ""
        if self._detokenizer is not None:
            # What ends a grammar's answer is no part of it, even where it has a text.
            piece = "" if stopped and self._grammar else self._detokenizer.add(token_id)
            if stopped or full:
                piece += self._detokenizer.finish()
            stopped = stopped or self._detokenizer.stopped
        output.text += piece
        if stopped or full:
            output.finish_reason = "stop" if stopped else "length"
        if piece or self.finished or self._detokenizer is None:
            self._tell(piece)

    def _penalised(self, row: LogitRow) -> LogitRow:
        return LogitRow(self._penalties.apply(row.logits)) if self._penalties.active else row

    def _tell(self, text: str) -> None:
        output, since = self.output, self._told
        self._told = len(output.token_ids)
        self.handle.pieces.append(
            Piece(self.index, text, tuple(output.token_ids[since:]), tuple(output.logprobs[since:]))
        )
