"""Speculation: several tokens of a sequence from one forward, the same that it would get without.

A drafter guesses a tree of next tokens, one forward gives the logits after each of them, and the
sequence samples as it always does: from the logits of its last token first, then, as long as what
it sampled is a node of the tree, from the logits of that node. So grammar, penalties, stop strings
and log-probabilities see one token after the other and know nothing of drafts.

That is exact rejection sampling. A draft is one token x with certainty, q(x) = 1; Leviathan et al.
2023 ("Fast Inference from Transformers via Speculative Decoding", section 2.3) accept it with
probability min(1, p(x)/q(x)) = p(x), and else draw from max(0, p − q) normalised, which is p
without x. To draw t from p and to accept x where t = x does the same, and for a tree too: its
children are several x at once. As t is drawn with the random numbers of its position (sampler.py),
the tokens are not only distributed as without speculation, they are equal.

Equal up to rounding: the attention of one new token and that of several add in different orders
(1e-7 of the logits' scale). Where activations are rounded to int8, that can flip a rounding (1e-2),
and two tokens of nearly the same score may change places. A `reproducible` engine takes the
attention of several in every step, which gives a row of a chain the same bits in any company.

A draft model draws its guesses with those same random numbers, from its own probabilities q. Then
they agree with t with a probability of at least (1 − d)/(1 + d), d being the total variation
distance of p and q (Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant
Speculative Decoding"), where independent guesses would be right far less often.

How deep a draft may be is decided anew in each step (`_Costs`, `Pace`): the depth from which most
tokens a second are expected, zero where drafts do not pay. Only speed depends on it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from statistics import median
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from phi3c.engine.draft import Draft
from phi3c.engine.scheduler import Part
from phi3c.engine.sequence import Sequence
from phi3c.runtime.compiled import CompiledPhi3

__all__ = ["Drafter", "Pace", "Speculation", "SpeculationOptions"]

_MEMORY = 0.85  # what an older guess weighs against the next one
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 256  # steps without a draft until one is tried again
_TRIAL = 2  # its depth
_MEASURE_AGAIN = 64  # forwards with drafts until a plain one is measured again
_GUESS_AT_MOST = 4  # the same where that batch was never measured, but others were


class Drafter(Protocol):
    """Guesses for sequences that decode. depth: the deepest draft it makes."""

    depth: int

    def nodes(self, depth: int) -> int:
        """The most tokens in a draft of this depth."""

    def propose(self, wanted: Seq[tuple[Sequence, int]]) -> list[Draft]:
        """A draft of at most the depth for each sequence, or an empty one."""

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""


class SpeculationOptions(Protocol):
    """What `Engine(speculation=…)` takes: PromptLookup, DraftModel.

    adaptive: shorter drafts, or none, where they do not pay.
    """

    adaptive: bool

    def start(self, model: CompiledPhi3, cache_tokens: int) -> Drafter:
        """A drafter for one engine on `model`, with room for its sequences."""


class Speculation:
    """Of one engine: adds drafts to the parts of a forward, and learns what they were worth."""

    def __init__(self, drafter: Drafter, adaptive: bool) -> None:
        self._drafter = drafter
        self._adaptive = adaptive
        self._costs = _Costs()
        self._paces: WeakKeyDictionary[Sequence, Pace] = WeakKeyDictionary()

    def add_drafts(
        self, parts: Seq[Part], budget: int, room: Callable[[Sequence, int], int]
    ) -> list[Part]:
        """The parts, some with a draft. budget: of their tokens; room: the depth that fits."""
        ready = [p for p in parts if p.sequence.pending == 1 and p.sequence.output.token_ids]
        # A prompt in the forward hides what the rest of it costs: no use to measure then.
        measurable = self._adaptive and len(ready) == len(parts)
        if not ready or (measurable and self._costs.wants_plain(len(ready))):
            return list(parts)
        depths = self._depths([p.sequence for p in ready], budget, room)
        if not depths:
            return list(parts)
        start = time.perf_counter()
        drafts = dict(zip(depths, self._drafter.propose(list(depths.items())), strict=True))
        self._costs.add_drafting(max(depths.values()), time.perf_counter() - start)
        return [replace(part, draft=drafts.get(part.sequence, part.draft)) for part in parts]

    def ran(self, parts: Seq[Part], seconds: float) -> None:
        """A forward of these parts took so long. One with a prompt in it says nothing here."""
        if all(part.sequence.pending == 1 for part in parts):
            self._costs.add_forward(len(parts), sum(part.size for part in parts), seconds)

    def accepted(self, part: Part, depth: int) -> None:
        """So much of a part's draft was right."""
        self._pace(part.sequence).learn(depth, part.draft.height)

    def forget(self, sequence: Sequence) -> None:
        self._drafter.forget(sequence)

    def _pace(self, sequence: Sequence) -> Pace:
        return self._paces.setdefault(sequence, Pace())

    def _depths(
        self, ready: Seq[Sequence], budget: int, room: Callable[[Sequence, int], int]
    ) -> dict[Sequence, int]:
        """How deep each sequence may guess, those that do not left out.

        One after another, the best guessed first, each takes the depth that makes the whole forward
        most worth while.
        """
        depths: dict[Sequence, int] = {}
        batch = tokens = expected = len(ready)
        deepest = 0
        for sequence in sorted(ready, key=lambda s: -self._pace(s).rate):
            pace, depth = self._pace(sequence), room(sequence, self._drafter.depth)
            while depth > 0 and self._drafter.nodes(depth) > budget:
                depth -= 1
            if depth <= 0:
                continue
            each = np.arange(depth + 1)
            right = pace.expected(each)
            if self._adaptive:
                nodes = [self._drafter.nodes(d) for d in range(depth + 1)]
                seconds = self._costs.seconds(
                    batch, tokens + np.array(nodes), np.maximum(deepest, each)
                )
                best = int(np.argmax((expected + right) / seconds))
                depth = min(depth, pace.choose(best))
            if depth:
                depths[sequence] = depth
                expected += right[depth]
                tokens += self._drafter.nodes(depth)
                budget -= self._drafter.nodes(depth)
                deepest = max(deepest, depth)
        return depths


