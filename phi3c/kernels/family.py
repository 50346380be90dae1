"""The kernels that a model can be built of: of a family of targets each."""

from .cpu import CpuKernels
from .gpu import GpuKernels

Kernels = CpuKernels | GpuKernels
