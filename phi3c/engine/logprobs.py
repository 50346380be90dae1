"""Log-probabilities of a token and of the likeliest ones, as OpenAI's API has them."""

from __future__ import annotations

import numpy as np

from phi3c.runtime.logit_row import LogitRow

__all__ = ["logprobs"]


def logprobs(
    logits: np.ndarray | LogitRow, token_id: int, top: int
) -> tuple[float, dict[int, float]]:
    """(the token's, likeliest id → its own) of logits `[vocab]`, before temperature and filters.

    To float32's precision. The lower id of equals is the likelier. Raises as LogitRow does.
    """
    row = LogitRow.of(logits)
    shift = float(row.top) + float(np.log(row.rough_weights(row.logits, 1.0).sum()))
    likeliest: list[int] = []
    if top:
        ids = np.flatnonzero(row.logits >= row.kth_largest(min(top, row.size)))
        likeliest = ids[np.argsort(-row.logits[ids], kind="stable")][:top].tolist()
    return float(row.logits[token_id]) - shift, {i: float(row.logits[i]) - shift for i in likeliest}
