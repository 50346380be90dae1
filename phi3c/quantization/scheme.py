"""Named weight schemes.

`q<bits>f<width>_1`, as in MLC-LLM: weights of linears, embedding and head in groups of 32 input
features, symmetric, with scales and KV pages of float<width>. `q4f<width>_hq` searches the scales
of 4-bit linears for the least squared error and keeps embedding and head at 8 bits. `q0<type>`
keeps the weights in that type and KV pages too, but for `q0bf16`, whose pages are float16: as large
and more precise. Activations between kernels are float32 on the CPU, and on a GPU what the scheme
says (`activations`).

On the CPU a grouped scheme rounds the input of every linear to int8, in groups of 32, and
multiplies in integers; with `:float` behind its name it does neither. On a GPU both names mean the
same: activations stay floats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from ..errors import SchemeError
from .group import GroupedRows, GroupQuantization, rounded_activations

Kind = str | GroupQuantization  # how a weight is stored: a dtype, or in groups


@dataclass(frozen=True)
class Scheme:
    """linear: how weights of linears are stored; vocabulary: of the embedding and the LM head.

    kv_dtype: of the KV pages; int8_activations: whether linears round their input to int8 in groups
    of 32.
    """

    name: str
    linear: Kind
    vocabulary: Kind
    kv_dtype: str
    int8_activations: bool = False

    @property
    def activations(self) -> str:
        """The dtype between a GPU's kernels: float16 if no part of the scheme is wider."""
        return "float16" if "float16" == self.kv_dtype and self.linear != "bfloat16" else "float32"

    def on(self, device: str) -> Scheme:
        """As that device computes it: only the CPU rounds activations to int8."""
        return self if device == "cpu" else replace(self, int8_activations=False)

    @property
    def tolerance(self) -> float:
        """Largest logit error / logit scale against float32 arithmetic on the same weights.

        Each rounding to int8 costs a linear's output half a percent, and sharp attention on random
        tokens amplifies that; a mistake of position or window costs more than the scale allows.
        """
        if self.int8_activations:
            return 1e-1
        return 1e-4 if self.kv_dtype == "float32" else 2e-2

    def kind(self, name: str) -> Kind:
        """How the tensor of that Hugging Face name is stored. Vectors (norms) stay float32."""
        in_vocabulary = name.startswith(("model.embed_tokens.", "lm_head."))
        return self.vocabulary if in_vocabulary else self.linear

    def inputs(self, x: np.ndarray) -> np.ndarray:
        """A linear's input with the values that the scheme keeps of it."""
        return rounded_activations(x) if self.int8_activations else x

    def rounded(self, name: str, rows: np.ndarray | GroupedRows) -> np.ndarray:
        """A source's tensor with the values that the scheme keeps of it, as float32."""
        kind = self.kind(name)
        if isinstance(rows, np.ndarray) and rows.ndim == 1:
            return rows.astype(np.float32)
        if isinstance(kind, GroupQuantization):
            return kind.dequantize(*kind.quantize(rows))
        return cast(rows, kind).astype(np.float32)


def cast(rows: np.ndarray | GroupedRows, dtype: str) -> np.ndarray:
    """In a plain dtype; numpy has bfloat16 from ml_dtypes. Infinite where a value is too large."""
    values = rows.values() if isinstance(rows, GroupedRows) else rows
    with np.errstate(over="ignore"):
        return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _plain(dtype: str, kv_dtype: str, short: str) -> Scheme:
    return Scheme(f"q0{short}", dtype, dtype, kv_dtype)


def _grouped(bits: int, dtype: str, int8: bool) -> Scheme:
    name = f"q{bits}f{dtype.removeprefix('float')}_1" + ("" if int8 else ":float")
    kind = GroupQuantization(bits, 32, dtype)
    return Scheme(name, kind, kind, dtype, int8_activations=int8)


def _accurate(dtype: str, int8: bool) -> Scheme:
    name = f"q4f{dtype.removeprefix('float')}_hq" + ("" if int8 else ":float")
    linear = GroupQuantization(4, 32, dtype, search=True)
    return Scheme(name, linear, GroupQuantization(8, 32, dtype), dtype, int8_activations=int8)


_FLOATS = ("float16", "float32")
SCHEMES = (
    _plain("float32", "float32", "f32"),
    _plain("float16", "float16", "f16"),
    _plain("bfloat16", "float16", "bf16"),
    *(_grouped(bits, d, int8) for bits in (8, 4, 3) for d in _FLOATS for int8 in (True, False)),
    *(_accurate(d, int8) for d in _FLOATS for int8 in (True, False)),
)


def parse_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises SchemeError."""
    for scheme in SCHEMES:
        if scheme.name == name:
            return scheme
    accepted = ", ".join(s.name for s in SCHEMES)
    raise SchemeError(f"quantization: found {name!r}; accepted: {accepted}")
