"""What the engine counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Metrics"]


@dataclass
class Metrics:
    """Sums since the engine was made; seconds are of the wall clock.

    computed_tokens: through the model, recomputed ones included; cached_tokens: of prompts, found
    as a prefix instead; refound_tokens: the same, by a sequence that was sent back or a sample that
    waited, of its own request. drafted_tokens: computed as guesses, of which accepted_tokens were
    right.
    sequence_steps: sequences of all steps (÷ steps: the mean batch). first_token_seconds: from
    submission, of first_tokens requests; later_token_seconds: from the token before it, of
    later_tokens of all samples; step_seconds, of which model_seconds in the model.
    """

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    steps: int = 0
    sequence_steps: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    refound_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    later_tokens: int = 0
    later_token_seconds: float = 0.0
    step_seconds: float = 0.0
    model_seconds: float = 0.0
    pages_free: int = 0
    pages_used: int = 0
    pages_cached: int = 0

    @property
    def mean_batch(self) -> float:
        """Sequences in a step."""
        return self.sequence_steps / max(1, self.steps)

    @property
    def time_to_first_token(self) -> float:
        """Mean seconds, from submission."""
        return self.first_token_seconds / max(1, self.first_tokens)

    @property
    def time_per_token(self) -> float:
        """Mean seconds from one token of a sample to the next, what it waited included."""
        return self.later_token_seconds / max(1, self.later_tokens)

    @property
    def overhead(self) -> float:
        """Share of the steps' time outside the model."""
        return 1 - self.model_seconds / self.step_seconds if self.step_seconds else 0.0
