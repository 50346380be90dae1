"""Per target: the passes from the exported model to a VM executable, as plain lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm import relax

from .passes.bounds import AttachUpperBounds
from .passes.lift_workspace import LiftWorkspace

Pass = Callable[[tvm.IRModule], tvm.IRModule]


def plan_passes(bounds: dict[str, int], device: str = "cpu") -> list[Pass]:
    """Everything up to and including memory planning.

    The model calls only scheduled kernels; what is left to legalize are reshapes, which become
    views. For GPUs all memory is planned, kernels' own too: CUDA's graphs keep addresses, and
    what a linear of many rows needs is as large as other intermediate results.
    """
    t = relax.transform
    return [
        AttachUpperBounds(tuple(bounds.items())),
        *([] if device == "cpu" else [LiftWorkspace()]),
        t.LegalizeOps(),
        t.RewriteDataflowReshape(),
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
    ]


def finalize_passes() -> list[Pass]:
    """From planned memory to what the VM's code generator takes.

    No KillAfterLastUse: storage is planned, so it frees nothing, and costs a call per tensor.
    """
    t = relax.transform
    return [
        t.LowerAllocTensor(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        t.AttachGlobalSymbol(),
    ]


def kernel_lowering(device: str) -> tvm.transform.PassContext:
    """How TVM lowers the kernels of a device.

    On a GPU memory is not reused between a kernel's buffers: what TVM gives a sum over threads is
    shared memory in the end, which a later local buffer of one thread would be put into.
    """
    config = {} if device == "cpu" else {"tirx.disable_storage_rewrite": True}
    return tvm.transform.PassContext(opt_level=3, config=config)


def apply(passes: Sequence[Pass], mod: tvm.IRModule) -> tvm.IRModule:
    """Runs the passes in order."""
    for one in passes:
        mod = one(mod)
    return mod
