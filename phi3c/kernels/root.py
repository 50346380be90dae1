"""Makes hand-scheduled functions fit for `call_tir`."""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize


def without(func: tirx.PrimFunc, names: set[str]) -> tirx.PrimFunc:
    """The function without its parameters of these names, which its body does not use."""
    kept = [parameter for parameter in func.params if parameter.name not in names]
    return tirx.PrimFunc(kept, func.body, func.ret_type, func.attrs)


def hand_scheduled(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Wrap the body in the root block that Relax expects, and keep automatic schedules off it."""
    root = SBlock([], [], [], "root", func.body)
    body = SBlockRealize([], tirx.const(True, "bool"), root)
    func = tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)
    return func.with_attr("tirx.is_scheduled", True).with_attr("tirx.noalias", True)
