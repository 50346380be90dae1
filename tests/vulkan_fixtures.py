"""What the tests of the Vulkan runtime share: a plugin of pytest.

Bad devices are played by vulkan_shim.c, in processes of their own (vulkan_cases.py).
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import numpy as np
import pytest
import vulkan_kernels as kernels
from vulkan_cases import PRELUDE, Cases, built_shim
from vulkan_kernels import ALL, module_bytes

from phi3c.errors import DeviceError
from phi3c.vulkan import devices, load_runtime, module_from_bytes


@pytest.fixture(scope="session")
def library_cache(pytestconfig) -> Path:
    """Of compiled libraries; pytest keeps it from run to run."""
    return Path(pytestconfig.cache.mkdir("vulkan"))


@pytest.fixture(scope="session")
def vulkan(library_cache, tmp_path_factory):
    if "XDG_RUNTIME_DIR" not in os.environ:  # else the loader complains
        os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("run"))
    if not kernels.has_compiler():
        pytest.skip("no glslangValidator (Debian: apt install glslang-tools)")
    load_runtime(cache=library_cache)
    try:
        found = devices()
    except DeviceError as error:
        pytest.skip(str(error))
    if not found:
        pytest.skip("no Vulkan device (Debian: apt install mesa-vulkan-drivers)")


@pytest.fixture(scope="module")
def module(vulkan):
    return module_from_bytes(module_bytes(*ALL))


@pytest.fixture(scope="module")
def cases(library_cache, vulkan):
    running = Cases(library_cache)
    yield running
    running.close()


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Path:
    return built_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def bytes_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "kernels.bin"
    path.write_bytes(module_bytes(*ALL))
    return path


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def case(cases, bytes_file):
    def run(code: str, loader: Path | None = None, code_is: int = 0, **environment) -> str:
        whole = PRELUDE.format(path=str(bytes_file)) + textwrap.dedent(code)
        return cases.run(whole, loader, code_is, **environment)

    return run
