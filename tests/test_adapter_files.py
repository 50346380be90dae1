"""PEFT adapter folders: the truth is what PEFT computes of them; what is refused, and how."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import BASE
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import Phi3Config as HFConfig
from transformers import Phi3ForCausalLM as HFModel

from phi3c import hub
from phi3c.adapters.layout import TARGETS, target_shape
from phi3c.adapters.peft_config import CONFIG_FILE, PeftScales
from phi3c.adapters.peft_files import WEIGHTS_FILE, adapter_folder, read_adapter
from phi3c.adapters.weights import AdapterWeights
from phi3c.config import Phi3Config
from phi3c.errors import AdapterError

CONFIG = Phi3Config.from_dict(HFConfig(**copy.deepcopy(BASE)).to_dict())
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Deltas = dict[tuple[int, str], np.ndarray]


def base_model(split: bool):
    """Phi-3, or a model whose linears have the same shapes and the names of split checkpoints."""
    fields = {k: v for k, v in BASE.items() if not k.startswith(("original", "sliding"))}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**fields)) if split else HFModel(HFConfig(**BASE))
    return model.eval()


def save_adapter(folder: Path, dtype=torch.float32, seed: int = 0, **lora) -> None:
    """A random adapter of LoraConfig(**lora), saved by PEFT."""
    split = not set(lora["target_modules"]) <= set(TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rslora with patterns
        model = get_peft_model(base_model(split), LoraConfig(**lora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.to(dtype).save_pretrained(folder)


def deltas_of_peft(folder: Path, split: bool) -> Deltas:
    """What PEFT adds to each target's weight when it loads the folder."""
    model = PeftModel.from_pretrained(base_model(split), folder)
    deltas: Deltas = {}
    sizes = {"q_proj": (0, 64), "k_proj": (64, 32), "v_proj": (96, 32)}
    sizes |= {"gate_proj": (0, 96), "up_proj": (96, 96)}
    for name, module in model.named_modules():
        if "default" not in getattr(module, "lora_A", {}):
            continue
        layer, linear = int(name.split(".layers.")[1].split(".")[0]), name.rpartition(".")[2]
        target = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj"}.get(linear[0], linear)
        target = "gate_up_proj" if linear in ("gate_proj", "up_proj") else target
        target = linear if linear in TARGETS else target
        start, rows = sizes.get(linear, (0, target_shape(CONFIG, target)[0]))
        whole = deltas.setdefault((layer, target), np.zeros(target_shape(CONFIG, target), "f4"))
        delta = module.get_delta_weight("default").detach().float().numpy()
        whole[start : start + rows] = delta
    return deltas


def merged_by_peft(checkpoint: Path, folder: Path, split: bool) -> HFModel:
    """The checkpoint's model with PEFT's deltas added to its weights."""
    model = HFModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        for (layer, target), delta in deltas_of_peft(folder, split).items():
            block = model.model.layers[layer]
            block = block.self_attn if target in ("qkv_proj", "o_proj") else block.mlp
            getattr(block, target).weight += torch.from_numpy(delta)
    return model


def check(folder: Path, split: bool) -> AdapterWeights:
    """Asserts that what is read is what PEFT computes."""
    read, expected = read_adapter(folder, CONFIG), deltas_of_peft(folder, split)
    assert expected and list(read.low_rank) == sorted(
        expected, key=lambda key: (key[0], TARGETS.index(key[1]))
    )
    for key, delta in expected.items():
        low_rank = read.low_rank[key]
        assert low_rank.a.dtype == low_rank.b.dtype == np.float32
        found = low_rank.b.astype("f8") @ low_rank.a.astype("f8")
        assert np.abs(found - delta).max() <= 1e-5 * np.abs(delta).max(), key
    assert read.rank == max(low_rank.rank for low_rank in read.low_rank.values())
    return read


