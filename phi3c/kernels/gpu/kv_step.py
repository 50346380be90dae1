"""How the keys and values of a step come to decode attention's threads: a few KV blocks of one
head, all asked of memory before any is used.

Keys lie `[head_dim, 16]` in a block, values `[16, head_dim]`. A thread multiplies VECTOR
neighbouring keys in every key_lanes-th dimension, and a vector of neighbouring dimensions of the
values of a few neighbouring keys, so that neighbouring threads read neighbouring addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from .limits import VECTOR, GpuLimits, MatrixUnits

BLOCKS = 4  # KV blocks of a step
KEYS = BLOCKS * KV_BLOCK
_THREADS = 128
_LANES = 16  # threads that share the values of a dimension, at most
_COPY = 16  # bytes of an asynchronous copy


@dataclass(frozen=True)
class Shares:
    """What of a step a thread has.

    key_lanes: threads that share a key, and value_lanes a dimension of the values.
    key_vectors, value_vectors: that a thread reads; of values they are of so many keys, and
    `vector` dimensions. Threads past value_lanes · columns have no values.
    """

    head_dim: int
    threads: int

    @property
    def key_lanes(self) -> int:
        return self.threads * VECTOR // KEYS

    @property
    def key_vectors(self) -> int:
        return -(-self.head_dim // self.key_lanes)

    @property
    def vector(self) -> int:
        return gcd(VECTOR, self.head_dim)

    @property
    def columns(self) -> int:
        return self.head_dim // self.vector

    @property
    def value_lanes(self) -> int:
        most = self.threads // self.columns
        return min(_LANES, 1 << (most.bit_length() - 1))

    @property
    def value_vectors(self) -> int:
        return KEYS // self.value_lanes

    def key_block(self, tx):
        return tx // (self.threads // BLOCKS)

    def key_lane(self, tx):
        return tx % (self.threads // BLOCKS) // (KV_BLOCK // VECTOR)

    def quad(self, tx):
        """Of a block's keys, in vectors."""
        return tx % (KV_BLOCK // VECTOR)


def shares_of(limits: GpuLimits, head_dim: int) -> Shares:
    few = head_dim // gcd(VECTOR, head_dim) <= _THREADS
    shares = Shares(head_dim, _THREADS if few else limits.threads)
    assert shares.columns <= shares.threads <= limits.threads
    return shares


@dataclass(frozen=True)
class KvStep:
    """scope, keys, values: of two buffers, and how many elements they have.
    shared_bytes: of those.

    `fetch(P, K, V, B, k, v, at, last, head, tx)`: of the blocks that are listed from `at` on, up
    to key number `last`. Slots past it hold nothing, not even zeros, and 0 · NaN would stay: in
    their place come zeros, or values of key number `last`; their keys may be anything.
    P `[blocks, 2, kv_heads, head_dim·16]`, K `[blocks, 2, kv_heads, head_dim, 16]` and
    V `[blocks, 2, kv_heads, 16, head_dim]` are one memory.
    `arrived()`: all that was asked for is there.
    `read_key(k, some, i, tx)`, `read_value(v, some, to, i, tx)`: a thread's i-th vector, to
    some[0 …], some[to …].
    loop: how a thread goes over its vectors: registers have no number that changes.
    """

    scope: str
    keys: int
    values: int
    shared_bytes: int
    fetch: Callable
    arrived: Callable
    read_key: Callable
    read_value: Callable
    loop: Callable


def kv_step(shares: Shares, limits: GpuLimits, matrix: MatrixUnits, kv_dtype: str) -> KvStep:
    """Copied where a third of the shared memory is left for all else."""
    size = 2 * 2 * KEYS * shares.head_dim
    fits = shares.head_dim % 16 == 0 and 3 * size <= 2 * limits.shared_bytes
    if matrix == "mma" and kv_dtype == "float16" and fits:
        return _copied(shares)
    return _in_registers(shares)


def _in_registers(shares: Shares) -> KvStep:
    """On any GPU, as far as its compiler leaves loads where they are."""
    head_dim, vector = shares.head_dim, shares.vector
    key_lanes, key_vectors = shares.key_lanes, shares.key_vectors
    columns, value_vectors = shares.columns, shares.value_vectors

    @T.inline
    def fetch(P, K, V, B, k, v, at, last, head, tx):
        nth = T.meta_var(T.min(shares.key_block(tx), last // KV_BLOCK))
        for i in T.unroll(key_vectors):
            d = T.meta_var(T.min(i * key_lanes + shares.key_lane(tx), head_dim - 1))
            for e in T.vectorized(VECTOR):
                k[i * VECTOR + e] = K[B[at + nth], 0, head, d, shares.quad(tx) * VECTOR + e]
        if tx < shares.value_lanes * columns:
            first = T.meta_var(tx // columns * value_vectors)
            for i in T.unroll(value_vectors):
                block = T.meta_var(T.min(first // KV_BLOCK + i // KV_BLOCK, last // KV_BLOCK))
                key = T.meta_var(T.min(first + i, last) - block * KV_BLOCK)
                for e in T.vectorized(vector):
                    v[i * vector + e] = V[B[at + block], 1, head, key, tx % columns * vector + e]

    @T.inline
    def arrived():
        T.evaluate(0)

    @T.inline
    def read_key(k, some, i, tx):
        for e in T.vectorized(VECTOR):
            some[e] = k[i * VECTOR + e]

    @T.inline
    def read_value(v, some, to, i, tx):
        for e in T.vectorized(vector):
            some[to + e] = v[i * vector + e]

    made = (fetch, arrived, read_key, read_value, T.unroll)
    return KvStep("local", key_vectors * VECTOR, value_vectors * vector, 0, *made)


def _copied(shares: Shares) -> KvStep:
    """By CUDA's cp.async to shared memory, as nvcc moves loads to where their values are used,
    across barriers too: keys would be waited for, and values after them."""
    head_dim, vector = shares.head_dim, shares.vector
    columns = shares.columns
    halves = _COPY // 2
    panel = KV_BLOCK * head_dim  # of a block: one range of memory
    copiers = shares.threads // BLOCKS
    copies = panel // halves // copiers
    assert copies * copiers * halves == panel

    @T.inline
    def fetch(P, K, V, B, k, v, at, last, head, tx):
        T.tvm_storage_sync("shared")  # the step before is read no longer
        nth = T.meta_var(tx // copiers)
        listed = T.meta_var(at + T.min(nth, last // KV_BLOCK))
        for i in T.unroll(copies):
            c = T.meta_var(i * copiers + tx % copiers)
            T.ptx["cp.async.cg.shared.global"](
                k.access_ptr("w", offset=nth * panel + c * halves),
                T.address_of(P[B[listed], 0, head, c * halves]),
                _COPY,
                T.Select(nth * KV_BLOCK <= last, T.uint32(_COPY), T.uint32(0)),
            )
        for i in T.unroll(copies):
            c = T.meta_var(i * copiers + tx % copiers)
            key = T.meta_var(nth * KV_BLOCK + c * halves // head_dim)
            T.ptx["cp.async.cg.shared.global"](
                v.access_ptr("w", offset=nth * panel + c * halves),
                T.address_of(P[B[listed], 1, head, c * halves]),
                _COPY,
                T.Select(key <= last, T.uint32(_COPY), T.uint32(0)),
            )
        T.ptx["cp.async.commit_group"]()

    @T.inline
    def arrived():
        T.ptx["cp.async.wait_group"](0)
        T.tvm_storage_sync("shared")

    @T.inline
    def read_key(k, some, i, tx):
        d = T.meta_var(i * shares.key_lanes + shares.key_lane(tx))
        for e in T.vectorized(VECTOR):
            some[e] = k[shares.key_block(tx) * panel + d * KV_BLOCK + shares.quad(tx) * VECTOR + e]

    @T.inline
    def read_value(v, some, to, i, tx):
        key = T.meta_var(tx // columns * shares.value_vectors + i)
        for e in T.vectorized(vector):
            some[to + e] = v[key * head_dim + tx % columns * vector + e]

    size = KEYS * head_dim
    return KvStep(
        "shared", size, size, 2 * 2 * size, fetch, arrived, read_key, read_value, T.serial
    )
