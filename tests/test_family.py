"""Every model of the family from its config, shrunk to two layers and a small vocabulary.

Head shape, grouping, rotary settings, window and original context are the real ones, and so the
lengths at which they matter.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_weights
from transformers import Phi3Config as HFConfig
from transformers import Phi3ForCausalLM as HFModel

import phi3c
from phi3c.config import Phi3Config
from phi3c.runtime.single_sequence import SingleSequence

CONFIGS = sorted(Path(__file__).parent.parent.joinpath("configs").glob("phi-*.json"))


def shrunk(config: Phi3Config) -> Phi3Config:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    ratio = max(2, heads // gcd(heads, kv_heads))
    return replace(
        config,
        vocab_size=211,
        num_hidden_layers=2,
        num_attention_heads=ratio,
        num_key_value_heads=ratio * kv_heads // heads,
        hidden_size=ratio * config.head_dim,
        intermediate_size=ratio * config.head_dim * 2,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_model_of_the_family(path, tmp_path):
    config = shrunk(Phi3Config.from_file(path))
    oracle = HFModel(HFConfig(**config.to_dict(), attn_implementation="sdpa")).eval()
    make_weights(oracle)
    oracle.save_pretrained(tmp_path / "checkpoint")
    context = min(4200, config.max_position_embeddings)
    artifact = phi3c.compile(
        tmp_path / "checkpoint",
        quantization="q0f32",
        output=tmp_path / "artifact",
        max_batch_size=1,
        context_length=context,
    )
    sequence = SingleSequence(phi3c.load(artifact.path))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, context)
    # Prefill to just before a boundary, decode across it.
    switch = config.original_max_position_embeddings
    for start in sorted({30, (config.sliding_window or 30) - 2, switch - 2}):
        if start + 4 > context:
            continue
        for end in range(max(start, len(sequence.tokens) + 1), start + 5):
            logits = sequence.extend(ids[len(sequence.tokens) : end])
            with torch.no_grad():
                tensor = torch.tensor(ids[None, :end])
                expected = oracle(tensor, logits_to_keep=1, use_cache=False).logits[0, 0].numpy()
            error = np.abs(logits - expected).max() / np.abs(expected).max()
            assert error <= 1e-4, (end, error)
            assert logits.argmax() == expected.argmax(), end
