"""GGUF files: the config, weights and tokenizer that come out, and everything that is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from phi3c.config import Phi3Config, RopeScaling
from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import CheckpointError, ConfigError
from phi3c.quantization.group import GroupedRows
from phi3c.sources import resolve_source
from phi3c.sources.gguf_file import GgufFile
from phi3c.weights import Checkpoint, checkpoint_shapes

ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy" / "checkpoint"
CONFIG = Phi3Config(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    original_max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    partial_rotary_factor=1.0,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=False,
    hidden_act="silu",
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=None,
    dtype=None,
)
LONGROPE = RopeScaling(
    short_factor=tuple(1 + 0.05 * i for i in range(8)),
    long_factor=tuple(1.5 + 1.3 * i for i in range(8)),
)
EMBED, QKV, NORM = (
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.qkv_proj.weight",
    "model.norm.weight",
)
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {
    EMBED: "token_embd.weight",
    NORM: "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, *rest = name.split(".")
    return f"blk.{layer}.{BLOCK['.'.join(rest[:-1])]}.weight"


def tensors(config: Phi3Config = CONFIG) -> dict[str, np.ndarray]:
    """By Hugging Face name, filled from a seed."""
    rng = np.random.default_rng(0)
    shapes = checkpoint_shapes(config)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def metadata(config: Phi3Config = CONFIG) -> dict[str, tuple]:
    """Key → type and value, as convert_hf_to_gguf writes them."""
    value, text = gguf.GGUFValueType, gguf.GGUFValueType.STRING
    window = 0 if config.sliding_window is None else config.sliding_window
    keys = {
        "phi3.context_length": (value.UINT32, config.max_position_embeddings),
        "phi3.rope.scaling.original_context_length": (
            value.UINT32,
            config.original_max_position_embeddings,
        ),
        "phi3.embedding_length": (value.UINT32, config.hidden_size),
        "phi3.feed_forward_length": (value.UINT32, config.intermediate_size),
        "phi3.block_count": (value.UINT32, config.num_hidden_layers),
        "phi3.attention.head_count": (value.UINT32, config.num_attention_heads),
        "phi3.attention.head_count_kv": (value.UINT32, config.num_key_value_heads),
        "phi3.attention.layer_norm_rms_epsilon": (value.FLOAT32, config.rms_norm_eps),
        "phi3.rope.dimension_count": (value.UINT32, config.rotary_dim),
        "phi3.rope.freq_base": (value.FLOAT32, config.rope_theta),
        "phi3.attention.sliding_window": (value.UINT32, window),
        "tokenizer.ggml.model": (text, "none"),
        "tokenizer.ggml.bos_token_id": (value.UINT32, config.bos_token_id),
        "tokenizer.ggml.eos_token_id": (value.UINT32, config.eos_token_ids[0]),
    }
    if config.rope_scaling is not None:
        keys["phi3.rope.scaling.attn_factor"] = (value.FLOAT32, config.attention_factor)
    return keys


def write(
    path: Path,
    config: Phi3Config = CONFIG,
    kind: Type = Type.F32,
    state: dict[str, np.ndarray] | None = None,
    keys: dict[str, tuple | None] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    raw: dict[str, tuple[np.ndarray, Type]] | None = None,
    **options,
) -> Path:
    """A GGUF file. kind: of the matrices; keys: added, replaced, or left out where None; extra:
    tensors by their own names; raw: blocks in place of a tensor (left out: an empty array)."""
    alignment = options.pop("alignment", None)
    writer = GGUFWriter(path, options.pop("architecture", "phi3"), **options)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, entry in (metadata(config) | (keys or {})).items():
        if entry is None:
            continue
        if isinstance(entry[1], list):
            writer.add_array(key, entry[1])
        else:
            writer.add_key_value(key, entry[1], entry[0])
    for name, array in (tensors(config) if state is None else state).items():
        blocks, its_kind = (raw or {}).get(name, (None, kind if array.ndim > 1 else Type.F32))
        if blocks is None:
            blocks = quantize(array, its_kind)
        if blocks.size:
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=its_kind)
    if config.rope_scaling is not None:
        for name in ("long", "short"):
            factors = np.array(getattr(config.rope_scaling, f"{name}_factor"), np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def u32(value: int) -> tuple:
    return gguf.GGUFValueType.UINT32, value


def f32(value: float) -> tuple:
    return gguf.GGUFValueType.FLOAT32, value


def text(value: str) -> tuple:
    return gguf.GGUFValueType.STRING, value


def refused(path: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    """Asserts that the model is refused, with `message` in the one line that says why."""
    with pytest.raises(error) as found:
        source = GgufFile(path)
        source.weights()
        source.text_files()
    assert message in str(found.value)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


# The config

CONFIGS = {
    "plain": CONFIG,
    "window": replace(CONFIG, sliding_window=31, rope_theta=250000.0, rms_norm_eps=1e-6),
    "tied": replace(CONFIG, tie_word_embeddings=True, num_key_value_heads=4),
    "longrope": replace(CONFIG, rope_scaling=LONGROPE, original_max_position_embeddings=64),
    "partial": replace(CONFIG, partial_rotary_factor=0.75, eos_token_ids=(39,)),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_config_is_the_one_that_was_converted(model, name):
    config = CONFIGS[name]
    found = GgufFile(write(model, config)).config
    if config.rope_scaling is not None:
        for long in (False, True):
            np.testing.assert_array_equal(found.inv_freq(long), config.inv_freq(long))
        assert found.attention_factor == config.attention_factor
        found = replace(found, rope_scaling=config.rope_scaling)
    assert found == config


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("phi-*.json")), ids=lambda p: p.stem
)
def test_the_configs_of_the_family_survive(model, file):
    """Tensors of the real sizes are a hole in the file."""
    config = Phi3Config.from_file(file)
    writer = GGUFWriter(model, "phi3")
    for key, entry in metadata(config).items():
        writer.add_key_value(key, entry[1], entry[0])
    if config.rope_scaling is not None:
        for name in ("long", "short"):
            factors = np.array(getattr(config.rope_scaling, f"{name}_factor"), np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    for name, shape in checkpoint_shapes(config).items():
        writer.add_tensor_info(
            gguf_name(name), shape, np.dtype(np.float16), 2 * int(np.prod(shape))
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with writer.fout[0] as out:
        for tensor in writer.tensors[0].values():
            if tensor.tensor is not None:
                writer.write_padding(out, out.tell())
                tensor.tensor.tofile(out)
    os.truncate(model, 40 << 30)
    found = GgufFile(model).config
    assert found.attention_factor == pytest.approx(config.attention_factor, rel=1e-6)
    for long in (False, True):
        np.testing.assert_array_equal(found.inv_freq(long), config.inv_freq(long))
    changed = ("rope_scaling", "dtype", "eos_token_ids", "pad_token_id")
    expected = replace(config, **{field: getattr(found, field) for field in changed})
    assert found == expected


@pytest.mark.parametrize("head_dim", [18, 98, 128])
def test_every_rotary_dimension_survives(model, head_dim):
    for rotary_dim in range(2, head_dim + 1, 2):
        config = replace(CONFIG, head_dim=head_dim, hidden_size=4 * head_dim)
        keys = {"phi3.rope.dimension_count": u32(rotary_dim)}
        state = {EMBED: np.zeros((40, 4 * head_dim), np.float32)}
        assert (
            GgufFile(write(model, config, state=state, keys=keys)).config.rotary_dim == rotary_dim
        )


def test_an_attention_factor_of_its_own_is_kept(model):
    config = CONFIGS["longrope"]
    keys = {"phi3.rope.scaling.attn_factor": f32(1.25)}
    assert GgufFile(write(model, config, keys=keys)).config.attention_factor == 1.25
    keys = {"phi3.rope.scaling.attn_factor": None}
    found = GgufFile(write(model, config, keys=keys)).config
    assert found.attention_factor == config.attention_factor


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({"phi3.attention.sliding_window": u32(0)}, None),
        ({"phi3.attention.sliding_window": None}, None),
        ({"phi3.attention.sliding_window": None, "phi3.block_count": u32(32)}, 2047),
        ({"phi3.attention.sliding_window": u32(0), "phi3.block_count": u32(32)}, None),
    ],
)
def test_a_file_without_a_window_has_the_one_that_old_files_meant(model, keys, window):
    config = replace(CONFIG, max_position_embeddings=4096)
    assert GgufFile(write(model, config, keys=keys)).config.sliding_window == window


def test_keys_that_may_be_absent(model):
    absent = (
        "phi3.rope.freq_base",
        "phi3.rope.dimension_count",
        "phi3.rope.scaling.original_context_length",
        "phi3.attention.sliding_window",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.model",
    )
    found = GgufFile(write(model, keys=dict.fromkeys(absent)))
    assert found.config == replace(CONFIG, bos_token_id=None, eos_token_ids=())
    assert set(found.text_files()) == {"config.json", "generation_config.json"}


# The weights


def values(rows: np.ndarray | GroupedRows) -> np.ndarray:
    return rows.values() if isinstance(rows, GroupedRows) else rows


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16])
def test_floats_keep_their_dtype_and_values(model, kind):
    state = tensors()
    weights = GgufFile(write(model, kind=kind)).weights()
    for name, array in state.items():
        found = weights.tensor(name)
        expected = kind if array.ndim > 1 else Type.F32
        stored = dequantize(quantize(array, expected), expected)
        assert (
            str(found.dtype)
            == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[expected.name]
        )
        np.testing.assert_array_equal(found.astype(np.float32), stored.reshape(array.shape))


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0])
def test_groups_are_those_of_the_file(model, kind):
    state = tensors()
    weights = GgufFile(write(model, kind=kind)).weights()
    for name, array in state.items():
        if array.ndim == 1:
            assert weights.rows(name, 0, len(array)).dtype == np.float32
            continue
        found = weights.rows(name, 0, len(array))
        assert isinstance(found, GroupedRows)
        assert found.q.dtype == np.int8 and found.q.shape == array.shape
        assert found.scale.dtype == np.float16
        assert found.scale.shape == (array.shape[0], array.shape[1] // 32)
        expected = dequantize(quantize(array, kind), kind)
        np.testing.assert_array_equal(found.values().view(np.uint32), expected.view(np.uint32))
        np.testing.assert_array_equal(weights.tensor(name), expected)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0])
def test_every_bit_pattern_of_a_group_is_read(model, kind):
    """Blocks of random bytes: −128 in Q8_0, negative scales, and which half a nibble is of."""
    rng = np.random.default_rng(1)
    rows, features = checkpoint_shapes(CONFIG)[QKV]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (rows, features // 32, size), np.uint8)
    scales = rng.standard_normal((rows, features // 32, 1)).astype(np.float16)
    blocks[..., :2] = scales.view(np.uint8)
    blocks[0, 0, 2:] = np.arange(128, 128 + size - 2) if kind == Type.Q8_0 else np.arange(16) * 16
    blocks = blocks.reshape(rows, -1)
    write(model, raw={QKV: (blocks, kind)})
    found = GgufFile(model).weights().rows(QKV, 0, rows)
    assert found.q.min() == (-128 if kind == Type.Q8_0 else -8)
    assert found.q.max() == (127 if kind == Type.Q8_0 else 7)
    np.testing.assert_array_equal(
        found.values().view(np.uint32), dequantize(blocks, kind).view(np.uint32)
    )
    if kind == Type.Q4_0:
        assert found.q[0, :16].tolist() == [-8] * 16
        assert found.q[0, 16:32].tolist() == list(range(-8, 8))


def k_blocks(kind: Type, rows: int, features: int) -> np.ndarray:
    """Random blocks of a type that quantize cannot write."""
    values_, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(2).integers(0, 256, (rows, features // values_, size), np.uint8)
    # Q6_K ends in its scale, Q4_K and Q5_K begin with two.
    at = slice(-2, None) if kind == Type.Q6_K else slice(0, 4)
    blocks[..., at] = np.full(2 if kind != Type.Q6_K else 1, 0.01, np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


WIDE = replace(CONFIG, hidden_size=256, head_dim=64)


@pytest.mark.parametrize("kind", [Type.Q6_K, Type.Q4_K, Type.Q5_K, Type.Q5_0])
def test_other_types_become_float32(model, kind):
    state = tensors(WIDE)
    name = "lm_head.weight"
    blocks = quantize(state[name], kind) if kind == Type.Q5_0 else k_blocks(kind, 40, 256)
    weights = GgufFile(write(model, WIDE, Type.Q4_0, raw={name: (blocks, kind)})).weights()
    expected = dequantize(blocks, kind)
    for start, stop in [(0, 40), (7, 8), (3, 38)]:
        found = weights.rows(name, start, stop)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[start:stop])


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0])
def test_any_range_of_rows(model, kind):
    weights = GgufFile(write(model, kind=kind)).weights()
    for name in (EMBED, NORM):
        whole, n = weights.tensor(name), weights.shapes[name][0]
        for start, stop in [(0, 1), (n - 1, n), (3, 20), (5, n)]:
            found = values(weights.rows(name, start, stop))
            assert found.shape == whole[start:stop].shape
            np.testing.assert_array_equal(found, whole[start:stop])


def test_rows_are_the_callers_to_change_and_may_be_read_from_threads(model):
    weights = GgufFile(write(model, kind=Type.Q4_0)).weights()
    expected = weights.tensor(EMBED)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: weights.rows(EMBED, i, i + 5), range(0, 40, 5)))
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part.values(), expected[5 * i : 5 * i + 5])
        part.q[:] = 0
        part.scale[:] = 0
    weights.rows(NORM, 0, 64)[:] = 0
    np.testing.assert_array_equal(weights.tensor(EMBED), expected)
    np.testing.assert_array_equal(weights.tensor(NORM), tensors()[NORM])


@pytest.mark.parametrize("alignment", [8, 1024])
def test_any_alignment(model, alignment):
    weights = GgufFile(write(model, alignment=alignment)).weights()
    np.testing.assert_array_equal(weights.tensor(QKV), tensors()[QKV])


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q6_K])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(model, kind, value):
    state = tensors(WIDE)
    raw = {}
    if kind == Type.Q6_K:
        blocks = k_blocks(kind, 512, 256)
        blocks[7, -2:] = np.array([value], np.float16).view(np.uint8)
        raw[QKV] = blocks, kind
    elif kind in (Type.Q8_0, Type.Q4_0):
        blocks = quantize(state[QKV], kind)
        blocks[7, :2] = np.array([value], np.float16).view(np.uint8)
        raw[QKV] = blocks, kind
    else:
        state[QKV][7, 3] = value
    weights = GgufFile(write(model, WIDE, kind if not raw else Type.F32, state, raw=raw)).weights()
    with pytest.raises(CheckpointError, match="blk.1.attn_qkv.weight: found NaN or infinite"):
        weights.rows(QKV, 0, 512)
    assert np.isfinite(values(weights.rows(QKV, 8, 512)).astype(np.float32)).all()


# Tensors that are refused


def test_missing_tensors_are_named_and_counted(model):
    state = tensors()
    del state[NORM]
    refused(write(model, state=state), "missing tensor output_norm.weight")
    refused(
        write(model, state={EMBED: state[EMBED]}), "missing tensor blk.0.attn_norm.weight and 1"
    )
    refused(write(model, state={NORM: np.ones(64, np.float32)}), "missing tensor token_embd.weight")
    for name in ("long", "short"):
        extra = {f"rope_factors_{name}.weight": np.ones(8, np.float32)}
        other = "short" if name == "long" else "long"
        refused(write(model, extra=extra), f"missing tensor rope_factors_{other}.weight")


@pytest.mark.parametrize(
    "name", ["blk.2.ffn_up.weight", "blk.0.attn_qkv.bias", "rope_freqs.weight"]
)
def test_a_tensor_left_over_is_named(model, name):
    path = write(model, extra={name: np.ones(8, np.float32)})
    refused(path, f"{name}: not a tensor of this config's model")


@pytest.mark.parametrize("shape", [(128, 128), (129, 64), (8192,), (1, 128, 64)])
def test_a_misshaped_tensor_is_refused(model, shape):
    raw = {QKV: (np.zeros(shape, np.float32), Type.F32)}
    message = f"blk.1.attn_qkv.weight: found shape {list(shape)}; accepted: [128, 64]"
    refused(write(model, raw=raw), message)


def patched(path: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def test_a_tensor_that_is_there_twice_is_refused(model):
    def rename(data: bytearray) -> None:
        at = data.index(b"blk.1.ffn_up.weight")
        data[at : at + 5] = b"blk.0"

    refused(patched(write(model), rename), "duplicated tensor with name blk.0.ffn_up.weight")


@pytest.mark.parametrize(
    ("number", "found"),
    [(999, "found block type 999"), (int(Type.I32), "blk.1.attn_qkv.weight: found I32")],
)
def test_a_type_that_cannot_be_read_is_named(model, number, found):
    def retype(data: bytearray) -> None:
        at = data.index(b"blk.1.attn_qkv.weight") + len("blk.1.attn_qkv.weight") + 4 + 2 * 8
        data[at : at + 4] = number.to_bytes(4, "little")

    path = patched(write(model), retype)
    refused(path, f"{found}; accepted: F32, F16, Q4_0, Q4_1, ")
    refused(path, "Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, ")


def test_a_quantized_vector_is_refused(model):
    blocks = quantize(np.ones((1, 64), np.float32), Type.Q8_0).reshape(-1)
    path = write(model, raw={NORM: (blocks, Type.Q8_0)})
    refused(path, "output_norm.weight: found Q8_0; accepted: F32, F16, BF16")


def test_features_that_do_not_fill_blocks_are_refused(model):
    config = replace(CONFIG, hidden_size=72, head_dim=18, intermediate_size=96)

    def retype(data: bytearray) -> None:
        at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
        data[at : at + 4] = int(Type.Q8_0).to_bytes(4, "little")

    path = patched(write(model, config), retype)
    refused(path, "row size (72) is not a multiple of Q8_0 block size (32)")


# Files that are refused


@pytest.mark.parametrize("data", [b"", b"GGU", b"GGML" + bytes(100), b"version https://git-lfs"])
def test_a_file_that_is_no_gguf(model, data):
    model.write_bytes(data)
    refused(model, f"found a file that begins with {data[:4]!r}; accepted: a GGUF file")


def test_a_file_that_is_not_there(model):
    refused(model, "cannot be read (No such file or directory)")


@pytest.mark.parametrize("config", [CONFIG, CONFIGS["longrope"]], ids=["plain", "longrope"])
def test_a_file_that_is_cut_short(model, config):
    data = write(model, config).read_bytes()
    for kept in [*range(4, 3000, 61), *range(3000, len(data), 9973), len(data) - 33]:
        model.write_bytes(data[:kept])
        refused(model, "cut short: ")


def test_a_header_that_lies_about_its_lengths(model):
    def many_keys(data: bytearray) -> None:
        data[16:24] = (2**60).to_bytes(8, "little")

    def long_key(data: bytearray) -> None:
        data[24:32] = (2**63 + 1).to_bytes(8, "little")

    for change in (many_keys, long_key):
        with pytest.raises(CheckpointError) as error:
            GgufFile(patched(write(model), change))
        assert "\n" not in str(error.value)


def test_metadata_of_an_unknown_type(model):
    def change(data: bytearray) -> None:
        at = data.index(b"phi3.block_count") + len("phi3.block_count")
        data[at] = 13

    refused(patched(write(model), change), "13) is not a valid GGUFValueType")


def test_a_big_endian_file(model):
    path = write(model, endianess=gguf.GGUFEndian.BIG)
    refused(path, "found a big-endian file; accepted: little-endian")


@pytest.mark.parametrize("version", [1, 4])
def test_another_version(model, version):
    def change(data: bytearray) -> None:
        data[4] = version

    refused(patched(write(model), change), f"found GGUF version {version}; accepted: 2, 3")


def test_version_2_is_read(model):
    def change(data: bytearray) -> None:
        data[4] = 2

    assert GgufFile(patched(write(model), change)).config == CONFIG


def test_another_architecture(model):
    path = write(model, architecture="llama")
    refused(path, "general.architecture: found 'llama'; accepted: phi3")


def test_a_part_of_a_split_file(model):
    path = write(model, keys={"split.count": (gguf.GGUFValueType.UINT16, 3)})
    refused(
        path, "split.count: found 3 files; accepted: one. llama.cpp joins them: llama-gguf-split"
    )


@pytest.mark.parametrize(
    "key",
    [
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_key_is_named(model, key):
    refused(write(model, keys={f"phi3.{key}": None}), f"phi3.{key}: found nothing; accepted: a")


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("phi3.block_count", text("2"), "found a string; accepted: an integer"),
        ("phi3.block_count", f32(2.5), "found 2.5; accepted: an integer"),
        ("phi3.attention.head_count", (None, [4, 4]), "found a list; accepted: an integer"),
        ("phi3.rope.freq_base", text("x"), "found a string; accepted: a number"),
        ("phi3.rope.scaling.type", text("yarn"), "found 'yarn'; accepted: none, longrope"),
        ("phi3.rope.scaling.type", text("longrope"), "missing tensor rope_factors_long.weight"),
        ("phi3.rope.scaling.factor", f32(4.0), "found 'linear'; accepted: none, longrope"),
        ("tokenizer.ggml.eos_token_id", u32(40), "found 40; accepted: 0 to 39"),
        ("general.alignment", u32(0), "alignment: must be a non-zero power of two"),
    ],
)
def test_a_wrong_value_is_named(model, key, entry, message):
    if key == "general.alignment":  # the writer itself minds 0

        def change(data: bytearray) -> None:
            data[data.index(key.encode()) + len(key) + 4] = 0

        path = patched(write(model, alignment=32), change)
    else:
        path = write(model, keys={key: entry})
    refused(path, message)


def test_what_the_config_refuses(model):
    path = write(model, keys={"phi3.attention.head_count_kv": u32(3)})
    refused(path, "num_key_value_heads: found 3 for 4 attention heads", ConfigError)


# Tokenizers


def tokenizer_keys(
    tokens: list[str],
    types: list[int],
    model: str = "llama",
    *,
    scores: list[float] | None = None,
    merges: list[str] | None = None,
    **others: tuple | None,
) -> dict[str, tuple | None]:
    keys: dict[str, tuple | None] = {
        "model": text(model),
        "tokens": (None, tokens),
        "token_type": (None, types),
    }
    if scores is not None:
        keys["scores"] = None, scores
    if merges is not None:
        keys["merges"] = None, merges
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | others).items()}


def tokenizer_of(model: Path, keys: dict, rows: int | None = None) -> Tokenizer:
    """The engine's tokenizer, from the text files of a model with these keys."""
    files = text_files(model, keys, rows)
    folder = model.parent / "out"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Tokenizer.from_folder(folder)


