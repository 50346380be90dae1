"""What the Vulkan target is worth on the device that is here.

    python benchmarks/on_vulkan.py configs/phi-3-mini-4k.json --layers 2

Four tables: the kernels that are emitted (and, where spirv-val is installed, validated), with their
bytes and seconds; the largest difference of each function's output from the same model's on the
CPU; dispatches a second of a kernel that does next to nothing; and a decode step by kernel.
Weights are random.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import tvm
from tvm.script import tirx as T

import phi3c
from phi3c.adapters.layout import AdapterLayout
from phi3c.compiler import compile_library
from phi3c.config import Phi3Config
from phi3c.kernels.root import hand_scheduled
from phi3c.manifest import Limits
from phi3c.pipeline import kernel_lowering
from phi3c.quantization.scheme import parse_scheme
from phi3c.runtime.compiled import CompiledPhi3
from phi3c.spirv.codegen import collected, register
from phi3c.targets import parse_target
from phi3c.vulkan import devices, load_runtime

VALIDATOR = shutil.which("spirv-val")
TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="that run (2)")
    parser.add_argument("--quantization", default="q4f16_1", metavar="SCHEME")
    parser.add_argument("--index", type=int, default=0, metavar="I", help="of the device (0)")
    args = parser.parse_args()
    print(devices()[args.index])
    facts = {"kernels": kernels(args.config)}
    facts["dispatches_per_second"] = dispatches(args.index)
    with tempfile.TemporaryDirectory() as folder:
        there, here = models(args, Path(folder))
        facts["parity"] = parity(there, here)
        facts["decode"] = decode_step(there)
    print(json.dumps(facts))


def kernels(path: Path) -> list[dict]:
    """Of the whole model, with and without slots for adapters."""
    config = Phi3Config.from_file(path)
    place, rows = parse_target("vulkan"), []
    print(f"\n{'scheme':10}{'adapters':>9}{'kernels':>9}{'bytes':>10}{'valid':>7}{'seconds':>9}")
    for name in ("q0f32", "q0f16", "q4f16_1"):
        for max_loras in (0, 8):
            scheme = parse_scheme(name)
            layout = AdapterLayout.of(config, max_loras, 16, scheme.kv_dtype)
            limits = Limits(8, min(4096, config.max_position_embeddings), 512)
            with tempfile.TemporaryDirectory() as folder, collected() as made:
                start = time.perf_counter()
                compile_library(config, scheme, place, limits, Path(folder) / "model.so", layout)
                seconds = time.perf_counter() - start
            size = sum(len(kernel.spirv) for kernel in made)
            valid = sum(map(is_valid, made)) if VALIDATOR else None
            rows.append(dict(scheme=name, adapters=max_loras, kernels=len(made), bytes=size))
            rows[-1] |= dict(valid=valid, seconds=seconds)
            shown = "-" if valid is None else valid
            print(f"{name:10}{max_loras:9}{len(made):9}{size:10}{shown:>7}{seconds:9.1f}")
    return rows


def is_valid(kernel) -> bool:
    command = [VALIDATOR, "--target-env", "vulkan1.1", "-"]
    return subprocess.run(command, input=kernel.spirv, capture_output=True).returncode == 0


def dispatches(index: int, count: int = 5000) -> float:
    """A second, of one workgroup each; the median of five."""

    @T.prim_func(private=True, s_tir=True)
    def add_one(a: T.handle):
        A = T.match_buffer(a, (64,), "float32")
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(64, thread="threadIdx.x"):
                A[t] = A[t] + T.float32(1)

    load_runtime()
    register()
    function = hand_scheduled(add_one).with_attr("global_symbol", "main")
    with kernel_lowering("vulkan"):
        module = tvm.IRModule({"main": function})
        kernel = tvm.compile(module, target=parse_target("vulkan").tvm_target)["main"]
    device = tvm.vulkan(index)
    tensor = tvm.runtime.tensor(np.zeros(64, np.float32), device)
    rates = []
    for _ in range(6):
        device.sync()
        start = time.perf_counter()
        for _ in range(count):
            kernel(tensor)
        device.sync()
        rates.append(count / (time.perf_counter() - start))
    rate = statistics.median(rates[1:])
    print(f"\n{rate:,.0f} dispatches a second ({min(rates[1:]):,.0f}–{max(rates[1:]):,.0f})")
    return rate


def models(args: argparse.Namespace, folder: Path) -> tuple[CompiledPhi3, CompiledPhi3]:
    """The same weights on the device and on the CPU, with float activations on both."""
    config = json.loads(args.config.read_text()) | {"num_hidden_layers": args.layers}
    (folder / "config.json").write_text(json.dumps(config))
    limits = dict(max_batch_size=4, context_length=256, prefill_chunk_size=64)
    scheme = args.quantization
    on_cpu = scheme if scheme.startswith("q0") else f"{scheme}:float"
    phi3c.compile(folder / "config.json", "vulkan", scheme, folder / "there", **limits)
    phi3c.compile(folder / "config.json", "cpu", on_cpu, folder / "here", **limits)
    return phi3c.load(folder / "there", f"vulkan:{args.index}"), phi3c.load(folder / "here")


def parity(there: CompiledPhi3, here: CompiledPhi3) -> dict[str, float]:
    """Function → largest difference / largest value."""
    found, expected = outputs(there), outputs(here)
    errors = {}
    for name, value in expected.items():
        error = np.abs(found[name].astype(np.float64) - value).max() / np.abs(value).max()
        errors[name] = float(error)
    print(f"\nlargest difference from the CPU, of {TOKENS} tokens")
    for name, error in errors.items():
        print(f"{name:40}{error:10.1e}")
    return errors


def outputs(model: CompiledPhi3) -> dict[str, np.ndarray]:
    """Of every function, each on a sequence that begins with the same tokens."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, TOKENS).tolist()
    found = {"embed": model.embed(ids).numpy()}
    for name in model.manifest.functions:
        if name in ("embed", "copy_slots", "get_logits", "block_maxima"):
            continue
        cache = model.create_paged_kv_cache(max_total_seq_len=256)
        cache.add_sequence(0)
        run = getattr(model, name)
        if "decode" in name:
            with cache.forward([0], [TOKENS - 1]):
                model.prefill(model.embed(ids[:-1]), cache)
            with cache.forward([0], [1]):
                found[name] = run(model.embed(ids[-1:]), cache)[0].numpy()
            continue
        extra = [[TOKENS - 1]] if name == "batch_prefill" else []
        with cache.forward([0], [TOKENS]):
            found[name] = run(model.embed(ids), *extra, cache)[0].numpy()
    found["get_logits"] = model.get_logits(found["prefill_to_last_hidden_states"]).numpy()
    return found


