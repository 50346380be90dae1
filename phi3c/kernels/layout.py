"""Sizes that the memory layouts of every family share."""

KV_BLOCK = 16  # tokens in a KV block
PANEL = 16  # output features in a panel: of an adapter's B, and of the CPU's weights
GROUP = 32  # input features to a scale of a group-quantized weight
