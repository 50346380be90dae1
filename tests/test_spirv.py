"""The SPIR-V emitter: every kind of node is valid SPIR-V, and does on a device what numpy does."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from spirv import VALIDATOR, emitted, lowered
from tvm.script import tirx as T
from vulkan_device import needs_device, run

from phi3c.errors import TargetError
from phi3c.spirv.codegen import emit, module_bytes
from phi3c.spirv.module import DType, Module, text
from phi3c.vulkan import devices

needs_validator = pytest.mark.skipif(VALIDATOR is None, reason="no spirv-val (spirv-tools)")

N = 70  # more than one workgroup, and the last one is not full
THREADS = 32


def elementwise(value, inputs: list[str], output: str):
    """A kernel Out[i] = value(i, buffers…) over N elements."""
    return (_of_one if len(inputs) == 1 else _of_two)(value, *inputs, output)


def _of_one(value, first: str, output: str):
    @T.prim_func(s_tir=True)
    def function(a: T.handle, o: T.handle):
        A = T.match_buffer(a, (N,), first)
        Out = T.match_buffer(o, (N,), output)
        for b in T.thread_binding((N + THREADS - 1) // THREADS, thread="blockIdx.x"):
            for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                if b * THREADS + t < N:
                    Out[b * THREADS + t] = value(b * THREADS + t, A)

    return function


def _of_two(value, first: str, second: str, output: str):
    @T.prim_func(s_tir=True)
    def function(a: T.handle, b: T.handle, o: T.handle):
        A = T.match_buffer(a, (N,), first)
        B = T.match_buffer(b, (N,), second)
        Out = T.match_buffer(o, (N,), output)
        for bx in T.thread_binding((N + THREADS - 1) // THREADS, thread="blockIdx.x"):
            for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                if bx * THREADS + t < N:
                    Out[bx * THREADS + t] = value(bx * THREADS + t, A, B)

    return function


def values(dtype: str, seed: int, low: float = -40, high: float = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype.startswith("uint"):
        low = 0
    found = rng.uniform(low, high, N)
    return (found if dtype.startswith("float") else np.rint(found)).astype(dtype)


def check(function, arrays: list[np.ndarray], output: str, expected: np.ndarray, tolerance=0.0):
    """Valid, and on the device what is expected."""
    emitted(function)
    found = run(function, arrays, (N,), output)
    if tolerance:
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    else:
        np.testing.assert_array_equal(found, expected)


pytestmark = [needs_validator]

BINARY = {
    "add": (lambda a, b: a + b, np.add),
    "subtract": (lambda a, b: a - b, np.subtract),
    "multiply": (lambda a, b: a * b, np.multiply),
    "minimum": (T.min, np.minimum),
    "maximum": (T.max, np.maximum),
}
DTYPES = ["float32", "float16", "int32", "uint32", "int64", "int16", "int8", "uint8"]


@needs_device
@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic(name, dtype):
    ours, numpys = BINARY[name]
    a, b = values(dtype, 1, -11, 11), values(dtype, 2, -11, 11)
    function = elementwise(lambda i, A, B: ours(A[i], B[i]), [dtype, dtype], dtype)
    check(function, [a, b], dtype, numpys(a, b).astype(dtype))


@needs_device
def test_division_rounds_as_tir_says():
    a, b = values("int32", 3), values("int32", 4)
    b[b == 0] = 7
    cases = {
        "floordiv": (lambda i, A, B: A[i] // B[i], a // b),
        "floormod": (lambda i, A, B: A[i] % B[i], a % b),
        "truncdiv": (lambda i, A, B: T.truncdiv(A[i], B[i]), np.trunc(a / b)),
        "truncmod": (lambda i, A, B: T.truncmod(A[i], B[i]), np.fmod(a, b)),
    }
    for value, expected in cases.values():
        function = elementwise(value, ["int32", "int32"], "int32")
        check(function, [a, b], "int32", expected.astype(np.int32))


@needs_device
def test_unsigned_division():
    a, b = values("uint32", 3, 0, 2**32 - 1), values("uint32", 4, 1, 2**20)
    check(
        elementwise(lambda i, A, B: T.truncdiv(A[i], B[i]), ["uint32"] * 2, "uint32"),
        [a, b],
        "uint32",
        a // b,
    )


@needs_device
@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_bits(dtype):
    a, b = values(dtype, 5, -(2**31), 2**31 - 1), values(dtype, 6, -(2**31), 2**31 - 1)
    shift = (b & 31).astype(dtype)
    cases = {
        "and": (lambda i, A, B: T.bitwise_and(A[i], B[i]), b, a & b),
        "or": (lambda i, A, B: T.bitwise_or(A[i], B[i]), b, a | b),
        "xor": (lambda i, A, B: T.bitwise_xor(A[i], B[i]), b, a ^ b),
        "left": (lambda i, A, B: T.shift_left(A[i], B[i]), shift, a << shift),
        "right": (lambda i, A, B: T.shift_right(A[i], B[i]), shift, a >> shift),
    }
    for value, second, expected in cases.values():
        check(elementwise(value, [dtype, dtype], dtype), [a, second], dtype, expected)


@needs_device
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_casts(source, target):
    a = values(source, 7, -100, 100)
    function = elementwise(lambda i, A: T.Cast(target, A[i]), [source], target)
    with np.errstate(invalid="ignore"):
        expected = a.astype(np.int64 if a.dtype.kind == "f" and target[0] != "f" else target)
    if a.dtype.kind == "f" and target.startswith("uint"):  # C leaves negative ones undefined
        a, expected = np.abs(a), np.abs(expected)
    check(function, [a], target, expected.astype(target))


@needs_device
def test_reinterpreted_bits():
    a = values("float32", 8)
    function = elementwise(lambda i, A: T.reinterpret("int32", A[i]), ["float32"], "int32")
    check(function, [a], "int32", a.view(np.int32))


MATHS = {
    "exp2": (T.exp2, np.exp2),
    "exp": (T.exp, np.exp),
    "log": (lambda x: T.log(T.fabs(x) + T.float32(1)), lambda x: np.log(np.abs(x) + 1)),
    "log2": (lambda x: T.log2(T.fabs(x) + T.float32(1)), lambda x: np.log2(np.abs(x) + 1)),
    "sqrt": (lambda x: T.sqrt(T.fabs(x)), lambda x: np.sqrt(np.abs(x))),
    "rsqrt": (
        lambda x: T.rsqrt(T.fabs(x) + T.float32(1)),
        lambda x: 1 / np.sqrt(np.abs(x) + 1),
    ),
    "tanh": (T.tanh, np.tanh),
    "sigmoid": (T.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "floor": (T.floor, np.floor),
    "ceil": (T.ceil, np.ceil),
    "trunc": (T.trunc, np.trunc),
    "nearbyint": (T.nearbyint, np.rint),
    "sin": (T.sin, np.sin),
    "cos": (T.cos, np.cos),
}


@needs_device
@pytest.mark.parametrize("name", MATHS)
def test_functions(name):
    ours, numpys = MATHS[name]
    a = values("float32", 9, -3, 3)
    function = elementwise(lambda i, A: ours(A[i]), ["float32"], "float32")
    check(function, [a], "float32", numpys(a.astype(np.float64)), tolerance=1e-3)


@needs_device
@pytest.mark.parametrize("name", ["<", "<=", ">", ">=", "==", "!="])
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint32"])
def test_comparisons(name, dtype):
    a, b = values(dtype, 10, 0, 4), values(dtype, 11, 0, 4)
    a[:10] = b[:10]
    compare = {
        "<": lambda x, y: x < y,
        "<=": lambda x, y: x <= y,
        ">": lambda x, y: x > y,
        ">=": lambda x, y: x >= y,
        "==": lambda x, y: x == y,
        "!=": lambda x, y: x != y,
    }[name]

    def value(i, A, B):
        return T.Select(compare(A[i], B[i]), T.int32(3), T.int32(-5))

    function = elementwise(value, [dtype, dtype], "int32")
    check(function, [a, b], "int32", np.where(compare(a, b), 3, -5).astype(np.int32))


@needs_device
def test_logic():
    a, b = values("int32", 12, -3, 3), values("int32", 13, -3, 3)

    def value(i, A, B):
        either = T.Or(T.And(A[i] > 0, B[i] > 0), T.Not(A[i] != B[i]))
        return T.Cast("int32", either)

    expected = ((a > 0) & (b > 0)) | (a == b)
    function = elementwise(value, ["int32", "int32"], "int32")
    check(function, [a, b], "int32", expected.astype(np.int32))


@needs_device
def test_only_the_side_that_is_taken_is_computed():
    """The other side would divide by zero, and load past the end."""
    a = values("int32", 14, 0, 3)

    def value(i, A):
        return T.if_then_else(A[i] > 0, T.truncdiv(12, A[i]), T.if_then_else(i > 5, i, -i))

    index = np.arange(N)
    expected = np.where(a > 0, 12 // np.maximum(a, 1), np.where(index > 5, index, -index))
    check(elementwise(value, ["int32"], "int32"), [a], "int32", expected.astype(np.int32))


@needs_device
def test_loops():
    """A loop that does not begin at zero, in one whose length is data, and a while."""

    @T.prim_func(s_tir=True)
    def function(a: T.handle, o: T.handle):
        A = T.match_buffer(a, (N,), "int32")
        Out = T.match_buffer(o, (N,), "int32")
        for t in T.thread_binding(N, thread="blockIdx.x"):
            for _ in T.thread_binding(1, thread="threadIdx.x"):
                total = T.alloc_buffer((2,), "int32", scope="local")
                total[0] = 0
                total[1] = 0
                for i in T.serial(A[t]):
                    for j in range(2, 5):
                        if j != 3:
                            total[0] = total[0] + i * j
                        else:
                            total[0] = total[0] + 1
                while total[1] < A[t]:
                    total[1] = total[1] + 3
                Out[t] = total[0] * 100 + total[1]

    a = values("int32", 15, 0, 9)
    expected = [sum(i * 6 + 1 for i in range(n)) * 100 + -(-n // 3) * 3 for n in a]
    check(function, [a], "int32", np.array(expected, np.int32))


@needs_device
def test_shared_memory_and_barriers():
    """Each workgroup reverses its part; the barrier is TVM's."""
    half = N // 2

    @T.prim_func(s_tir=True)
    def function(a: T.handle, o: T.handle):
        A = T.match_buffer(a, (N,), "float32")
        Out = T.match_buffer(o, (N,), "float32")
        for b in T.thread_binding(2, thread="blockIdx.x"):
            for t in T.thread_binding(half, thread="threadIdx.x"):
                S = T.alloc_buffer((half,), "float32", scope="shared")
                S[t] = A[b * half + t]
                Out[b * half + t] = S[half - 1 - t]

    a = values("float32", 16)
    kernel = emitted(function)[0]
    assert (kernel.workgroup, kernel.shared_bytes) == ((half, 1, 1), 4 * half)
    check(function, [a], "float32", np.concatenate([a[:half][::-1], a[half:][::-1]]))


