"""The Vulkan runtime on whatever device there is; Debian's lavapipe (mesa-vulkan-drivers) will do.

Bad devices are played by vulkan_shim.c, in processes of their own.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import struct
import subprocess
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tvm
import vulkan_kernels as kernels
import vulkan_workout as workout
from tvm.script import tirx as T
from vulkan_cases import PRELUDE
from vulkan_kernels import ADD, ALL, CHAIN, CONSTANTS, GRID, module_bytes
from vulkan_validation import VALIDATION, validated

from phi3c.errors import ArtifactError, DeviceError
from phi3c.vulkan import (
    VulkanDevice,
    check_device,
    devices,
    load_runtime,
    module_from_bytes,
    profiled,
    save_pipelines,
    statistics,
)
from phi3c.vulkan import build as build_module
from phi3c.vulkan import library as library_module
from phi3c.vulkan.build import runtime_library
from phi3c.vulkan.library import default_cache

pytest_plugins = ("vulkan_fixtures",)
pytestmark = pytest.mark.usefixtures("vulkan")
TESTS = Path(__file__).parent
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def zeros(n: int, dtype: str = "uint32"):
    return workout.upload(np.zeros(n, dtype))


# Devices


def test_a_device_is_described():
    for index, device in enumerate(devices()):
        assert device.index == index
        assert device.name and device.driver and device.api_version >= (1, 0)
        assert device.kind in ("discrete", "integrated", "virtual", "cpu", "other")
        for field in fields(VulkanDevice):
            value = getattr(device, field.name)
            assert type(value).__name__ == field.type.partition("[")[0], field.name
    order = ["discrete", "integrated", "virtual", "cpu", "other"]
    kinds = [order.index(device.kind) for device in devices()]
    assert kinds == sorted(kinds)


def test_tvm_knows_the_device():
    device, here = devices()[0], tvm.vulkan(0)
    assert here.exist
    assert not tvm.vulkan(len(devices())).exist
    assert not tvm.vulkan(-1).exist
    assert here.device_name == device.name
    assert here.max_threads_per_block == device.max_workgroup_invocations
    assert tuple(here.max_thread_dimensions) == device.max_workgroup_size
    assert here.max_shared_memory_per_block == device.max_shared_memory
    assert here.warp_size == device.subgroup_size
    assert here.compute_version == ".".join(map(str, device.api_version))
    assert here.total_global_memory == device.memory_bytes
    assert 0 <= here.available_global_memory <= device.memory_bytes
    assert here.max_clock_rate is None


def test_a_target_takes_its_attributes_from_the_device():
    device = devices()[0]
    attributes = tvm.target.Target({"kind": "vulkan", "from_device": 0}).attrs
    assert attributes["device_name"] == device.name
    assert bool(attributes["supports_float16"]) == device.shader_float16
    assert bool(attributes["supports_16bit_buffer"]) == device.storage_buffer_16bit
    assert attributes["max_storage_buffer_range"] == device.max_storage_buffer_range
    assert attributes["max_shared_memory_per_block"] == device.max_shared_memory


def test_an_unknown_device_is_refused():
    count = len(devices())
    with pytest.raises(DeviceError, match=f"vulkan: device {count}: accepted: 0 to {count - 1}"):
        tvm.runtime.empty((1,), "uint8", tvm.vulkan(count))
    with pytest.raises(DeviceError, match="vulkan: device 99: accepted: 0 to"):
        statistics(99)


def test_a_device_that_suffices_is_accepted():
    device = devices()[0]
    check_device(device, storage_buffer_range=1 << 20, subgroup_size=device.subgroup_size)
    check_device(replace(device, storage_buffer_16bit=False, shader_float16=False))


@pytest.mark.parametrize(
    ("change", "needs", "message"),
    [
        (
            {"storage_buffer_16bit": False},
            {"features": ["storage_buffer_16bit"]},
            "has no 16-bit storage .storageBuffer16BitAccess., which kernels need",
        ),
        ({"shader_int64": False}, {"features": ["shader_int64"]}, "has no 64-bit integers"),
        (
            {"max_workgroup_count": (99, 65535, 65535)},
            {"workgroup_count": (100, 1, 1)},
            r"need \(100, 1, 1\) workgroups; it accepts \(99, 65535, 65535\)",
        ),
        (
            {"max_storage_buffers": 4},
            {"storage_buffers": 5},
            "need 5 storage buffers; it accepts 4",
        ),
        (
            {"subgroup_size": 64},
            {"subgroup_size": 32},
            "need subgroups of 32 threads; it has 64",
        ),
        (
            {"subgroup_operations": 1},
            {"subgroup_operations": 1 | 16},
            "need subgroup operations 17 .*; it lacks 16",
        ),
        ({"api_version": (1, 0, 9)}, {}, "knows Vulkan 1.0.9; needed: 1.1 or later"),
        (
            {"max_storage_buffer_range": 1000},
            {"storage_buffer_range": 1001},
            "kernels need 1001 bytes of one buffer; it accepts 1000",
        ),
        ({"max_shared_memory": 8}, {"shared_memory": 9}, "need 9 bytes of shared memory"),
        (
            {"max_workgroup_invocations": 128},
            {"workgroup_invocations": 256},
            "kernels need 256 threads in a workgroup; it accepts 128",
        ),
        (
            {"max_workgroup_size": (128, 128, 64)},
            {"workgroup_size": (1, 1, 65)},
            r"workgroups of \(1, 1, 65\) threads; it accepts \(128, 128, 64\)",
        ),
        ({"max_push_constants": 128}, {"push_constants": 136}, "need 136 bytes of push const"),
        (
            {"memory_bytes": 1 << 30},
            {"memory": 1 << 31},
            "2.15 GB of memory are needed; it has 1.07 GB",
        ),
    ],
)
def test_a_device_that_does_not_suffice_is_refused(change, needs, message):
    device = devices()[0]
    with pytest.raises(DeviceError, match=message):
        check_device(replace(device, **change), **needs)


# Copies


@pytest.mark.parametrize("size", [0, *workout.SIZES])
def test_copies_of_any_size(size, rng):
    workout.check_copies(rng, [size])


@pytest.mark.parametrize(("begin", "size"), [(1, 1), (3, 64), (5, 70_000), (4, 8), (64, 65_537)])
def test_copies_into_a_part_of_a_buffer(module, begin, size, rng):
    whole = rng.integers(0, 256, 1 << 18, dtype=np.uint8)
    tensor = workout.upload(whole)
    part = tensor._create_view((size,), "uint8", begin)
    data = rng.integers(0, 256, size, dtype=np.uint8)
    n = whole.size // 4
    # Of a buffer that a kernel is still to use, and of one that is idle.
    for busy in (True, False):
        if busy:
            words = whole.view(np.uint32)
            words[:] = 3 * words + 1
            module["chain"](tensor, n, 1, workout.blocks(n), 64)
        part.copyfrom(data)
        whole[begin : begin + size] = data
        assert np.array_equal(part.numpy(), data)
        assert np.array_equal(tensor.numpy(), whole)
        data = 255 - data


def test_copies_within_a_buffer(rng):
    data = rng.integers(0, 256, 1000, dtype=np.uint8)
    tensor = workout.upload(data)
    parts = [tensor._create_view((400,), "uint8", begin) for begin in (1, 501, 300)]
    parts[0].copyto(parts[1])
    data[501:901] = data[1:401]
    assert np.array_equal(tensor.numpy(), data)
    with pytest.raises(ValueError, match="a copy within a buffer from 501 to 300 of 400 bytes"):
        parts[1].copyto(parts[2])


def test_workspaces_are_kept(module):
    runtime = ctypes.CDLL(tvm.libinfo.find_libtvm_runtime())
    take, give_back = runtime.TVMBackendAllocWorkspace, runtime.TVMBackendFreeWorkspace
    take.restype = ctypes.c_void_p
    take.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    give_back.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    # More than any other test leaves behind.
    first = take(7, 0, 10_000_000, 0, 8)
    # As compiled code passes buffers: as pointers.
    module["chain"](ctypes.c_void_p(first), 64, 5, 1, 64)
    assert give_back(7, 0, first) == 0
    before = statistics().bytes_in_use
    second = take(7, 0, 9_000_000, 0, 8)
    other = take(7, 0, 9_000_000, 0, 8)
    assert second == first and other != first
    assert statistics().bytes_in_use - before in range(9_000_000, 13_000_000)
    assert give_back(7, 0, other) == give_back(7, 0, second) == 0


# Kernels


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1001, 100_003])
def test_add(module, n, rng):
    workout.check_add(module, rng, n)


def test_constants_are_8_bytes_each_in_order(module):
    found = zeros(16)
    values = (-5, -(1 << 40) - 3, 200, 1.0009765625, -2.5, 1e300, 3.140625, True)
    module["constants"](found, *values, 1, 16)
    data = found.numpy().tobytes()
    formats = ("<i", "<q", "<B", "<e", "<f", "<d", None, "<B")
    for i, (value, form) in enumerate(zip(values, formats, strict=True)):
        slot = data[8 * i : 8 * i + 8]
        if form is None:  # bfloat16: the upper half of a float32
            assert slot[:2] == struct.pack("<f", value)[2:]
        else:
            assert slot.startswith(struct.pack(form, value)), (i, slot)


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-8, 2.0**-24, 3e-8, 6e-5, 0.1, 65504.0, 65519.9, 65520.0, 1e9, np.inf]
)
def test_float16_constants_are_rounded_to_the_nearest(module, value):
    found = zeros(16)
    module["constants"](found, 0, 0, 0, -value, 0.0, 0.0, value, False, 1, 16)
    data = found.numpy().tobytes()
    with np.errstate(over="ignore"):
        assert data[24:26] == np.float16(-np.float32(value)).tobytes()
    import ml_dtypes

    assert data[48:50] == np.float32(value).astype(ml_dtypes.bfloat16).tobytes()


def test_launch_parameters_of_every_axis_in_any_order(module):
    x, y, z = 5, 4, 3
    found = zeros(x * y * z * 24)
    # threadIdx.z, blockIdx.y, blockIdx.x, threadIdx.y, blockIdx.z, threadIdx.x, shared memory
    module["grid"](found, 4, y, x, 3, z, 2, 1024)
    group = np.arange(x * y * z)
    number = group % x + 100 * (group // x % y) + 10_000 * (group // (x * y))
    expected = number[:, None] + 1_000_000 * np.arange(24)[None]
    assert np.array_equal(found.numpy().reshape(-1, 24), expected)


def test_many_dispatches_run_in_order_and_in_batches(module):
    before = statistics()
    workout.check_chain(module, steps=1000)
    after = statistics()
    assert after.dispatches - before.dispatches == 1000
    assert 3 <= after.submissions - before.submissions <= 100


def test_many_buffers(module):
    if devices()[0].max_storage_buffers < len(kernels.MANY.arguments):
        pytest.skip("the device has fewer buffers")
    workout.check_many_buffers(module)


def test_half_precision_storage(module):
    if not devices()[0].storage_buffer_16bit:
        pytest.skip("the device has no 16-bit storage")
    tensor = workout.upload(np.arange(128, dtype=np.float16))
    module["halves"](tensor, 2, 64)
    assert np.array_equal(tensor.numpy(), 2 * np.arange(128, dtype=np.float16))


def test_buffers_that_are_freed_while_in_use(module, rng):
    workout.check_freed(module, rng)


def test_several_threads(module):
    workout.in_threads(6, lambda i: workout.check_freed(module, np.random.default_rng(i), rounds=5))


def test_an_empty_launch_does_nothing(module):
    tensor = zeros(64)
    before = statistics().dispatches
    module["chain"](tensor, 64, 7, 0, 64)
    module["grid"](tensor, 4, 0, 1, 3, 1, 2, 0)
    assert statistics().dispatches == before
    assert not tensor.numpy().any()


def test_a_function_outlives_its_module():
    chain = module_from_bytes(module_bytes(CHAIN))["chain"]
    tensor = zeros(64)
    chain(tensor, 64, 7, 1, 64)
    del chain
    assert (tensor.numpy() == 7).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((64, 7, 1), ValueError, "found 4 arguments; accepted: 3 and 2 launch extents"),
        ((64, 7, 1, 32), ValueError, "kernel chain: threadIdx.x: found 32; its code has 64"),
        ((64, 7, -1, 64), ValueError, "kernel chain: blockIdx.x: -1"),
        ((64, "7", 1, 64), TypeError, "int"),
        (
            (64, 7, 1 << 40, 64),
            DeviceError,
            r"kernel chain: 1099511627776 workgroups along blockIdx.x; .* accepts at most \d+",
        ),
    ],
)
def test_wrong_arguments_are_refused(module, arguments, error, message):
    with pytest.raises(error, match=message):
        module["chain"](zeros(64), *arguments)


@pytest.mark.parametrize("pointer", [0, 1, 0xDEADBEEF0])
def test_a_pointer_that_is_no_buffer_is_refused(module, pointer):
    with pytest.raises(ValueError, match="kernel chain: argument 0 is no buffer of Vulkan"):
        module["chain"](ctypes.c_void_p(pointer), 64, 7, 1, 64)


def test_a_tensor_of_another_device_is_refused(module):
    tensor = tvm.runtime.tensor(np.zeros(64, np.uint32))
    with pytest.raises(ValueError, match="kernel chain: argument 0 is no buffer of Vulkan"):
        module["chain"](tensor, 64, 7, 1, 64)


def test_a_buffer_that_is_too_large_is_refused():
    most = min(devices()[0].max_storage_buffer_range, devices()[0].max_allocation)
    if most >= 1 << 40:
        pytest.skip("no buffer is too large for this device")
    with pytest.raises(MemoryError, match=f"a buffer of {most + 1} bytes; .* at most {most} "):
        tvm.runtime.empty((most + 1,), "uint8", tvm.vulkan(0))


def test_what_the_device_has_not_is_named():
    too_many = kernels.many_buffers(devices()[0].max_storage_buffers + 1)
    if len(too_many.arguments) < 200:
        chosen = module_from_bytes(module_bytes(too_many))
        with pytest.raises(DeviceError, match=r"kernel many: \d+ buffers; .* at most \d+ \(maxPer"):
            chosen["many"](*[zeros(64) for _ in too_many.arguments], 1, 64)
    # The capability Kernel, which no Vulkan device has, in front of the first one.
    code = bytearray(CHAIN.spirv())
    code[20:20] = struct.pack("<II", 2 << 16 | 17, 6)
    data = module_bytes(CHAIN)
    whole = kernels._string(kernels.code_bytes(CHAIN.spirv()))
    data = data.replace(whole, kernels._string(kernels.code_bytes(bytes(code))))
    with pytest.raises(DeviceError, match="kernel chain: needs SPIR-V capability 6, which"):
        module_from_bytes(data)["chain"](zeros(64), 64, 7, 1, 64)


def test_kernels_are_timed(module):
    if not devices()[0].timestamps:
        pytest.skip("the device has no timestamps")
    tensor = zeros(1 << 20)
    module["chain"](tensor, 64, 7, 1, 64)
    with profiled() as times:
        for _ in range(600):
            module["chain"](tensor, 1 << 10, 1, 16, 64)
        for _ in range(5):
            module["halves"](tensor, 1 << 14, 64)
    assert {name: time.count for name, time in times.items()} == {"chain": 600, "halves": 5}
    each = {name: time.seconds / time.count for name, time in times.items()}
    assert 0 < each["chain"] < each["halves"] < 5
    module["chain"](tensor, 64, 7, 1, 64)
    with profiled() as times:
        pass
    assert times == {}


# The bytes of a module


def test_a_module_in_a_library_is_the_same_when_loaded(tmp_path, rng):
    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((1,), "int32")):
        with T.sblock("root"):
            a[0] = 7

    data = module_bytes(*ALL)
    made = module_from_bytes(data)
    assert made.kind == "vulkan"
    assert made.implements_function("add") and not made.implements_function("sub")
    host = tvm.compile(tvm.IRModule({"main": main}), target="llvm")
    host.mod.import_module(made)
    path = tmp_path / "library.so"
    host.export_library(str(path))
    assert data in path.read_bytes()
    loaded = tvm.runtime.load_module(str(path))
    (module,) = loaded.imports
    assert module.kind == "vulkan"
    workout.check_add(module, rng, 1001)


def test_truncated_bytes_are_refused_at_every_length():
    data = module_bytes(CONSTANTS)
    for length in range(len(data)):
        with pytest.raises(ArtifactError, match="^vulkan: "):
            module_from_bytes(data[:length])
    with pytest.raises(ArtifactError, match="1 bytes after the end"):
        module_from_bytes(data + b"\0")


def test_changed_bytes_are_refused_or_harmless():
    data = module_bytes(ADD, GRID)
    change = random.Random(0)
    refused = 0
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(change.choice((1, 4, 40))):
            changed[change.randrange(len(data))] = change.randrange(256)
        try:
            module_from_bytes(bytes(changed))
        except ArtifactError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated"),
        (b"\xff" * 64, "truncated"),
        (random.Random(1).randbytes(500), "truncated"),
        (kernels._string("metal") + bytes(16), "found metal; accepted: vulkan"),
        (kernels._string("vulkan") + b"\xff" * 8, "truncated"),
    ],
)
def test_other_bytes_are_refused(data, message):
    with pytest.raises(ArtifactError, match=message):
        module_from_bytes(data)


@pytest.mark.parametrize(
    ("spirv", "message"),
    [
        (b"", "kernel chain: its code is damaged: not SPIR-V"),
        (bytes(400), "kernel chain: its code is damaged: not SPIR-V"),
        (struct.pack("<6I", 0x07230203, 0x10300, 0, 9, 0, 0), "an instruction runs past its end"),
        (bytes(20) + b"\1", "kernel chain: its code is damaged: wrong length"),
    ],
)
def test_code_that_is_no_spirv_is_refused(spirv, message):
    data = module_bytes(CHAIN)
    whole = kernels._string(kernels.code_bytes(CHAIN.spirv()))
    with pytest.raises(ArtifactError, match=message):
        module_from_bytes(data.replace(whole, kernels._string(kernels.code_bytes(spirv))))


# The library


def test_the_library_is_compiled_once(library_cache, monkeypatch):
    first = runtime_library(library_cache)
    monkeypatch.setattr(build_module, "_build", lambda *_: pytest.fail("compiled again"))
    # Nor is anything needed for it.
    monkeypatch.setattr(build_module, "get_cc", lambda: None)
    monkeypatch.setattr(build_module, "find_spec", lambda _: None)
    assert runtime_library(library_cache) == first
    load_runtime(cache=library_cache / "other")
    assert not (library_cache / "other").exists()


def test_two_that_compile_at_once_make_one_library(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"  # writes its process id to what follows -o
    compiler.write_text('#!/bin/sh\nwhile [ "$1" ]; do [ $1 = -o ] && echo $$ > $2; shift; done\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(build_module, "get_cc", lambda: str(compiler))
    made = []
    workout.in_threads(8, lambda _: made.append(runtime_library(tmp_path / "cache")))
    assert len(made) == 8 and len(set(made)) == 1
    assert list((tmp_path / "cache").iterdir()) == [made[0]]
    assert made[0].read_text().strip().isdigit()


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "get_cc", lambda: None)
    with pytest.raises(DeviceError, match=r"needs a C\+\+ compiler; found none .* apt install g"):
        runtime_library(tmp_path)
    monkeypatch.setattr(build_module, "get_cc", lambda: "/nowhere/g++")
    with pytest.raises(DeviceError, match=r"the C\+\+ compiler /nowhere/g\+\+ does not run"):
        runtime_library(tmp_path)


def test_a_missing_header_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "find_spec", lambda _: None)
    with pytest.raises(DeviceError, match=r"found no such package \(pip install 'phi3c\[vulkan\]"):
        runtime_library(tmp_path)


def test_a_library_that_does_not_compile(tmp_path):
    with pytest.raises(DeviceError, match="does not compile with .*: .*error.*no-such-flag"):
        runtime_library(tmp_path, ["-no-such-flag"])
    assert not list(tmp_path.iterdir())


def test_a_vulkan_runtime_of_tvms_own_is_left_alone(monkeypatch):
    monkeypatch.setattr(library_module, "_library", None)
    monkeypatch.setattr(library_module, "runtime_library", lambda *_: pytest.fail("was compiled"))
    load_runtime()
    monkeypatch.setattr(library_module, "_function", lambda _: None)
    with pytest.raises(DeviceError, match="this TVM has a Vulkan runtime of its own"):
        library_module.runtime_function("statistics")


def test_the_cache_is_where_the_system_wants_it(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/phi3c/vulkan")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/phi3c/vulkan"
    save_pipelines()


def test_the_package_with_the_header_is_not_imported():
    assert "vulkan" not in sys.modules


# Bad devices and bad ends, in processes of their own


def test_no_loader(case):
    """A module can be made all the same: at compile time there may be no Vulkan."""
    case(
        """
        module = module_from_bytes(data)
        chain = module["chain"]
        assert not vulkan.exist
        message = "found no Vulkan loader .* apt install libvulkan1"
        for work in (devices, statistics, lambda: tvm.runtime.empty((1,), "uint8", vulkan)):
            with pytest.raises(DeviceError, match=message):
                work()
        """,
        loader=Path("/nowhere/libvulkan.so.1"),
    )


def test_a_library_that_is_no_loader(case):
    case(
        """
        with pytest.raises(DeviceError, match="libm.so.6: not a Vulkan loader"):
            devices()
        """,
        loader=Path("libm.so.6"),
    )


def test_no_devices(case, shim):
    case(
        """
        assert devices() == []
        assert not vulkan.exist
        with pytest.raises(DeviceError, match="found no Vulkan device .* mesa-vulkan-drivers"):
            tvm.runtime.empty((1,), "uint8", vulkan)
        """,
        shim,
        SHIM_NO_DEVICES=1,
    )


def test_a_device_of_vulkan_1_0(case, shim):
    case(
        """
        (device,) = devices()[:1]
        assert device.api_version == (1, 0, 0)
        with pytest.raises(DeviceError, match="knows Vulkan 1.0.0; needed: 1.1 or later"):
            check_device(device)
        assert not vulkan.exist
        with pytest.raises(DeviceError, match="knows Vulkan 1.0.0; needed: 1.1 or later"):
            tvm.runtime.empty((1,), "uint8", vulkan)
        """,
        shim,
        SHIM_API_1_0=1,
    )


def test_a_device_without_16_bit_storage(case, shim):
    case(
        """
        with pytest.raises(DeviceError, match="has no 16-bit storage"):
            check_device(devices()[0], features=["storage_buffer_16bit"])
        with pytest.raises(DeviceError, match="kernel halves: needs storageBuffer16BitAccess, "):
            module_from_bytes(data)["halves"](workout.upload(np.zeros(64, np.float16)), 1, 64)
        """,
        shim,
        SHIM_NO_16BIT=1,
    )


def test_small_limits(case, shim):
    case(
        """
        module = module_from_bytes(data)
        with pytest.raises(OutOfMemoryError, match="1048577 bytes; .* accepts at most 1048576 "):
            tvm.runtime.empty((1048577,), "uint8", vulkan)
        tensor = workout.upload(np.zeros(1 << 20, np.uint8))
        with pytest.raises(DeviceError, match="101 workgroups along blockIdx.x; .* most 100 "):
            module["grid"](tensor, 4, 1, 101, 3, 1, 2, 0)
        with pytest.raises(DeviceError, match="64 threads in a workgroup; .* accepts at most 63 "):
            module["chain"](tensor, 64, 7, 1, 64)
        with pytest.raises(DeviceError, match="64 bytes of push constants; .* at most 32 "):
            module["constants"](tensor, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, False, 1, 16)
        workout.check_copies(np.random.default_rng(0), [100, 1 << 20])
        """,
        shim,
        SHIM_SMALL=1,
    )


def test_out_of_memory(case, shim):
    case(
        """
        module = module_from_bytes(data)
        kept = [tvm.runtime.empty((1 << 20,), "uint8", vulkan) for _ in range(8)]
        message = "asked for 33554432 bytes with 8388608 bytes in use; .* has [0-9]+ bytes of mem"
        with pytest.raises(MemoryError, match=message) as caught:
            tvm.runtime.empty((32 << 20,), "uint8", vulkan)
        assert type(caught.value) is OutOfMemoryError
        workout.check_add(module, np.random.default_rng(0), 1001)  # all is well else
        """,
        shim,
        SHIM_MEMORY=32 << 20,
    )


@pytest.mark.parametrize("how", ["SHIM_LOST", "SHIM_LOST_WAIT"])
@pytest.mark.parametrize("when", [1, 5])
def test_a_lost_device(case, shim, how, when):
    output = case(
        """
        module = module_from_bytes(data)
        tensor = workout.upload(np.zeros(4096, np.uint32))
        other = tvm.runtime.empty((100,), "uint32", vulkan)
        with pytest.raises(DeviceError, match="the device was lost .vk[A-Za-z]+: VK_ERROR_DEVICE_"):
            for step in range(5000):
                module["chain"](tensor, 4096, step, 64, 64)
                if step % 10 == 0:
                    vulkan.sync()
        for work in (
            vulkan.sync,
            tensor.numpy,
            statistics,
            lambda: tensor.copyfrom(np.zeros(4096, np.uint32)),
            lambda: module["chain"](tensor, 4096, 0, 64, 64),
            lambda: tvm.runtime.empty((100,), "uint32", vulkan),
        ):
            with pytest.raises(DeviceError, match="the device was lost .*: restart the process"):
                work()
        del other
        save_pipelines()
        print("caught")
        """,
        shim,
        **{how: when},
    )
    assert output == "caught\n"


@pytest.mark.parametrize("environment", [{"SHIM_NO_PUSH": 1}, {"SHIM_DISCRETE": 1}])
def test_other_devices(case, shim, environment):
    """One without push descriptors; one whose memory the host does not see."""
    assert case("workout.check_all(data)", shim, **environment) == "right\n"


@pytest.mark.parametrize("end", ["", "raise SystemExit"])
def test_the_process_ends_with_work_in_flight(case, end):
    case(
        f"""
        module = module_from_bytes(data)
        tensor = workout.upload(np.zeros(1 << 21, np.uint32))
        for step in range(60):
            module["chain"](tensor, 1 << 21, step, 1 << 15, 64)
        keep = tvm.runtime.empty((10,), "uint8", vulkan)
        {end}
        """
    )


def test_the_child_of_a_fork_is_told(case):
    output = case(
        """
        import os
        tensor = workout.upload(np.zeros(100, np.uint32))
        child = os.fork()
        if child == 0:
            with pytest.raises(DeviceError, match="is the child of a fork"):
                tensor.numpy()
            del tensor
            raise SystemExit
        assert os.waitpid(child, 0)[1] == 0
        assert not tensor.numpy().any()
        print("both")
        """
    )
    assert output == "both\n"


def test_the_loader_cannot_be_changed_later(case):
    case(
        """
        assert devices()
        with pytest.raises(DeviceError, match="its library cannot be changed to other.so"):
            runtime_function("set_library")("other.so")
        """
    )


# The drivers' pipeline caches

USE_PIPELINES = """
    runtime_function("set_cache_folder")({folder!r})
    workout.check_add(module_from_bytes(data), np.random.default_rng(0), 1001)
