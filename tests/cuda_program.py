"""Run as a program where there is a stub of NVIDIA's driver: `devices ARTIFACT`, `compile FILE`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn

import phi3c
from phi3c.device_code import device_code
from phi3c.errors import DeviceError, OutOfMemoryError, TargetError
from phi3c.kernels.gpu import GpuKernels
from phi3c.linker import find_linker
from phi3c.pipeline import apply, finalize_passes, kernel_lowering, plan_passes
from phi3c.readiness import readiness
from phi3c.targets import parse_target


class _Norm(nn.Module):
    def forward(self, x: nn.Tensor, weight: nn.Tensor):
        kernel = GpuKernels("float32").rms_norm(64, 1e-5)
        out = nn.Tensor.placeholder(x.shape, "float32")
        return nn.op.tensor_ir_op(kernel, "rms_norm", [x, weight], out)


def one_kernel(path: Path, arch: str) -> None:
    """A library of one kernel."""
    spec = {"forward": {"x": nn.spec.Tensor(["n", 64], "float32")}}
    spec["forward"]["weight"] = nn.spec.Tensor([64], "float32")
    place = parse_target(f"cuda:{arch}")
    mod, _ = _Norm().export_tvm(nn.spec.ModuleSpec.from_raw(spec, _Norm()))
    with place.tvm_target:
        mod = apply([*plan_passes({"n": 8}), *finalize_passes()], mod)
    with device_code(place) as built, kernel_lowering("cuda"):
        executable = relax.build(mod, target=place.tvm_target, relax_pipeline=None)
        executable.export_library(str(path), fcompile=find_linker(place), **built.options())


def check_devices(artifact: Path) -> None:
    """The stub's GPU becomes another one again and again."""
    arch = phi3c.Artifact.open(artifact).manifest.target.needs.arch

    def refused(gpu: str, error: type[Exception], match: str, **options) -> None:
        os.environ["CUDA_STUB_DEVICE"] = gpu
        with pytest.raises(error, match=match):
            phi3c.load(artifact, **options)

    assert tvm.cuda().exist
    refused("7.5 80", DeviceError, rf"found cuda:0 \(a stub, sm_75\); accepted: {arch}, which")
    refused("9.0 0", OutOfMemoryError, r"found 0.00 MB available on cuda:0 \(a stub, sm_90\)")
    refused(
        "9.0 80",
        DeviceError,
        r"found cuda:1; accepted: one that is there: cuda:0 \(a stub",
        device="cuda:1",
    )
    refused("9.0 80,12040", DeviceError, r"driver is for CUDA 12.4; needed: one for 13.0 or later")
    refused("", DeviceError, "found cuda:0; accepted: one that is there: none, as the driver finds")
    with pytest.raises(TargetError, match="'cuda:native', but the driver finds no GPU"):
        parse_target("cuda:native")
    for capability, native in ("8.9", "sm_89"), ("8.8", "sm_87"), ("13.0", "sm_121"):
        os.environ["CUDA_STUB_DEVICE"] = f"{capability} 80"
        assert parse_target("cuda:native").arch == native
    (ready,) = [each for each in readiness() if each.target == "cuda"]
    assert ready.devices == ("cuda:0 (a stub, sm_130)",) and not ready.missing


if __name__ == "__main__":
    command, path = sys.argv[1], Path(sys.argv[2])
    if command == "devices":
        check_devices(path)
    else:
        one_kernel(path, "sm_90")