FUSED = {
    "all": dict(r=4, lora_alpha=16, target_modules=list(TARGETS)),
    "rslora": dict(r=8, lora_alpha=5, use_rslora=True, target_modules=list(TARGETS)),
    "one target": dict(r=3, lora_alpha=1, target_modules=["o_proj"]),
    "one layer": dict(r=4, target_modules=["qkv_proj", "down_proj"], layers_to_transform=[1]),
    "no scale": dict(r=4, lora_alpha=0, target_modules=["qkv_proj"]),
    "half a number": dict(r=4, lora_alpha=0.5, target_modules=["gate_up_proj"]),
    "without": dict(r=4, target_modules=list(TARGETS), exclude_modules=["layers.0.mlp.down_proj"]),
    "gaussian": dict(r=4, target_modules=["qkv_proj"], init_lora_weights="gaussian"),
    "orthogonal": dict(r=4, target_modules=["qkv_proj"], init_lora_weights="orthogonal"),
    "mica": dict(r=4, target_modules=["qkv_proj"], init_lora_weights="mica"),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=list(TARGETS),
        rank_pattern={"qkv_proj": 2, r"layers\.1\.mlp\..*": 6},
        alpha_pattern={"self_attn.o_proj": 3, "^model.layers.0.mlp.down_proj": 40, "proj": 1000},
    ),
    "the first pattern counts": dict(
        r=4,
        lora_alpha=8,
        target_modules=list(TARGETS),
        alpha_pattern={r".*\.mlp\..*": 2, r"layers.0.*": 30, "down_proj": 400, "v_proj": 5000},
    ),
    "patterns and rslora": dict(
        r=4,
        use_rslora=True,
        target_modules=list(TARGETS),
        rank_pattern={"o_proj": 9},
        alpha_pattern={"o_proj": 7},
    ),
}
UNFUSED = {
    "all parts": dict(r=4, lora_alpha=16, target_modules=SPLIT),
    "q and v": dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "k": dict(r=4, target_modules=["k_proj"]),
    "up": dict(r=4, target_modules=["up_proj"]),
    "gate, rslora": dict(r=4, use_rslora=True, target_modules=["gate_proj"]),
    "some layers": dict(r=4, target_modules=SPLIT, layers_to_transform=[1]),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=SPLIT,
        rank_pattern={"q_proj": 2, "v_proj": 5, r"1\.mlp\.up_proj": 7},
        alpha_pattern={"k_proj": 3, "layers.0.mlp.gate_proj": 40, "qkv_proj": 1000},
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_names(name, tmp_path):
    save_adapter(tmp_path, **FUSED[name])
    check(tmp_path, split=False)


@pytest.mark.parametrize("name", UNFUSED)
def test_names_of_split_checkpoints(name, tmp_path):
    save_adapter(tmp_path, **UNFUSED[name])
    check(tmp_path, split=True)


def test_parts_are_stacked(tmp_path):
    save_adapter(tmp_path, r=4, target_modules=SPLIT, rank_pattern={"q_proj": 2})
    read = check(tmp_path, split=True)
    qkv, gate_up = read.low_rank[0, "qkv_proj"], read.low_rank[0, "gate_up_proj"]
    assert (qkv.rank, gate_up.rank, read.rank) == (10, 8, 10)
    assert (qkv.b != 0).sum() == 64 * 2 + 32 * 4 + 32 * 4  # nothing beside the diagonal
    assert read_adapter(tmp_path, CONFIG, max_rank=10).digest == read.digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("split", [False, True])
def test_half_precision(dtype, split, tmp_path):
    save_adapter(tmp_path, dtype, r=4, target_modules=SPLIT if split else list(TARGETS))
    assert {str(a.dtype) for a in load_file(tmp_path / WEIGHTS_FILE).values()} == {str(dtype)[6:]}
    check(tmp_path, split)


def test_how_the_adapter_was_initialised_does_not_matter(tmp_path):
    save_adapter(tmp_path, **FUSED["all"])
    edit(tmp_path, init_lora_weights="eva", eva_config={"rho": 2.0})
    check(tmp_path, split=False)


def test_the_rank_is_that_of_the_tensors(tmp_path):
    """Not what the config says, which some tools do not keep up to date."""
    save_adapter(tmp_path, r=8, lora_alpha=16, target_modules=["o_proj"])
    expected = read_adapter(tmp_path, CONFIG).low_rank
    edit(tmp_path, r=64, rank_pattern={"o_proj": 32})
    for key, low_rank in read_adapter(tmp_path, CONFIG).low_rank.items():
        np.testing.assert_array_equal(low_rank.b, expected[key].b)


def test_the_digest_is_that_of_what_is_computed(tmp_path):
    def digest(**edits) -> str:
        edit(tmp_path, **edits)
        return read_adapter(tmp_path, CONFIG).digest

    save_adapter(tmp_path, **FUSED["all"])
    first = digest()
    assert digest(task_type="CAUSAL_LM", lora_dropout=0.5) == first
    assert len({first, digest(lora_alpha=17), digest(use_rslora=True)}) == 3
    edit(tmp_path, lora_alpha=16, use_rslora=False)
    assert digest() == first
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors[KEY.format("B")][-1, -1] += 1
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    assert digest() != first


@pytest.mark.parametrize(
    "pattern, module, fits",
    [
        ("o_proj", "model.layers.3.self_attn.o_proj", True),
        ("proj", "model.layers.3.self_attn.o_proj", False),
        ("self_attn.o_proj", "model.layers.3.self_attn.o_proj", True),
        (r"layers\.\d+\.self_attn\..*", "model.layers.13.self_attn.o_proj", True),
        ("layers.3", "model.layers.3.self_attn.o_proj", False),
        ("^model.layers.3.self_attn.o_proj", "model.layers.3.self_attn.o_proj", True),
    ],
)
def test_patterns(pattern, module, fits):
    scales = PeftScales(2, ((pattern, 12),), rslora=False)
    assert scales.scale(module, 4) == (3 if fits else 0.5)
    assert PeftScales(2, ((pattern, 12),), True).scale(module, 9) == (12 if fits else 2) / 3


# What is refused

KEY = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_{}.weight"


def edit(folder: Path, **fields) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "a"
    save_adapter(folder, r=4, lora_alpha=8, target_modules=list(TARGETS))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def refused(folder: Path, *parts: str, config: Phi3Config = CONFIG, max_rank=None) -> None:
    """Asserts that the folder is refused in one line that has all parts."""
    with pytest.raises(AdapterError) as error:
        read_adapter(folder, config, max_rank)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    for part in parts:
        assert part in message
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize(
    "field, value, found",
    [
        ("peft_type", "LOHA", '"LOHA"'),
        ("peft_type", "ADALORA", '"ADALORA"'),
        ("peft_type", None, "null"),
        ("bias", "all", '"all"'),
        ("bias", "lora_only", '"lora_only"'),
        ("use_dora", True, "true"),
        ("modules_to_save", ["embed_tokens", "lm_head"], '["embed_tokens", "lm_head"]'),
        ("trainable_token_indices", [5], "[5]"),
        ("trainable_token_indices", {"embed_tokens": [5]}, '{"embed_tokens": [5]}'),
        ("lora_bias", True, "true"),
        ("fan_in_fan_out", True, "true"),
        ("target_parameters", ["mlp.w"], '["mlp.w"]'),
        ("layer_replication", [[0, 2], [1, 2]], "[[0, 2], [1, 2]]"),
        ("alora_invocation_tokens", [1, 2], "[1, 2]"),
        ("use_qalora", True, "true"),
        ("use_bdlora", {"nblocks": 2}, '{"nblocks": 2}'),
        ("arrow_config", {"top_k": 3}, '{"top_k": 3}'),
        ("kasa_config", {"beta": 1}, '{"beta": 1}'),
        ("kasa_config", {}, "{}"),
        ("monteclora_config", {"n": 1}, '{"n": 1}'),
        ("megatron_config", {"x": 1}, '{"x": 1}'),
        ("use_something_new", True, "true"),
        ("something_new_config", {"x": 1}, '{"x": 1}'),
        ("init_lora_weights", "pissa", '"pissa"'),
        ("init_lora_weights", "pissa_niter_4", '"pissa_niter_4"'),
        ("init_lora_weights", "olora", '"olora"'),
        ("init_lora_weights", "corda", '"corda"'),
        ("init_lora_weights", "loftq", '"loftq"'),
        ("init_lora_weights", "lora_ga", '"lora_ga"'),
        ("r", 0, "0"),
        ("r", "16", '"16"'),
        ("rank_pattern", {"q_proj": 0}, "0"),
        ("rank_pattern", [1], "[1]"),
        ("lora_alpha", "16", '"16"'),
        ("lora_alpha", True, "true"),
        ("lora_alpha", math.nan, "NaN"),
        ("lora_alpha", 10**400, "1000"),
        ("alpha_pattern", {"o_proj": None}, "null"),
        ("alpha_pattern", {"(": 1}, '"("'),
        ("alpha_pattern", {"((a|b)+)+x": 1}, '"((a|b)+)+x", which may take very long to match'),
        ("alpha_pattern", {".?.?.?.?x": 1}, '".?.?.?.?x", which may take very long to match'),
        ("alpha_pattern", {"(|.)" * 4: 1}, '"(|.)(|.)(|.)(|.)", which may take very long to match'),
        ("alpha_pattern", {".*.*.*.*x": 1}, '".*.*.*.*x", which may take very long to match'),
        ("alpha_pattern", {"(?i)o_proj": 1}, '"(?i)o_proj" (global flags'),
        ("use_rslora", "yes", '"yes"'),
    ],
)
def test_a_config_that_is_not_supported(folder, field, value, found):
    edit(folder, **{field: value})
    refused(folder, f"{folder / CONFIG_FILE}: {field}: ", f"found {found}", "; accepted: ")


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_switches_that_are_off(folder, value):
    before = read_adapter(folder, CONFIG).digest
    switches = ("use_dora", "modules_to_save", "layer_replication", "use_new", "new_config")
    edit(folder, **dict.fromkeys(switches, value), init_lora_weights=None, arrow_config=None)
    assert read_adapter(folder, CONFIG).digest == before


def test_pissa_changes_the_base_model(folder):
    """Why it is refused: PEFT's model is no longer the base model and the adapter's delta."""
    edit(folder, init_lora_weights="pissa")
    model = PeftModel.from_pretrained(base_model(False), folder)
    before = base_model(False).model.layers[0].self_attn.qkv_proj.weight
    after = model.base_model.model.model.layers[0].self_attn.qkv_proj.base_layer.weight
    assert (before - after).abs().max() > 1e-3


def test_no_alpha(folder):
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["lora_alpha"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    refused(folder, "lora_alpha: found nothing; accepted: a number")


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000, "[]", "3", "null"])
def test_a_config_that_is_none(folder, text):
    (folder / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    refused(folder, CONFIG_FILE, "accepted: an object" if text in ("[]", "3", "null") else "JSON")


def rewrite(folder: Path, change) -> None:
    """change: of the dict of tensors, in place."""
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / WEIGHTS_FILE)


