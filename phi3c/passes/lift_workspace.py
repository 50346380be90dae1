"""Workspace that kernels allocate for themselves becomes memory that the planner gives them.

TVM takes a kernel's own global buffers from a pool of the calling thread, which frees them as soon
as another kernel wants more. What keeps addresses for longer than a call, a CUDA graph, needs them
to be outputs of the kernel, like any other intermediate result.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

_CALL_TIR = "relax.call_tir"


class LiftWorkspace:
    """Global buffers at the root of a function that `call_tir` calls become more outputs of it."""

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        mod = mod.clone()
        found = {
            var: func
            for var, func in mod.functions_items()
            if isinstance(func, tirx.PrimFunc) and _buffers(func)
        }
        for var in found:
            del mod[var]
        mutator = _Calls(mod)
        for var, func in found.items():  # a new variable: the type of the old one is the old one
            made = mutator.builder_.add_func(_with_outputs(func), var.name_hint)
            mutator.lifted[var] = made, func
        for var, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mutator.builder_.update_func(var, mutator.visit_expr(func))
        return mutator.builder_.get()


def _root(func: tirx.PrimFunc) -> list[tirx.Stmt]:
    """The statements of the root block; none where it has no such list."""
    body = func.body
    if not isinstance(body, SBlockRealize) or not isinstance(body.block.body, tirx.SeqStmt):
        return []
    return list(body.block.body.seq)


def _is_workspace(statement: tirx.Stmt) -> bool:
    return isinstance(statement, tirx.AllocBuffer) and statement.buffer.scope() == "global"


def _buffers(func: tirx.PrimFunc) -> list[tirx.Buffer]:
    return [statement.buffer for statement in _root(func) if _is_workspace(statement)]


def _with_outputs(func: tirx.PrimFunc) -> tirx.PrimFunc:
    kept = tirx.SeqStmt([s for s in _root(func) if not _is_workspace(s)])
    root = SBlock([], [], [], func.body.block.name_hint, kept)
    body = SBlockRealize([], tirx.const(True, "bool"), root)
    return tirx.PrimFunc([*func.params, *_buffers(func)], body, func.ret_type, func.attrs)


@relax.expr_functor.mutator
class _Calls(relax.PyExprMutator):
    """Calls of functions give what they gave before. lifted: the function that was → its variable
    now, and what it was."""

    def __init__(self, mod: tvm.IRModule):
        super().__init__(mod)
        self.lifted: dict[tvm.ir.GlobalVar, tuple[tvm.ir.GlobalVar, tirx.PrimFunc]] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if not _is_call_tir(call) or call.args[0] not in self.lifted:
            return call
        var, func = self.lifted[call.args[0]]
        args = call.args[1]
        extents = {}
        for parameter, arg in zip(func.params, args, strict=False):  # the outputs follow
            for inner, outer in zip(parameter.shape, arg.ty.shape, strict=True):
                if isinstance(inner, tirx.Var):
                    extents[inner] = outer
        more = [
            relax.TensorType(
                [_substituted(extent, extents) for extent in buffer.shape],
                str(buffer.dtype),
            )
            for buffer in _buffers(func)
        ]
        (out,) = call.ty_args
        own = list(out.fields) if isinstance(out, relax.TupleType) else [out]
        made = self.builder_.emit(relax.call_tir(var, args, [*own, *more]))
        if not isinstance(out, relax.TupleType):
            return relax.TupleGetItem(made, 0)
        return relax.Tuple([relax.TupleGetItem(made, i) for i in range(len(own))])


def _is_call_tir(call: relax.Call) -> bool:
    return isinstance(call.op, tvm.ir.Op) and call.op.name == _CALL_TIR


def _substituted(extent: tvm.ir.Expr, extents: dict[tirx.Var, tvm.ir.Expr]) -> tvm.ir.Expr:
    made = tvm_ffi.structural_map(
        extent, (tirx.Var, lambda var: extents.get(var, var)), order="post"
    )
    return tvm.sym.Analyzer().simplify(made)  # the least of two numbers is none to relax
