"""Named weight schemes.

`q0f32` and `q0f16` keep weights and KV pages in that type, unquantized. Arithmetic and the
activations between kernels are the target's choice (float32 on the CPU).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SchemeError


@dataclass(frozen=True)
class Scheme:
    """weight_dtype: of linears and the embedding; kv_dtype: of the KV pages."""

    name: str
    weight_dtype: str
    kv_dtype: str


Q0F32 = Scheme("q0f32", weight_dtype="float32", kv_dtype="float32")
Q0F16 = Scheme("q0f16", weight_dtype="float16", kv_dtype="float16")
SCHEMES = (Q0F32, Q0F16)


def parse_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises SchemeError."""
    for scheme in SCHEMES:
        if scheme.name == name:
            return scheme
    accepted = ", ".join(s.name for s in SCHEMES)
    raise SchemeError(f"quantization: found {name!r}; accepted: {accepted}")
