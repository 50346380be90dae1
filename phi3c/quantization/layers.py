"""Weights of a model under construction, as the scheme stores them."""

from __future__ import annotations

from tvm.relax.frontend import nn

from ..kernels.family import Kernels
from ..kernels.weight_format import storage_dtype
from .group import GroupQuantization
from .scheme import Kind


class GroupWeight(nn.Module):
    """The parameters q and scale of a group-quantized `[out, in]` weight."""

    def __init__(
        self,
        kernels: Kernels,
        quantization: GroupQuantization,
        out_features: int,
        in_features: int,
    ):
        super().__init__()
        shapes = kernels.group_shapes(out_features, in_features, quantization.bits)
        self.quantization = quantization
        self.q = nn.Parameter(shapes[0], "uint32")
        self.scale = nn.Parameter(shapes[1], quantization.scale_dtype)


Weight = nn.Parameter | GroupWeight


def make_weight(kernels: Kernels, kind: Kind, out_features: int, in_features: int) -> Weight:
    """kind: how it is stored."""
    if isinstance(kind, GroupQuantization):
        return GroupWeight(kernels, kind, out_features, in_features)
    return nn.Parameter(kernels.weight_shape(out_features, in_features), storage_dtype(kind))
