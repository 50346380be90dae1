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

from phi3c.engine.logit_row import LogitRow

__all__ = ["RaceNumbers", "first_in_race"]

_AT_ONCE = 8  # blocks looked into
_GOLDEN, _FIRST_MIX, _SECOND_MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


class RaceNumbers:
    """Exponential random numbers of one position, for a table `[rows, blocks]` of tokens.

    key: two integers below 2**64. least `[blocks]` float64: the least number of each block.
    """

    def __init__(self, key: tuple[int, int], position: int, shape: tuple[int, int]) -> None:
        block_key, token_key = key
        self._rows, self._blocks = shape
        self._stream = _mix((token_key + (position + 1) * _GOLDEN) & _MASK)
        stream = _mix((block_key + (position + 1) * _GOLDEN) & _MASK)
        self.least = -np.log(_uniform(stream, np.arange(self._blocks))) / self._rows

    def of(self, blocks: np.ndarray) -> np.ndarray:
        """float64 `[rows, m]`, of the tokens of m blocks."""
        index = np.add.outer(np.arange(self._rows + 1) * self._blocks, blocks)
        uniform = _uniform(self._stream, index)  # of the tokens; the last row: who has the least
        owner = ((1 - uniform[-1]) * self._rows).astype(np.int64)
        numbers = -np.log(uniform[:-1])
        numbers[owner, np.arange(blocks.size)] = 0
        numbers += self.least[blocks]
        return numbers


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
    blocks, found, goal = row.tops.size, [], np.inf
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        weights = row.weights(row.tops, temperature)
        bounds = numbers.least / weights
        bounds[(weights == 0) | (row.tops < lowest[0])] = np.inf
        order = bounds.argsort()
        for start in range(0, blocks, _AT_ONCE):
            some = order[start : start + _AT_ONCE]
            if bounds[some[0]] >= goal:
                break
            values = row.table[:, some]
            weights = row.weights(values, temperature)
            times = numbers.of(some) / weights
            times[(weights == 0) | (values < lowest[0])] = np.inf
            if lowest[1] < row.logits.size:
                ids = np.add.outer(np.arange(len(times)) * blocks, some)
                times[(values == lowest[0]) & (ids > lowest[1])] = np.inf
            times = times.ravel()
            first = [times.argmin()] if count == 1 else times.argsort(kind="stable")[:count]
            found += [
                (times[i], int(i // some.size * blocks + some[i % some.size]))
                for i in first
                if times[i] < goal
            ]
            found = sorted(found)[:count]
            if len(found) == count:
                goal = found[-1][0]
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
