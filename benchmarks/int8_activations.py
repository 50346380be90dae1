"""What rounding activations to int8 does to logits: the figures of the notes.

    python benchmarks/int8_activations.py

The same weights in two artifacts, with int8 and with float activations; the largest difference of a
logit over the largest logit. On the toy's conversations and on random tokens, and on random weights
(standard deviation 0.02) in the shapes of Phi-3-mini with two layers and a small vocabulary.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from quantization_cost import TOY, conversations

import phi3c
from phi3c.config import Phi3Config
from phi3c.engine.tokenizer import Tokenizer
from phi3c.runtime.compiled import CompiledPhi3

MINI = Path(__file__).parent.parent / "configs" / "phi-3-mini-4k.json"


def logits(model: CompiledPhi3, ids: list[int]) -> np.ndarray:
    """At every position, `[n, vocab]`, with the factors that the whole length takes."""
    cache = model.create_paged_kv_cache(max_batch_size=1)
    long = model.config.needs_long_factors(len(ids))
    cache.add_sequence(0, max_length=model.manifest.limits.context_length if long else None)
    with cache.forward([0], [len(ids)]):
        found, _ = model.batch_verify(model.embed(ids), cache)
    return found.numpy()[0]


def largest_error(models: list[CompiledPhi3], ids: list[int]) -> float:
    """Of int8 against float activations, over the scale of the logits."""
    rounded, exact = (logits(model, ids) for model in models)
    return float(np.abs(rounded - exact).max() / np.abs(exact).max())


def pair(source: Path, scheme: str, folder: Path, **options) -> list[CompiledPhi3]:
    """The artifacts with int8 and with float activations."""
    outputs = [folder / kind for kind in ("int8", "float")]
    for name, output in zip((scheme, f"{scheme}:float"), outputs, strict=True):
        phi3c.compile(source, quantization=name, output=output, **options)
    return [phi3c.load(output) for output in outputs]


def random_ids(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", default="q4f16_1")
    parser.add_argument("--count", type=int, default=20, help="texts a row; conversations a task")
    parser.add_argument("--length", type=int, default=100, help="random tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = pair(TOY / "checkpoint", args.scheme, Path(folder) / "toy")
        vocab_size = models[0].config.vocab_size
        texts = {
            "toy, conversations": conversations(
                Tokenizer.from_folder(models[0].artifact.path), max(1, args.count // 4), args.seed
            ),
            "toy, random tokens": random_ids(vocab_size, args.count, args.length, args.seed),
        }
        for name, rows in texts.items():
            found[name] = [largest_error(models, ids) for ids in rows]
        config = Phi3Config.from_file(MINI).to_dict()
        config |= {"num_hidden_layers": 2, "vocab_size": 1024}
        shrunk = Path(folder) / "config.json"
        shrunk.write_text(json.dumps(config))
        models = pair(shrunk, args.scheme, Path(folder) / "mini", seed=args.seed)
        rows = random_ids(1024, args.count, args.length, args.seed)
        found["Phi-3-mini's shapes, random"] = [largest_error(models, ids) for ids in rows]
    print("| | texts | median | largest |\n|---|---:|---:|---:|")
    for name, errors in found.items():
        print(f"| {name} | {len(errors)} | {np.median(errors):.1e} | {max(errors):.1e} |")
    print(json.dumps({"scheme": args.scheme, "seed": args.seed, "errors": found}))


if __name__ == "__main__":
    main()