def text_files(model: Path, keys: dict, rows: int | None = None) -> dict[str, bytes]:
    state = {EMBED: np.zeros((rows or len(keys["tokenizer.ggml.tokens"][1]), 64), np.float32)}
    return GgufFile(write(model, state=state, keys=keys)).text_files()


CORPUS = [
    "the quick brown fox jumps over the lazy dog, then the other fox thinks it over",
    "naïve café: the thing that those others thought through, 12 and 123",
    "aaaa aaa aa, banana bandana, Tokenizers tokenize tokens",
] * 4
MARKERS = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]


def sentencepiece() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types like Phi-3's, padding included, with some 150 pieces."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    # SentencePiece numbers merged pieces in order of their scores, and characters after them.
    pieces = [piece for piece, _ in by_id if len(piece) > 1]
    pieces += [piece for piece, _ in by_id if len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokens += MARKERS
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1000.0] * len(MARKERS)
    types = [TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces)
    types += [TokenType.CONTROL] * len(MARKERS)
    padding = range(len(tokens), len(tokens) + 7)
    tokens += [f"[PAD{i}]" for i in padding]
    return tokens, scores + [-10000.0] * 7, [int(t) for t in types] + [int(TokenType.UNUSED)] * 7


TOKENS, SCORES, TYPES = sentencepiece()
YES, NO = (gguf.GGUFValueType.BOOL, True), (gguf.GGUFValueType.BOOL, False)
SENTENCEPIECE = tokenizer_keys(
    TOKENS,
    TYPES,
    scores=SCORES,
    pre=text("default"),
    bos_token_id=u32(1),
    eos_token_id=u32(TOKENS.index("<|endoftext|>")),
    padding_token_id=u32(TOKENS.index("<|endoftext|>")),
    unknown_token_id=u32(0),
    add_bos_token=NO,
)


