"""Loading a LoRA adapter beside a running engine: how long it takes, and what it does to the steps.

    python benchmarks/adapter_load.py ARTIFACT --rank 16      # compiled with --max-loras

Random adapters of all four linears of every layer, as PEFT saves them (float16, fused names), whose
files are in the page cache. Another thread loads one while the engine decodes a batch; then a
request of that adapter arrives, whose first step writes it to its slot. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import phi3c
from phi3c.adapters.layout import TARGETS, layer_targets, target_shape

_BLOCKS = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp"}
_SETTLE = 20  # steps before anything is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="sequences that decode meanwhile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    model = phi3c.load(args.artifact, threads=args.threads)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), model, args.rank, rng)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        rounds = [measure(model, folder, args, rng) for _ in range(args.rounds)]
    print(f"rank {args.rank}, {size / 1e6:.0f} MB; a batch of {args.batch} decodes meanwhile")
    print("| round | load, s | a step before, ms | longest while loading | the first with it |")
    print("|---:|---:|---:|---:|---:|")
    for i, found in enumerate(rounds):
        print(
            f"| {i + 1} | {found['load']:.2f} | {found['before'] * 1e3:.1f} | "
            f"{found['longest'] * 1e3:.1f} | {found['first'] * 1e3:.1f} |"
        )
    print(json.dumps({"rank": args.rank, "bytes": size, "batch": args.batch, "rounds": rounds}))


def write_adapter(
    folder: Path, model: phi3c.CompiledPhi3, rank: int, rng: np.random.Generator
) -> None:
    tensors = {}
    for layer, target in layer_targets(model.config):
        out_features, in_features = target_shape(model.config, target)
        at = f"base_model.model.model.layers.{layer}.{_BLOCKS.get(target, 'mlp')}.{target}"
        for name, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            values = rng.standard_normal(shape, np.float32) * 0.01
            tensors[f"{at}.lora_{name}.weight"] = values.astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measure(
    model: phi3c.CompiledPhi3, folder: str, args: argparse.Namespace, rng: np.random.Generator
) -> dict[str, float]:
    """Seconds: of the load, of a step before it (median), of the longest step during it, and of
    the step that takes the first request of the adapter."""
    engine = phi3c.Engine(model, prefix_cache=False)
    params = phi3c.SamplingParams(temperature=0, ignore_eos=True)

    def submit(adapter: str | None) -> None:
        ids = rng.integers(3, model.config.vocab_size, 16).tolist()
        engine.submit(phi3c.Request(ids, params, adapter=adapter))

    def step() -> float:
        start = time.perf_counter()
        engine.step()
        return time.perf_counter() - start

    for _ in range(args.batch):
        submit(None)
    before = [step() for _ in range(2 * _SETTLE)][_SETTLE:]
    took: list[float] = []

    def load() -> None:
        start = time.perf_counter()
        model.load_adapter(folder, "new")
        took.append(time.perf_counter() - start)

    loading = threading.Thread(target=load)
    loading.start()
    during = []
    while loading.is_alive():
        during.append(step())
    loading.join()
    submit("new")
    first = step()
    engine.abort_all()
    model.unload_adapter("new")
    return {
        "load": took[0],
        "before": statistics.median(before),
        "longest": max(during, default=0.0),
        "first": first,
    }


if __name__ == "__main__":
    main()
