"""Cosine and sine of float32 angles that no fast-math can spoil.

A GPU's own are only good near zero, and ours go to position 131,071 radians and more. The angle is
m · 2^−t exactly, m of 24 bits; its phase, in units of 2^−32 turns, is m · 2^32/(2π) · 2^−t, and
only the low 32 bits of the whole part matter (Payne & Hanek 1983): integer arithmetic, which is
the same everywhere. Then Cephes' polynomials (Moshier, sinf and cosf) on [−π/4, π/4].
"""

from decimal import Decimal
from math import pi

from tvm.script import tirx as T

_PI = Decimal("3.14159265358979323846264338327950288")
_PER_RADIAN = Decimal(2**32) / (2 * _PI)  # 683565275.576…
_WHOLE = int(_PER_RADIAN)
_LOW, _HIGH = _WHOLE & 0xFFFF, _WHOLE >> 16
_FRACTION = int((_PER_RADIAN - _WHOLE) * 2**16)  # its first 16 bits

_SIN = (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4)  # of x³, x⁵, x⁷
_COS = (4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5)  # of x⁴, x⁶, x⁸


def _u(value: int):
    return T.uint32(value)


def _right(x, count):
    return T.shift_right(x, count)


def _left(x, count):
    return T.shift_left(x, count)


def _clamped(count):
    """A shift's count, int32, as uint32 from 0 to 31: others are undefined on GPUs."""
    return T.Cast("uint32", T.min(T.max(count, 0), 31))


@T.inline
def cos_sin(angle, C, S):
    """C[0], S[0] = cos(angle), sin(angle), for a float32 expression from 0 up to 2^18."""
    bits: T.let = T.reinterpret("uint32", angle)
    t: T.let = T.int32(150) - T.Cast("int32", _right(bits, _u(23)))  # at least 6
    m: T.let = T.bitwise_or(T.bitwise_and(bits, _u(0x7FFFFF)), _u(0x800000))
    a: T.let = _right(m, _u(12))
    b: T.let = T.bitwise_and(m, _u(0xFFF))
    # m · _WHOLE = high · 2^28 + low, from products below 2^28.
    p0: T.let = b * _u(_LOW)
    mid: T.let = _right(p0, _u(12)) + a * _u(_LOW) + _left(b * _u(_HIGH), _u(4))
    fraction: T.let = _right(a * _u(_FRACTION), _u(4)) + _right(b * _u(_FRACTION), _u(16))
    carried: T.let = (
        T.bitwise_or(T.bitwise_and(p0, _u(0xFFF)), _left(T.bitwise_and(mid, _u(0xFFFF)), _u(12)))
        + fraction
    )
    high: T.let = _right(mid, _u(16)) + a * _u(_HIGH) + _right(carried, _u(28))
    low: T.let = T.bitwise_and(carried, _u(0xFFFFFFF))
    near: T.let = T.bitwise_or(_left(high, _clamped(28 - t)), _right(low, _clamped(t)))
    phase: T.let = T.Select(t < 28, near, _right(high, _clamped(t - 28)))
    quadrant: T.let = _right(phase + _u(2**29), _u(30))
    rest: T.let = T.reinterpret("int32", phase - _left(quadrant, _u(30)))
    x: T.let = T.Cast("float32", rest) * T.float32(pi / 2 / 2**30)
    z: T.let = x * x
    sin: T.let = x + x * z * (
        T.float32(_SIN[0]) + z * (T.float32(_SIN[1]) + z * T.float32(_SIN[2]))
    )
    cos: T.let = (
        T.float32(1)
        - T.float32(0.5) * z
        + z * z * (T.float32(_COS[0]) + z * (T.float32(_COS[1]) + z * T.float32(_COS[2])))
    )
    odd: T.let = T.bitwise_and(quadrant, _u(1)) == _u(1)
    c: T.let = T.Select(odd, sin, cos)
    s: T.let = T.Select(odd, cos, sin)
    C[0] = T.Select(T.bitwise_and(quadrant + _u(1), _u(2)) == _u(2), -c, c)
    S[0] = T.Select(T.bitwise_and(quadrant, _u(2)) == _u(2), -s, s)
