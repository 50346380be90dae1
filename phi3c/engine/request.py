"""What is asked of the engine, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phi3c.engine.grammar import Grammar
from phi3c.engine.sampler import SamplingParams
from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import InputError, Phi3CError
from phi3c.runtime.loaded_adapters import Adapter

__all__ = ["Handle", "Output", "Piece", "Request", "prompt_tokens"]

_MOST_SAMPLES = 256

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """prompt: text, token ids, or chat messages (role, content), which the checkpoint's own
    template makes a prompt. params: None means what the checkpoint's generation_config.json says,
    as on the command line; `SamplingParams()` samples at temperature 1. n: samples of it, which
    have their turn before requests of the same priority that came later. priority: the higher goes
    first. grammar: what the answer must look like; it then ends with an end-of-sequence token,
    unless max_tokens or a stop string cuts it. adapter: the name of a loaded LoRA adapter; None for
    the model itself.
    """

    prompt: Prompt
    params: SamplingParams | None = None
    n: int = 1
    priority: int = 0
    grammar: Grammar | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.params is not None and not isinstance(self.params, SamplingParams):
            raise InputError(f"params: found {self.params!r}; accepted: SamplingParams, or None")
        if type(self.n) is not int or not 1 <= self.n <= _MOST_SAMPLES:
            raise InputError(f"n: found {self.n!r}; accepted: an integer from 1 to {_MOST_SAMPLES}")
        if type(self.priority) is not int:
            raise InputError(f"priority: found {self.priority!r}; accepted: an integer")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InputError(f"grammar: found {self.grammar!r}; accepted: a Grammar, or None")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise InputError(f"adapter: found {self.adapter!r}; accepted: a name, or None")
        if self.grammar is not None and self.params is not None and self.params.ignore_eos:
            raise InputError("ignore_eos: found true; accepted: false, as eos ends a grammar")


@dataclass
class Output:
    """One sample. finish_reason: "stop", "length", "cancelled", "error", or None so far.

    logprobs: of each token, where asked for: (its log-probability, likeliest id → theirs). They
    come after penalties and biases, before a grammar's mask, the temperature and the filters.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """Text that is now certain, of sample `index`, and its tokens since the last piece.

    Their logprobs, where asked for, as in Output. text is empty in an engine without a tokenizer,
    and at the end of a sample whose last tokens have none. Together the token ids are the output's;
    text that is held back (half a character, the beginning of a stop string) comes with a later
    piece than its tokens would, or with none.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[tuple[float, dict[int, float]], ...] = ()


@dataclass(eq=False)
class Handle:
    """A submitted request, its params filled in. error: why it failed, if it did. cached_tokens: of
    its prompt, those found in the prefix cache when it first had its turn. adapter: that it runs
    with.
    """

    request: Request
    prompt_ids: list[int]
    outputs: list[Output]
    error: Phi3CError | RuntimeError | None = None
    cached_tokens: int = 0
    pieces: list[Piece] = field(default_factory=list)  # not taken yet
    adapter: Adapter | None = None

    @property
    def done(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    def take(self) -> list[Piece]:
        """The pieces that came since the last call."""
        taken, self.pieces = self.pieces, []
        return taken


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of a prompt in any form. Raises InputError."""
    listed = isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes | bytearray)
    if not listed or (isinstance(prompt, np.ndarray) and prompt.ndim != 1):
        raise InputError(
            f"prompt: found {prompt!r}; accepted: text, a list of token ids, or of chat messages"
        )
    if not isinstance(prompt, str) and all(not isinstance(item, Mapping) for item in prompt):
        return list(prompt)
    if tokenizer is None:
        raise InputError("prompt: found text; accepted: token ids, as the engine has no tokenizer")
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.encode_chat(list(prompt))
