"""Constants of the kernels' arithmetic."""

LOG2_E = 1.4426950408889634  # exp(x) = 2^(x · log2 e)