def put(key: str, value):
    return lambda tensors: tensors.update({key: value})


def move(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


A, B = KEY.format("A"), KEY.format("B")
ONE = np.ones((4, 64), np.float32)


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda t: t.pop(B), [f"{A}: found without {B}; accepted: both"]),
        (lambda t: t.pop(A), [f"{B}: found without {A}; accepted: both"]),
        (put(A, ONE[:, :32]), [f"{A}: found shape [4, 32]; accepted: [rank, 64]"]),
        (put(A, ONE[0]), [f"{A}: found shape [64]; accepted: [rank, 64]"]),
        (put(A, ONE[:0]), [f"{A}: found rank 0; accepted: 1 or more"]),
        (put(A, ONE[:3]), [f"{B}: found shape [128, 4]; accepted: [128, 3]"]),
        (put(B, ONE), [f"{B}: found shape [4, 64]; accepted: [128, 4]"]),
        (put(A, ONE * np.float32(np.nan)), [f"{A}: found NaN or infinite values"]),
        (put(B, np.full((128, 4), np.inf, "f4")), [f"{B}: found NaN or infinite values"]),
        (
            put(B, np.full((128, 4), 3e38, "f4")),
            [f"{B}: found values beyond float32", "scaled by 2"],
        ),
        (put(A, ONE.astype("f8")), [f"{A}: found dtype F64; accepted: F32, F16, BF16"]),
        (put(A, ONE.astype("i4")), [f"{A}: found dtype I32"]),
        (
            put(A.replace("layers.0", "layers.2"), ONE),
            ["layers.2.self_attn.qkv_proj.lora_A.weight: found layer 2; accepted: 0 to 1"],
        ),
        (
            put(A.replace("qkv_proj", "q_proj"), ONE),
            ["layers.0.self_attn.q_proj.lora_A.weight: found without"],
        ),
        (
            put("base_model.model.lm_head.lora_A.weight", ONE),
            ["base_model.model.lm_head.lora_A.weight: found weights of the LM head; accepted: "],
        ),
        (
            put("base_model.model.lm_head.weight", ONE),
            ["base_model.model.lm_head.weight: found weights of the LM head"],
        ),
        (
            put("base_model.model.model.embed_tokens.lora_embedding_A", ONE),
            ["model.embed_tokens.lora_embedding_A: found weights of the embedding; accepted: "],
        ),
        (
            put("base_model.model.model.embed_tokens.weight", ONE),
            ["model.embed_tokens.weight: found weights of the embedding"],
        ),
        (
            put(A.replace("lora_A.weight", "lora_magnitude_vector"), ONE),
            ["lora_magnitude_vector: not a part of a LoRA adapter"],
        ),
        (put(B.replace("weight", "bias"), ONE), ["lora_B.bias: not a part of a LoRA adapter"]),
        (put("x", ONE), [f"{WEIGHTS_FILE}: x: not a part of a LoRA adapter"]),
        (put(A.replace("lora_A", "lora_A.default"), ONE), ["lora_A.default.weight: not a part"]),
        (put(A.replace("layers.0", "layers.00"), ONE), ["layers.00.self_attn.qkv_proj"]),
        (put(A.replace("self_attn", "mlp"), ONE), ["mlp.qkv_proj.lora_A.weight: not a part"]),
        (move(A, A.removeprefix("base_model.")), [": model.model.layers.0.self_attn.qkv_proj"]),
        (lambda t: t.clear(), ["no tensor matches this model: found 0 tensors; accepted: base_"]),
        (
            lambda t: (t.clear(), t.update({"transformer.h.0.attn.lora_A.weight": ONE})),
            ["no tensor matches", "1 tensors, such as transformer.h.0.attn.lora_A.weight"],
        ),
    ],
)
def test_tensors_that_are_not_supported(folder, change, parts):
    rewrite(folder, change)
    refused(folder, str(folder / WEIGHTS_FILE), *parts)


