"""Upper bounds of symbolic extents, which let the memory planner allocate workspace statically."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax


@dataclass(frozen=True)
class AttachUpperBounds:
    """Marks every Relax function with the largest value each named symbolic extent may take."""

    bounds: tuple[tuple[str, int], ...]

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        bounds = dict(self.bounds)
        mod = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mod[var] = func.with_attr("tir_var_upper_bound", bounds)
        return mod
