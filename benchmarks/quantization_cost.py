"""What each scheme costs in accuracy: the table of the README.

    python benchmarks/quantization_cost.py

Toy: exact answers per task through compiled artifacts, greedy, on held-out prompts that stay within
original_max_position_embeddings, cross it, and are past it; and the next-token distribution at
every position of conversations, against the float32 artifact: mean KL divergence (nats) and how
often the most likely token is the same.

Layers: Phi-3-mini's linears with Gaussian weights, on Gaussian inputs (for down_proj, what silu·mul
makes of such): ‖y − y*‖ / ‖y*‖ against the unrounded weights and inputs. A trained model's weights
and activations are less even, so these are for comparing schemes, not for predicting a model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "toy"))
import evaluate as toy
import tasks

import phi3c
from phi3c.config import Phi3Config
from phi3c.engine.tokenizer import Tokenizer
from phi3c.quantization.scheme import SCHEMES, Scheme, parse_scheme
from phi3c.runtime.compiled import CompiledPhi3
from phi3c.weights import checkpoint_shapes

ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy"
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")


def conversations(tokenizer: Tokenizer, count: int, seed: int) -> list[list[int]]:
    """Token ids of prompts with their answers, of all tasks and kinds."""
    found = []
    for task in tasks.TASKS:
        for prompts in toy.KINDS.values():
            for prompt in prompts(task, count, seed):
                ids = tokenizer.encode_chat(prompt.messages())
                found.append(ids + tokenizer.encode(prompt.answer))
    return found


def log_probabilities(model: CompiledPhi3, ids: list[int]) -> np.ndarray:
    """At every position, `[n, vocab]` float64, with the factors that the whole length takes."""
    cache = model.create_paged_kv_cache(max_batch_size=1)
    long = model.config.needs_long_factors(len(ids))
    cache.add_sequence(0, max_length=model.manifest.limits.context_length if long else None)
    with cache.forward([0], [len(ids)]):
        logits, _ = model.batch_verify(model.embed(ids), cache)
    logits = logits.numpy()[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def toy_costs(names: list[str], count: int, seed: int) -> dict[str, dict[str, float]]:
    """Scheme → accuracy of each task, KL divergence, top-1 agreement."""
    costs, exact = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in ["q0f32", *[n for n in names if n != "q0f32"]]:
            output = Path(folder) / name.replace(":", "-")
            phi3c.compile(TOY / "checkpoint", quantization=name, output=output)
            model = phi3c.load(output)
            texts = conversations(Tokenizer.from_folder(output), max(1, count // 10), seed)
            found = [log_probabilities(model, ids) for ids in texts]
            exact = exact or found
            pairs = list(zip(exact, found, strict=True))
            divergence = [(np.exp(p) * (p - q)).sum(axis=-1) for p, q in pairs]
            agreement = [p.argmax(axis=-1) == q.argmax(axis=-1) for p, q in pairs]
            accuracy = toy.evaluate(model, count, seed)
            costs[name] = {
                **{task: float(np.mean(list(row.values()))) for task, row in accuracy.items()},
                "kl": float(np.concatenate(divergence).mean()),
                "top1": float(np.concatenate(agreement).mean()),
            }
            print(f"{name}: {json.dumps(costs[name])}", file=sys.stderr, flush=True)
    return {name: costs[name] for name in names}


def layer_costs(schemes: list[Scheme], rows: int, seed: int) -> dict[str, dict[str, float]]:
    """Scheme → relative output error of each linear."""
    config = Phi3Config.from_file(ROOT / "configs" / "phi-3-mini-4k.json")
    shapes = {n.split(".")[-2]: (n, shape) for n, shape in checkpoint_shapes(config).items()}
    rng = np.random.default_rng(seed)
    costs: dict[str, dict[str, float]] = {scheme.name: {} for scheme in schemes}
    for linear in LINEARS:
        name, (out_features, in_features) = shapes[linear]
        weight = 0.02 * rng.standard_normal((out_features, in_features), dtype=np.float32)
        x = rng.standard_normal((rows, in_features), dtype=np.float32)
        if linear == "down_proj":
            gate = rng.standard_normal(x.shape, dtype=np.float32)
            x *= gate / (1 + np.exp(-gate))
        exact = x @ weight.T
        rounded: dict[object, np.ndarray] = {}  # schemes share weights
        for scheme in schemes:
            kind = scheme.kind(name)
            if kind not in rounded:
                rounded = {kind: scheme.rounded(name, weight)}
            error = scheme.inputs(x) @ rounded[kind].T - exact
            costs[scheme.name][linear] = float(np.linalg.norm(error) / np.linalg.norm(exact))
    return costs


def bits_per_weight(scheme: Scheme) -> float:
    """Of a linear, its scales included."""
    kind = scheme.linear
    if isinstance(kind, str):
        return 16 if kind != "float32" else 32
    return kind.bits + 8 * np.dtype(kind.scale_dtype).itemsize / kind.group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", help="(those with 16-bit floats)")
    parser.add_argument("--count", type=int, default=200, help="prompts a task and kind")
    parser.add_argument("--rows", type=int, default=64, help="inputs of a layer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    schemes = [parse_scheme(name) for name in args.schemes] or [
        s for s in SCHEMES if s.name == "q0f32" or "f32" not in s.name
    ]
    toys = toy_costs([s.name for s in schemes], args.count, args.seed)
    layers = layer_costs(schemes, args.rows, args.seed)
    head = ["scheme", "bits", *tasks.TASKS, "KL", "top-1", *LINEARS]
    print("| " + " | ".join(head) + " |")
    print("|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|")
    for scheme in schemes:
        found, errors = toys[scheme.name], layers[scheme.name]
        cells = [f"`{scheme.name}`", f"{bits_per_weight(scheme):.1f}"]
        cells += [f"{100 * found[task]:.1f}" for task in tasks.TASKS]
        cells += [f"{found['kl']:.1e}", f"{100 * found['top1']:.2f}"]
        cells += [f"{100 * errors[linear]:.2g}" for linear in LINEARS]
        print("| " + " | ".join(cells) + " |")
    print(json.dumps({"count": args.count, "seed": args.seed, "toy": toys, "layers": layers}))


if __name__ == "__main__":
    main()
