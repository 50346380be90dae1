"""Named weight schemes.

`q<bits>f<width>_1`, as in MLC-LLM: weights of linears, embedding and head in groups of 32 input
features, symmetric, with scales and KV pages of float<width>. `q0f<width>` keeps weights and KV
pages in that type. Activations between kernels are the target's choice (float32 on the CPU). With
`:int8` behind its name a grouped scheme rounds the input of every linear to int8 and multiplies in
integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import SchemeError
from .group import GroupQuantization


@dataclass(frozen=True)
class Scheme:
    """weight: of linears and the embedding, a dtype or how it is quantized.

    kv_dtype: of the KV pages; int8_activations: whether linears round
    their input to int8 in groups of 32.
    """

    name: str
    weight: str | GroupQuantization
    kv_dtype: str
    int8_activations: bool = False

    @property
    def tolerance(self) -> float:
        """Largest logit error / logit scale against float32 arithmetic on the same weights."""
        return 1e-4 if self.kv_dtype == "float32" and not self.int8_activations else 2e-2

    def rounded(self, weight: np.ndarray) -> np.ndarray:
        """A checkpoint's tensor with the values that the scheme keeps of it, as float32."""
        if weight.ndim == 1:
            return weight.astype(np.float32)
        if isinstance(self.weight, GroupQuantization):
            return self.weight.dequantize(*self.weight.quantize(weight))
        return weight.astype(self.weight).astype(np.float32)


def _grouped(bits: int, dtype: str, int8: bool) -> Scheme:
    name = f"q{bits}f{dtype.removeprefix('float')}_1" + (":int8" if int8 else "")
    return Scheme(name, GroupQuantization(bits, 32, dtype), dtype, int8_activations=int8)


SCHEMES = (
    Scheme("q0f32", "float32", "float32"),
    Scheme("q0f16", "float16", "float16"),
    *(
        _grouped(bits, dtype, int8)
        for bits in (8, 4, 3)
        for dtype in ("float16", "float32")
        for int8 in (False, True)
    ),
)


def parse_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises SchemeError."""
    for scheme in SCHEMES:
        if scheme.name == name:
            return scheme
    accepted = ", ".join(s.name for s in SCHEMES)
    raise SchemeError(f"quantization: found {name!r}; accepted: {accepted}")
