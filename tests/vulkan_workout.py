"""Kernels, copies and frees of every kind on device 0, each result checked. Prints "right".

Run with other loaders, under the validation layer and under sanitizers by test_vulkan_runtime.py.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import tvm
from vulkan_kernels import ADD, CHAIN, MANY

from phi3c.vulkan import load_runtime, module_from_bytes, profiled, statistics

BYTES = Path(sys.argv[1]).read_bytes() if __name__ == "__main__" else b""
# Around the limits of each way to copy (stream.cc); the last needs more chunks than there are.
SIZES = (1, 3, 4, 5, 16, 4096, 65535, 65536, 65540, (4 << 20) - 1, (36 << 20) + 5)


def upload(data: np.ndarray):
    return tvm.runtime.tensor(data, tvm.vulkan(0))


def blocks(n: int, threads: int = 64) -> int:
    return -(-n // threads)


def check_copies(rng: np.random.Generator, sizes=SIZES) -> None:
    for size in sizes:
        data = rng.integers(0, 256, size, dtype=np.uint8)
        here = upload(data)
        assert np.array_equal(here.numpy(), data), size
        there = tvm.runtime.empty((size,), "uint8", tvm.vulkan(0))
        here.copyto(there)
        here.copyfrom(255 - data)  # ordered after the copy out of it
        assert np.array_equal(there.numpy(), data), size
        assert np.array_equal(here.numpy(), 255 - data), size


def check_add(module, rng: np.random.Generator, n: int) -> None:
    a, b = rng.standard_normal((2, n), dtype=np.float32)
    c = tvm.runtime.empty((n,), "float32", tvm.vulkan(0))
    module["add"](upload(a), upload(b), c, n, 0.5, blocks(n), ADD.threads[0])
    assert np.array_equal(c.numpy(), a + np.float32(0.5) * b), n


def check_chain(module, n: int = 1000, steps: int = 700) -> None:
    """Many dispatches, each after the one before, and copies to the buffer between them."""
    data = np.arange(n, dtype=np.uint32)
    tensor = upload(data)
    for step in range(steps):
        module["chain"](tensor, n, step, blocks(n), CHAIN.threads[0])
        data = 3 * data + np.uint32(step)
        if step == steps // 2:
            data = data[::-1].copy()
            tensor.copyfrom(data)
    assert np.array_equal(tensor.numpy(), data)


def check_freed(module, rng: np.random.Generator, rounds: int = 30) -> None:
    """Buffers that are freed while their kernels are still to run."""
    before = statistics().bytes_in_use
    for _ in range(rounds):
        check_add(module, rng, 1021)
        n = 4099
        data = rng.integers(0, 1 << 30, n, dtype=np.uint32)
        kept, dropped = upload(data), upload(data)
        module["chain"](dropped, n, 1, blocks(n), CHAIN.threads[0])
        dropped.copyto(kept)
        del dropped
        other = upload(data)
        module["chain"](other, n, 2, blocks(n), CHAIN.threads[0])
        assert np.array_equal(kept.numpy(), 3 * data + 1)
    del kept, other
    tvm.vulkan(0).sync()
    assert statistics().bytes_in_use <= before + (40 << 20)  # staging stays


def check_many_buffers(module) -> None:
    tensors = [upload(np.full(64, i, np.uint32)) for i in range(len(MANY.arguments))]
    for _ in range(3):
        module["many"](*tensors, 1, 64)
    for i, tensor in enumerate(tensors):
        assert (tensor.numpy() == 4 * i).all()


def in_threads(count: int, work) -> None:
    errors = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def check_all(data: bytes) -> None:
    rng = np.random.default_rng(0)
    module = module_from_bytes(data)
    check_copies(rng)
    for n in (1, 63, 64, 65, 100_003):
        check_add(module, rng, n)
    check_chain(module)
    check_freed(module, rng)
    check_many_buffers(module)
    in_threads(4, lambda i: check_freed(module, np.random.default_rng(i), rounds=5))
    with profiled() as times:
        check_chain(module, steps=300)
    assert times["chain"].count == 300 and 0 < times["chain"].seconds < 60, times
    check_add(module_from_bytes(data), rng, 5)  # whose pipelines go while they may be in use
    print("right")


if __name__ == "__main__":
    load_runtime(cache=sys.argv[2], flags=sys.argv[3:])
    check_all(BYTES)
