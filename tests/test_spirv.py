"""The SPIR-V emitter: every kind of node is valid SPIR-V, and does on a device what numpy does."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import tvm
from spirv import VALIDATOR, emitted, lowered, validate
from tvm import tirx
from tvm.script import tirx as T
from vulkan_device import needs_device, run

import phi3c
from phi3c.adapters.layout import AdapterLayout
from phi3c.compiler import compile_library
from phi3c.config import Phi3Config
from phi3c.errors import TargetError
from phi3c.manifest import Limits
from phi3c.quantization.scheme import SCHEMES, parse_scheme
from phi3c.spirv import codegen
from phi3c.spirv.codegen import collected, emit, module_bytes
from phi3c.spirv.module import DType, EmitError, Module, text
from phi3c.spirv.statements import Statements
from phi3c.targets import PORTABLE_VULKAN, parse_target
from phi3c.vulkan import devices

needs_validator = pytest.mark.skipif(VALIDATOR is None, reason="no spirv-val (spirv-tools)")

CONFIGS = Path(__file__).parent.parent / "configs"
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
    assert module.constant(DType.parse("int8"), 255) == module.constant(DType.parse("int32"), -1)
    third = module.constant(DType.parse("float32"), float(np.float16(1 / 3)))
    assert module.constant(DType.parse("float16"), 1 / 3) == third
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


def test_the_error_goes_through_tvm(monkeypatch, tmp_path):
    """TVM calls the emitter from C++; what it raises is the error of compile."""

    def refuse(function):
        raise TargetError("vulkan: the kernel f: no SPIR-V for it")

    monkeypatch.setattr(codegen, "emit_kernel", refuse)
    config = CONFIGS / "tiny.json"
    with pytest.raises(TargetError, match="vulkan: the kernel f: no SPIR-V for it"):
        phi3c.compile(config, "vulkan", "q0f16", tmp_path / "made")
    assert not (tmp_path / "made").exists()


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
    with pytest.raises(EmitError, match="the dtype float8_e4m3"):
        DType.parse("float8_e4m3")
    refused(elementwise(lambda i, A: A[i], ["int4"], "int4"), "no SPIR-V for the dtype int4")


def refused(function, message: str, target=None) -> None:
    with pytest.raises(TargetError, match=f"the kernel main_kernel: {message}"):
        emit(lowered(function, target))


def test_a_scalar_argument_below_32_bits_is_named():
    @T.prim_func(s_tir=True)
    def function(a: T.handle, shift: T.int16):
        A = T.match_buffer(a, (N,), "int32")
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(N, thread="threadIdx.x"):
                A[t] = A[t] + T.Cast("int32", shift)

    refused(function, "no SPIR-V for the argument shift, a int16, not of 32 or 64 bits")


def test_a_long_vector_is_named():
    @T.prim_func(s_tir=True)
    def function(a: T.handle, o: T.handle):
        A = T.match_buffer(a, (64,), "float32")
        Out = T.match_buffer(o, (64,), "float32")
        for b in T.thread_binding(8, thread="blockIdx.x"):
            for _ in T.thread_binding(1, thread="threadIdx.x"):
                for v in T.vectorized(8):
                    Out[b * 8 + v] = A[b * 8 + v] + T.float32(1)

    refused(function, "no SPIR-V for a .* of 8 lanes, more than 4")


@pytest.mark.parametrize("name", ["exp", "log2", "tanh", "sin", "pow"])
def test_functions_of_64_bits_that_glsl_lacks_are_named(name):
    def value(i, A):
        call = getattr(T, name)
        return call(A[i], A[i]) if name == "pow" else call(A[i])

    function = elementwise(value, ["float64"], "float64")
    refused(function, f"no SPIR-V for .*{name}")


def test_bits_of_narrow_values_are_named():
    function = elementwise(lambda i, A: T.reinterpret("int16", A[i]), ["float16"], "int16")
    refused(function, "no SPIR-V for the bits of float16 as int16")


def test_a_variable_that_nothing_binds_is_named():
    with pytest.raises(EmitError, match="the variable x, which is not bound"):
        Statements().expression(tirx.Var("x", "int32"))


def test_volatile_memory_is_for_warps_of_one_thread():
    nothing = tirx.Evaluate(tirx.IntImm("int32", 0))
    volatile = tirx.AttrStmt(tirx.Var("S", "handle"), "tirx.volatile", 1, nothing)
    Statements().statement(volatile)
    with pytest.raises(EmitError, match="volatile memory, for warps of 32 threads"):
        Statements(warp_size=32).statement(volatile)


def shuffled(dtype: str, width: int):
    @T.prim_func(s_tir=True)
    def function(a: T.handle, o: T.handle):
        A = T.match_buffer(a, (32,), dtype)
        Out = T.match_buffer(o, (32,), dtype)
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(32, thread="threadIdx.x"):
                Out[t] = T.tvm_warp_shuffle(T.tvm_warp_activemask(), A[t], 1, width, width)

    return function


def with_subgroups(**attributes) -> tvm.target.Target:
    """The portable target, and subgroups."""
    granted = PORTABLE_VULKAN | {"supported_subgroup_operations": 1 | 16} | attributes
    return tvm.target.Target({"kind": "vulkan", "host": "llvm", **granted})


def test_a_shuffle_needs_a_subgroup_of_its_width():
    (kernel,) = emit(lowered(shuffled("float32", 32), with_subgroups()))
    assert (kernel.subgroup_size, kernel.subgroup_operations) == (32, 1 | 16)
    (kernel,) = emit(lowered(elementwise(lambda i, A: A[i], ["float32"], "float32")))
    assert (kernel.subgroup_size, kernel.subgroup_operations) == (0, 0)
    for dtype in ("float16", "int64"):
        target = with_subgroups(supports_int64=True)
        refused(shuffled(dtype, 32), f"no SPIR-V for tvm_warp_shuffle of {dtype}, not of", target)
    refused(shuffled("float32", 32), "found subgroup operations 17; .* lacks 17 .--target vulkan:n")


@pytest.mark.parametrize(
    ("dtype", "granted", "message"),
    [
        ("int8", {}, "found storage_buffer_8bit; .* lacks supports_8bit_buffer"),
        ("int64", {}, "found shader_int64; .* lacks supports_int64"),
        ("float64", {}, "found shader_float64; .* lacks supports_float64"),
        ("float16", {"supports_16bit_buffer": False}, "found storage_buffer_16bit; "),
        ("float32", {"max_threads_per_block": 31}, "found 32 threads in a workgroup; accepted: 31"),
        ("float32", {"max_block_size_x": 31}, "found 32 threads in x; accepted: 31, the target's"),
        ("float32", {"max_per_stage_descriptor_storage_buffer": 1}, "found 2 storage buffers; "),
    ],
)
def test_what_the_target_does_not_grant_is_refused(dtype, granted, message):
    function = elementwise(lambda i, A: A[i], [dtype], dtype)
    refused(function, message, with_subgroups(**granted))


# Values of 8 and 16 bits


@pytest.mark.parametrize("dtype", ["float16", "int16", "uint16", "int8", "uint8"])
def test_narrow_values_are_of_memory_alone(dtype):
    """No arithmetic of their width, in storage buffers, shared memory or registers."""

    @T.prim_func(s_tir=True)
    def function(a: T.handle, o: T.handle):
        A = T.match_buffer(a, (32,), dtype)
        Out = T.match_buffer(o, (32,), dtype)
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(32, thread="threadIdx.x"):
                S = T.alloc_buffer((32,), dtype, scope="shared")
                L = T.alloc_buffer((1,), dtype, scope="local")
                S[t] = A[t] + A[t]
                L[0] = S[31 - t] * S[t]
                Out[t] = T.max(L[0], A[t])

    (kernel,) = emit(lowered(function, with_subgroups(supports_8bit_buffer=True)))
    validate(kernel)
    width = "16" if dtype.endswith("16") else "8"
    assert kernel.features == (f"storage_buffer_{width}bit",)
    assert kernel.shared_bytes == 4 * 32  # 32 bits each


def halves() -> np.ndarray:
    """Where rounding to float16 can go wrong: ties, steps at powers of two, the ends of the
    range, and as many others."""
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    exact = np.concatenate([exact[:200], exact[1000:1100], exact[::97], exact[-200:]])
    next_one = np.float32(np.inf)
    ties = (exact[:-1] + exact[1:]) / 2
    found = [exact, ties, np.nextafter(ties, next_one), np.nextafter(ties, -next_one)]
    found.append(np.float32([65519, 65520, 65536, 1e30, np.inf, 2.0**-25, 2.9e-8, 1e-30]))
    found.append(np.random.default_rng(0).standard_normal(1000).astype(np.float32))
    whole = np.concatenate(found)
    return np.concatenate([whole, -whole, [np.nan]]).astype(np.float32)


@needs_device
@pytest.mark.parametrize("how", ["stored", "kept", "vector"])
def test_float16_is_rounded_to_the_nearest_even(how):
    """By a store's conversion, and of values that stay in registers."""
    a = halves()
    a = np.concatenate([a, np.zeros(-len(a) % 64, np.float32)])
    count, dtype = len(a), "float32" if how == "kept" else "float16"

    @T.prim_func(s_tir=True)
    def one(x: T.handle, o: T.handle):
        A = T.match_buffer(x, (count,), "float32")
        Out = T.match_buffer(o, (count,), dtype)
        for b in T.thread_binding(count // 64, thread="blockIdx.x"):
            for t in T.thread_binding(64, thread="threadIdx.x"):
                Out[b * 64 + t] = T.Cast(dtype, T.Cast("float16", A[b * 64 + t]))

    @T.prim_func(s_tir=True)
    def four(x: T.handle, o: T.handle):
        A = T.match_buffer(x, (count,), "float32")
        Out = T.match_buffer(o, (count,), "float16")
        for b in T.thread_binding(count // 4, thread="blockIdx.x"):
            for _ in T.thread_binding(1, thread="threadIdx.x"):
                for v in T.vectorized(4):
                    Out[b * 4 + v] = T.Cast("float16", A[b * 4 + v])

    function = four if how == "vector" else one
    emitted(function)
    with np.errstate(over="ignore"):
        expected = a.astype(np.float16)
    found = run(function, [a], (count,), dtype)
    np.testing.assert_array_equal(found, expected.astype(dtype))


def test_a_conversion_that_is_stored_asks_for_the_nearest_even():
    (kernel,) = emit(
        lowered(elementwise(lambda i, A: T.Cast("float16", A[i]), ["float32"], "float16"))
    )
    words = struct.unpack(f"<{len(kernel.spirv) // 4}I", kernel.spirv)
    decorated = [
        words[i + 1]
        for i in range(len(words) - 3)
        if words[i] == 4 << 16 | 71 and words[i + 2 : i + 4] == (39, 0)
    ]
    assert len(decorated) == 1


def test_buffers_that_are_only_read_are_marked():
    @T.prim_func(s_tir=True)
    def function(a: T.handle, b: T.handle, c: T.handle, d: T.handle):
        A = T.match_buffer(a, (N,), "float16")
        B = T.match_buffer(b, (N,), "float32")
        C = T.match_buffer(c, (N,), "int32")
        D = T.match_buffer(d, (N,), "float32")
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(N, thread="threadIdx.x"):
                B[t] = B[t] + T.Cast("float32", A[t])
                D[C[t]] = B[t]

    (kernel,) = emitted(function)
    words = struct.unpack(f"<{len(kernel.spirv) // 4}I", kernel.spirv)
    decorated: dict[int, set[int]] = {33: set(), 24: set()}  # Binding, NonWritable: of which ids
    bindings = {}
    at = 5
    while at < len(words):
        count, opcode = words[at] >> 16, words[at] & 0xFFFF
        if opcode == 71 and words[at + 2] in decorated:
            decorated[words[at + 2]].add(words[at + 1])
            bindings |= {words[at + 1]: words[at + 3]} if words[at + 2] == 33 else {}
        at += count
    assert {"ABCD"[bindings[variable]] for variable in decorated[24]} == {"A", "C"}


@needs_device
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_narrow_integers_wrap(dtype):
    info = np.iinfo(dtype)
    a, b = (np.random.default_rng(s).integers(info.min, info.max, N, dtype) for s in (1, 2))
    b[b == 0] = 3
    wide_a, wide_b, shift = a.astype(np.int64), b.astype(np.int64), (b & 7).astype(dtype)
    cases = {
        "add": (lambda i, A, B: A[i] + B[i], b, wide_a + wide_b),
        "subtract": (lambda i, A, B: A[i] - B[i], b, wide_a - wide_b),
        "multiply": (lambda i, A, B: A[i] * B[i], b, wide_a * wide_b),
        "left": (lambda i, A, B: T.shift_left(A[i], B[i]), shift, wide_a << shift),
        "right": (lambda i, A, B: T.shift_right(A[i], B[i]), shift, wide_a >> shift),
        "not": (lambda i, A, B: T.bitwise_not(A[i]) ^ B[i], b, ~wide_a ^ wide_b),
        "less": (lambda i, A, B: T.Cast(dtype, A[i] + B[i] < B[i]), b, (a + b < b)),
    }
    for value, second, expected in cases.values():
        function = elementwise(value, [dtype, dtype], dtype)
        check(function, [a, second], dtype, expected.astype(dtype))


@needs_device
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
def test_the_remainder_of_negative_numbers(dtype):
    a, b = (np.random.default_rng(s).integers(-100, 100, N, dtype) for s in (1, 2))
    b[b == 0] = -7
    function = elementwise(lambda i, A, B: T.truncmod(A[i], B[i]), [dtype, dtype], dtype)
    check(function, [a, b], dtype, np.fmod(a, b))


# A model


@pytest.mark.parametrize("name", [one.name for one in SCHEMES if ":" not in one.name])
def test_every_kernel_of_a_model_is_valid(name, tmp_path, valid):
    """With adapters. The device needs 16-bit storage where values have 16 bits, nothing else."""
    config = Phi3Config.from_file(CONFIGS / "tiny.json")
    scheme = parse_scheme(name)
    layout = AdapterLayout.of(config, 2, 16, scheme.kv_dtype)
    path, limits = tmp_path / "model.tar", Limits(2, 64, 16)
    with collected() as kernels:
        library = compile_library(config, scheme, parse_target("vulkan"), limits, path, layout)
    for kernel in kernels:
        if kernel.spirv not in valid:
            validate(kernel)
            valid.add(kernel.spirv)
    needs = library.needs
    assert needs.features == (("storage_buffer_16bit",) if "f16" in name else ())
    assert needs.kernels == len(kernels) > 30 and max(needs.grid) < 65536
    assert needs.workgroup == (256, 16, 1) and needs.storage_buffers == 12
    assert (needs.subgroup_size, needs.subgroup_operations) == (0, 0)


@needs_device
def test_a_device_with_more_gets_the_same_kernels(tmp_path):
    """Nothing that TVM does hangs on the further attributes."""
    config, scheme, limits = (
        Phi3Config.from_file(CONFIGS / "tiny.json"),
        "q4f16_1",
        Limits(2, 64, 16),
    )
    made = []
    for name in ("vulkan", "vulkan:native"):
        with collected() as kernels:
            path = tmp_path / "model.tar"
            compile_library(config, parse_scheme(scheme), parse_target(name), limits, path)
        made.append(kernels)
    assert made[0] == made[1]


@pytest.fixture(scope="module")
def valid() -> set[bytes]:
    """Code that spirv-val has seen."""
    return set()