"""


@pytest.fixture(scope="module")
def pipeline_cache(cases, bytes_file, tmp_path_factory) -> Path:
    """A file that a process has written."""
    folder = tmp_path_factory.mktemp("pipelines") / "some" / "folder"
    code = PRELUDE.format(path=str(bytes_file)) + textwrap.dedent(USE_PIPELINES)
    assert cases.run(code.format(folder=str(folder))) == ""
    (path,) = folder.iterdir()
    return path


def test_the_pipeline_cache_is_written_and_read(case, pipeline_cache):
    assert pipeline_cache.suffix == ".pipelines"
    before = pipeline_cache.read_bytes()
    assert before[:8] == b"PHI3CVK1"
    assert case(USE_PIPELINES.format(folder=str(pipeline_cache.parent))) == ""
    assert list(pipeline_cache.parent.iterdir()) == [pipeline_cache]


def test_two_processes_write_the_pipeline_cache_at_once(case, tmp_path):
    code = USE_PIPELINES.format(folder=str(tmp_path))
    output = case(
        f"""
        import os
        child = os.fork()  # Vulkan is not in use yet
        {textwrap.indent(textwrap.dedent(code), " " * 8)}
        if child:
            assert os.waitpid(child, 0)[1] == 0
        """
    )
    assert output == ""
    assert case(code) == ""
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: random.Random(0).randbytes(10_000),
    ],
    ids=["empty", "header", "truncated", "longer", "changed", "garbage"],
)
def test_a_damaged_pipeline_cache_is_made_anew(case, pipeline_cache, tmp_path, damage):
    path = tmp_path / pipeline_cache.name
    whole = pipeline_cache.read_bytes()
    path.write_bytes(damage(whole))
    warning = f"phi3c: vulkan: {path}: the pipeline cache is damaged; it is made anew\n"
    assert case(USE_PIPELINES.format(folder=str(tmp_path))) == warning
    assert list(tmp_path.iterdir()) == [path]
    new = path.read_bytes()
    assert new[:8] == whole[:8] and struct.unpack_from("<Q", new, 8) == (len(new) - 24,)


def test_a_pipeline_cache_that_cannot_be_written_is_no_error(case, tmp_path):
    (tmp_path / "file").touch()
    assert case(USE_PIPELINES.format(folder=str(tmp_path / "file" / "folder"))) == ""


# Tools that look on


@validated
@pytest.mark.parametrize("environment", [{}, {"SHIM_NO_PUSH": 1, "SHIM_DISCRETE": 1}])
def test_the_validation_layer_has_nothing_to_say(case, shim, environment):
    output = case("workout.check_all(data)", shim, VK_INSTANCE_LAYERS=VALIDATION, **environment)
    assert output == "right\n"


@validated
def test_the_validation_layer_is_there(case, shim):
    """The control: a submission with one wrong field."""
    code = "workout.check_add(module_from_bytes(data), np.random.default_rng(0), 10)"
    output = case(code, shim, VK_INSTANCE_LAYERS=VALIDATION, SHIM_WRONG=1)
    assert "VUID-VkSubmitInfo-sType-sType" in output


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc"), reason="preloads gcc's sanitizers"
)
def test_under_sanitizers(library_cache, bytes_file):
    def gcc_library(name: str) -> str:
        command = ["gcc", f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # The C++ library as well: the sanitizer looks for its exceptions before Python loads it.
    preloaded = [gcc_library("libasan.so"), gcc_library("libstdc++.so")]
    if not Path(preloaded[0]).is_absolute():
        pytest.skip("no libasan")
    done = subprocess.run(
        [
            *(sys.executable, TESTS / "vulkan_workout.py", bytes_file, library_cache),
            *SANITIZERS,
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | {
            "LD_PRELOAD": ":".join(preloaded),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        },
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stdout + done.stderr