@needs_device
@pytest.mark.parametrize("name", ["shuffle", "shuffle_xor", "shuffle_up", "shuffle_down"])
def test_values_of_other_threads_of_a_subgroup(name):
    width = devices()[0].subgroup_size
    shuffle = getattr(T, f"tvm_warp_{name}")
    threads = 4 * width

    @T.prim_func(s_tir=True)
    def function(a: T.handle, o: T.handle):
        A = T.match_buffer(a, (threads,), "float32")
        Out = T.match_buffer(o, (threads,), "float32")
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(threads, thread="threadIdx.x"):
                Out[t] = shuffle(T.tvm_warp_activemask(), A[t], 1, width, width)

    emitted(function)
    a = np.arange(threads, dtype=np.float32)
    found = run(function, [a], (threads,), "float32").reshape(-1, width)
    rows = a.reshape(-1, width)
    if name == "shuffle":
        np.testing.assert_array_equal(found, np.repeat(rows[:, 1:2], width, axis=1))
    elif name == "shuffle_xor":
        np.testing.assert_array_equal(found, rows.reshape(-1, 2)[:, ::-1].reshape(-1, width))
    elif name == "shuffle_up":  # the first has nothing above it
        np.testing.assert_array_equal(found[:, 1:], rows[:, :-1])
    else:
        np.testing.assert_array_equal(found[:, :-1], rows[:, 1:])


