"""Scores that no key has."""

MASKED = -1e30  # the weight is exactly zero
UNMASKED = 0.5 * MASKED  # every real score is above it
