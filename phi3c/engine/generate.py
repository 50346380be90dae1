"""Text from a session, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from phi3c.engine.detokenizer import IncrementalDetokenizer
from phi3c.engine.sampler import Sampler, SamplingParams
from phi3c.engine.session import Session
from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import ContextLengthError

__all__ = ["Generation"]


class Generation:
    """The answer to one prompt. Iterating over it runs the model and gives the text in pieces.

    text, token_ids: so far; every sampled token counts, the end-of-sequence token too.
    finish_reason: "stop" (an end-of-sequence token or a stop string), "length" (max_tokens, or
    prompt and answer fill the context), None while there is more to come.
    prefill_tokens: of the prompt, those that the session did not hold already; prefill_seconds:
    until the first token was sampled; decode_seconds: for all others, the caller's time left out.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
    ) -> None:
        """Runs nothing. InputError: an empty prompt, or ids out of the vocabulary;
        ContextLengthError: the prompt leaves no room for a token."""
        self.prompt_ids = session.check(prompt_ids)
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.prefill_tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self._session = session
        self._sampler = Sampler(params)
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.stop)
        room = session.context_length - len(self.prompt_ids)
        if room == 0:
            raise ContextLengthError(
                f"prompt: found {len(self.prompt_ids)} tokens; accepted: up to "
                f"{session.context_length - 1}, so that the context has room for an answer"
            )
        self._max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        ends = tokenizer.eos_token_ids.union(session.model.config.eos_token_ids)
        self._eos_token_ids = frozenset() if params.ignore_eos else ends
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        """The pieces of text that were not taken yet; none is empty."""
        return self._pieces

    def _run(self) -> Iterator[str]:
        computed, start = self._session.computed_tokens, time.perf_counter()
        token_id = self._sampler.sample(self._session.resume(self.prompt_ids))
        self.prefill_seconds = time.perf_counter() - start
        self.prefill_tokens = self._session.computed_tokens - computed
        while True:
            if piece := self._take(token_id):
                yield piece
            if self.finish_reason is not None:
                return
            start = time.perf_counter()
            token_id = self._sampler.sample(self._session.extend([token_id]))
            self.decode_seconds += time.perf_counter() - start

    def _take(self, token_id: int) -> str:
        """Append a token; returns its text, and all that was held back if it is the last one."""
        self.token_ids.append(token_id)
        piece = self._detokenizer.add(token_id)
        at_end = token_id in self._eos_token_ids
        if at_end or len(self.token_ids) == self._max_tokens:
            piece += self._detokenizer.finish()
            self.finish_reason = "length"
        if at_end or self._detokenizer.stopped:
            self.finish_reason = "stop"
        self.text += piece
        return piece