@needs_device
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_vectors(dtype):
    """Loads, arithmetic and stores of several lanes at a time."""

    @T.prim_func(s_tir=True)
    def function(a: T.handle, o: T.handle):
        A = T.match_buffer(a, (N,), dtype)
        Out = T.match_buffer(o, (N,), "float32")
        for b in T.thread_binding(N // 2, thread="blockIdx.x"):
            for _ in T.thread_binding(1, thread="threadIdx.x"):
                for v in T.vectorized(2):
                    Out[b * 2 + v] = T.Cast("float32", A[b * 2 + v]) * T.float32(0.5) + T.Cast(
                        "float32", v
                    )

    a = values(dtype, 17)
    expected = a.astype(np.float32) * 0.5 + np.arange(N) % 2
    check(function, [a], "float32", expected.astype(np.float32))


@needs_device
def test_a_symbolic_extent_is_an_argument():
    @T.prim_func(s_tir=True)
    def function(a: T.handle, o: T.handle):
        n = T.int64()
        A = T.match_buffer(a, (n,), "float32")
        Out = T.match_buffer(o, (n,), "float32")
        for b in T.thread_binding((n + 15) // 16, thread="blockIdx.x"):
            for t in T.thread_binding(16, thread="threadIdx.x"):
                if b * 16 + t < n:
                    Out[b * 16 + t] = A[n - 1 - b * 16 - t]

    a = values("float32", 18)
    assert [k.arguments for k in emitted(function)] == [("handle", "handle", "int32")]
    check(function, [a], "float32", a[::-1])


def test_constants_keep_their_bits():
    module = Module()
    for dtype, value in (("float32", float("inf")), ("int32", -1), ("uint32", 2**32 - 1)):
        first = module.constant(DType.parse(dtype), value)
        assert module.constant(DType.parse(dtype), value) == first  # made once
    assert module.constant(DType.parse("int8"), -1) != module.constant(DType.parse("int32"), -1)
    assert text("abc") == [0x00636261] and text("abcd") == [0x64636261, 0]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda i, A: T.call_pure_extern("float32", "lgammaf", A[i]), "a call of lgamma"),
        (lambda i, A: T.erf(A[i]), "a call of erf"),
    ],
)
def test_what_has_no_spirv_is_named(value, named):
    function = elementwise(value, ["float32"], "float32")
    with pytest.raises(TargetError, match=f"the kernel main_kernel: no SPIR-V for {named}"):
        emit(lowered(function))


