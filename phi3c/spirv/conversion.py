"""From a dtype to another, of values as they are carried."""

from __future__ import annotations

from .module import DType, Module
from .narrow import fitted
from .opcodes import Op


def converted(module: Module, value: int, source: DType, target: DType) -> int:
    """As C converts: floats to integers towards zero, integers modulo their width; but float64
    to float16 by way of float32."""
    if source == target:
        return value
    found = _carried_as(module, value, source, target)
    return found if _holds(target, source) else fitted(module, found, target)


def _carried_as(module: Module, value: int, source: DType, target: DType) -> int:
    """Carried values as those that carry the target, which they may not fit."""
    source, target = source.carried, target.carried
    result = module.type(target)
    if source == target:
        return value
    if target.kind == "bool":
        op = Op.F_UNORD_NOT_EQUAL if source.kind == "float" else Op.I_NOT_EQUAL
        return module.value(op, result, value, module.constant(source, 0))
    if source.kind == "bool":
        choices = module.constant(target, 1), module.constant(target, 0)
        return module.value(Op.SELECT, result, value, *choices)
    if source.kind == "float" and target.kind == "float":
        return module.value(Op.F_CONVERT, result, value)
    if source.kind == "float":
        op = Op.CONVERT_F_TO_S if target.kind == "int" else Op.CONVERT_F_TO_U
        return module.value(op, result, value)
    if target.kind == "float":
        op = Op.CONVERT_S_TO_F if source.kind == "int" else Op.CONVERT_U_TO_F
        return module.value(op, result, value)
    if source.bits != target.bits:
        same_kind = DType(source.kind, target.bits, source.lanes)
        op = Op.S_CONVERT if source.kind == "int" else Op.U_CONVERT
        value = module.value(op, module.type(same_kind), value)
    if source.kind == target.kind:
        return value
    return module.value(Op.BITCAST, result, value)


def _holds(target: DType, source: DType) -> bool:
    """Whether the target has every value of the source: of float16's, whole numbers of 8 bits."""
    if source.kind == "bool" or target == target.carried:
        return True
    if target.kind == source.kind:
        return target.bits >= source.bits
    if target.kind == "float":
        return source.bits == 8
    return (target.kind, source.kind) == ("int", "uint") and target.bits > source.bits
