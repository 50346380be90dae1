"""Tiny random models, as transformers makes them, and their compiled artifacts."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import aarch64
import numpy as np
import pytest
import torch
import tvm
from cuda_device import found_gpu
from transformers import Phi3Config as HFConfig
from transformers import Phi3ForCausalLM as HFModel
from tvm.script.parser.core.parser import ScriptMacro

import phi3c
from phi3c.config import Phi3Config
from phi3c.kernels.cpu.isa import AVX2, AVX512, AVX512_VNNI, AVX_VNNI, NEON_I8MM, PORTABLE, Isa
from phi3c.model.inlining import nearest_parser
from phi3c.quantization.scheme import parse_scheme
from phi3c.runtime.host import _linux_cpu_flags
from phi3c.targets import parse_target
from phi3c.weights import Checkpoint

BASE = dict(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    original_max_position_embeddings=256,
    sliding_window=None,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

ScriptMacro._find_parser_def = nearest_parser  # as in quick_inlining, for kernels that tests make

_errors: dict[str, float] = {}  # model → largest error / logit scale of the whole run
_kernel_errors: dict[str, float] = {}  # test of a kernel → largest error / largest value


def keep(errors: dict[str, float], name: str, error: float) -> None:
    errors[name] = max(error, errors.get(name, 0.0))


def pytest_configure(config) -> None:
    if found_gpu():  # else TVM gives CUDA source, which tests only look at, to its own compiler
        os.environ["TVM_COMPILE_FORCE_FALLBACK"] = "1"
    if hasattr(config, "workerinput"):  # pytest -n: each core has a worker already
        torch.set_num_threads(1)


def pytest_sessionfinish(session) -> None:
    """A worker of `pytest -n` hands over what it has kept for the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["errors"] = [_errors, _kernel_errors]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """The summary of `pytest -n` is of all workers; one that crashed has handed over nothing."""
    handed = getattr(node, "workeroutput", {}).get("errors", ())
    for kept, errors in zip((_errors, _kernel_errors), handed, strict=False):
        for name, error in errors.items():
            keep(kept, name, error)


def pytest_terminal_summary(terminalreporter) -> None:
    for title, errors in (
        ("parity with transformers: largest error / logit scale", _errors),
        ("kernels against their twins: largest error / largest value", _kernel_errors),
    ):
        if errors:
            terminalreporter.section(title)
            for name, error in sorted(errors.items()):
                terminalreporter.write_line(f"{name:44} {error:.1e}")


def kernel_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest error as a share of the largest value; kept for the summary of the run."""
    assert np.isfinite(found).all()
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition("[")[0].split()[0]
    keep(_kernel_errors, test.removeprefix("test_"), error)
    return error


def longrope(rotary_dim: int) -> dict:
    """Two clearly different factor sets."""
    half = rotary_dim // 2
    return {
        "type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(half)],
        "long_factor": [1.5 + 1.3 * i for i in range(half)],
    }


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint on disk, its transformers model (float32), and its artifact."""

    folder: Path
    oracle: HFModel
    compiled: phi3c.CompiledPhi3
    tolerance: float  # of the logit scale

    @property
    def config(self) -> Phi3Config:
        return self.compiled.config

    def weights(self, name: str) -> np.ndarray:
        return Checkpoint(self.folder, self.config).tensor(name)

    def logits(self, ids) -> np.ndarray:
        """The oracle's logits at every position, `[n, vocab]`, of one sequence on its own."""
        with torch.no_grad():
            return self.oracle(torch.tensor([list(map(int, ids))])).logits[0].numpy()

    def last_logits(self, ids) -> np.ndarray:
        return self.logits(ids)[-1]

    def check(self, found, expected) -> float:
        """Asserts closeness; returns the largest error over the logit scale."""
        found = np.asarray(found.numpy() if hasattr(found, "numpy") else found)
        found = found.reshape(expected.shape)
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        keep(_errors, self.folder.name, error)
        assert error <= self.tolerance, error
        return error


def make_checkpoint(folder: Path, seed: int = 0, **overrides) -> HFModel:
    """A random Phi-3 saved as float32 safetensors."""
    config = HFConfig(**copy.deepcopy(BASE | overrides), attn_implementation="eager")
    model = HFModel(config).eval()
    make_weights(model, seed)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def make_weights(model: HFModel, seed: int = 0) -> None:
    """Random weights under which attention is sharp enough to show an error of position."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)


def build(tmp: Path, name: str, quantization: str = "q0f32", compile_options=(), **overrides):
    """A TinyModel; `overrides` are fields of transformers' Phi3Config."""
    folder = tmp / name
    oracle = make_checkpoint(folder, **overrides)
    options = dict(max_batch_size=4, prefill_chunk_size=96) | dict(compile_options)
    artifact = phi3c.compile(
        folder, quantization=quantization, output=tmp / f"{name}-artifact", **options
    )
    tolerance = parse_scheme(quantization).tolerance
    return TinyModel(folder, oracle, phi3c.load(artifact.path), tolerance)


@cache
def host_isas() -> tuple[Isa, ...]:
    """This machine's instruction set, and the others that it can run."""
    # What the system lists, if it does: LLVM may take the CPU for an older one.
    flags = _linux_cpu_flags() or set(parse_target("cpu").cpu_flags)
    return tuple(isa for isa, mcpu in MCPU.items() if set(parse_target(mcpu).cpu_flags) <= flags)


# An LLVM CPU for each instruction set whose kernels differ.
MCPU = {
    AVX512_VNNI: "cpu:icelake-server",
    AVX512: "cpu:skylake-avx512",
    AVX_VNNI: "cpu:alderlake",
    AVX2: "cpu:x86-64-v3",
    PORTABLE: "cpu:x86-64-v2",
}


@pytest.fixture(params=[*MCPU, NEON_I8MM], ids=lambda isa: isa.name)
def isa(request) -> Isa:
    """Each instruction set that this machine can run, and one of NEON's (others: test_neon.py)."""
    if request.param in aarch64.CPUS:
        aarch64.skip_unless_emulated()
    elif request.param not in host_isas():
        pytest.skip(f"this CPU has no {request.param.name}")
    return request.param


def compile_kernel(func, isa: Isa):
    """A kernel as a callable of TVM tensors."""
    if isa in aarch64.CPUS:
        return aarch64.EmulatedKernel(func, isa)
    target = parse_target(MCPU[isa]).tvm_target
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=target)["main"]


@pytest.fixture(scope="session")
def build_model(tmp_path_factory):
    """build(name, **overrides), each model made once a session."""
    made: dict[str, tuple[dict, TinyModel]] = {}
    tmp = tmp_path_factory.mktemp("models")

    def get(name: str, **overrides) -> TinyModel:
        if name not in made:
            made[name] = overrides, build(tmp, name, **overrides)
        assert made[name][0] == overrides, f"two different models are named {name}"
        return made[name][1]

    return get