def sentencepiece_ids(segment: str) -> list[int]:
    """SentencePiece's BPE by its definition: join the best-scored pair until none is left."""
    pieces = {t: SCORES[i] for i, t in enumerate(TOKENS) if TYPES[i] == TokenType.NORMAL}
    parts = list("▁" + segment.replace(" ", "▁")) if segment else []
    while True:
        pairs = [left + right for left, right in pairwise(parts)]
        joined = [(pieces.get(pair, -np.inf), -i) for i, pair in enumerate(pairs)]
        score, at = max(joined, default=(-np.inf, 0))
        if score == -np.inf:
            break
        parts[-at : 2 - at] = ["".join(parts[-at : 2 - at])]
    ids = []
    for part in parts:
        known = [TOKENS.index(part)] if part in pieces else []
        ids += known or [TOKENS.index(f"<0x{byte:02X}>") for byte in part.encode()]
    return ids


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("spm") / "model.gguf", SENTENCEPIECE)


TEXTS = [
    "the quick brown fox",
    "  two  spaces, then\n\nlines\tand a tab ",
    "naïve café 你好 世界 🙂👍 e\u0301",
    "aaaaaaa banana",
    "",
    " ",
    "▁ already there ▁",
    "[PAD400] <0x41> <unk",
]


@pytest.mark.parametrize("sample", TEXTS)
def test_sentencepiece_by_its_definition(spm, sample):
    assert spm.encode(sample) == sentencepiece_ids(sample)
    assert spm.decode(spm.encode(sample)) == sample.replace("▁", " ")


