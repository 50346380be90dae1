"""How the tokens of a vocabulary are split in blocks, by the kernels and by the sampler alike: the
random numbers of a draw depend on it (engine/race.py)."""

_TOKENS = 64  # of a block, at most


def logit_blocks(vocab_size: int) -> int:
    """How many blocks there are. Token i is in block i % blocks, and row i // blocks of it."""
    return -(-vocab_size // _TOKENS)
