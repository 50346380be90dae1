"""Reads how much workspace the memory planner gave each function."""

from __future__ import annotations

import tvm
from tvm import relax, tirx


@relax.expr_functor.visitor
class _StorageSizes(relax.PyExprVisitor):
    def __init__(self):
        super().__init__()
        self.total = 0

    def visit_call_(self, call: relax.Call) -> None:
        if call.op == tvm.ir.Op.get("relax.memory.alloc_storage"):
            size = call.args[0].values[0]
            if isinstance(size, tirx.IntImm):
                self.total += int(size.value)
        super().visit_call_(call)


def workspace_bytes(mod: tvm.IRModule) -> dict[str, int]:
    """Function name → bytes of statically planned storage, after StaticPlanBlockMemory."""
    sizes = {}
    for var, func in mod.functions_items():
        if isinstance(func, relax.Function):
            visitor = _StorageSizes()
            visitor.visit_expr(func)
            sizes[var.name_hint] = visitor.total
    return sizes