@settings(deadline=None, max_examples=150)
@given(st.text(st.sampled_from("thequickbrownfx aTn, é你🙂\n▁"), max_size=40))
def test_any_text_by_sentencepieces_definition(spm, sample):
    assert spm.encode(sample) == sentencepiece_ids(sample)
    assert spm.decode(spm.encode(sample)) == sample.replace("▁", " ")


def test_sentencepiece_markers_are_phi_3s(spm):
    ids = {marker: TOKENS.index(marker) for marker in [*MARKERS, "</s>", "<s>"]}
    the, fox = sentencepiece_ids("the"), sentencepiece_ids("fox")
    # A space goes in front of text after a marker, which takes the white space in between.
    assert spm.encode("<|user|>\nthe<|end|>\n <|assistant|>\nfox") == [
        *(ids["<|user|>"], *the, ids["<|end|>"], ids["<|assistant|>"], *fox)
    ]
    for keeps in ("<s>", "<|endoftext|>"):
        assert spm.encode(f"{keeps} the") == [ids[keeps], *sentencepiece_ids(" the")]
    assert spm.encode("</s>  the") == [ids["</s>"], *the]
    assert spm.decode([ids["<|user|>"], *the, ids["</s>"], ids["<|end|>"]]) == "the</s>"
    assert spm.eos_token_ids == {ids["<|endoftext|>"], ids["<|end|>"]}
    assert spm.vocab_size == len(TOKENS) - 7