def decode_step(model: CompiledPhi3, steps: int = 5) -> dict:
    """Milliseconds: of a step, and of its kernels on the device."""
    cache = model.create_paged_kv_cache(max_total_seq_len=256)
    cache.add_sequence(0)
    with cache.forward([0], [60]):
        model.prefill(model.embed(np.arange(60)), cache)

    def step() -> float:
        start = time.perf_counter()
        with cache.forward([0], [1]):
            model.decode(model.embed([7]), cache)[0].numpy()
        return time.perf_counter() - start

    step()
    times = [step() for _ in range(steps)]
    with model.kernel_times() as kernels:
        for _ in range(steps):
            step()
    median = statistics.median(times) * 1e3
    print(f"\na decode step at context 64: {median:.2f} ms; its kernels, ms on the device")
    rows = sorted(kernels.items(), key=lambda item: -item[1].seconds)
    spent = {name: time.seconds / steps * 1e3 for name, time in rows}
    for name, time_ in rows:
        print(f"{name:40}{time_.count // steps:5} ×{spent[name]:9.3f}")
    print(f"{'together':40}{sum(t.count for _, t in rows) // steps:5} ×{sum(spent.values()):9.3f}")
    return {"milliseconds": median, "kernels": spent}


if __name__ == "__main__":
    main()
