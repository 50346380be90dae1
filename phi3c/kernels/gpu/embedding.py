"""Token embedding, and the rows of hidden states that an LM head needs."""

from tvm.script import tirx as T

from ..plain_weight import as_float32
from ..root import hand_scheduled
from ..weight_format import GroupFormat, WeightFormat
from .limits import GpuLimits
from .rows import for_each
from .weight import weight_buffers, weight_reader


def embedding(limits: GpuLimits, vocab_size: int, hidden_size: int, kind: WeightFormat, dtype: str):
    """ids `[n]` i32, weight (weight.weight_buffers) → `[n, hidden]` dtype.

    The table has a linear's layout, so that a tied LM head needs no second copy of it.
    """
    if isinstance(kind, GroupFormat):
        return _group_embedding(limits, vocab_size, hidden_size, kind, dtype)

    @T.inline
    def put(args, t, k):
        I, W, O = T.meta_var(args)
        O[t, k] = T.Cast(dtype, as_float32(W[I[t], k], kind))

    run = for_each(limits, hidden_size, put)

    @T.prim_func(private=True, s_tir=True)
    def func(ids: T.handle, weight: T.handle, out: T.handle):
        n = T.int64()
        I = T.match_buffer(ids, (n,), "int32")
        W = T.match_buffer(weight, (vocab_size, hidden_size), kind)
        O = T.match_buffer(out, (n, hidden_size), dtype)
        run(n, (I, W, O))

    return hand_scheduled(func)


def _group_embedding(
    limits: GpuLimits, vocab_size: int, hidden_size: int, kind: GroupFormat, dtype: str
):
    reader = weight_reader(limits, hidden_size, kind)
    chunk = reader.chunk
    (q_shape, q_dtype), (scale_shape, scale_dtype) = weight_buffers(vocab_size, hidden_size, kind)

    @T.inline
    def put(args, t, c):
        I, W, O = T.meta_var(args)
        D = T.alloc_buffer((chunk,), "float32", scope="local")
        reader.read(W, D, I[t], c)
        for v in T.unroll(chunk):
            O[t, c * chunk + v] = T.Cast(dtype, D[v] * reader.factor(W, I[t], c * chunk))

    run = for_each(limits, hidden_size // chunk, put)

    @T.prim_func(private=True, s_tir=True)
    def func(ids: T.handle, q: T.handle, scale: T.handle, out: T.handle):
        n = T.int64()
        I = T.match_buffer(ids, (n,), "int32")
        Q = T.match_buffer(q, q_shape, q_dtype)
        S = T.match_buffer(scale, scale_shape, scale_dtype)
        O = T.match_buffer(out, (n, hidden_size), dtype)
        run(n, (I, (Q, S), O))

    return hand_scheduled(func)


def take_rows(limits: GpuLimits, features: int, dtype: str):
    """x `[n, features]`, positions `[b]` i32 → `[b, features]`."""

    @T.inline
    def put(args, i, k):
        X, P, O = T.meta_var(args)
        O[i, k] = X[P[i], k]

    run = for_each(limits, features, put)

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, positions: T.handle, out: T.handle):
        n = T.int64()
        b = T.int64()
        X = T.match_buffer(x, (n, features), dtype)
        P = T.match_buffer(positions, (b,), "int32")
        O = T.match_buffer(out, (b, features), dtype)
        run(b, (X, P, O))

    return hand_scheduled(func)


def last_row(limits: GpuLimits, features: int, dtype: str):
    """x `[n, features]` → `[1, features]`."""

    @T.inline
    def put(args, i, k):
        X, O, n = T.meta_var(args)
        O[i, k] = X[n - 1, k]

    run = for_each(limits, features, put)

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, out: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n, features), dtype)
        O = T.match_buffer(out, (1, features), dtype)
        run(1, (X, O, n))

    return hand_scheduled(func)
