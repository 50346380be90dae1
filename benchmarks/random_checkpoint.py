"""Writes a checkpoint of random weights in a config's full size, as Hugging Face shards.

    python benchmarks/random_checkpoint.py configs/phi-3-mini-4k.json /tmp/mini

For timing conversions; its tokenizer is the toy's, so that text can be fed in (answers are noise).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from phi3c.config import Phi3Config
from phi3c.weights import RandomWeights

SHARD_BYTES = 2_000_000_000
TOY = Path(__file__).parent.parent / "examples" / "toy" / "checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    weights = RandomWeights(Phi3Config.from_file(args.config), args.seed)
    args.output.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TOY / name, args.output / name)
    shutil.copyfile(args.config, args.output / "config.json")
    dtype = ml_dtypes.bfloat16 if args.dtype == "bfloat16" else args.dtype
    shard: dict[str, np.ndarray] = {}
    weight_map, count, total = {}, 1, 0
    for name in weights.shapes:
        array = weights.tensor(name).astype(dtype)
        if shard and sum(a.nbytes for a in shard.values()) + array.nbytes > SHARD_BYTES:
            save_file(shard, args.output / shard_name(count))
            shard, count = {}, count + 1
        shard[name] = array
        weight_map[name] = shard_name(count)
        total += array.nbytes
    save_file(shard, args.output / shard_name(count))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.output / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{args.output}: {len(weight_map)} tensors, {total / 1e9:.2f} GB in {count} shards")


def shard_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


if __name__ == "__main__":
    main()
