"""One long sequence at Phi-3-mini's real head shape, two layers, checked at every decoded length.

    python benchmarks/long_run.py --tokens 6000

Prefills to just before original_max_position_embeddings, decodes across it (where the sequence is
recomputed once with the long factors) and on to the end; transformers computes the same tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import Phi3Config as HFConfig
from transformers import Phi3ForCausalLM as HFModel

import phi3c
from phi3c.config import Phi3Config
from phi3c.runtime.single_sequence import SingleSequence

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/phi-3-mini-128k.json")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--quantization", default="q0f32")
    args = parser.parse_args()
    config = replace(
        Phi3Config.from_file(args.config),
        num_hidden_layers=2,
        vocab_size=1024,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
    )
    torch.manual_seed(0)
    oracle = HFModel(HFConfig(**config.to_dict(), attn_implementation="sdpa")).eval()
    switch = config.original_max_position_embeddings
    ids = np.random.default_rng(0).integers(0, config.vocab_size, args.tokens).tolist()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        oracle.save_pretrained(f"{folder}/checkpoint")
        artifact = phi3c.compile(
            f"{folder}/checkpoint",
            quantization=args.quantization,
            output=f"{folder}/artifact",
            max_batch_size=1,
            context_length=args.tokens,
        )
        sequence = SingleSequence(phi3c.load(artifact.path))
        start = time.perf_counter()
        found = [sequence.extend(ids[: switch - 6])]
        for token in ids[switch - 6 :]:
            found.append(sequence.extend([token]))
        seconds = time.perf_counter() - start
        tensor = torch.tensor([ids])
        before = oracle(tensor[:, :switch], logits_to_keep=7, use_cache=False).logits[0]
        keep = args.tokens - switch
        after = oracle(tensor, logits_to_keep=keep, use_cache=False).logits[0]
        expected = torch.cat([before, after]).numpy()
    found = np.stack(found)
    errors = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
    worst = int(errors.argmax())
    result = {
        "config": args.config.name,
        "layers": 2,
        "heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "tokens": args.tokens,
        "switch_at": switch,
        "steps_compared": len(errors),
        "largest_error_of_scale": float(errors[worst]),
        "at_position": args.tokens - len(errors) + worst,
        "greedy_tokens_equal": bool((found.argmax(1) == expected.argmax(1)).all()),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
