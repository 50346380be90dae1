"""From logits to a token: temperature, top-k, top-p and min-p, in the order of `generate`.

`SamplingParams` is what a request asks for, `filtered_distribution` the exact distribution that it
means for one row of logits, `Sampler` draws from it. Penalties and biases change the logits before
(penalties.py).

A draw is a race: every token of the vocabulary has an exponential random number, divided by its
probability, and the least wins, which is each token with just its probability (the Gumbel-max
trick, Maddison et al. 2014, without the logarithm). The numbers depend on the seed and on the
position in the answer alone, so a seed gives the same tokens whatever else is in the batch; and who
knows similar logits, as a draft model does, can say beforehand which tokens are likely to win
(speculation.py).

Ties: top-k keeps every token as large as the k-th (as transformers does); greedy and top-p prefer
the lower token id.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phi3c.errors import InputError

__all__ = ["Sampler", "SamplingParams", "filtered_distribution"]

_MAX_SEED = 2**64
_MOST_PENALTY = 100.0
_MOST_BIAS = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled, and when it stops. Validated on construction."""

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # 1 = off
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # 0 = off; a share of the largest probability
    repetition_penalty: float = 1.0  # of tokens in prompt or answer (Keskar et al. 2019); 1 = off
    presence_penalty: float = 0.0  # taken from the logits of tokens in the answer
    frequency_penalty: float = 0.0  # the same, for each time
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # token id → added
    logprobs: int | None = None  # log-probabilities of the token and of so many likeliest
    seed: int | None = None  # None = fresh randomness
    max_tokens: int | None = None  # None = as far as the context reaches
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._check_real("temperature", math.inf, "a finite number, 0 (greedy) or more")
        self._check_real("top_p", 1.0, "a number from 0 to 1")
        self._check_real("min_p", 1.0, "a number from 0 to 1")
        self._check_int("top_k", 0, None, "an integer, 0 (off) or more")
        self._check_real("repetition_penalty", _MOST_PENALTY, "a number above 0, up to 100", 1e-6)
        for name in ("presence_penalty", "frequency_penalty"):
            self._check_real(name, 2.0, "a number from -2 to 2", -2.0)
        if not isinstance(self.logit_bias, Mapping) or not all(
            type(token) is int and token >= 0 and _is_finite(bias) and abs(bias) <= _MOST_BIAS
            for token, bias in self.logit_bias.items()
        ):
            raise _refusal("logit_bias", self.logit_bias, "token ids and numbers from -100 to 100")
        if self.logprobs is not None:
            self._check_int("logprobs", 0, 21, "null, or an integer from 0 to 20")
        if self.seed is not None:
            self._check_int("seed", 0, _MAX_SEED, "null, or an integer from 0 to 2**64 - 1")
        if self.max_tokens is not None:
            self._check_int("max_tokens", 1, None, "null, or an integer of 1 or more")
        if not isinstance(self.stop, tuple | list) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise _refusal("stop", self.stop, "a tuple or list of non-empty strings")
        object.__setattr__(self, "stop", tuple(self.stop))  # a list would not be hashable
        if not isinstance(self.ignore_eos, bool):
            raise _refusal("ignore_eos", self.ignore_eos, "true or false")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def _check_real(self, field: str, high: float, accepted: str, low: float = 0.0) -> None:
        value = getattr(self, field)
        if not _is_finite(value) or not low <= value <= high:
            raise _refusal(field, value, accepted)

    def _check_int(self, field: str, low: int, end: int | None, accepted: str) -> None:
        value = getattr(self, field)
        integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not integer or value < low or (end is not None and value >= end):
            raise _refusal(field, value, accepted)


