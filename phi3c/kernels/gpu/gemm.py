"""y = x Wᵀ for many rows: tiles of x and W in shared memory, 4 × 4 sums a thread.

The weights are dequantized on their way to shared memory, once for the 64 rows of a tile.
"""

from collections.abc import Callable

from tvm.script import tirx as T

from .limits import VECTOR, GpuLimits
from .weight import WeightReader

TILE = 64  # rows of x, and output features, of a workgroup
DEPTH = 32  # input features between two barriers: one quantization group
_SIDE = 4  # rows, and output features, of a thread
_CHUNK = 8  # input features that a thread brings to shared memory
# A feature's row in shared memory: vectors stay aligned, columns change banks. (The buffers are
# one-dimensional: TVM takes the padding out of two-dimensional ones.)
_PITCH = TILE + 4


def gemm(
    limits: GpuLimits,
    out_features: int,
    in_features: int,
    reader: WeightReader,
    dtype: str,
    store: Callable,
):
    """Returns the inline function `multiply(X, W, R, O, n)`, a kernel, as gemv.py has it."""
    threads = (TILE // _SIDE) ** 2
    assert threads == TILE * DEPTH // _CHUNK <= limits.threads
    assert 2 * DEPTH * _PITCH * 4 <= limits.shared_bytes
    across = TILE // _SIDE  # threads along the output features
    chunks = DEPTH // _CHUNK
    own = reader.chunk
    vector = VECTOR if in_features % VECTOR == 0 else 1
    whole = in_features % DEPTH == 0
    blocks = -(-out_features // TILE)

    # `line` is a row of x (or W), clamped to the last one: what comes of it is not kept. Features
    # past the last are zeros.
    @T.inline
    def load_x(X, A, line, r, k, feature):
        stored = T.alloc_buffer((vector,), dtype, scope="local")
        for v in T.vectorized(vector):
            stored[v] = X[line, feature + v]
        for v in T.unroll(vector):
            A[(k + v) * _PITCH + r] = T.Cast("float32", stored[v])

    @T.inline
    def load_w(W, B, line, r, k, feature):
        D = T.alloc_buffer((own,), "float32", scope="local")
        reader.read(W, D, line, feature // own)
        for v in T.unroll(own):
            B[(k + v) * _PITCH + r] = D[v] * reader.factor(W, line, feature)

    @T.inline
    def zeros(S, r, k, count):
        for v in T.unroll(count):
            S[(k + v) * _PITCH + r] = T.float32(0)

    @T.inline
    def load(load_some, M, S, line, r, k, feature, count):
        if whole:
            load_some(M, S, line, r, k, feature)
        else:
            if feature < in_features:
                load_some(M, S, line, r, k, feature)
            else:
                zeros(S, r, k, count)

    @T.inline
    def multiply(X, W, R, O, n):
        for by in T.thread_binding((n + (TILE - 1)) // TILE, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    A = T.alloc_buffer((DEPTH * _PITCH,), "float32", scope="shared")
                    B = T.alloc_buffer((DEPTH * _PITCH,), "float32", scope="shared")
                    acc = T.alloc_buffer((_SIDE * _SIDE,), "float32", scope="local")
                    for i in T.unroll(_SIDE * _SIDE):
                        acc[i] = T.float32(0)
                    r = T.meta_var(tx // chunks)
                    k = T.meta_var(tx % chunks * _CHUNK)
                    for step in T.serial((in_features + DEPTH - 1) // DEPTH):
                        for c in T.unroll(_CHUNK // vector):
                            at = T.meta_var(k + c * vector)
                            line = T.meta_var(T.min(by * TILE + r, n - 1))
                            load(load_x, X, A, line, r, at, step * DEPTH + at, vector)
                        for c in T.unroll(_CHUNK // own):
                            at = T.meta_var(k + c * own)
                            line = T.meta_var(T.min(bx * TILE + r, out_features - 1))
                            load(load_w, W, B, line, r, at, step * DEPTH + at, own)
                        for d in T.serial(DEPTH):
                            a = T.alloc_buffer((_SIDE,), "float32", scope="local")
                            b = T.alloc_buffer((_SIDE,), "float32", scope="local")
                            for v in T.vectorized(_SIDE):
                                a[v] = A[d * _PITCH + tx // across * _SIDE + v]
                            for v in T.vectorized(_SIDE):
                                b[v] = B[d * _PITCH + tx % across * _SIDE + v]
                            for i in T.unroll(_SIDE):
                                for j in T.unroll(_SIDE):
                                    acc[i * _SIDE + j] += a[i] * b[j]
                    for i in T.unroll(_SIDE):
                        for j in T.unroll(_SIDE):
                            row = T.meta_var(by * TILE + tx // across * _SIDE + i)
                            o = T.meta_var(bx * TILE + tx % across * _SIDE + j)
                            if row < n and o < out_features:
                                store(R, O, row, o, acc[i * _SIDE + j])

    return multiply
