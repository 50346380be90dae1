"""aarch64: the integer kernels of every NEON instruction set, under emulation, and whole artifacts.

All other kernels are the same for the three of them; conftest.py's `isa` runs those on one.
"""

from __future__ import annotations

import shutil
import subprocess

import aarch64
import numpy as np
import pytest
import tvm
from conftest import make_checkpoint
from test_adapter_kernels import test_int8_shrink  # noqa: F401
from test_quantization import (
    test_int8_linear_at_the_ends_of_the_range,  # noqa: F401
    test_quantize_rows,  # noqa: F401
)

import phi3c
from phi3c.errors import ArtifactError
from phi3c.kernels.cpu.int8_linear import int8_linear
from phi3c.kernels.cpu.isa import NEON, NEON_DOTPROD, NEON_I8MM, Isa
from phi3c.kernels.cpu.quantize import quantize_rows
from phi3c.triple import runs_here

OBJDUMP = f"{aarch64.TRIPLE}-objdump"


@pytest.fixture(params=[NEON, NEON_DOTPROD], ids=lambda isa: isa.name)
def isa(request) -> Isa:
    """Those that conftest.py's `isa` does not run."""
    aarch64.skip_unless_emulated()
    return request.param


@pytest.mark.skipif(shutil.which(OBJDUMP) is None, reason=f"no {OBJDUMP} is installed")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("target", "instructions"),
    [(NEON_DOTPROD, {"sdot": 64}), (NEON_I8MM, {"usdot": 64, "usmmla": 32})],
)
def test_the_instructions_are_used(target, instructions, bits):
    aarch64.skip_unless_emulated()
    linear = int8_linear(
        target.dot.for_bits(bits), target.int8_rows, 64, 64, bits, "float16", False
    )
    found = disassembled(aarch64.EmulatedKernel(linear, target))
    for name, least in instructions.items():  # of a tile, and of one row
        assert found.count(name) >= least
    assert found.count("prfm") >= 4
    # A load that fills all lanes with one activation: an offset or a scale of a row, no more.
    assert found.count("ld1r") <= 4 * target.int8_rows


def disassembled(kernel: aarch64.EmulatedKernel) -> list[str]:
    command = [OBJDUMP, "-d", "--no-show-raw-insn", kernel.object]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[1] for line in lines if line.startswith(" ") and len(line.split()) > 1]


def test_an_error_of_an_emulated_kernel_is_reported(isa):
    kernel = aarch64.EmulatedKernel(quantize_rows(isa, 64, 8), isa)
    x, wrong = np.zeros((1, 64), np.float32), np.zeros((1, 3, 10), np.int32)
    with pytest.raises(RuntimeError, match=r"exit code 1: ValueError: Invalid As.shape\[1\]"):
        kernel(tvm.runtime.tensor(x), tvm.runtime.tensor(wrong))


def test_an_artifact_for_another_architecture(tmp_path):
    if shutil.which(aarch64.COMPILER) is None:
        pytest.skip(f"no {aarch64.COMPILER} is installed")
    make_checkpoint(tmp_path / "checkpoint")
    target = f"cpu:neoverse-n1:{aarch64.TRIPLE}"
    artifact = phi3c.compile(tmp_path / "checkpoint", target, "q4f16_1", tmp_path / "artifact")
    assert artifact.manifest.target.mtriple == aarch64.TRIPLE
    assert "asimddp" in artifact.manifest.target.cpu_flags
    assert artifact.library.read_bytes()[18:20] == b"\xb7\0"  # ELF: e_machine is AArch64
    if not runs_here(aarch64.TRIPLE):
        with pytest.raises(ArtifactError, match="compiled for aarch64-linux-gnu; this machine is"):
            phi3c.load(artifact.path)