class Sampler:
    """Draws the tokens of one sequence. `stream` tells apart the samples of one seeded request."""

    def __init__(self, params: SamplingParams, stream: int = 0) -> None:
        self.params = params
        self._position = 0  # of the next token in the answer
        seeds = np.random.SeedSequence(params.seed, spawn_key=(stream,))
        self._key = seeds.generate_state(2, np.uint64)

    def sample(self, logits: np.ndarray) -> int:
        """The next token for `logits` [vocab]. RuntimeError if they hold NaN or +inf."""
        [token_id] = self.likeliest(logits, 1)
        self._position += 1
        return token_id

    def likeliest(self, logits: np.ndarray, count: int, ahead: int = 0) -> list[int]:
        """The first `count` in the race for the token after `ahead` more, were these its logits.

        The first of them is what `sample` takes. Fewer where fewer have a probability.
        """
        if self.params.greedy:
            logits = _checked(logits)
            return [_argmax(logits)] if count == 1 else _least(-logits, count)
        ids, probs = filtered_distribution(logits, self.params)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            times = self._numbers(self._position + ahead, logits.size)[ids] / probs
        times[probs == 0] = np.inf
        return ids[_least(times, count)].tolist()

    def _numbers(self, position: int, vocab: int) -> np.ndarray:
        """Exponential random numbers `[vocab]`, each position's from a stream of its own."""
        counter = np.array([0, 0, 0, position], np.uint64)
        stream = np.random.Philox(key=self._key, counter=counter)
        return np.random.Generator(stream).standard_exponential(vocab)


def _least(values: np.ndarray, count: int) -> list[int]:
    """Indices of the least finite values, in order; the first of equals first."""
    if count == 1:
        return [int(values.argmin())]
    count = min(count, int(np.isfinite(values).sum()))
    some = np.flatnonzero(values <= np.partition(values, count - 1)[count - 1])
    return some[np.argsort(values[some], kind="stable")][:count].tolist()


def filtered_distribution(
    logits: np.ndarray, params: SamplingParams
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that `params` lets through, and their probabilities (float64, summing to 1).

    logits: [vocab], any float type. Returns ids [m] int64 and probs [m]; the order is unspecified.
    """
    logits = _checked(logits)
    if params.greedy:
        return np.array([_argmax(logits)]), np.ones(1)
    ids = _top_k(logits, params.top_k)
    scores = logits[ids].astype(np.float64)
    # Subtract before dividing: a tiny temperature then gives 0 and -inf, never inf - inf.
    with np.errstate(over="ignore"):
        weights = np.exp((scores - scores.max()) / params.temperature)
    if params.top_p < 1:
        kept = _top_p(ids, weights / weights.sum(), params.top_p)
        ids, weights = ids[kept], weights[kept]
    if params.min_p > 0:
        kept = weights >= params.min_p  # the largest weight is 1: a weight is a share of it
        ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def _top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids of the logits no smaller than the k-th largest; all of them for k = 0."""
    if not 0 < k < logits.size:
        return np.arange(logits.size)
    place = logits.size - int(k)
    return np.flatnonzero(logits >= np.partition(logits, place)[place])


def _top_p(ids: np.ndarray, probs: np.ndarray, top_p: float) -> np.ndarray:
    """Positions that stay when the least likely tokens, 1 - top_p of the mass, are dropped."""
    # Tokens below (1 - top_p) / n are dropped in any case (n of them weigh less than 1 - top_p):
    # what is left to sort is small.
    drop = 1 - top_p
    left = np.flatnonzero(probs >= drop / probs.size)
    if left.size == 0:  # rounding, where all are alike and top_p is 0
        left = np.array([probs.argmax()])
    mass_below = 1 - probs[left].sum()
    ascending = left[np.lexsort((-ids[left], probs[left]))]
    cumulative = mass_below + np.cumsum(probs[ascending])
    first = np.searchsorted(cumulative, drop, side="right")
    return ascending[min(first, ascending.size - 1) :]


def _checked(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits)
    if logits.ndim != 1 or logits.size == 0:
        raise InputError(f"logits: found shape {list(logits.shape)}; accepted: [vocab]")
    top = logits.max()  # NaN if any is
    if not np.isfinite(top):
        found = "NaN" if np.isnan(top) else "+inf" if top > 0 else "nothing but -inf"
        raise RuntimeError(f"cannot sample: logits hold {found}")
    return logits


def _is_finite(value: Any) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _argmax(logits: np.ndarray) -> int:
    return int(logits.argmax())  # the first of equals: the lowest id


def _refusal(field: str, found: Any, accepted: str) -> InputError:
    return InputError(f"{field}: found {found!r}; accepted: {accepted}")
