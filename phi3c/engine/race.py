"""A race of the tokens of a vocabulary, whose first is a draw, and which looks at few of them.

Every token has an exponential random number, divided by its weight, and the least wins, which is
each token with just its probability (the Gumbel-max trick, Maddison et al. 2014, without the
logarithm).

The numbers are made from the top down. The least of the n numbers of a block is one exponential
divided by n, any of the n may have it, and the others exceed it by exponentials of their own
(exponentials have no memory). So a block's least number over its largest weight is a time that
nobody in it beats, and only blocks that could beat the best so far are looked into.

A number is a function of seed, position and token alone (SplitMix64, Steele et al. 2014, which
gives the i-th of a stream without those before it): the same in any batch, and for a draft model.
"""

from __future__ import annotations

import numpy as np

from phi3c.runtime.logit_row import LogitRow

__all__ = ["RaceNumbers", "first_in_race"]

_FEW = 512  # tokens that are just compared
_AT_ONCE = 16  # blocks looked into
_GOLDEN, _FIRST_MIX, _SECOND_MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


class RaceNumbers:
    """Exponential random numbers of one position, float64, for a table `[rows, blocks]` of tokens.

    key: an integer below 2**64.
    """

    def __init__(self, key: int, position: int, shape: tuple[int, int]) -> None:
        self._rows, self._blocks = shape
        self._stream = _mix((key + (position + 1) * _GOLDEN) & _MASK)
        self._owners = self._rows * self._blocks  # the stream has the tokens first, then these,
        self._leasts = self._owners + self._blocks  # and then these

    def least(self) -> np.ndarray:
        """`[blocks]`: the least number of each block."""
        index = np.arange(self._leasts, self._leasts + self._blocks)
        return -np.log(_uniform(self._stream, index)) / self._rows

    def of(self, token_ids: np.ndarray) -> np.ndarray:
        """`[m]`, of m tokens."""
        return self._of(token_ids, *self._of_blocks(token_ids % self._blocks))

    def in_blocks(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `[rows, m]` of m blocks, and their numbers."""
        token_ids = np.add.outer(np.arange(0, self._owners, self._blocks), blocks)
        return token_ids, self._of(token_ids, *self._of_blocks(blocks))

    def _of(self, token_ids: np.ndarray, least: np.ndarray, owner: np.ndarray) -> np.ndarray:
        more = -np.log(_uniform(self._stream, token_ids))
        more[token_ids == owner] = 0
        return least + more

    def _of_blocks(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The least number of each block, and the token that has it."""
        index = np.concatenate([self._leasts + blocks, self._owners + blocks])
        least, owner = _uniform(self._stream, index).reshape(2, -1)
        row = ((1 - owner) * self._rows).astype(np.int64)
        return -np.log(least) / self._rows, row * self._blocks + blocks


def first_in_race(
    row: LogitRow,
    numbers: RaceNumbers,
    temperature: float,
    lowest: tuple[float, int],
    count: int,
) -> list[int]:
    """The first `count` tokens, in order; fewer where fewer have a probability.

    lowest: (logit, token id) of the last that takes part, in the order of logits and then of ids.
    """
    found: list[tuple[float, int]] = []
    logits, blocks = row.logits, row.blocks

    def run(ids: np.ndarray, values: np.ndarray, its_numbers: np.ndarray) -> None:
        weights = row.weights(values, temperature)
        times = its_numbers / weights
        times[(weights == 0) | (values < lowest[0])] = np.inf
        if lowest[1] < logits.size:
            times[(values == lowest[0]) & (ids > lowest[1])] = np.inf
        times, ids = times.ravel(), ids.ravel()
        first = [times.argmin()] if count == 1 else times.argsort(kind="stable")[:count]
        found.extend((times[i], int(ids[i])) for i in first if times[i] < np.inf)
        found[:] = sorted(found)[:count]

    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        if lowest[0] > -np.inf:
            ids = np.flatnonzero(logits >= lowest[0])
            if ids.size <= _FEW:
                run(ids, logits[ids], numbers.of(ids))
                return [token_id for _, token_id in found]
        weights = row.weights(row.tops, temperature)
        bounds = numbers.least() / weights
        bounds[(weights == 0) | (row.tops < lowest[0])] = np.inf
        order = bounds.argsort()
        for start in range(0, blocks, _AT_ONCE):
            some = order[start : start + _AT_ONCE]
            if bounds[some[0]] >= (found[-1][0] if len(found) == count else np.inf):
                break
            ids, its_numbers = numbers.in_blocks(some)
            run(ids, row.table[:, some], its_numbers)
    return [token_id for _, token_id in found]


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _FIRST_MIX) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND_MIX) & _MASK
    return z ^ (z >> 31)


def _uniform(stream: int, index: np.ndarray) -> np.ndarray:
    """The numbers of a stream at `index` (0 and up), float64, above 0 and up to 1."""
    z = index.astype(np.uint64)
    z += 1
    z *= _GOLDEN
    z += stream
    z ^= z >> 30
    z *= _FIRST_MIX
    z ^= z >> 27
    z *= _SECOND_MIX
    z ^= z >> 31
    z >>= 11
    z += 1
    return z * 2.0**-53