def test_memory_of_another_scope_is_named():
    @T.prim_func(s_tir=True)
    def function(o: T.handle):
        Out = T.match_buffer(o, (N,), "float32")
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(N, thread="threadIdx.x"):
                S = T.alloc_buffer((N,), "float32", scope="wmma.accumulator")
                S[t] = T.float32(1)
                Out[t] = S[t]

    with pytest.raises(TargetError, match="memory of scope wmma.accumulator"):
        emit(lowered(function))


def test_module_bytes_are_tvms_format():
    function = elementwise(lambda i, A: A[i] + T.float32(1), ["float32"], "float32")
    kernels = emitted(function)
    data, place = module_bytes(kernels), 0

    def number(form: str):
        nonlocal place
        found = struct.unpack_from(form, data, place)
        place += struct.calcsize(form)
        return found[0] if len(found) == 1 else found

    def sized() -> bytes:
        nonlocal place
        size = number("<Q")
        place += size
        return data[place - size : place]

    assert sized() == b"vulkan" and number("<Q") == 1
    assert sized() == sized() == b"main_kernel"
    assert [number("<BBH") for _ in range(number("<Q"))] == [(3, 64, 1)] * 2
    assert [sized() for _ in range(number("<Q"))] == [b"blockIdx.x", b"threadIdx.x"]
    assert number("<Q") == 0
    assert number("<Q") == 1 and sized() == b"main_kernel"
    shader = sized()
    assert place == len(data)
    flag, words = struct.unpack_from("<IQ", shader)
    assert (flag, words) == (0, len(kernels[0].spirv) // 4)
    assert shader[12:] == kernels[0].spirv and shader[12:16] == b"\x03\x02\x23\x07"


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="the dtype float8_e4m3"):
        DType.parse("float8_e4m3")
