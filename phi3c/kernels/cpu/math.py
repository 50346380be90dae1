"""Vectorisable float32 functions: libm's become one scalar call per lane."""

from tvm.script import tirx as T

from ..math import LOG2_E

# Minimax-like coefficients of 2**f on [-0.5, 0.5]: the Taylor series of exp(f·ln 2), 7 terms,
# relative error below 2e-8 before rounding.
_EXP2 = (
    1.0,
    0.6931471805599453,
    0.24022650695910072,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.00015403530393381608,
)


def exp2(x):
    """2**x for a float32 expression, clamped to the normal range [-126, 126]."""
    x = T.min(T.max(x, T.float32(-126)), T.float32(126))
    whole = T.floor(x + T.float32(0.5))
    frac = x - whole
    poly = T.float32(_EXP2[-1])
    for c in reversed(_EXP2[:-1]):
        poly = poly * frac + T.float32(c)
    power = T.reinterpret("float32", T.shift_left(T.Cast("int32", whole) + 127, 23))
    return poly * power


def silu(x):
    """x · sigmoid(x) for a float32 expression."""
    return x / (T.float32(1) + exp2(x * T.float32(-LOG2_E)))
