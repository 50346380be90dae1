"""Compiles the runtime library, once for each version of what it is made of."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import tvm
import tvm_ffi
from tvm.support.cc import get_cc

from ..errors import DeviceError

_FOLDER = Path(__file__).parent
_HEADER = "vulkan.cdef.h"
# Sources that include TVM's headers, which take the compiler seconds to read; the others read only
# Vulkan's. Each lot is compiled as one file.
_WITH_TVM = ("device_api", "kernel", "module", "register")
# Only the registrations are found from outside, and those by their effect.
_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread"]


def runtime_library(cache: Path, flags: Sequence[str] = ()) -> Path:
    """The library's path in the folder `cache`, compiled now unless it is there.

    `flags` are added to the compiler's, a sanitizer's for example. Processes that compile at the
    same time do not disturb each other. One that is there is taken without compiler and header.
    Raises DeviceError where these are missing, or where it does not compile; OSError if the folder
    cannot be written.
    """
    library = cache / f"runtime-{_key(flags)}.so"
    if library.exists():
        return library
    compiler, header = _compiler(), _header_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
        built = _build(compiler, header, flags, Path(folder))
        os.replace(built, library)
    return library


def _build(compiler: list[str], header: Path, flags: Sequence[str], folder: Path) -> Path:
    includes = [f"-I{header}"]
    for path in (tvm.libinfo.find_include_path(), *tvm_ffi.libinfo.include_paths()):
        includes += ["-isystem", str(path)]
    sources = sorted(_FOLDER.glob("*.cc"))
    lots = [
        [source for source in sources if (source.stem in _WITH_TVM) == with_tvm]
        for with_tvm in (True, False)
    ]
    objects = [folder / f"{number}.o" for number in range(len(lots))]

    def compile_lot(sources: list[Path], target: Path) -> None:
        whole = target.with_suffix(".cc")
        whole.write_text("".join(f'#include "{source}"\n' for source in sources))
        _run([*compiler, *_FLAGS, *flags, *includes, "-c", str(whole), "-o", str(target)])

    with ThreadPoolExecutor(len(lots)) as pool:
        list(pool.map(compile_lot, lots, objects))
    library = folder / "runtime.so"
    _run([*compiler, *_FLAGS, *flags, "-shared", *map(str, objects), "-o", str(library), *_links()])
    return library


def _links() -> list[str]:
    """TVM's libraries are in the process already: these name them, so that they are found."""
    options = ["-lstdc++" if os.uname().sysname != "Darwin" else "-lc++", "-ldl"]
    for path in map(Path, (tvm.libinfo.find_libtvm_runtime(), tvm_ffi.libinfo.find_libtvm_ffi())):
        options += [str(path), f"-Wl,-rpath,{path.parent}"]
    return options


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise DeviceError(f"vulkan: the C++ compiler {command[0]} does not run: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        raise DeviceError(
            f"vulkan: the runtime library does not compile with {command[0]}: {first}"
        )


def _compiler() -> list[str]:
    found = get_cc()
    if found is None:
        raise DeviceError(
            "vulkan: compiling the runtime library needs a C++ compiler; found none of g++, gcc, "
            "clang++, clang on the path, and no CXX (Debian: apt install g++)"
        )
    return shlex.split(found)


def _header_folder() -> Path:
    """Of the package `vulkan`, which is not imported: that would load the Vulkan loader."""
    spec = find_spec("vulkan")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / _HEADER).is_file():
            return Path(folder)
    raise DeviceError(
        "vulkan: compiling the runtime library needs Vulkan's header, which the package vulkan "
        "carries; found no such package (pip install 'phi3c[vulkan]')"
    )


def _key(flags: Sequence[str]) -> str:
    """What the library is made of and for, as a short hash.

    Not of the compiler and Vulkan's header: whichever they are, what they make runs.
    """
    parts = [tvm.__version__, tvm_ffi.__version__, tvm.__file__, platform.machine()]
    digest = hashlib.sha256("\n".join([*parts, *_FLAGS, *flags]).encode())
    for path in [*sorted(_FOLDER.glob("*.h")), *sorted(_FOLDER.glob("*.cc"))]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
