"""From logits to a token: temperature, top-k, top-p and min-p, in the order of `generate`.

`SamplingParams` is what a request asks for, `filtered_distribution` the exact distribution that it
means for one row of logits, `Sampler` draws from it. Penalties and biases change the logits before
(penalties.py).

A draw is a race of the tokens (race.py). Its numbers depend on the seed and on the position in the
answer alone, so a seed gives the same tokens whatever else is in the batch; and who knows similar
logits, as a draft model does, can say beforehand which tokens are likely to win (speculation.py).

Ties: top-k keeps every token as large as the k-th (as transformers does); greedy and top-p prefer
the lower token id. In a large vocabulary top-p compares masses to float32's precision.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phi3c.engine.race import RaceNumbers, first_in_race
from phi3c.errors import InputError
from phi3c.runtime.logit_row import LogitRow

__all__ = ["Sampler", "SamplingParams", "filtered_distribution"]

_MAX_SEED = 2**64
_MOST_PENALTY = 100.0
_MOST_BIAS = 100.0
_FEW = 1024  # tokens that top-p just sorts
_BIN_SHIFT = 19  # bits of a float32 that its bin leaves out
_BINS = (0x3F800000 >> _BIN_SHIFT) + 1  # up to that of 1.0


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
        self._key = int(seeds.generate_state(1, np.uint64)[0])

    def sample(self, logits: np.ndarray | LogitRow) -> int:
        """The next token for `logits` [vocab]. RuntimeError if they hold NaN or +inf."""
        [token_id] = self.likeliest(logits, 1)
        self._position += 1
        return token_id

    def likeliest(self, logits: np.ndarray | LogitRow, count: int, ahead: int = 0) -> list[int]:
        """The first `count` in the race for the token after `ahead` more, were these its logits.

        The first of them is what `sample` takes. Fewer where fewer have a probability.
        """
        row = LogitRow.of(logits)
        if self.params.greedy:
            return _largest(row, count)
        numbers = RaceNumbers(self._key, self._position + ahead, row.table.shape)
        lowest = _lowest(row, self.params)
        return first_in_race(row, numbers, self.params.temperature, lowest, count)


def filtered_distribution(
    logits: np.ndarray, params: SamplingParams
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that `params` lets through, and their probabilities (float64, summing to 1).

    logits: [vocab], any float type. Returns ids [m] int64, ascending, and probs [m].
    """
    row = LogitRow.of(logits)
    if params.greedy:
        return np.array([row.argmax()]), np.ones(1)
    value, last = _lowest(row, params)
    stays = row.logits > value
    stays[: last + 1] |= row.logits[: last + 1] == value
    ids = np.flatnonzero(stays)
    weights = row.weights(row.logits[ids], params.temperature)
    return ids, weights / weights.sum()


def _lowest(row: LogitRow, params: SamplingParams) -> tuple[float, int]:
    """(logit, token id) of the last token that stays, in the order of logits and then of ids.

    That is all there is to say: each filter keeps a beginning of that order.
    """
    value, last = -np.inf, row.size
    if 0 < params.top_k < row.size:
        value = row.kth_largest(int(params.top_k))
    if params.top_p < 1:
        value, last = _top_p(row, value, params)
    if params.min_p > 0:
        around = row.top + params.temperature * np.log(params.min_p)
        around -= 1e-6 * (abs(row.top) + abs(around))  # rounding; the weights decide
        values = row.at_least(max(value, around))
        least = values[row.weights(values, params.temperature) >= params.min_p].min()
        if least > value:
            value, last = least, row.size
    return value, last


def _top_p(row: LogitRow, value: float, params: SamplingParams) -> tuple[float, int]:
    """`_lowest` of those that reach `value`, when the least likely, 1 - top_p of them, go."""
    values, drop, below, total = row.at_least(value), 1 - params.top_p, 0.0, None
    if values.size > _FEW:
        # Only the bin that the limit is in has to be sorted.
        weights = row.rough_weights(values, params.temperature)
        reached = np.cumsum(_masses(weights))
        total = reached[-1]
        found = min(int(np.searchsorted(reached, drop * total, side="right")), _BINS - 1)
        low, high = (np.array([found, found + 1], np.int32) << _BIN_SHIFT).view(np.float32)
        values = values[(weights >= low) & (weights < high)]
        below = reached[found - 1] if found else 0.0
    ascending = np.sort(values)
    reached = below + np.cumsum(row.weights(ascending, params.temperature))
    limit = drop * (reached[-1] if total is None else total)
    first = min(int(np.searchsorted(reached, limit, side="right")), ascending.size - 1)
    value = ascending[first]
    stay = int(np.searchsorted(ascending, value, side="right")) - first  # of those equal to it
    return value, int(np.flatnonzero(row.logits == value)[stay - 1])


def _masses(weights: np.ndarray) -> np.ndarray:
    """The sum of the weights in each bin, float64 `[_BINS]`, of weights float32 from 0 to 1.

    A weight's upper bits are its bin: 16 bins from one power of two to the next.
    """
    masses = np.zeros(_BINS)
    for start in range(0, weights.size, 8192):  # what the allocator has at hand
        some = weights[start : start + 8192]
        bins = (some.view(np.int32) >> _BIN_SHIFT).astype(np.intp)
        masses += np.bincount(bins, some.astype(np.float64), minlength=_BINS)
    return masses


def _largest(row: LogitRow, count: int) -> list[int]:
    """Ids of the largest logits that are not -inf, in order; the lower of equals first."""
    first = row.argmax()
    if count == 1:
        return [first]
    order = np.argsort(-row.logits, kind="stable")[:count]
    return order[row.logits[order] > -np.inf].tolist()


def _is_finite(value: Any) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _refusal(field: str, found: Any, accepted: str) -> InputError:
    return InputError(f"{field}: found {found!r}; accepted: {accepted}")
