"""The answer to one request, or those to a few in a batch, in an engine that nobody else uses, and
the time they take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from phi3c.engine.engine import Engine
from phi3c.engine.request import Output, Request

__all__ = ["Answer", "answers_together"]


class Answer:
    """Iterating over it runs the engine, for all of its batch, and gives the first sample's text in
    pieces.

    prefill_seconds: of the steps until the first token was sampled; decode_seconds: of all others;
    the caller's own time is in neither.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        """Runs nothing. Raises as `Engine.submit` does."""
        self.handle = engine.submit(request)
        self.prefill_seconds = self.decode_seconds = 0.0
        self._engine = engine
        self._batch = [self]
        self._pieces = self._run()

    @property
    def output(self) -> Output:
        return self.handle.outputs[0]

    @property
    def prefill_tokens(self) -> int:
        """Of the prompt, those that were not found in the prefix cache."""
        return len(self.handle.prompt_ids) - self.handle.cached_tokens

    def __iter__(self) -> Iterator[str]:
        """The pieces that were not taken yet; none is empty.

        What interrupts a step (Ctrl-C) cancels the request; the engine can go on with others.
        Raises what the request failed with.
        """
        return self._pieces

    def close(self) -> None:
        """End it, if it has not ended; its pages are given back."""
        self._engine.cancel(self.handle)

    def _run(self) -> Iterator[str]:
        try:
            while True:
                for piece in self.handle.take():
                    if piece.index == 0 and piece.text:
                        yield piece.text
                if self.handle.done:
                    break
                self._step()
        finally:
            self.close()
        if self.handle.error is not None:
            raise self.handle.error

    def _step(self) -> None:
        running = [(a, bool(a.output.token_ids)) for a in self._batch if not a.handle.done]
        start = time.perf_counter()
        self._engine.step()
        seconds = time.perf_counter() - start
        for answer, decoding in running:
            if decoding:
                answer.decode_seconds += seconds
            else:
                answer.prefill_seconds += seconds


def answers_together(engine: Engine, requests: Iterable[Request]) -> list[Answer]:
    """Of all requests in one batch: iterating over one goes on with the others.

    Raises as `Engine.submit` does, and then leaves none.
    """
    batch: list[Answer] = []
    try:
        for request in requests:
            batch.append(Answer(engine, request))
    except BaseException:
        for answer in batch:
            answer.close()
        raise
    for answer in batch:
        answer._batch = batch
    return batch