@dataclass
class Pace:
    """How well one sequence is guessed, and how long it waits for another try if badly.

    hits of tries: of late, guesses that were right; it begins with a hopeful two of three.
    """

    hits: float = 2.0
    tries: float = 3.0
    pause: int = _FIRST_PAUSE
    skipped: int = 0

    @property
    def rate(self) -> float:
        return self.hits / self.tries

    def expected(self, depths: np.ndarray) -> np.ndarray:
        """Right guesses in a row, of so many: the sum of rate, rate², …"""
        if self.rate == 1:
            return depths
        return self.rate * (1 - self.rate**depths) / (1 - self.rate)

    def choose(self, best: int) -> int:
        """The depth, where `best` is the one that pays: at times a trial although none does."""
        if best:
            self.pause, self.skipped = _FIRST_PAUSE, 0
            return best
        self.skipped += 1
        return _TRIAL if self.skipped > self.pause else 0

    def learn(self, right: int, height: int) -> None:
        """`right` guesses in a row of a draft of this height were."""
        self.hits = _MEMORY * self.hits + right
        self.tries = _MEMORY * self.tries + min(right + 1, height)
        if self.skipped > self.pause:
            self.pause, self.skipped = min(2 * self.pause, _LONGEST_PAUSE), 0


class _Costs:
    """Measured seconds of forwards, of late: plain ones by batch, those with drafts by tokens."""

    def __init__(self) -> None:
        self._plain: dict[int, deque[float]] = {}
        self._verify: dict[int, deque[float]] = {}
        self._drafting: deque[float] = deque(maxlen=9)  # a level
        self._since: dict[int, int] = {}  # batch → forwards with drafts since its last plain one
        self._lines: dict[int, tuple[list[int], list[float]]] = {}  # batch → tokens, seconds

    def add_forward(self, batch: int, tokens: int, seconds: float) -> None:
        self._lines.clear()
        if tokens == batch:
            self._plain.setdefault(batch, deque(maxlen=5)).append(seconds)
            self._since[batch] = 0
        else:
            self._verify.setdefault(tokens, deque(maxlen=5)).append(seconds)
            self._since[batch] = self._since.get(batch, 0) + 1

    def add_drafting(self, depth: int, seconds: float) -> None:
        self._drafting.append(seconds / depth)

    def wants_plain(self, batch: int) -> bool:
        """Whether it is time to measure what a batch costs without drafts."""
        patience = _MEASURE_AGAIN if batch in self._plain else _GUESS_AT_MOST
        return not self._plain or self._since.get(batch, 0) >= patience

    def seconds(self, batch: int, tokens: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """Of forwards of so many tokens, and of drafts so deep; between measured ones on a line.

        More tokens than were ever measured are taken to cost no more: a reason to try them. Where
        nothing was measured, all cost the same.
        """
        if batch not in self._lines:
            plain = {b: median(self._plain[b]) for b in sorted(self._plain)} or {batch: 1.0}
            points = {batch: float(np.interp(batch, list(plain), list(plain.values())))}
            if self._plain:
                points |= {n: median(self._verify[n]) for n in sorted(self._verify) if n > batch}
            self._lines[batch] = list(points), list(points.values())
        drafting = median(self._drafting) if self._drafting else 0.0
        return np.interp(tokens, *self._lines[batch]) + depths * drafting
