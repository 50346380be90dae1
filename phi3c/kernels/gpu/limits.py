"""What every GPU that we compile for grants a workgroup."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuLimits:
    """threads: of a workgroup; shared_bytes: of its shared (threadgroup) memory.

    The defaults are Metal's and lavapipe's; CUDA grants more. The width of a warp is not here: no
    kernel may rely on one.
    """

    threads: int = 256
    shared_bytes: int = 32768


LANES = 32  # threads that share a sum, at least; a choice of ours, not the width of a warp
