"""Values of 8 and 16 bits, which are carried in 32: what an operation's result becomes."""

from __future__ import annotations

from .module import BOOL, UINT32, DType, Module
from .opcodes import ROUND_TO_NEAREST_EVEN, Decoration, Glsl, Op

_FLOAT32 = DType("float", 32, 1)
_SIGN, _INFINITY = 0x80000000, 0x7F800000
_TOO_LARGE = 0x47800000  # 2^16: float16 has none of that exponent
_SUBNORMAL = 0x38800000  # 2^-14: below it float16 has steps of 2^-24
_STEP = 2.0**-24


def fitted(module: Module, value: int, dtype: DType) -> int:
    """A carried value → the nearest of the dtype; an integer modulo 2^bits."""
    if dtype == dtype.carried:
        return value
    if dtype.kind == "float":
        return _half(module, value, dtype.lanes)
    result = module.type(dtype.carried)
    if dtype.kind == "uint":
        mask = module.constant(dtype.carried, (1 << dtype.bits) - 1)
        return module.value(Op.BITWISE_AND, result, value, mask)
    places = module.constant(dtype.carried, 32 - dtype.bits)
    high = module.value(Op.SHIFT_LEFT_LOGICAL, result, value, places)
    return module.value(Op.SHIFT_RIGHT_ARITHMETIC, result, high, places)


def _half(module: Module, value: int, lanes: int) -> int:
    """To the nearest float16, ties to even, of the bits: what a conversion to float16 does is the
    driver's choice, but where a store follows."""
    words, floats = UINT32.of_lanes(lanes), _FLOAT32.of_lanes(lanes)
    word, real, truth = (module.type(t) for t in (words, floats, BOOL.of_lanes(lanes)))

    def number(x: int) -> int:
        return module.constant(words, x)

    def of(op: Op, *operands: int) -> int:
        return module.value(op, word, *operands)

    def choice(compare: Op, least: int, then: int, other: int) -> int:
        chosen = module.value(compare, truth, magnitude, number(least))
        return of(Op.SELECT, chosen, then, other)

    bits = of(Op.BITCAST, value)
    sign = of(Op.BITWISE_AND, bits, number(_SIGN))
    magnitude = of(Op.BITWISE_XOR, bits, sign)
    last = of(Op.BITWISE_AND, of(Op.SHIFT_RIGHT_LOGICAL, magnitude, number(13)), number(1))
    half = of(Op.I_ADD, magnitude, of(Op.I_ADD, last, number(0xFFF)))
    normal = of(Op.BITWISE_AND, half, number(0xFFFFE000))
    fits = module.value(Op.U_LESS_THAN, truth, normal, number(_TOO_LARGE))
    normal = of(Op.SELECT, fits, normal, number(_INFINITY))
    normal = choice(Op.U_GREATER_THAN, _INFINITY, magnitude, normal)  # not a number
    positive = module.value(Op.BITCAST, real, magnitude)
    step, steps = module.constant(floats, _STEP), module.constant(floats, 1 / _STEP)
    scaled = module.value(Op.F_MUL, real, positive, steps)
    scaled = module.value(Op.EXT_INST, real, module.extended, Glsl.ROUND_EVEN, scaled)
    small = of(Op.BITCAST, module.value(Op.F_MUL, real, scaled, step))
    found = choice(Op.U_LESS_THAN, _SUBNORMAL, small, normal)
    return module.value(Op.BITCAST, real, of(Op.BITWISE_OR, found, sign))


def loaded(module: Module, value: int, dtype: DType) -> int:
    """A scalar of a storage buffer, as it is carried."""
    if dtype == dtype.carried:
        return value
    return module.value(_CONVERSIONS[dtype.kind], module.type(dtype.carried), value)


def stored(module: Module, value: int, dtype: DType) -> int:
    """A carried scalar → what a storage buffer holds; a float is rounded to the nearest, ties to
    even, which may be asked of a conversion only where nothing but a store follows."""
    if dtype == dtype.carried:
        return value
    found = module.value(_CONVERSIONS[dtype.kind], module.type(dtype), value)
    if dtype.kind == "float":
        module.decorate(found, Decoration.FP_ROUNDING_MODE, ROUND_TO_NEAREST_EVEN)
    return found


_CONVERSIONS = {"float": Op.F_CONVERT, "int": Op.S_CONVERT, "uint": Op.U_CONVERT}
