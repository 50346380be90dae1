"""The largest logit of each block of a vocabulary: all that greedy decoding reads of a row.

Logits are compared as integers in their order, as fast-math options leave no NaN to be seen, and
allow any of infinities.
"""

from tvm.script import tirx as T

from ..root import hand_scheduled
from .limits import LANES, GpuLimits

_NAN = 0x7FFFFFFF  # above all others
_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF


def block_maxima(limits: GpuLimits, vocab_size: int, blocks: int):
    """logits `[1, n, vocab]` f32 → `[n, 2, blocks]` i32: the largest of each block, as its bits,
    and its token id, the lowest of equals; a NaN and its id where there is any.

    Token i is in block i % blocks, so that neighbouring threads read neighbouring logits; a block
    has a thread in each of several teams, a team a range of its tokens.
    """
    teams = limits.threads // LANES
    rows = -(-vocab_size // blocks)
    depth = -(-rows // teams)

    @T.inline
    def rank(value, bits, key):
        """key[0]: an integer in the order of the logits."""
        bits[0] = T.reinterpret("int32", value)
        key[0] = T.bitwise_and(bits[0], T.int32(_MAGNITUDE))
        if key[0] > T.int32(_INFINITY):
            key[0] = T.int32(_NAN)
        elif bits[0] < 0:
            key[0] = -key[0]

    @T.prim_func(private=True, s_tir=True)
    def func(logits: T.handle, out: T.handle):
        n = T.int64()
        X = T.match_buffer(logits, (1, n, vocab_size), "float32")
        O = T.match_buffer(out, (n, 2, blocks), "int32")
        for i in T.thread_binding(n, thread="blockIdx.y"):
            for bx in T.thread_binding((blocks + LANES - 1) // LANES, thread="blockIdx.x"):
                for ty in T.thread_binding(teams, thread="threadIdx.y"):
                    for tx in T.thread_binding(LANES, thread="threadIdx.x"):
                        keys = T.alloc_buffer((teams * LANES,), "int32", scope="shared")
                        ids = T.alloc_buffer((teams * LANES,), "int32", scope="shared")
                        bits = T.alloc_buffer((1,), "int32", scope="local")
                        key = T.alloc_buffer((1,), "int32", scope="local")
                        key_id = T.alloc_buffer((1,), "int32", scope="local")
                        best = T.alloc_buffer((1,), "int32", scope="local")
                        best_id = T.alloc_buffer((1,), "int32", scope="local")
                        block = T.meta_var(bx * LANES + tx)
                        best[0] = T.int32(-_NAN)
                        best_id[0] = T.Cast("int32", block)
                        if block < blocks:
                            for j in T.serial(depth):
                                token = T.meta_var((ty * depth + j) * blocks + block)
                                if token < vocab_size:
                                    rank(X[0, i, token], bits, key)
                                    if key[0] > best[0]:
                                        best[0] = key[0]
                                        best_id[0] = T.Cast("int32", token)
                        keys[ty * LANES + tx] = best[0]
                        ids[ty * LANES + tx] = best_id[0]
                        if ty == 0 and block < blocks:
                            for other in T.serial(1, teams):
                                key[0] = keys[other * LANES + tx]
                                key_id[0] = ids[other * LANES + tx]
                                if key[0] > best[0]:
                                    best[0] = key[0]
                                    best_id[0] = key_id[0]
                            O[i, 0, block] = T.reinterpret("int32", X[0, i, best_id[0]])
                            O[i, 1, block] = best_id[0]

    return hand_scheduled(func)
