"""A kernel's own global buffers become planned memory, and nothing else changes."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.script import tirx as T

from phi3c.kernels.root import hand_scheduled
from phi3c.passes.lift_workspace import LiftWorkspace
from phi3c.passes.workspace import workspace_bytes
from phi3c.pipeline import apply, finalize_passes, plan_passes

MOST = 8


@T.prim_func(private=True, s_tir=True)
def reverse_twice_as_large(x: T.handle, out: T.handle):
    rows = T.int64()
    X = T.match_buffer(x, (rows, 4), "float32")
    OUT = T.match_buffer(out, (rows, 4), "float32")
    W = T.alloc_buffer((rows + 1, 4), "float32")
    V = T.alloc_buffer((T.min(rows, MOST), 4), "float32")
    for i, j in T.grid(rows, 4):
        W[i + 1, j] = X[i, j] * T.float32(2)
    for i, j in T.grid(rows, 4):
        V[i, j] = W[rows - i, j]
    for i, j in T.grid(rows, 4):
        OUT[i, j] = V[i, j]


class Model(nn.Module):
    def forward(self, x: nn.Tensor):
        kernel = hand_scheduled(reverse_twice_as_large)
        for _ in range(2):
            out = nn.Tensor.placeholder(x.shape, "float32")
            x = nn.op.tensor_ir_op(kernel, "reverse", [x], out)
        return x


def exported(rows: int | str = "n") -> tvm.IRModule:
    spec = {"forward": {"x": nn.spec.Tensor([rows, 4], "float32")}}
    return Model().export_tvm(nn.spec.ModuleSpec.from_raw(spec, Model()))[0]


def built(device: str, rows: int | str = "n") -> tuple[relax.VMExecutable, int]:
    """As for that device, but for this machine's CPU; and the planned bytes."""
    with tvm.target.Target("llvm") as target:
        mod = apply(plan_passes({"n": MOST}, device), exported(rows))
        planned = workspace_bytes(mod)["forward"]
        mod = apply(finalize_passes(), mod)
        return relax.build(mod, target=target, relax_pipeline=None), planned


@pytest.mark.parametrize("extent", ["n", 3])
@pytest.mark.parametrize("rows", [1, 3, MOST])
def test_results_stay_and_memory_is_planned(rows, extent):
    rows = rows if extent == "n" else extent
    (plain, own), (lifted, all_of_it) = built("cpu", extent), built("cuda", extent)
    x = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    for executable in plain, lifted:
        machine = relax.VirtualMachine(executable, tvm.cpu())
        found = machine["forward"](tvm.runtime.tensor(x)).numpy()
        np.testing.assert_array_equal(found, 4 * x)  # reversed twice
    most = MOST if extent == "n" else extent
    assert all_of_it - own >= 4 * 4 * (2 * most + 1)


def test_the_kernel_allocates_nothing_more():
    mod = LiftWorkspace()(exported())
    (kernel,) = [func for _, func in mod.functions_items() if isinstance(func, tvm.tirx.PrimFunc)]
    assert len(kernel.params) == 4 and "alloc_buffer" not in kernel.script()
    assert "alloc_buffer" in hand_scheduled(reverse_twice_as_large).script()