def test_the_sentencepiece_file_is_transformers(model):
    """All but the vocabulary, which the encodings above check, as Phi-3's tokenizer.json has it."""
    found = json.loads(text_files(model, SENTENCEPIECE)["tokenizer.json"])
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    assert found["normalizer"] == {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
    }
    assert found["pre_tokenizer"] is None and found["post_processor"] is None
    assert found["decoder"] == {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    settings_ = {key: found["model"][key] for key in ("unk_token", "fuse_unk", "byte_fallback")}
    assert settings_ == {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    flags = {
        token["content"]: (token["rstrip"], token["special"]) for token in found["added_tokens"]
    }
    assert flags == {
        "<unk>": (False, True),
        "<s>": (False, True),
        "</s>": (True, False),
        "<|endoftext|>": (False, True),
        "<|assistant|>": (True, True),
        "<|system|>": (True, True),
        "<|end|>": (True, True),
        "<|user|>": (True, True),
    }
    assert not any(token["lstrip"] or token["normalized"] for token in found["added_tokens"])
    # Every way to put a piece together, best piece first.
    ranks = {t: i for i, t in enumerate(TOKENS) if TYPES[i] == TokenType.NORMAL}
    merges = [tuple(pair) for pair in found["model"]["merges"]]
    assert set(merges) == {(p[:i], p[i:]) for p in ranks for i in range(1, len(p))} & {
        (a, b) for a in ranks for b in ranks
    }
    assert [ranks[a + b] for a, b in merges] == sorted(ranks[a + b] for a, b in merges)


def test_a_bos_token_is_added_where_the_file_says_so(model, spm):
    the = sentencepiece_ids("the")
    for value, ids in [(YES, [1, *the]), (None, [1, *the])]:
        found = tokenizer_of(model, SENTENCEPIECE | {"tokenizer.ggml.add_bos_token": value})
        assert found.encode("the") == ids
        assert found.encode("the", add_special_tokens=False) == the
    eos = {"tokenizer.ggml.add_eos_token": YES}
    found = tokenizer_of(model, SENTENCEPIECE | eos)
    assert found.encode("the") == [*the, TOKENS.index("<|endoftext|>")]


def test_no_space_is_put_in_front_where_the_file_says_so(model):
    keys = {"tokenizer.ggml.add_space_prefix": NO}
    found = tokenizer_of(model, SENTENCEPIECE | keys)
    assert found.encode(" the") == sentencepiece_ids("the")
    for sample in ("the fox", " the", ""):
        assert found.decode(found.encode(sample)) == sample


def test_the_chat_template_and_the_tokens_it_knows(model):
    template = "{{ bos_token }}<|{{ messages[0].role }}|>\n{{ messages[0].content }}{{ eos_token }}"
    keys = SENTENCEPIECE | {"tokenizer.chat_template": text(template)}
    found = tokenizer_of(model, keys)
    chat = [{"role": "user", "content": "the"}]
    assert found.apply_chat_template(chat) == "<s><|user|>\nthe<|endoftext|>"
    config = json.loads(text_files(model, keys)["tokenizer_config.json"])
    assert config["unk_token"] == "<unk>" and config["pad_token"] == "<|endoftext|>"
    assert config["add_bos_token"] is False
    assert not tokenizer_of(model, SENTENCEPIECE).has_chat_template


def test_a_turns_end_is_where_generation_ends(model):
    eot = {"tokenizer.ggml.eot_token_id": u32(2)}
    files = text_files(model, SENTENCEPIECE | eot)
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": 1,
        "eos_token_id": [2, TOKENS.index("<|endoftext|>"), TOKENS.index("<|end|>")],
        "pad_token_id": TOKENS.index("<|endoftext|>"),
    }
    config = json.loads(files["config.json"])
    assert config["model_type"] == "phi3" and config["architectures"] == ["Phi3ForCausalLM"]
    assert Phi3Config.from_dict(config) == GgufFile(model).config


# Byte-level tokenizers

# As Hugging Face's files of GPT-2, Phi-4 and Phi-4-mini have them.
WORDS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "dbrx": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def trained(pre: str) -> tokenizers.Tokenizer:
    source = tokenizers.Tokenizer(models.BPE())
    words = WORDS[pre]
    if isinstance(words, str):
        split = pre_tokenizers.Split(tokenizers.Regex(words), "removed", invert=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words = pre_tokenizers.Sequence([split, byte_level])
    source.pre_tokenizer = words
    source.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=MARKERS, show_progress=False
    )
    source.train_from_iterator(CORPUS, trainer)
    return source


def byte_level_keys(source: tokenizers.Tokenizer, pre: str) -> dict[str, tuple | None]:
    """As convert_hf_to_gguf writes a GPT-2 tokenizer, with five rows of padding."""
    parsed = json.loads(source.to_str())
    rows = source.get_vocab_size() + 5
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, i in parsed["model"]["vocab"].items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for token in parsed["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], int(TokenType.CONTROL)
    merges = [" ".join(pair) for pair in parsed["model"]["merges"]]
    end = u32(tokens.index("<|endoftext|>"))
    ids = {"bos_token_id": end, "eos_token_id": end}
    return tokenizer_keys(tokens, types, "gpt2", merges=merges, pre=text(pre), **ids)


GPT2 = byte_level_keys(trained("gpt-2"), "gpt-2")
ROWS = len(GPT2["tokenizer.ggml.tokens"][1])


@pytest.fixture(scope="module", params=list(WORDS))
def byte_level(request, tmp_path_factory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A file's tokenizer, and the one that it was made of."""
    source = trained(request.param)
    path = tmp_path_factory.mktemp("bytes") / "model.gguf"
    return tokenizer_of(path, byte_level_keys(source, request.param)), source


@settings(deadline=None, max_examples=60)
@given(
    st.text(st.sampled_from("thequickbrownfx aTnN,'sl é你🙂\n\r\t/123²"), max_size=40)
    | st.text(max_size=20)
    | st.sampled_from(TEXTS)
)
def test_a_byte_level_tokenizer_is_the_one_it_was_made_of(byte_level, sample):
    found, source = byte_level
    ids = source.encode(sample).ids
    assert found.encode(sample) == ids
    assert found.decode(ids) == source.decode(ids) == sample
    assert found.vocab_size == source.get_vocab_size()


def test_byte_level_markers_are_found(byte_level):
    found, source = byte_level
    sample = "<|user|>the<|end|><|endoftext|>"
    assert found.encode(sample) == source.encode(sample).ids
    assert found.decode(found.encode(sample)) == "the"
    assert found.eos_token_ids == {source.token_to_id("<|end|>"), source.token_to_id(MARKERS[0])}


@pytest.mark.parametrize(
    ("pre", "sample", "words"),
    [
        ("gpt-2", "I've 12345 Tests'LL\n\n  x", "I|'ve| 12345| Tests|'|LL|\n\n | x"),
        ("dbrx", "I've 12345 Tests'LL\n\n  x", "I|'ve| |123|45| Tests|'LL|\n\n| | x"),
        ("gpt-4o", "I've 12345 Tests'LL\n\n  x", "I've| |123|45| Tests'LL|\n\n| | x"),
        ("dbrx", "camelCase a/b/\n(été)", "camelCase| a|/b|/\n|(été|)"),
        ("gpt-4o", "camelCase a/b/\n(été)", "camel|Case| a|/b|/\n|(été|)"),
    ],
)
def test_words_are_those_of_the_pre_tokenizer(model, pre, sample, words):
    """As tiktoken's r50k, cl100k and o200k cut them."""
    built = text_files(model, GPT2 | {"tokenizer.ggml.pre": text(pre)})["tokenizer.json"]
    found = tokenizers.Tokenizer.from_str(built.decode())
    spans = [span for _, span in found.pre_tokenizer.pre_tokenize_str(sample)]
    assert [sample[a:b] for a, b in spans] == words.split("|")


@pytest.mark.parametrize(
    ("pre", "marker", "flags"),
    [
        ("dbrx", "<|im_sep|>", {"<|user|>": (True, True), "<|endoftext|>": (True, True)}),
        ("gpt-4o", "<|end|>", {"<|user|>": (False, True), "<|endoftext|>": (False, False)}),
        ("gpt-2", "<|end|>", {"<|user|>": (False, False), "<|endoftext|>": (False, False)}),
    ],
)
def test_strip_flags_are_those_of_phi_4(model, pre, marker, flags):
    tokens = [marker if t == "<|end|>" else t for t in GPT2["tokenizer.ggml.tokens"][1]]
    keys = GPT2 | {"tokenizer.ggml.pre": text(pre), "tokenizer.ggml.tokens": (None, tokens)}
    found = json.loads(text_files(model, keys)["tokenizer.json"])["added_tokens"]
    strips = {token["content"]: (token["lstrip"], token["rstrip"]) for token in found}
    assert {name: strips[name] for name in flags} == flags


# Tokenizers that are refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": text("bert")}, "tokenizer.ggml.model: found 'bert'; accepted: llama, gpt2. Lay"),
        ({"pre": text("qwen2")}, "tokenizer.ggml.pre: found 'qwen2'; accepted: gpt-2, dbrx, gpt"),
        ({"pre": None}, "tokenizer.ggml.pre: found 'default'"),
        ({"pre": text("x")}, "Lay the model's own tokenizer.json beside the file"),
        ({"merges": None}, "tokenizer.ggml.merges: found nothing; accepted: a list of strings"),
        ({"merges": (None, ["q zz"])}, "tokenizer.ggml.*: not a tokenizer: "),
        ({"merges": (None, ["qz"])}, "tokenizer.ggml.merges: found 'qz'; accepted: two tokens"),
        ({"model": text("llama")}, "tokenizer.ggml.scores: found nothing; accepted: a score for"),
        ({"tokens": (None, ["a"] * ROWS)}, "found 'a' as token 0 and as token 1"),
        ({"token_type": (None, [1, 1])}, f"found 2 values; accepted: one for each of the {ROWS}"),
        ({"tokens": (None, ["a"] * 500), "token_type": None}, "found 500 tokens; accepted: up to"),
        ({"add_bos_token": YES, "bos_token_id": None}, "add_bos_token: found true without"),
        ({"tokens": None}, "tokenizer.ggml.tokens: found nothing; accepted: a list of strings"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_named(model, changes, message):
    keys = GPT2 | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError) as error:
        text_files(model, keys, ROWS)
    assert message in str(error.value) and str(model) in str(error.value)
    assert "\n" not in str(error.value)


def test_tokens_that_are_not_text_are_refused(model):
    path = patched(
        write(model, keys=GPT2), lambda data: data.__setitem__(data.index(b"<|user"), 255)
    )
    refused(path, "damaged: 'utf-8' codec can't decode byte 0xff")


# Files beside the .gguf

TOY_FILES = ("tokenizer.json", "generation_config.json", "tokenizer_config.json")


def lay_beside(model: Path, *names: str) -> None:
    for name in names:
        (model.parent / name).write_bytes((TOY / name).read_bytes())


def test_a_tokenizer_beside_the_file_is_taken_instead(model):
    lay_beside(model, *TOY_FILES)
    (model.parent / "config.json").write_text("not looked at")
    (model.parent / "chat_template.jinja").write_text("{{ messages[0].content }}")
    keys = {"tokenizer.ggml.model": text("gpt2"), "tokenizer.ggml.pre": text("unknown")}
    keys |= tokenizer_keys(["a"] * 320, [TokenType.UNUSED] * 320, "gpt2")
    found = tokenizer_of(model, keys)
    assert found.encode("reverse") == Tokenizer.from_folder(TOY).encode("reverse")
    assert found.apply_chat_template([{"role": "user", "content": "x"}]) == "x"
    files = GgufFile(model).text_files()
    assert all(files[name] == (TOY / name).read_bytes() for name in TOY_FILES)
    assert json.loads(files["config.json"])["hidden_size"] == 64
    used = {file.name for file in GgufFile(model).input_files()}
    assert used == set(files) - {"config.json"} | {"model.gguf"}


def test_a_tokenizer_alone_beside_the_file_keeps_the_rest_of_the_metadata(model):
    lay_beside(model, "tokenizer.json")
    keys = {
        "tokenizer.ggml.eos_token_id": u32(260),
        "tokenizer.ggml.eot_token_id": u32(264),
        "tokenizer.chat_template": text("{{ messages[0].content }}"),
    }
    state = {EMBED: np.zeros((320, 64), np.float32)}
    files = GgufFile(write(model, state=state, keys=keys)).text_files()
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [260, 264]
    assert json.loads(files["tokenizer_config.json"])["chat_template"].startswith("{{ messages")
    assert files["tokenizer.json"] == (TOY / "tokenizer.json").read_bytes()


def test_other_files_do_not_count_without_a_tokenizer(model):
    (model.parent / "generation_config.json").write_text("not looked at")
    source = GgufFile(write(model))
    assert source.input_files() == [model]
    assert json.loads(source.text_files()["generation_config.json"])["eos_token_id"] == [2]


def test_another_models_tokenizer_beside_the_file_is_refused(model):
    beside = model.parent / "tokenizer.json"
    lay_beside(model, "tokenizer.json")
    with pytest.raises(CheckpointError, match="tokenizer.json: token .*: this is another model's"):
        text_files(model, GPT2)
    with pytest.raises(CheckpointError, match="found token 259; accepted: up to 39, the rows"):
        GgufFile(write(model)).text_files()
    for content in ("", "[]", '{"model": {}}', '{"model": {"vocab": {"a": "b"}}}'):
        beside.write_text(content)
        with pytest.raises(CheckpointError, match="tokenizer.json: found no vocabulary"):
            GgufFile(write(model)).text_files()


# A whole model


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_0])
def test_the_toy_checkpoint_comes_back(model, kind):
    config = Phi3Config.from_file(TOY)
    config = replace(config, eos_token_ids=(260,))
    checkpoint = Checkpoint(TOY, config)
    state = {name: checkpoint.tensor(name).astype(np.float32) for name in checkpoint.shapes}
    write(model, config, kind, state, {"tokenizer.ggml.padding_token_id": u32(260)})
    lay_beside(model, *TOY_FILES)
    source = resolve_source(model)
    assert isinstance(source, GgufFile)
    assert replace(source.config, rope_scaling=None, dtype=None) == replace(
        config, rope_scaling=None, dtype=None, original_max_position_embeddings=512
    )
    for long in (False, True):
        np.testing.assert_array_equal(source.config.inv_freq(long), config.inv_freq(long))
    assert source.config.attention_factor == config.attention_factor
    assert source.config.original_max_position_embeddings == 64
    weights = source.weights()
    for name, array in state.items():
        if kind in (Type.F32, Type.F16) or array.ndim == 1:
            np.testing.assert_array_equal(weights.tensor(name).astype(np.float32), array)
        else:
            expected = dequantize(quantize(array, kind), kind)
            np.testing.assert_array_equal(weights.tensor(name), expected)
    tokenizer, expected = Tokenizer.from_folder(model.parent), Tokenizer.from_folder(TOY)
    chat = [{"role": "user", "content": "add 3 4"}]
    assert tokenizer.encode_chat(chat) == expected.encode_chat(chat)
    assert set(source.text_files()) == {"config.json", *TOY_FILES}
