"""Finds the program that links a target's library, and compiles its thread pool."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from tvm.support.cc import create_shared, cross_compiler, get_cc

from .errors import TargetError
from .targets import Target
from .triple import architecture, runs_here

Link = Callable[..., None]  # of (output path, object paths, options), as TVM calls it

# Compiled as C by whatever compiler links; objects follow.
_THREAD_POOL = Path(__file__).with_name("thread_pool.c")
_OPTIONS = ["-O2", "-x", "c", str(_THREAD_POOL), "-x", "none"]
# What TVM's runtime and the system define is found when the library is loaded. Its own name, else
# the path that it is written to, is not looked at.
_DYLIB = ["-Wl,-undefined,dynamic_lookup", "-Wl,-install_name,@rpath/model.so"]
_OLDEST_MACOS = "12.0"


def find_linker(place: Target) -> Link:
    """What `export_library` takes as fcompile. Raises TargetError, naming what was looked for."""
    if runs_here(place.mtriple):
        if get_cc() is None:
            raise TargetError(
                f"target: {place.name}: linking the library needs a C++ compiler; found none of "
                "g++, gcc, clang++, clang on the path, and no CXX (Debian: apt install g++)"
            )
        return cross_compiler(create_shared, list(_OPTIONS))
    if "linux" not in place.mtriple:
        return _apple_linker(place)
    # Compilers leave the vendor out of their names or not, and know one name of an architecture.
    short = f"{architecture(place.mtriple)}-linux-gnu"
    names = [f"{t}-{cc}" for t in dict.fromkeys((place.mtriple, short)) for cc in ("g++", "gcc")]
    for name in names:
        if path := shutil.which(name):
            return cross_compiler(path, list(_OPTIONS))
    if link := _clang(place.mtriple):
        return link
    package = short.replace("_", "-")
    raise TargetError(
        f"target: {place.name}: linking the library needs a compiler for {place.mtriple}; found "
        f"none of {', '.join(names)}, clang with ld.lld on the path (Debian: apt install "
        f"g++-{package})"
    )


def links_later(place: Target) -> bool:
    """Whether a library is left as objects: for a Mac, where no linker for one is found here.

    Raises TargetError where there is none for another machine.
    """
    try:
        find_linker(place)
    except TargetError:
        if "apple" not in place.mtriple or runs_here(place.mtriple):
            raise
        return True
    return False


def pack_objects(output: str, objects: list[str], options: list[str] | None = None) -> None:
    """In place of a linker: the same objects give the same bytes."""
    with tarfile.open(output, "w") as archive:
        for path in map(Path, objects):
            entry = tarfile.TarInfo(path.name)
            entry.size = path.stat().st_size
            with path.open("rb") as data:
                archive.addfile(entry, data)


pack_objects.output_format = "tar"  # as TVM asks of it


def _apple_linker(place: Target) -> Link:
    if sys.platform == "darwin" and (cc := get_cc()):
        return cross_compiler(cc, [f"--target={place.mtriple}", *_OPTIONS])
    if link := _clang(place.mtriple) or _zig(place.mtriple):
        return link
    raise TargetError(
        f"target: {place.name}: linking the library needs a compiler for {place.mtriple}; found no "
        "clang with ld64.lld on the path (Debian: apt install clang lld) and no package ziglang "
        "(pip install ziglang, 100 MB)"
    )


def _clang(triple: str) -> Link | None:
    """clang and LLVM's linker; the libraries of that system are not there and not needed."""
    apple = "apple" in triple
    clang = shutil.which("clang")
    if clang is None or shutil.which("ld64.lld" if apple else "ld.lld") is None:
        return None
    options = [f"--target={triple}", "-fuse-ld=lld", "-nostdlib"]
    if apple:
        options += _DYLIB
    return cross_compiler(clang, options + _OPTIONS)


def _zig(triple: str) -> Link | None:
    """The compiler of the package ziglang, which brings macOS's headers and symbols."""
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        return None
    zig = Path(found.origin).with_name("zig")
    target = f"--target={architecture(triple)}-macos.{_OLDEST_MACOS}"
    command = [str(zig), "cc", target, "-shared", "-g0"]

    def link(output: str, objects: list[str], options: list[str] | None = None) -> None:
        all_options = [*_DYLIB, *_OPTIONS, *(options or [])]
        done = subprocess.run(
            [*command, "-o", output, *all_options, *objects], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{zig} cc: {done.stderr.strip()}")

    link.output_format = "so"  # as TVM asks of it
    return link
