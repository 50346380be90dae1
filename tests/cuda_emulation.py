"""A machine with an NVIDIA GPU, as far as TVM's CUDA runtime and we can tell: a stub of the driver
(cuda_stub.cc), and a model's kernels run on the host from their CUDA source (gpu_emulator.h)."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_emulator import COMPILER, HEADER, _instruction, kernels_of

from phi3c.cuda.nvrtc import _headers

STUB = Path(__file__).with_name("cuda_stub.cc")
_MORE = """
#define EMULATE_CUDA
#include "{header}"
"""
_LAUNCH = """
extern "C" void launch_{name}(void** p, unsigned* grid, unsigned* block) {{
  emulator::run_grid({{grid[0], grid[1], grid[2]}}, {{block[0], block[1], block[2]}}, {order},
                     [=] {{ {name}({arguments}); }});
}}
extern "C" const unsigned sizes_{name}[] = {{ {sizes}, 0 }};
"""


def stub_driver(folder: Path) -> Path:
    """The folder, with libcuda.so.1 and libcudart.so.13 in it."""
    versions = folder / "versions"
    versions.write_text("libcudart.so.13 { global: *; };")
    common = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    common += [f"-I{_headers()}", str(STUB)]
    for name, options in (
        ("libcuda.so.1", ["-DDRIVER", "-ldl"]),
        ("libcudart.so.13", [f"-Wl,--version-script={versions}"]),
    ):
        _run([*common, *options, f"-Wl,-soname,{name}", "-o", str(folder / name)])
    return folder


def environment(driver: Path, device: str, kernels: Path | None = None) -> dict[str, str]:
    """Of a process that shall see the device; see cuda_stub.cc."""
    more = {"LD_LIBRARY_PATH": str(driver), "CUDA_STUB_DEVICE": device}
    return os.environ | more | ({"CUDA_STUB_KERNELS": str(kernels)} if kernels else {})


def emulated(source: str, folder: Path, last_first: bool = False, parts: int = 4) -> Path:
    """A library with a function launch_<kernel> for each kernel of TVM's CUDA source, and the
    sizes_<kernel> of its arguments. last_first: threads run in that order between barriers."""
    kernels = [_as_cpp(kernel, last_first) for kernel in kernels_of(source, "cuda")]
    objects = []
    for i in range(parts):
        text = _MORE.format(header=HEADER) + "".join(kernels[i::parts])
        (folder / f"kernels{i}.cc").write_text(text)
        objects.append(folder / f"kernels{i}.o")
    flags = ["-O1", "-std=c++17", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-fPIC"]
    if os.uname().machine == "x86_64":
        flags.append("-mf16c")

    def compile_part(target: Path) -> None:
        _run([COMPILER, *flags, "-c", str(target.with_suffix(".cc")), "-o", str(target)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_part, objects))
    library = folder / "kernels.so"
    _run([COMPILER, "-shared", *map(str, objects), "-o", str(library)])
    return library


def _as_cpp(kernel: str, last_first: bool) -> str:
    head = re.match(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\((.*)\) \{', kernel)
    name, parameters = head[1], head[2].replace("__restrict__ ", "").split(", ")
    types = [parameter.rpartition(" ")[0] for parameter in parameters]
    body = kernel[head.end() :]
    body = re.sub(
        r"__shared__ alignas\(64\) (\w+) (\w+)\[(\d+)\];",
        r"\1* \2 = (\1*)emulator::array(\3 * sizeof(\1));",
        body,
    )
    body = re.sub(r"__asm__ __volatile__\(.*?\);(?=\n)", _instruction, body, flags=re.DOTALL)
    assert "__shared__" not in body and "asm" not in body
    arguments = ", ".join(f"*({kind}*)p[{i}]" for i, kind in enumerate(types))
    text = f"static void {name}({', '.join(parameters)}) {{{body}"
    sizes = ", ".join(f"sizeof({kind})" for kind in types)
    order = str(last_first).lower()
    return text + _LAUNCH.format(name=name, arguments=arguments, sizes=sizes, order=order)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
