"""Batches of commands of the Vulkan runtime: their length, their order, and failures on the way."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tvm
import vulkan_workout as workout
from vulkan_validation import VALIDATION, validated

from phi3c.vulkan import statistics

pytest_plugins = ("vulkan_fixtures",)
pytestmark = pytest.mark.usefixtures("vulkan")

SYNCHRONIZATION = {
    "VK_INSTANCE_LAYERS": VALIDATION,
    "VK_LAYER_ENABLES": "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT",
}


# Length


def test_long_kernels_are_submitted_in_many_batches(module):
    """A driver takes a batch of seconds for one that hangs."""
    n, steps = 64 * 65535, 100
    tensor = workout.upload(np.zeros(n, np.uint32))

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            module["chain"](tensor, n, 1, workout.blocks(n), 64)
        tvm.vulkan(0).sync()
        return time.perf_counter() - start

    run(8)
    before = statistics().submissions
    seconds = run(steps)
    batches = statistics().submissions - before
    assert seconds / batches < 0.25, (seconds, batches)
    assert batches <= steps
    # Those of short ones are as long as ever.
    n = 64
    run(16)
    before = statistics().submissions
    run(2000)
    assert statistics().submissions - before < 150


def test_batches_where_the_queue_has_no_clock(case, shim):
    case(
        """
        assert not devices()[0].timestamps
        workout.check_chain(module_from_bytes(data), steps=640)
        assert 40 <= statistics().submissions <= 50
        with pytest.raises(DeviceError, match="has no timestamps, so kernels cannot be timed"):
            with profiled():
                pass
        """,
        shim,
        SHIM_NO_TIMESTAMPS=1,
    )


def test_a_queue_without_graphics_is_preferred(case, shim):
    case("workout.check_chain(module_from_bytes(data))", shim, SHIM_QUEUES=1)


# Order


def test_only_what_needs_a_barrier_has_one(case, shim):
    case(
        """
        import ctypes, os
        calls = ctypes.CDLL(os.environ["SHIM_PATH"]).shim_calls
        module = module_from_bytes(data)
        a, b = (workout.upload(np.full(100, value, np.float32)) for value in (3, 4))
        sums = [tvm.runtime.empty((100,), "float32", vulkan) for _ in range(20)]
        vulkan.sync()

        def barriers(work):
            before = calls(b"CmdPipelineBarrier")
            work()
            return calls(b"CmdPipelineBarrier") - before

        def add(total):
            module["add"](a, b, total, 100, 2.0, 2, 64)

        def inputs():
            for tensor in sums:
                tensor.copyfrom(np.zeros(100, np.float32))

        assert barriers(inputs) <= 1  # if what was there before was written just now
        assert barriers(lambda: add(sums[0])) == 1  # after it was written
        assert barriers(lambda: [add(total) for total in sums[1:]]) == 0  # a and b are only read
        assert barriers(lambda: add(sums[5])) == 1  # written again
        assert barriers(lambda: a.copyfrom(np.zeros(100, np.float32))) == 1  # after it was read
        assert barriers(lambda: sums[7].copyto(sums[8])) == 0
        assert barriers(lambda: sums[8].copyto(sums[9])) == 1
        assert all((total.numpy() == 11).all() for total in sums)
        """,
        shim,
        SHIM_DISCRETE=1,
        SHIM_PATH=str(shim),
    )


@validated
@pytest.mark.parametrize("environment", [{}, {"SHIM_NO_PUSH": 1, "SHIM_DISCRETE": 1}])
def test_no_command_overtakes_one_that_it_needs(case, shim, environment):
    output = case("workout.check_all(data)", shim, **SYNCHRONIZATION, **environment)
    assert output == "right\n"


@validated
def test_the_validation_layer_sees_missing_barriers(case, shim):
    """The control. One that is right runs on: lavapipe executes in order."""
    code = "workout.check_chain(module_from_bytes(data), steps=40)"
    output = case(code, shim, **SYNCHRONIZATION, SHIM_NO_BARRIERS=1)
    assert "SYNC-HAZARD" in output


def test_the_inputs_of_a_step_do_not_wait_for_the_device(case, shim):
    case(
        """
        from phi3c.runtime.device import VulkanGpu
        gpu, module = VulkanGpu(devices()[0]), module_from_bytes(data)
        before = statistics().submissions
        inputs = [gpu.inputs({"x": np.full(n, n, np.int32)})["x"] for n in range(1, 11)]
        assert statistics().submissions == before
        for n, tensor in enumerate(inputs, 1):
            module["chain"](tensor, n, 1, 1, 64)
        assert all((tensor.numpy() == 3 * n + 1).all() for n, tensor in enumerate(inputs, 1))
        """,
        shim,
        SHIM_DISCRETE=1,
    )


# Failures


def test_a_submission_that_is_out_of_memory_is_repeated(case, shim):
    case(
        "workout.check_chain(module_from_bytes(data))",
        shim,
        SHIM_OOM="QueueSubmit",
        SHIM_OOM_FIRST=5,
        SHIM_OOM_COUNT=1,
    )


@pytest.mark.parametrize("environment", [{}, {"SHIM_DISCRETE": 1}])
def test_what_cannot_be_submitted_for_a_while_is_not_lost(case, shim, environment):
    output = case(
        """
        failures = []

        def repeated(work, *arguments):
            while True:
                try:
                    return work(*arguments)
                except OutOfMemoryError as error:
                    assert "vkQueueSubmit: VK_ERROR_OUT_OF_DEVICE_MEMORY" in str(error)
                    failures.append(error)

        module = module_from_bytes(data)
        tensor = workout.upload(np.zeros(100, np.uint32))
        odd = [tvm.runtime.empty((101,), "uint8", vulkan) for _ in range(600)]
        expected = np.zeros(100, np.uint32)
        for step in range(600):
            # Of a tensor, as that of an array waits for the device.
            here = tvm.runtime.tensor(np.full(101, step % 251, np.uint8))
            repeated(here.copyto, odd[step])
            repeated(module["chain"], tensor, 100, step, 2, 64)
            expected = 3 * expected + np.uint32(step)
        assert np.array_equal(repeated(tensor.numpy), expected)
        assert all((part.numpy() == step % 251).all() for step, part in enumerate(odd))
        print(len(failures))
        """,
        shim,
        **environment,
        SHIM_OOM="QueueSubmit",
        SHIM_OOM_FIRST=3,
        SHIM_OOM_COUNT=7,
    )
    assert 1 <= int(output) <= 3  # each tries twice


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("CreateComputePipelines", "kernel add: vkCreateComputePipelines: VK_ERROR_OUT_OF_DEV"),
        ("CreateDescriptorPool", "vkCreateDescriptorPool: VK_ERROR_OUT_OF_DEVICE_MEMORY"),
        ("AllocateCommandBuffers", "vkAllocateCommandBuffers: VK_ERROR_OUT_OF_DEVICE_MEMORY"),
    ],
)
def test_no_memory_for_an_object(case, shim, function, message):
    case(
        f"""
        module = module_from_bytes(data)
        a, b, c = (tvm.runtime.empty((100,), "float32", vulkan) for _ in range(3))
        with pytest.raises(OutOfMemoryError, match="{message}"):
            module["add"](a, b, c, 100, 0.5, 2, 64)
        workout.check_add(module, np.random.default_rng(0), 100)
        """,
        shim,
        SHIM_OOM=function,
        SHIM_OOM_COUNT=1,
        SHIM_NO_PUSH=1,
    )


def test_no_memory_for_a_buffer(case, shim):
    case(
        """
        with pytest.raises(OutOfMemoryError, match="out of memory: asked for 100 bytes"):
            tvm.runtime.empty((100,), "uint8", vulkan)
        """,
        shim,
        SHIM_OOM="CreateBuffer",
    )


@pytest.mark.parametrize(
    ("function", "destroyed"),
    [
        ("EnumeratePhysicalDevices", ["DestroyInstance"]),
        ("CreateDevice", []),
        ("CreatePipelineCache", ["DestroyDevice"]),
        ("CreateCommandPool", ["DestroyDevice"]),
    ],
)
def test_what_was_opened_in_vain_is_closed(case, shim, function, destroyed):
    case(
        f"""
        import ctypes, os
        calls = ctypes.CDLL(os.environ["SHIM_PATH"]).shim_calls
        with pytest.raises((OutOfMemoryError, DeviceError), match="vk{function}: VK_ERROR_OUT_OF"):
            tvm.runtime.empty((100,), "uint8", vulkan)
        names = ("DestroyInstance", "DestroyDevice")
        assert [name for name in names if calls(name.encode())] == {destroyed}
        workout.check_chain(module_from_bytes(data), steps=10)
        """,
        shim,
        SHIM_OOM=function,
        SHIM_OOM_COUNT=1,
        SHIM_PATH=str(shim),
    )


def test_a_thread_frees_tensors_while_the_process_ends(case, shim):
    """One that is not Python's, as those stop before."""
    case(
        """
        import ctypes, os
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        module = module_from_bytes(data)
        kept, found = [], []
        for _ in range(4000):
            tensor = workout.upload(np.zeros(20_000, np.uint32))
            kept.append(tensor.__dlpack__())
            found.append(pointer(kept[-1], b"dltensor"))
        tensor = workout.upload(np.zeros(1 << 20, np.uint32))
        for step in range(40):
            module["chain"](tensor, 1 << 20, step, 1 << 14, 64)
        work = ctypes.CDLL(os.environ["SHIM_PATH"]).shim_free_in_thread
        work((ctypes.c_void_p * len(found))(*found), len(found))
        for capsule in kept:  # is the thread's now
            ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), b"used_dltensor")
        """,
        shim,
        SHIM_PATH=str(shim),
    )
