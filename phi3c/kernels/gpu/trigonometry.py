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
    # Buffers, for TVM would put the expression of a `T.let` wherever it is used.
    t = T.alloc_buffer((1,), "int32", scope="local")
    m = T.alloc_buffer((2,), "uint32", scope="local")  # halves of 12 bits, the upper one first
    product = T.alloc_buffer((2,), "uint32", scope="local")  # m · _PER_RADIAN: high · 2^28 + low
    part = T.alloc_buffer((2,), "uint32", scope="local")
    phase = T.alloc_buffer((2,), "uint32", scope="local")  # phase, nearest quadrant
    x = T.alloc_buffer((2,), "float32", scope="local")  # what is past the quadrant, its square
    y = T.alloc_buffer((2,), "float32", scope="local")  # cosine and sine of that

    part[0] = T.reinterpret("uint32", angle)
    t[0] = T.int32(150) - T.Cast("int32", _right(part[0], _u(23)))  # at least 6
    part[0] = T.bitwise_or(T.bitwise_and(part[0], _u(0x7FFFFF)), _u(0x800000))
    m[0] = _right(part[0], _u(12))
    m[1] = T.bitwise_and(part[0], _u(0xFFF))

    # From products below 2^28, no sum beyond 32 bits.
    part[0] = m[1] * _u(_LOW)
    part[1] = _right(part[0], _u(12)) + m[0] * _u(_LOW) + _left(m[1] * _u(_HIGH), _u(4))
    product[0] = _right(part[1], _u(16)) + m[0] * _u(_HIGH)
    product[1] = T.bitwise_or(
        T.bitwise_and(part[0], _u(0xFFF)), _left(T.bitwise_and(part[1], _u(0xFFFF)), _u(12))
    )
    product[1] += _right(m[0] * _u(_FRACTION), _u(4)) + _right(m[1] * _u(_FRACTION), _u(16))
    product[0] += _right(product[1], _u(28))
    product[1] = T.bitwise_and(product[1], _u(0xFFFFFFF))

    if t[0] < 28:
        phase[0] = T.bitwise_or(
            _left(product[0], _clamped(28 - t[0])), _right(product[1], _clamped(t[0]))
        )
    else:
        phase[0] = _right(product[0], _clamped(t[0] - 28))
    phase[1] = _right(phase[0] + _u(2**29), _u(30))

    rest = T.meta_var(T.reinterpret("int32", phase[0] - _left(phase[1], _u(30))))
    x[0] = T.Cast("float32", rest) * T.float32(pi / 2 / 2**30)
    x[1] = x[0] * x[0]
    y[0] = T.float32(_COS[0]) + x[1] * (T.float32(_COS[1]) + x[1] * T.float32(_COS[2]))
    y[0] = T.float32(1) - T.float32(0.5) * x[1] + x[1] * x[1] * y[0]
    y[1] = T.float32(_SIN[0]) + x[1] * (T.float32(_SIN[1]) + x[1] * T.float32(_SIN[2]))
    y[1] = x[0] + x[0] * x[1] * y[1]
    if T.bitwise_and(phase[1], _u(1)) == _u(0):
        C[0] = y[0]
        S[0] = y[1]
    else:
        C[0] = y[1]
        S[0] = y[0]
    if T.bitwise_and(phase[1] + _u(1), _u(2)) == _u(2):
        C[0] = -C[0]
    if T.bitwise_and(phase[1], _u(2)) == _u(2):
        S[0] = -S[0]