@pytest.mark.parametrize("linear", ["q_proj", "v_proj"])
def test_fused_and_unfused_names_of_one_layer(folder, linear):
    rows = 64 if linear == "q_proj" else 32
    part = A.replace("qkv_proj", linear)

    def change(tensors):
        tensors[part] = ONE
        tensors[part.replace("lora_A", "lora_B")] = np.ones((rows, 4), np.float32)

    rewrite(folder, change)
    refused(folder, f"layer 0: found {A} and {part}; accepted: either qkv_proj or its parts")


def test_fused_and_unfused_names_of_different_layers(tmp_path):
    save_adapter(tmp_path / "a", r=4, target_modules=["qkv_proj"], layers_to_transform=[0])
    save_adapter(tmp_path / "b", r=4, target_modules=["q_proj"], layers_to_transform=[1])
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE) | load_file(tmp_path / "b" / WEIGHTS_FILE)
    save_file(tensors, tmp_path / "a" / WEIGHTS_FILE)
    assert list(read_adapter(tmp_path / "a", CONFIG).low_rank) == [
        (0, "qkv_proj"),
        (1, "qkv_proj"),
    ]


@pytest.mark.parametrize("fields", [{"hidden_size": 128}, {"intermediate_size": 128}])
def test_a_base_model_of_other_dimensions(folder, fields):
    other = Phi3Config.from_dict(HFConfig(**copy.deepcopy(BASE | fields)).to_dict())
    refused(folder, "found shape", "from this model's dimensions", config=other)


