"""Runs pieces of Python in children of a process that has TVM and the runtime library loaded.

A child has not touched Vulkan yet: it may use any loader, in any environment, and end in any way.
It is a fork, as TVM takes seconds to import. As a program: reads requests, one JSON a line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from phi3c.vulkan import build

TESTS = Path(__file__).parent
SECONDS = 120  # more than any case takes: then it hangs

# What a case begins with; `path`: of the bytes of a module.
PRELUDE = """
import numpy as np
import pytest
import tvm
import vulkan_workout as workout
from phi3c.errors import ArtifactError, DeviceError, OutOfMemoryError
from phi3c.vulkan import *
from phi3c.vulkan.library import runtime_function
data = open({path!r}, "rb").read()
vulkan = tvm.vulkan(0)
"""


def built_shim(folder: Path) -> Path:
    """A loader whose devices lack what the environment says (vulkan_shim.c)."""
    path, header = folder / "libvulkan_shim.so", build._header_folder()
    flags = ["-shared", "-fPIC", "-O1", f"-I{header}"]
    subprocess.run(["gcc", *flags, str(TESTS / "vulkan_shim.c"), "-o", str(path)], check=True)
    return path


class Cases:
    """`run(code)` returns what the code printed; it must end by itself, with exit code 0."""

    def __init__(self, library_cache: Path):
        path = f"{TESTS.parent}{os.pathsep}{TESTS}"
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(library_cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    def run(self, code: str, loader: Path | None = None, code_is: int = 0, **environment) -> str:
        """`loader`: Vulkan's loader; `environment`: more of it; `code_is`: the exit code."""
        request = {"code": code, "loader": str(loader or ""), "environment": environment}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        assert answer["exit"] == code_is, answer["output"]
        return answer["output"]

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


def main() -> None:
    import pytest  # noqa: F401 - what cases import, once for all
    import vulkan_workout  # noqa: F401

    from phi3c.vulkan import load_runtime

    load_runtime(cache=sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                signal.alarm(SECONDS)
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                break
            _, status = os.waitpid(child, 0)
            output.seek(0)
            text = output.read().decode(errors="replace")
        # A signal is a negative number, as in subprocess.
        answer = {"exit": os.waitstatus_to_exitcode(status), "output": text}
        print(json.dumps(answer), flush=True)
    else:
        return
    from phi3c.vulkan.library import runtime_function

    os.environ.update({key: str(value) for key, value in request["environment"].items()})
    runtime_function("set_library")(request["loader"])
    runtime_function("set_cache_folder")("")
    exec(compile(request["code"], "<case>", "exec"), {"__name__": "case"})  # noqa: S102


if __name__ == "__main__":
    main()
