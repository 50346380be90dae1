"""What every GPU that we compile for grants a workgroup."""

from dataclasses import dataclass
from typing import Literal

MatrixUnits = Literal["none", "mma", "simdgroup"]
"""Units that multiply small matrices of float16 with float32 sums: none that we use, CUDA's tensor
cores (sm_80 and later), or Metal's simdgroup matrices (Apple7 and later)."""


VECTOR = 4  # values that one load may fetch on every GPU


@dataclass(frozen=True)
class GpuLimits:
    """threads: of a workgroup; shared_bytes: of its shared (threadgroup) memory; halves: of float16
    that one load may fetch.

    The defaults are Metal's and lavapipe's; CUDA grants more. The width of a warp is not here: no
    kernel may rely on one, but those of the MatrixUnits, which bring it along.
    """

    threads: int = 256
    shared_bytes: int = 32768
    halves: int = VECTOR

    def vector_of(self, dtype: str) -> int:
        """Values of `dtype` that one load may fetch."""
        return self.halves if dtype == "float16" else VECTOR


CUDA = GpuLimits(shared_bytes=49152, halves=8)  # more memory must be asked of the driver

LANES = 32  # threads that share a sum, at least; a choice of ours, not the width of a warp
