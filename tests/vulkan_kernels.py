"""Kernels of the tests of Vulkan: GLSL, compiled by glslangValidator, and the bytes of a module."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

HANDLE = (3, 64, 1)  # (code, bits, lanes) of a DLDataType
INT32 = (0, 32, 1)
INT64 = (0, 64, 1)
UINT8 = (1, 8, 1)
FLOAT16 = (2, 16, 1)
FLOAT32 = (2, 32, 1)
FLOAT64 = (2, 64, 1)
BFLOAT16 = (4, 16, 1)
BOOL = (6, 8, 1)

ONE_AXIS = ("blockIdx.x", "threadIdx.x")


@dataclass(frozen=True)
class Kernel:
    """`body` is GLSL after the layout of the threads, with `@` for `set = 0, binding =`."""

    name: str
    body: str
    arguments: tuple
    threads: tuple[int, int, int] = (64, 1, 1)
    tags: tuple[str, ...] = ONE_AXIS

    def spirv(self) -> bytes:
        return _compile(self.name, self.body, self.threads)


ADD = Kernel(
    "add",
    """
    layout(@0) readonly buffer A { float a[]; };
    layout(@1) readonly buffer B { float b[]; };
    layout(@2) writeonly buffer C { float c[]; };
    layout(push_constant) uniform P { layout(offset = 0) int n; layout(offset = 8) float scale; };
    void main() {
        uint i = gl_GlobalInvocationID.x;
        if (i < n) c[i] = a[i] + scale * b[i];
    }""",
    (HANDLE, HANDLE, HANDLE, INT32, FLOAT32),
)

# Every constant's 8 bytes as they are.
CONSTANTS = Kernel(
    "constants",
    """
    layout(@0) writeonly buffer A { uint a[]; };
    layout(push_constant) uniform P { uint words[16]; };
    void main() { a[gl_LocalInvocationID.x] = words[gl_LocalInvocationID.x]; }""",
    (HANDLE, INT32, INT64, UINT8, FLOAT16, FLOAT32, FLOAT64, BFLOAT16, BOOL),
    threads=(16, 1, 1),
)

# Each group's number, at its place in a grid.
GRID = Kernel(
    "grid",
    """
    layout(@0) writeonly buffer A { uint a[]; };
    void main() {
        uvec3 g = gl_WorkGroupID, n = gl_NumWorkGroups, t = gl_LocalInvocationID;
        uint group = (g.z * n.y + g.y) * n.x + g.x;
        uint thread = (t.z * 3 + t.y) * 2 + t.x;
        a[group * 24 + thread] = g.x + 100 * g.y + 10000 * g.z + 1000000 * thread;
    }""",
    (HANDLE,),
    threads=(2, 3, 4),
    tags=(
        "threadIdx.z",
        "blockIdx.y",
        "paramWriteAccess:[1]",
        "blockIdx.x",
        "threadIdx.y",
        "blockIdx.z",
        "threadIdx.x",
        "tirx.use_dyn_shared_memory",
    ),
)

# a[i] = 3 a[i] + step: in another order, or one left out, it gives another result.
CHAIN = Kernel(
    "chain",
    """
    layout(@0) buffer A { uint a[]; };
    layout(push_constant) uniform P { uint n; layout(offset = 8) uint step_; };
    void main() {
        uint i = gl_GlobalInvocationID.x;
        if (i < n) a[i] = 3 * a[i] + step_;
    }""",
    (HANDLE, INT32, INT32),
)

HALVES = Kernel(
    "halves",
    """
    layout(@0) buffer A { float16_t a[]; };
    void main() {
        uint i = gl_GlobalInvocationID.x;
        a[i] = float16_t(2 * float(a[i]));
    }""",
    (HANDLE,),
)


def many_buffers(count: int) -> Kernel:
    """Adds i to each value of the i-th buffer."""
    return Kernel(
        "many",
        "".join(f"layout(@{i}) buffer A{i} {{ uint a{i}[]; }};\n" for i in range(count))
        + "void main() { uint i = gl_LocalInvocationID.x;"
        + "".join(f"a{i}[i] += {i};" for i in range(count))
        + "}",
        (HANDLE,) * count,
    )


MANY = many_buffers(24)

ALL = (ADD, CONSTANTS, GRID, CHAIN, HALVES, MANY)


def module_bytes(*kernels: Kernel) -> bytes:
    """Of a module of kind "vulkan" (phi3c/vulkan/module_format.h)."""
    information = b"".join(
        _string(k.name)
        + _string(k.name)
        + _count(k.arguments)
        + b"".join(struct.pack("<BBH", *argument) for argument in k.arguments)
        + _count(k.tags)
        + b"".join(map(_string, k.tags))
        + _count(())
        for k in kernels
    )
    code = b"".join(_string(k.name) + _string(code_bytes(k.spirv())) for k in kernels)
    return _string("vulkan") + _count(kernels) + information + _count(kernels) + code


def code_bytes(spirv: bytes) -> bytes:
    return struct.pack("<IQ", 0, len(spirv) // 4) + spirv


def has_compiler() -> bool:
    return shutil.which("glslangValidator") is not None


@cache
def _compile(name: str, body: str, threads: tuple[int, int, int]) -> bytes:
    source = (
        "#version 450\n"
        "#extension GL_EXT_shader_16bit_storage : enable\n"
        f"layout(local_size_x = {threads[0]}, local_size_y = {threads[1]}, "
        f"local_size_z = {threads[2]}) in;\n"
    ) + body.replace("@", "set = 0, binding = ")
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.comp")
        path.write_text(source)
        command = ["glslangValidator", "--target-env", "vulkan1.1", "--source-entrypoint", "main"]
        command += ["-e", name, "-o", f"{folder}/kernel.spv", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return Path(folder, "kernel.spv").read_bytes()


def _count(items: tuple) -> bytes:
    return struct.pack("<Q", len(items))


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data
