"""Writes a GGUF file of random Q4_0 weights in a config's size, for phi3c and llama.cpp alike.

    python benchmarks/random_gguf.py configs/phi-3-mini-4k.json /tmp/mini.gguf

Norms are float32 and the LM head is Q4_0 too (llama-quantize --pure), so that both read as much.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from phi3c.config import Phi3Config
from phi3c.weights import checkpoint_shapes

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SCALE = 0.02 / 4.6  # of values −8 … 7, so that weights have a deviation of 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    write(Phi3Config.from_file(args.config), args.output)


def write(config: Phi3Config, path: Path) -> None:
    """Any config without LongRoPE."""
    c, rng = config, np.random.default_rng(0)
    writer = GGUFWriter(path, "phi3")
    writer.add_name("random")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.rotary_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_sliding_window(c.sliding_window or 0)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_]
    tokens += [f"\u2581t{i}" for i in range(c.vocab_size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, shape in checkpoint_shapes(c).items():
        if len(shape) == 1:
            writer.add_tensor(gguf_name(name), np.ones(shape, np.float32))
            continue
        blocks = np.empty((shape[0], shape[1] // 32, 18), np.uint8)
        blocks[..., :2] = np.float16(_SCALE).reshape(1).view(np.uint8)
        blocks[..., 2:] = rng.integers(0, 256, (*blocks.shape[:2], 16), np.uint8)
        data = blocks.reshape(shape[0], -1)
        writer.add_tensor(gguf_name(name), data, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


if __name__ == "__main__":
    main()
