"""Token embedding out of weight panels, and the rows of hidden states that an LM head needs."""

from tvm.script import tirx as T

from ..layout import PANEL
from ..plain_weight import as_float32
from ..root import hand_scheduled
from .layout import panel_shape


def embedding(vocab_size: int, hidden_size: int, weight_dtype: str):
    """ids `[n]` i32, weight `[panels, hidden, 16]` → `[n, hidden]` f32.

    The table has a linear's layout, so that a tied LM head needs no second copy of it.
    """
    n_panels = panel_shape(vocab_size, hidden_size)[0]

    @T.prim_func(private=True, s_tir=True)
    def func(ids: T.handle, weight: T.handle, out: T.handle):
        n = T.int64()
        I = T.match_buffer(ids, (n,), "int32")
        W = T.match_buffer(weight, (n_panels, hidden_size, PANEL), weight_dtype)
        O = T.match_buffer(out, (n, hidden_size), "float32")
        for t in T.serial(n):
            for k in T.serial(hidden_size):
                O[t, k] = as_float32(W[I[t] // PANEL, k, I[t] % PANEL], weight_dtype)

    return hand_scheduled(func)


def take_rows(features: int, dtype: str = "float32"):
    """x `[n, features]`, positions `[b]` i32 → `[b, features]`."""

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, positions: T.handle, out: T.handle):
        n = T.int64()
        b = T.int64()
        X = T.match_buffer(x, (n, features), dtype)
        P = T.match_buffer(positions, (b,), "int32")
        O = T.match_buffer(out, (b, features), dtype)
        for i in T.serial(b):
            for k in T.serial(features):
                O[i, k] = X[P[i], k]

    return hand_scheduled(func)


def last_row(features: int, dtype: str = "float32"):
    """x `[n, features]` → `[1, features]`."""

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, out: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n, features), dtype)
        O = T.match_buffer(out, (1, features), dtype)
        for k in T.serial(features):
            O[0, k] = X[n - 1, k]

    return hand_scheduled(func)
