"""Where a loaded model's kernels run: the CPU, or one of the GPUs that are there."""

from __future__ import annotations

import re

import numpy as np
import tvm

from ..artifact import Artifact
from ..errors import DeviceError, TargetError
from ..manifest import Manifest
from ..memory import in_units
from ..tensor_file import tensor_bytes


def open_device(artifact: Artifact, name: str | None) -> tvm.runtime.Device:
    """name: `cpu`, `vulkan` or `vulkan:<index>`; None: the artifact's own kind, the first of it.

    Raises TargetError for another kind, and DeviceError where there is no such device, or it lacks
    what the kernels or the weights need.
    """
    kind = artifact.manifest.target.device
    accepted = "cpu, or None" if kind == "cpu" else f"{kind}, {kind}:<index>, or None"
    match = re.fullmatch(r"(\w+?)(?::(\d+))?", name or kind)
    if match is None or match[1] != kind or (kind == "cpu" and match[2]):
        raise TargetError(
            f"device: found {name!r}; accepted: {accepted}, as {artifact.path} was compiled for "
            f"{artifact.manifest.target.name}"
        )
    if kind == "cpu":
        return tvm.cpu()
    return _open_vulkan(artifact, int(match[2] or 0))


def _open_vulkan(artifact: Artifact, index: int) -> tvm.runtime.Device:
    from ..vulkan import check_device, devices

    found = devices()
    if index >= len(found):
        there = ", ".join(map(str, found)) or "none"
        raise DeviceError(
            f"device: found vulkan:{index}; accepted: one that is there, which are: {there} "
            "(Debian: apt install mesa-vulkan-drivers)"
        )
    needs, manifest = artifact.manifest.target.needs, artifact.manifest
    check_device(
        found[index],
        shared_memory=needs.shared_bytes,
        workgroup_invocations=needs.threads,
        push_constants=needs.argument_bytes,
    )
    _check_parameters(manifest, found[index])
    return tvm.vulkan(index)


def _check_parameters(manifest: Manifest, device) -> None:
    """A kernel sees a parameter as one buffer."""
    sizes = {info.name: tensor_bytes(info.shape, info.dtype) for info in manifest.parameters}
    name, size = max(sizes.items(), key=lambda item: item[1])
    most = device.max_storage_buffer_range
    if size > most:
        raise DeviceError(
            f"{device}: {name} has {in_units(size)}; it accepts buffers of {in_units(most)}: "
            "use a quantization with fewer bits"
        )


def parameter_on(device: tvm.runtime.Device, array: np.ndarray) -> tvm.runtime.Tensor:
    """A mapped parameter: itself on the CPU, a copy elsewhere."""
    if device.type == "cpu":
        return tvm.runtime.from_dlpack(array)
    return tvm.runtime.tensor(array, device)