def test_a_rank_beyond_the_slots(folder, tmp_path):
    assert read_adapter(folder, CONFIG, max_rank=4).rank == 4
    refused(folder, "layer 0: qkv_proj: found rank 4; accepted: up to 3 (max_rank)", max_rank=3)
    split = tmp_path / "split"
    save_adapter(split, r=4, target_modules=SPLIT, rank_pattern={"k_proj": 6})
    refused(
        split,
        "qkv_proj: found rank 14 (q_proj 4 + k_proj 6 + v_proj 4); accepted: up to 8",
        max_rank=8,
    )


@pytest.mark.parametrize("size", [0, 5, 100, 3000])
def test_a_file_that_is_cut_off(folder, size):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, str(path), "not a whole safetensors file")


def test_a_pickle(folder):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    refused(folder, "found adapter_model.bin, a pickle", f"accepted: {WEIGHTS_FILE}")


def test_missing_files(folder):
    (folder / WEIGHTS_FILE).unlink()
    refused(folder, f"no {WEIGHTS_FILE}; accepted: PEFT's adapter folder")
    (folder / CONFIG_FILE).unlink()
    refused(folder, f"no {CONFIG_FILE}; accepted: PEFT's adapter folder")


def test_what_names_a_folder(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "download_files", lambda *args: asked.append(args) or folder)
    assert adapter_folder(folder) == adapter_folder(str(folder)) == folder and not asked
    assert adapter_folder("owner/adapter") == folder
    assert asked == [("owner/adapter", (CONFIG_FILE, WEIGHTS_FILE), "a LoRA adapter")]
    for source, found in (("no/such/folder", "no such folder"), (folder / CONFIG_FILE, "a file")):
        with pytest.raises(AdapterError, match=f"{re.escape(str(source))}: {found}; accepted: "):
            adapter_folder(source)


def test_bfloat16_is_exact(folder):
    values = np.float32([1.0, 2.0**-100, -3.5e30, 1.0078125])
    rewrite(folder, put(A, np.resize(values, (4, 64)).astype(ml_dtypes.bfloat16)))
    rewrite(folder, put(B, np.ones((128, 4), np.float32)))
    read = read_adapter(folder, CONFIG).low_rank[0, "qkv_proj"]
    np.testing.assert_array_equal(read.a, np.resize(values, (4, 64)).astype(ml_dtypes.bfloat16))
