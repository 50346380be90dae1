"""Device memory of the Vulkan runtime: few allocations, used again; and where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import vulkan_workout as workout

from phi3c.vulkan import statistics

pytest_plugins = ("vulkan_fixtures",)
pytestmark = pytest.mark.usefixtures("vulkan")

MIB = 1 << 20
DEVICES = [{}, {"SHIM_DISCRETE": 1}]


@pytest.mark.parametrize("environment", DEVICES)
def test_many_tensors_take_few_allocations(case, shim, environment):
    case(
        """
        sizes = np.random.default_rng(0).integers(1, 20_000, 5000)
        tensors = [workout.upload(np.full(n, i % 251, np.uint8)) for i, n in enumerate(sizes)]
        for i, (tensor, n) in list(enumerate(zip(tensors, sizes)))[::7]:
            assert np.array_equal(tensor.numpy(), np.full(n, i % 251, np.uint8)), i
        assert statistics().allocations < 8
        """,
        shim,
        SHIM_ALLOCATIONS=64,
        **environment,
    )


def test_too_many_allocations_are_out_of_memory(case, shim):
    case(
        """
        def large():
            return tvm.runtime.empty((65 << 20,), "uint8", vulkan)
        small = workout.upload(np.arange(100))
        kept = [large() for _ in range(3)]
        with pytest.raises(OutOfMemoryError, match="out of memory: asked for 68157440 bytes with"):
            large()
        assert statistics().allocations == 4
        more = [tvm.runtime.empty((MIB,), "uint8", vulkan) for _ in range(20)]  # have their block
        del kept[0]
        large()
        assert np.array_equal(small.numpy(), np.arange(100))
        """.replace("MIB", str(MIB)),
        shim,
        SHIM_ALLOCATIONS=4,
    )


@pytest.mark.parametrize("seed", range(3))
def test_tensors_that_come_and_go_keep_their_bytes(seed):
    """Of all sizes: kept ones, pieces of blocks, blocks of their own."""
    rng = np.random.default_rng(seed)
    tvm.vulkan(0).sync()
    before = statistics()
    live: list[tuple] = []
    for step in range(800):
        if len(live) > 60 or (live and rng.random() < 0.45):
            tensor, expected = live.pop(rng.integers(len(live)))
            found = tensor.numpy()
            assert np.array_equal(found, np.resize(expected, found.size)), step
            continue
        largest = rng.choice([64, 5_000, 70_000, 700_000, 5 * MIB] * 10 + [40 * MIB])
        pattern = rng.integers(0, 256, 97, dtype=np.uint8)
        size = int(rng.integers(1, largest + 1))
        live.append((workout.upload(np.resize(pattern, size)), pattern))
    for tensor, expected in live:
        assert np.array_equal(tensor.numpy(), np.resize(expected, tensor.shape[0]))
    live.clear()
    del tensor
    tvm.vulkan(0).sync()
    after = statistics()
    assert after.bytes_in_use == before.bytes_in_use
    assert after.allocations <= before.allocations + 3  # small ones are kept, and an empty block


@pytest.mark.parametrize("environment", DEVICES)
def test_a_step_makes_no_buffers(case, shim, environment):
    """Inputs, a result, kernels that are still to use them when they are freed."""
    output = case(
        """
        import ctypes, os
        calls = ctypes.CDLL(os.environ["SHIM_PATH"]).shim_calls
        module = module_from_bytes(data)
        hidden = workout.upload(np.zeros(1000, np.uint32))

        def step(number):
            sizes = [1, 1, 1, 2, 7, 16, 65, 257, 1000, 4000]
            inputs = [workout.upload(np.full(n, number, np.int32)) for n in sizes]
            for tensor, n in zip(inputs, sizes):
                module["chain"](tensor, n, 1, workout.blocks(n), 64)
            module["chain"](hidden, 1000, number, workout.blocks(1000), 64)
            logits = tvm.runtime.empty((1000,), "uint32", vulkan)
            hidden.copyto(logits)
            return logits.numpy()

        expected = np.uint32(0)
        for number in range(110):
            if number == 10:
                before = [calls(b"CreateBuffer"), calls(b"AllocateMemory")]
            expected = np.uint32((3 * int(expected) + number) % (1 << 32))
            assert (step(number) == expected).all(), number
        assert [calls(b"CreateBuffer"), calls(b"AllocateMemory")] == before
        print(before[1])
        """,
        shim,
        SHIM_PATH=str(shim),
        **environment,
    )
    assert int(output) <= 2


def test_all_of_a_small_memory_is_used(case, shim):
    """By blocks that are as small as what is left."""
    case(
        """
        tensors = []
        with pytest.raises(OutOfMemoryError, match="asked for 1048576 bytes with 20971520 bytes"):
            while True:
                tensors.append(tvm.runtime.empty((1 << 20,), "uint8", vulkan))
        assert len(tensors) == 20
        """,
        shim,
        SHIM_MEMORY=20 * MIB,
    )


def test_what_is_kept_is_given_up_where_memory_is_short(case, shim):
    case(
        """
        small = [workout.upload(np.zeros(16 << 10, np.uint8)) for _ in range(900)]
        del small
        tensors = [tvm.runtime.empty((31 << 20,), "uint8", vulkan)]
        tensors += [tvm.runtime.empty((1000,), "uint8", vulkan) for _ in range(900)]
        """,
        shim,
        SHIM_MEMORY=32 * MIB,
    )


def test_an_integrated_device_uses_the_memory_of_the_host(case, shim):
    case(
        """
        assert devices()[0].kind == "integrated"
        assert devices()[0].memory_bytes == (64 << 20) + (1 << 30)
        tensors = [workout.upload(np.full(4 << 20, i, np.uint8)) for i in range(40)]
        assert all((tensor.numpy() == i).all() for i, tensor in enumerate(tensors))
        """,
        shim,
        SHIM_INTEGRATED=64 * MIB,
    )


def test_the_driver_says_what_is_free(case, shim):
    case(
        """
        assert vulkan.available_global_memory == 50_000_000
        tensor = tvm.runtime.empty((1 << 20,), "uint8", vulkan)
        idle = 50_000_000 + 63 * (1 << 20)  # of the block, whose use the shim does not count
        assert vulkan.available_global_memory == idle
        """,
        shim,
        SHIM_BUDGET=50_000_000,
    )
