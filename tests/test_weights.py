"""Reading checkpoints: transformers' names and shapes, and everything that is refused."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Phi3Config as HFConfig
from transformers import Phi3ForCausalLM as HFModel

from phi3c.config import Phi3Config
from phi3c.errors import CheckpointError
from phi3c.weights import Checkpoint, RandomWeights, checkpoint_shapes

INDEX = "model.safetensors.index.json"
CONFIG = replace(
    Phi3Config.from_file(Path(__file__).parent.parent / "configs" / "tiny.json"),
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    rope_scaling=None,
)
TIED = replace(CONFIG, tie_word_embeddings=True)
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
QKV = "model.layers.0.self_attn.qkv_proj.weight"


def tensors(config: Phi3Config = CONFIG, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor that a checkpoint needs, filled from a seed."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in checkpoint_shapes(config).items()
    }


def save(folder: Path, state: dict[str, torch.Tensor], file: str = "model.safetensors") -> None:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / file)


def write_index(folder: Path, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, message: str, config: Phi3Config = CONFIG) -> None:
    """Asserts that the folder is refused, with `message` in the one line that says why."""
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder, config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Names and shapes

FAMILY = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide-head": {"head_dim": 24, "num_hidden_layers": 3},
    "odd-sizes": {"vocab_size": 131, "hidden_size": 36, "intermediate_size": 52, "head_dim": 10},
}


@pytest.mark.parametrize("name", list(FAMILY))
def test_shapes_are_those_of_transformers(name, tmp_path):
    base = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
    }
    model = HFModel(HFConfig(**base | FAMILY[name]))
    model.save_pretrained(tmp_path)
    config = Phi3Config.from_file(tmp_path)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected[HEAD]  # the same tensor under a second name
    assert checkpoint_shapes(config) == expected
    checkpoint = Checkpoint(tmp_path, config)
    for key in expected:
        np.testing.assert_array_equal(checkpoint.tensor(key), model.state_dict()[key].numpy())


# What is read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_keep_their_dtype_and_values(tmp_path, dtype):
    state = tensors(dtype=dtype)
    save(tmp_path, state)
    checkpoint = Checkpoint(tmp_path, CONFIG)
    for name, tensor in state.items():
        array = checkpoint.tensor(name)
        assert str(array.dtype) == str(dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())


def test_dtypes_may_be_mixed(tmp_path):
    state = tensors(dtype=torch.bfloat16)
    state[NORM] = state[NORM].float()
    save(tmp_path, state)
    checkpoint = Checkpoint(tmp_path, CONFIG)
    assert checkpoint.tensor(NORM).dtype == np.float32
    assert str(checkpoint.tensor(QKV).dtype) == "bfloat16"


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_read_with_and_without_an_index(tmp_path, with_index):
    state = tensors()
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        save(tmp_path, {n: t for n, t in state.items() if weight_map[n] == file}, file)
    if with_index:
        write_index(tmp_path, weight_map)
        save(tmp_path, {"optimizer.state": torch.zeros(3)}, "not-in-the-index.safetensors")
    checkpoint = Checkpoint(tmp_path, CONFIG)
    for name, tensor in state.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), tensor.numpy())


def test_a_pickle_beside_safetensors_is_not_looked_at(tmp_path):
    save(tmp_path, tensors())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert Checkpoint(tmp_path, CONFIG).tensor(NORM).shape == (8,)


def test_rotary_buffers_of_old_checkpoints_are_left_out(tmp_path):
    save(tmp_path, tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert Checkpoint(tmp_path, CONFIG).tensor(QKV).shape == (16, 8)


# What is refused


def test_a_missing_tensor_is_named(tmp_path):
    state = tensors()
    del state[NORM]
    save(tmp_path, state)
    refused(tmp_path, f"missing tensor {NORM}")


def test_several_missing_tensors_are_counted(tmp_path):
    save(tmp_path, {EMBED: tensors()[EMBED]})
    refused(tmp_path, "missing tensor model.layers.0.input_layernorm.weight and 7 more")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.qkv_proj.bias", "x"]
)
def test_a_tensor_left_over_is_named(tmp_path, name):
    save(tmp_path, tensors() | {name: torch.ones(8)})
    refused(tmp_path, f"{name}: not a tensor of this config's model")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    state = tensors()
    save(tmp_path, state, "model-1.safetensors")
    save(tmp_path, {NORM: state[NORM]}, "model-2.safetensors")
    refused(tmp_path, f"{NORM}: found in {tmp_path}/model-1.safetensors and in {tmp_path}")


@pytest.mark.parametrize("shape", [(8, 16), (16, 9), (128,), (1, 16, 8)])
def test_a_misshaped_tensor_is_refused(tmp_path, shape):
    save(tmp_path, tensors() | {QKV: torch.zeros(shape)})
    refused(tmp_path, f"{QKV}: found shape {list(shape)}; accepted: [16, 8]")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8")]
)
def test_another_dtype_is_refused(tmp_path, dtype, name):
    save(tmp_path, tensors() | {NORM: torch.ones(8).to(dtype)})
    refused(tmp_path, f"{NORM}: found dtype {name}")
    refused(tmp_path, "accepted: F32, F16, BF16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, dtype, value):
    state = tensors(dtype=dtype)
    state[QKV][7, 3] = value
    save(tmp_path, state)
    checkpoint = Checkpoint(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=f"{QKV}: found NaN or infinite values"):
        checkpoint.tensor(QKV)
    assert np.isfinite(checkpoint.tensor(NORM)).all()


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    save(tmp_path, tensors())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, f"{path}: not a whole safetensors file")


def test_a_git_lfs_pointer_is_refused(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    refused(tmp_path, "model.safetensors: not a whole safetensors file")


def test_a_header_that_lies_about_its_length_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(tmp_path, "not a whole safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_refused_with_the_way_out(tmp_path, name):
    torch.save(tensors(), tmp_path / name)
    refused(tmp_path, f"found {name}, a pickle, which can run code when read")
    refused(tmp_path, "save_pretrained")


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, f"{tmp_path}: no *.safetensors file")


# The index of a sharded checkpoint


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    save(tmp_path, tensors(), "model-1.safetensors")
    write_index(tmp_path, {EMBED: "model-1.safetensors", NORM: "model-2.safetensors"})
    refused(tmp_path, f"{tmp_path}/model-2.safetensors: no such file, but {INDEX} names it")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "sub/x.safetensors"]
)
def test_an_index_cannot_name_a_file_elsewhere(tmp_path, name):
    save(tmp_path, tensors())
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_index(folder, {EMBED: name})
    refused(folder, f"found file {name!r}; accepted: names in the folder")


@pytest.mark.parametrize("name", ["..", ".", "", 3, None, ["a"], {}])
def test_an_index_must_name_files(tmp_path, name):
    save(tmp_path, tensors())
    write_index(tmp_path, {EMBED: name})
    refused(tmp_path, str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": []}', "[" * 100_000]
)
def test_a_broken_index_is_refused(tmp_path, text):
    save(tmp_path, tensors())
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, f"{INDEX}: not a weight index")


def test_an_index_that_leaves_a_shard_out_is_missing_tensors(tmp_path):
    state = tensors()
    head = {HEAD: state.pop(HEAD)}
    save(tmp_path, state, "model-1.safetensors")
    save(tmp_path, head, "model-2.safetensors")
    write_index(tmp_path, {EMBED: "model-1.safetensors"})
    refused(tmp_path, f"missing tensor {HEAD}")


# Tied embeddings


def test_a_tied_head_may_be_absent_or_equal(tmp_path):
    state = tensors(TIED)
    assert HEAD not in state
    save(tmp_path / "absent", state)
    save(tmp_path / "equal", state | {HEAD: state[EMBED].clone()})
    for name in ("absent", "equal"):
        found = Checkpoint(tmp_path / name, TIED).tensor(EMBED)
        np.testing.assert_array_equal(found, state[EMBED].numpy())


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_tied_head_in_another_shard_is_compared_too(tmp_path, scale):
    state = tensors(TIED)
    save(tmp_path, state, "model-2.safetensors")
    save(tmp_path, {HEAD: state[EMBED] * scale}, "model-1.safetensors")
    if scale == 1:
        assert Checkpoint(tmp_path, TIED).tensor(EMBED).shape == (10, 8)
    else:
        refused(tmp_path, f"{HEAD} differs from {EMBED}, but config.json says tie", TIED)


def test_a_tied_head_of_another_shape_differs(tmp_path):
    state = tensors(TIED)
    save(tmp_path, state | {HEAD: state[EMBED][:5].clone()})
    refused(tmp_path, f"{HEAD} differs", TIED)


def test_a_head_that_is_not_tied_is_required(tmp_path):
    save(tmp_path, tensors(TIED))
    refused(tmp_path, f"missing tensor {HEAD}")


# Random weights


def test_random_weights_depend_on_the_seed_and_the_name_alone():
    first, again, other = (
        RandomWeights(CONFIG, 1),
        RandomWeights(CONFIG, 1),
        RandomWeights(CONFIG, 2),
    )
    names = list(checkpoint_shapes(CONFIG))
    expected = {name: first.tensor(name) for name in names}
    for name in reversed(names):  # in whatever order they are asked for
        np.testing.assert_array_equal(again.tensor(name), expected[name])
        assert not np.array_equal(other.tensor(name), expected[name])
    deeper = RandomWeights(replace(CONFIG, num_hidden_layers=3), 1)
    np.testing.assert_array_equal(deeper.tensor(QKV), expected[QKV])
    assert not np.array_equal(expected[EMBED], expected[HEAD])


def test_random_weights_have_the_shapes_and_a_sane_scale():
    config = replace(CONFIG, hidden_size=64, intermediate_size=128)
    weights = RandomWeights(config, 0)
    for name, shape in checkpoint_shapes(config).items():
        array = weights.tensor(name)
        assert array.shape == shape and array.dtype == np.float32
        assert abs(array.mean() - ("norm" in name)) < 0.01
        assert 0.01 < array.std() < 0.03


def test_a_tensor_twice_in_one_header_is_refused(tmp_path):
    save(tmp_path, tensors())
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    twice = json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'
    text = twice.encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(tmp_path, f"{NORM}: found in ")
