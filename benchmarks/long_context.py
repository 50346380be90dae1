"""Figure: error against position, for phi3c and for a decoder that switches factors by chunk.

    python benchmarks/long_context.py --output docs/long_context.svg     # needs matplotlib

Both run the toy checkpoint's artifact over the same text, token by token after a prompt; the second
chooses LongRoPE's factors by the number of tokens in the current forward, as MLC-LLM and TVM's KV
cache do. The oracle is the numpy reference, which recomputes each length.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import phi3c
from phi3c.config import Phi3Config
from phi3c.reference import reference_logits
from phi3c.runtime.compiled import CompiledPhi3
from phi3c.runtime.single_sequence import SingleSequence
from phi3c.weights import Checkpoint

ROOT = Path(__file__).parent.parent


def phi3c_logits(model: CompiledPhi3, ids: list[int], prompt: int) -> np.ndarray:
    sequence = SingleSequence(model)
    rows = [sequence.extend(ids[:prompt])]
    rows += [sequence.extend([token]) for token in ids[prompt:]]
    return np.stack(rows)


def by_chunk_logits(model: CompiledPhi3, ids: list[int], prompt: int) -> np.ndarray:
    """As above, with the factor set of each forward chosen by its number of new tokens."""
    switch = model.config.original_max_position_embeddings
    cache = model.create_paged_kv_cache(max_batch_size=1)
    cache.add_sequence(0, max_length=len(ids))
    rightly = cache.forward_inputs

    def by_chunk() -> dict[str, np.ndarray]:
        inputs = rightly()
        inputs["factor_set"][:] = len(inputs["factor_set"]) > switch
        return inputs

    cache.forward_inputs = by_chunk
    rows = []
    for part in [ids[:prompt], *([token] for token in ids[prompt:])]:
        with cache.forward([0], [len(part)]):
            logits, _ = model.prefill(model.embed(part), cache)
        rows.append(logits.numpy().reshape(-1))
    return np.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples/toy/checkpoint")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, help="an .svg or .png to draw")
    args = parser.parse_args()
    config = Phi3Config.from_file(args.checkpoint)
    weights = Checkpoint(args.checkpoint, config).tensor
    ids = np.random.default_rng(0).integers(0, config.vocab_size, args.tokens).tolist()
    with tempfile.TemporaryDirectory() as folder:
        artifact = phi3c.compile(args.checkpoint, quantization="q0f32", output=f"{folder}/toy")
        model = phi3c.load(artifact.path)
        found = {
            "phi3c": phi3c_logits(model, ids, args.prompt),
            "factors by chunk": by_chunk_logits(model, ids, args.prompt),
        }
    lengths = range(args.prompt, args.tokens + 1)
    expected = np.stack([reference_logits(config, weights, ids[:n])[-1] for n in lengths])
    scale = np.abs(expected).max()
    errors = {name: np.abs(rows - expected).max(axis=1) / scale for name, rows in found.items()}
    if args.output:
        draw(errors, list(lengths), config.original_max_position_embeddings, args.output)
    result = {
        "checkpoint": args.checkpoint.name,
        "original_max": config.original_max_position_embeddings,
        "tokens": args.tokens,
        "largest_error_of_scale": {name: float(e.max()) for name, e in errors.items()},
    }
    print(json.dumps(result))


def draw(errors: dict[str, np.ndarray], lengths: list[int], switch: int, output: Path) -> None:
    import matplotlib

    matplotlib.use("svg" if output.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "phi3c"  # the same bytes each time
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, values in errors.items():
        axes.semilogy(lengths, np.maximum(values, 1e-9), label=name)
    axes.axvline(switch, color="grey", linewidth=1, linestyle=":")
    axes.text(switch, axes.get_ylim()[1], " original_max", color="grey", va="top")
    axes.set_xlabel("tokens in the sequence")
    axes.set_ylabel("largest logit error / logit scale")
    axes.legend(loc="center right")
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
