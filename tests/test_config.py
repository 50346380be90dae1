"""Phi3Config: what it reads, what it refuses and in which words, and its rotary maths.

The oracle is transformers: its Phi3Config for defaults and saved files, its Phi3RotaryEmbedding for
frequencies and the attention factor.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Phi3Config as HfPhi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from phi3c.config import Phi3Config, RopeScaling
from phi3c.errors import ConfigError, Phi3CError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DROP = object()  # in a change: remove the key

SHORT = [1.0, 1.01, 1.02, 1.05, 1.1, 1.2, 1.3, 1.4]
LONG = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.5, 8.0]
FACTORS = {"short_factor": SHORT, "long_factor": LONG}
LONGROPE = {"type": "longrope", **FACTORS}

PLAIN = {
    "model_type": "phi3",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
LONG_CONTEXT = {**PLAIN, "original_max_position_embeddings": 32, "rope_scaling": LONGROPE}


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    merged = {**base, **changes}
    return {key: value for key, value in merged.items() if value is not DROP}


# ---------------------------------------------------------------------------------- forms accepted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": DROP},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": None, "type": None, "factor": None}},
        {"rope_theta": 10000},
        {"rope_theta": DROP},
        {"rope_theta": DROP, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": None},
        {"partial_rotary_factor": 1.0},
        {"partial_rotary_factor": None},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1}},
        {"head_dim": 16},
        {"head_dim": None},
        {"vocab_size": 256.0},
        {
            "original_max_position_embeddings": 4096
        },  # transformers' default, unused without longrope
        {"original_max_position_embeddings": 256},
        {"rms_norm_eps": DROP},
        {"tie_word_embeddings": DROP},
        {"sliding_window": DROP},
        {"hidden_act": DROP},
        {"eos_token_id": [2]},
        {"torch_dtype": DROP, "dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"attention_bias": False, "mlp_bias": False, "lm_head_bias": None},
        {"quantization_config": None},
        {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attention_dropout": 0.1},
        {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "full_attn_mod": 1},
        {"architectures": ["Phi3ForCausalLM"], "use_cache": True, "initializer_range": 0.02},
    ],
    ids=lambda changes: json.dumps(changes, default=lambda _: "absent"),
)
def test_forms_of_the_plain_config(changes: dict[str, Any]) -> None:
    config = Phi3Config.from_dict(changed(PLAIN, **changes))
    assert config == Phi3Config.from_dict(PLAIN)
    assert config.rope_scaling is None
    assert config.original_max_position_embeddings == 256
    assert config.inv_freq(long=True).tolist() == config.inv_freq(long=False).tolist()
    assert not config.needs_long_factors(10**6)
    assert config.attention_factor == 1.0


IN_PARAMETERS = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 32,
    **FACTORS,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": {"type": "su", **FACTORS}},
        {"rope_scaling": {"type": "yarn", **FACTORS}},
        {"rope_scaling": {"rope_type": "longrope", **FACTORS}},
        {"rope_scaling": {"rope_type": "su", **FACTORS}},
        {"rope_scaling": {"rope_type": "yarn", **FACTORS}},
        # What transformers 5 saves after it has read an old file: both spellings side by side.
        {"rope_scaling": {"rope_type": "longrope", "type": "su", **FACTORS}},
        {"rope_scaling": {"rope_type": "longrope", "type": "yarn", **FACTORS}},
        {
            "original_max_position_embeddings": DROP,
            "rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32},
        },
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32}},
        {"rope_scaling": {**LONGROPE, "rope_theta": 10000, "partial_rotary_factor": 1.0}},
        {"rope_scaling": {**LONGROPE, "factor": None, "attention_factor": None}},
        {"rope_scaling": {**LONGROPE, "beta_fast": 32, "short_mscale": None}},
        {
            "rope_theta": DROP,
            "original_max_position_embeddings": DROP,
            "rope_scaling": DROP,
            "rope_parameters": IN_PARAMETERS,
        },
        {"rope_scaling": None, "rope_parameters": IN_PARAMETERS},
        {"rope_parameters": IN_PARAMETERS},
    ],
    ids=lambda changes: re.sub(
        r'"(short|long)_factor": \[.*?\],? ?', "", json.dumps(changes, default=lambda _: "absent")
    ),
)
def test_forms_of_the_longrope_config(changes: dict[str, Any]) -> None:
    config = Phi3Config.from_dict(changed(LONG_CONTEXT, **changes))
    assert config == Phi3Config.from_dict(LONG_CONTEXT)
    assert config.rope_scaling == RopeScaling(short_factor=tuple(SHORT), long_factor=tuple(LONG))
    assert config.original_max_position_embeddings == 32
    assert not config.needs_long_factors(32)
    assert config.needs_long_factors(33)


def test_partial_rotary_factor_at_the_top_or_inside() -> None:
    rope = {"short_factor": SHORT[:6], "long_factor": LONG[:6]}
    top = changed(LONG_CONTEXT, partial_rotary_factor=0.75, rope_scaling={"type": "su", **rope})
    inside = changed(
        LONG_CONTEXT,
        rope_scaling=DROP,
        rope_parameters={"rope_type": "longrope", "partial_rotary_factor": 0.75, **rope},
    )
    config = Phi3Config.from_dict(top)
    assert config == Phi3Config.from_dict(inside)
    assert config.rotary_dim == 12
    assert config.inv_freq(long=True).shape == (6,)


@pytest.mark.parametrize("absent", [DROP, None])
def test_key_value_heads_default_to_the_attention_heads(absent: Any) -> None:
    config = Phi3Config.from_dict(changed(PLAIN, num_key_value_heads=absent))
    assert (config.num_key_value_heads, config.num_query_groups) == (4, 1)


def test_head_dim_need_not_be_hidden_over_heads() -> None:
    config = Phi3Config.from_dict(changed(PLAIN, hidden_size=65, head_dim=32))
    assert (config.head_dim, config.rotary_dim) == (32, 32)


@pytest.mark.parametrize(
    ("eos", "ids"), [(2, (2,)), ([2, 7, 32000], (2, 7, 32000)), ([], ()), (None, ())]
)
def test_eos_token_id_is_one_many_or_none(eos: Any, ids: tuple[int, ...]) -> None:
    assert Phi3Config.from_dict(changed(PLAIN, eos_token_id=eos)).eos_token_ids == ids


def test_null_token_ids_are_none_and_absent_ones_default() -> None:
    nulls = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = Phi3Config.from_dict(changed(PLAIN, **nulls))
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (), None)
    config = Phi3Config.from_dict(changed(PLAIN, **dict.fromkeys(nulls, DROP)))
    hf = HfPhi3Config()
    assert (config.bos_token_id, config.pad_token_id) == (hf.bos_token_id, hf.pad_token_id)
    assert config.eos_token_ids == (hf.eos_token_id,)


def test_absent_keys_default_as_in_transformers() -> None:
    required = {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    config, hf = Phi3Config.from_dict(required), HfPhi3Config()
    for field in (
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "sliding_window",
        "tie_word_embeddings",
        "hidden_act",
        "bos_token_id",
        "pad_token_id",
    ):
        assert getattr(config, field) == getattr(hf, field), field
    assert config.rope_theta == hf.rope_parameters["rope_theta"]
    assert config.partial_rotary_factor == hf.rope_parameters["partial_rotary_factor"]
    assert config.dtype is None
    scaled = changed(
        required,
        max_position_embeddings=8192,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    )
    original_max = Phi3Config.from_dict(scaled).original_max_position_embeddings
    assert original_max == hf.original_max_position_embeddings


# -------------------------------------------------------------------------------------- refusals

INT = "an integer from 1 to 2147483647"
POSITIVE = "a finite number above 0"
REFUSALS: list[tuple[dict[str, Any], str, str, str]] = [
    # changes to LONG_CONTEXT, field named, what was found, what is accepted
    ({"model_type": "phi3small"}, "model_type", "'phi3small' (Phi-3-small: another", "'phi3' (Phi"),
    (
        {"model_type": "phimoe"},
        "model_type",
        "'phimoe' (Phi-3.5-MoE: another",
        "'phi3' (Phi-3-mini",
    ),
    ({"model_type": "llama"}, "model_type", "'llama'", "'phi3'"),
    ({"model_type": ["phi3"]}, "model_type", "['phi3']", "'phi3'"),
    ({"model_type": DROP}, "model_type", "nothing", "required"),
    ({"vocab_size": DROP}, "vocab_size", "nothing", "required"),
    ({"hidden_size": None}, "hidden_size", "null", "required"),
    ({"intermediate_size": DROP}, "intermediate_size", "nothing", "required"),
    ({"num_hidden_layers": DROP}, "num_hidden_layers", "nothing", "required"),
    ({"num_attention_heads": DROP}, "num_attention_heads", "nothing", "required"),
    ({"vocab_size": True}, "vocab_size", "True", INT),
    ({"vocab_size": "256"}, "vocab_size", "'256'", INT),
    ({"hidden_size": 64.5}, "hidden_size", "64.5", INT),
    ({"hidden_size": math.nan}, "hidden_size", "nan", INT),
    ({"intermediate_size": 0}, "intermediate_size", "0", INT),
    ({"intermediate_size": 2**31}, "intermediate_size", "2147483648", INT),
    ({"num_hidden_layers": -2}, "num_hidden_layers", "-2", INT),
    ({"num_attention_heads": 0}, "num_attention_heads", "0", INT),
    ({"num_key_value_heads": 0}, "num_key_value_heads", "0", INT),
    ({"num_key_value_heads": 3}, "num_key_value_heads", "3 for 4", "a divisor of num_attention"),
    ({"num_key_value_heads": 8}, "num_key_value_heads", "8 for 4", "a divisor of num_attention"),
    ({"head_dim": 0}, "head_dim", "0", INT),
    (
        {"hidden_size": 66},
        "hidden_size",
        "66 for 4",
        "a multiple of num_attention_heads, or a head_dim",
    ),
    ({"max_position_embeddings": None}, "max_position_embeddings", "null", INT),
    ({"max_position_embeddings": [256]}, "max_position_embeddings", "[256]", INT),
    (
        {"original_max_position_embeddings": 257},
        "original_max_position_embeddings",
        "257",
        "at most max_position_embeddings (256)",
    ),
    (
        {"original_max_position_embeddings": DROP},
        "original_max_position_embeddings",
        "4096",
        "4096 where the file gives none",
    ),
    (
        {"original_max_position_embeddings": 1},
        "original_max_position_embeddings",
        "1",
        "an integer from 2",
    ),
    (
        {"original_max_position_embeddings": 0},
        "original_max_position_embeddings",
        "0",
        "an integer from 1",
    ),
    ({"rms_norm_eps": 0}, "rms_norm_eps", "0", POSITIVE),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps", "-1e-05", POSITIVE),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps", "inf", POSITIVE),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps", "'1e-5'", POSITIVE),
    ({"rms_norm_eps": True}, "rms_norm_eps", "True", POSITIVE),
    ({"rope_theta": 0.0}, "rope_theta", "0.0", "a number from 1 to 1e38"),
    ({"rope_theta": 10**400}, "rope_theta", "1000000", "a number from 1 to 1e38"),
    ({"sliding_window": 0}, "sliding_window", "0", INT + ", or null"),
    ({"sliding_window": -1}, "sliding_window", "-1", INT + ", or null"),
    ({"sliding_window": False}, "sliding_window", "False", INT + ", or null"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings", "1", "true or false"),
    ({"hidden_act": "gelu"}, "hidden_act", "'gelu'", "'silu'"),
    ({"bos_token_id": -1}, "bos_token_id", "-1", "an integer from 0 to 2147483647, or null"),
    ({"pad_token_id": 0.5}, "pad_token_id", "0.5", "or null"),
    ({"eos_token_id": "2"}, "eos_token_id", "'2'", "a list of them, or null"),
    ({"eos_token_id": [2, None]}, "eos_token_id", "null", "a list of them, or null"),
    ({"torch_dtype": "float8"}, "torch_dtype", "'float8'", "one of float32, float16, bfloat16"),
    (
        {"dtype": "float32"},
        "torch_dtype",
        "'float32' in dtype and 'bfloat16' in torch_dtype",
        "one value",
    ),
    ({"attention_bias": True}, "attention_bias", "true", "false"),
    ({"attention_bias": "no"}, "attention_bias", "'no'", "true or false"),
    ({"mlp_bias": True}, "mlp_bias", "true", "false"),
    ({"lm_head_bias": True}, "lm_head_bias", "true", "false"),
    (
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantization_config",
        "'awq'",
        "unquantized",
    ),
    ({"quantization_config": "gptq"}, "quantization_config", "'gptq'", "unquantized"),
    ({"partial_rotary_factor": 0.0}, "partial_rotary_factor", "0.0", "above 0, up to 1"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor", "1.5", "above 0, up to 1"),
    (
        {"partial_rotary_factor": 0.95},
        "partial_rotary_factor",
        "0.95 with head_dim 16, which rotates 15",
        "an even number",
    ),
    ({"partial_rotary_factor": 0.01}, "partial_rotary_factor", "rotates 0", "above 0"),
    ({"rope_scaling": "longrope"}, "rope_scaling", "'longrope'", "an object or null"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling.type",
        "'linear'",
        "'longrope'",
    ),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.rope_type", "'llama3'", "'longrope'"),
    ({"rope_scaling": {"type": ["su"]}}, "rope_scaling.type", "['su']", "'longrope'"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "rope_type",
        "'yarn' without short_factor",
        "'yarn' only with short_factor and long_factor",
    ),
    (
        {"rope_scaling": FACTORS},
        "rope_scaling.short_factor",
        "without a scaling rope_type",
        "'longrope'",
    ),
    (
        {"rope_scaling": {"factor": 2.0}},
        "rope_scaling.factor",
        "2.0 without a scaling rope_type",
        "'longrope'",
    ),
    (
        {"rope_scaling": {"type": "su", "long_factor": LONG}},
        "short_factor",
        "nothing",
        "rotary_dim / 2",
    ),
    (
        {"rope_scaling": {"type": "su", "short_factor": SHORT}},
        "long_factor",
        "nothing",
        "rotary_dim / 2",
    ),
    (
        {"rope_scaling": {**LONGROPE, "short_factor": SHORT[:7]}},
        "short_factor",
        "7 entries",
        "8 (rotary_dim / 2)",
    ),
    (
        {"rope_scaling": {**LONGROPE, "long_factor": [*LONG, 1.0]}},
        "long_factor",
        "9 entries",
        "8 (rotary_dim / 2)",
    ),
    (
        {"rope_scaling": {**LONGROPE, "long_factor": 2.0}},
        "rope_scaling.long_factor",
        "2.0",
        "a list",
    ),
    ({"rope_scaling": {**LONGROPE, "long_factor": []}}, "rope_scaling.long_factor", "[]", "a list"),
    (
        {"rope_scaling": {**LONGROPE, "long_factor": [0.0, *LONG[1:]]}},
        "rope_scaling.long_factor[0]",
        "0.0",
        POSITIVE,
    ),
    (
        {"rope_scaling": {**LONGROPE, "long_factor": [*LONG[:7], -1]}},
        "rope_scaling.long_factor[7]",
        "-1",
        POSITIVE,
    ),
    (
        {"rope_scaling": {**LONGROPE, "short_factor": [math.inf, *SHORT[1:]]}},
        "rope_scaling.short_factor[0]",
        "inf",
        POSITIVE,
    ),
    (
        {"rope_scaling": {**LONGROPE, "short_factor": [True, *SHORT[1:]]}},
        "rope_scaling.short_factor[0]",
        "True",
        POSITIVE,
    ),
    (
        {"rope_scaling": {**LONGROPE, "short_factor": [1e-50, *SHORT[1:]]}},
        "short_factor",
        "1e-50",
        "positive, finite float32",
    ),
    ({"rope_scaling": {**LONGROPE, "factor": 0}}, "rope_scaling.factor", "0", POSITIVE),
    (
        {"rope_scaling": {**LONGROPE, "attention_factor": -1.0}},
        "rope_scaling.attention_factor",
        "-1.0",
        POSITIVE,
    ),
    (
        {"rope_scaling": {**LONGROPE, "short_mscale": 1.1}},
        "rope_scaling.short_mscale",
        "1.1",
        "Phi-3-small and Phi-3.5-MoE",
    ),
    (
        {"rope_parameters": {"long_mscale": 1.2}},
        "rope_parameters.long_mscale",
        "1.2",
        "Phi-3-small and Phi-3.5-MoE",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
        "rope_parameters.full_attention",
        "an object",
        "all layers",
    ),
    (
        {"rope_parameters": {"rope_theta": 5e5}},
        "rope_theta",
        "10000.0 in rope_theta and 500000.0 in rope_parameters.rope_theta",
        "one value",
    ),
    (
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 64}},
        "original_max_position_embeddings",
        "32 in original_max_position_embeddings and 64 in rope_scaling.",
        "one value",
    ),
    (
        {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
        "1.0 in partial_rotary_factor and 0.5 in rope_parameters.",
        "one value",
    ),
    (
        {"rope_parameters": {"rope_type": "default"}},
        "rope_type",
        "'longrope' in rope_scaling.type and 'default' in rope_parameters.rope_type",
        "one value",
    ),
    (
        {"rope_parameters": {"long_factor": SHORT}},
        "long_factor",
        "in rope_scaling.long_factor and",
        "one value",
    ),
]


@pytest.mark.parametrize(("changes", "field", "found", "accepted"), REFUSALS)
def test_refusals_name_field_found_and_accepted(
    changes: dict[str, Any], field: str, found: str, accepted: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Phi3Config.from_dict(changed(LONG_CONTEXT, **changes), name="some/config.json")
    message = str(caught.value)
    start = f"some/config.json: {field}: found "
    assert message.startswith(start), message
    found_part, separator, accepted_part = message[len(start) :].partition("; accepted: ")
    assert separator and found in found_part and accepted in accepted_part, message
    assert "\n" not in message
    assert len(message) < 320
    assert isinstance(caught.value, Phi3CError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("top", [[], None, "phi3", 3])
def test_a_config_is_an_object(top: Any) -> None:
    with pytest.raises(
        ConfigError, match="^config.json: the whole file: found .*; accepted: a JSON"
    ):
        Phi3Config.from_dict(top)


def test_replace_runs_the_same_checks() -> None:
    config = Phi3Config.from_dict(LONG_CONTEXT)
    assert dataclasses.replace(config, num_hidden_layers=1).num_hidden_layers == 1
    with pytest.raises(ConfigError, match="^num_hidden_layers: found 0"):
        dataclasses.replace(config, num_hidden_layers=0)
    with pytest.raises(ConfigError, match="^short_factor: found 8 entries; accepted: 4"):
        dataclasses.replace(config, head_dim=8)
    longer = dataclasses.replace(Phi3Config.from_dict(PLAIN), max_position_embeddings=512)
    assert longer.original_max_position_embeddings == 512


def test_a_config_is_frozen_and_hashable() -> None:
    config = Phi3Config.from_dict(LONG_CONTEXT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 1  # type: ignore[misc]
    assert len({config, Phi3Config.from_dict(LONG_CONTEXT), Phi3Config.from_dict(PLAIN)}) == 2


# ----------------------------------------------------------------------------------------- files


def test_from_file_reads_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LONG_CONTEXT))
    expected = Phi3Config.from_dict(LONG_CONTEXT)
    assert Phi3Config.from_file(tmp_path) == expected
    assert Phi3Config.from_file(tmp_path / "config.json") == expected
    assert Phi3Config.from_file(str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        (b"", "not valid JSON"),
        (b'{"model_type": "phi3",', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "found a JSON list; accepted: a JSON object"),
        (b'{"model_type": "phi3"}', "num_attention_heads: found nothing"),
    ],
)
def test_unreadable_files_are_refused_in_one_line(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Phi3Config.from_file(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "config.json")) and problem in message
    assert "accepted" in message and "\n" not in message


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.*cannot be read.*accepted"):
        Phi3Config.from_file(tmp_path / "absent")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        Phi3Config.from_file(tmp_path / "file" / "config.json")


# ---------------------------------------------------------------------------------- known models

TEXTBOOK = math.sqrt(1 + math.log(32) / math.log(4096))  # 4096 -> 131072
KNOWN = {
    # head_dim, rotary_dim, query groups, theta, longrope, window, tied, attention factor
    "phi-3-mini-4k": (96, 96, 1, 1e4, False, 2047, False, 1.0),
    "phi-3-mini-128k": (96, 96, 1, 1e4, True, 262144, False, TEXTBOOK),
    "phi-3.5-mini": (96, 96, 1, 1e4, True, 262144, False, TEXTBOOK),
    "phi-3-medium-4k": (128, 128, 4, 1e4, False, 2047, False, 1.0),
    "phi-3-medium-128k": (128, 128, 4, 1e4, True, 131072, False, TEXTBOOK),
    "phi-4": (128, 128, 4, 2.5e5, False, None, False, 1.0),
    "phi-4-mini": (128, 96, 3, 1e4, True, 262144, True, TEXTBOOK),
    "tiny": (16, 16, 2, 1e4, True, None, False, math.sqrt(1 + math.log(8) / math.log(32))),
}


def test_every_file_in_configs_is_known() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_rotary_settings_of_known_models(name: str) -> None:
    config = Phi3Config.from_file(CONFIGS / f"{name}.json")
    assert KNOWN[name] == (
        config.head_dim,
        config.rotary_dim,
        config.num_query_groups,
        config.rope_theta,
        config.rope_scaling is not None,
        config.sliding_window,
        config.tie_word_embeddings,
        config.attention_factor,
    )
    expected_switch = 32 if name == "tiny" else 4096
    assert config.needs_long_factors(expected_switch + 1) == (config.rope_scaling is not None)
    assert not config.needs_long_factors(expected_switch)
    assert Phi3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ------------------------------------------------------------------------- transformers as oracle


def hf_config(d: dict[str, Any]) -> HfPhi3Config:
    return HfPhi3Config.from_dict(copy.deepcopy(d))  # it writes into the rope_scaling it is given


def hf_rotary(hf: HfPhi3Config, last_position: int) -> tuple[np.ndarray, float]:
    """inv_freq and the cos/sin factor that transformers uses when the last token is there."""
    rotary = Phi3RotaryEmbedding(hf)
    rotary(torch.zeros(1), torch.tensor([[last_position]]))
    return rotary.inv_freq.numpy(), rotary.attention_scaling


def assert_rotary_as_in_transformers(config: Phi3Config, hf: HfPhi3Config) -> None:
    switch = config.original_max_position_embeddings
    for long, last_position in ((False, switch - 1), (True, switch)):
        inv_freq, attention_factor = hf_rotary(hf, last_position)
        assert config.needs_long_factors(last_position + 1) == (
            long and config.rope_scaling is not None
        )
        ours = config.inv_freq(long=long)
        assert ours.dtype == inv_freq.dtype == np.float32
        # torch's float32 power is one unit off now and then, which the product and the quotient
        # may carry to two; everything else is the same float32 operations.
        np.testing.assert_array_max_ulp(ours, inv_freq, maxulp=2)
        assert np.mean(ours == inv_freq) >= 0.75
        assert config.attention_factor == attention_factor


@pytest.mark.parametrize("name", KNOWN)
def test_rotary_maths_of_known_models_is_transformers(name: str) -> None:
    path = CONFIGS / f"{name}.json"
    config = Phi3Config.from_file(path)
    assert_rotary_as_in_transformers(config, HfPhi3Config.from_json_file(path))
    # transformers reads the canonical form to the same thing.
    assert_rotary_as_in_transformers(config, hf_config(config.to_dict()))


@pytest.mark.parametrize(
    "given_factors",
    [
        {},
        {"factor": 4.0},
        {"factor": 1.0},
        {"factor": 0.5},
        {"attention_factor": 1.75},
        {"factor": 4.0, "attention_factor": 1.75},
    ],
    ids=str,
)
@pytest.mark.parametrize("max_positions", [32, 256])
def test_attention_factor_is_transformers(
    given_factors: dict[str, float], max_positions: int
) -> None:
    d = changed(
        LONG_CONTEXT,
        max_position_embeddings=max_positions,
        rope_scaling={**LONGROPE, **given_factors},
    )
    assert_rotary_as_in_transformers(Phi3Config.from_dict(d), hf_config(d))


def test_inv_freq_is_the_formula() -> None:
    config = Phi3Config.from_dict(LONG_CONTEXT)
    for long, factors in ((False, SHORT), (True, LONG)):
        expected = [1 / (f * 10000 ** (2 * i / 16)) for i, f in enumerate(factors)]
        np.testing.assert_allclose(config.inv_freq(long=long), expected, rtol=3e-7)
        np.testing.assert_array_equal(config.rope_factors(long), np.float32(factors))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": DROP},
        {"rope_scaling": {"type": "yarn", **FACTORS}},
        {"rope_scaling": {**LONGROPE, "factor": 4.0, "attention_factor": 1.5}},
        {"rope_theta": 250000.0, "num_key_value_heads": None, "tie_word_embeddings": True},
        {"sliding_window": 48, "eos_token_id": [2, 3], "bos_token_id": None, "torch_dtype": DROP},
        {
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": SHORT[:6],
                "long_factor": LONG[:6],
            },
        },
    ],
    ids=lambda changes: ",".join(changes) or "unchanged",
)
def test_what_transformers_saves_reads_to_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    d = changed(LONG_CONTEXT, **changes)
    hf = hf_config(d)
    hf.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved and "rope_scaling" not in saved  # its own form, not d's
    config = Phi3Config.from_file(tmp_path)
    assert config == Phi3Config.from_dict(d)
    assert_rotary_as_in_transformers(config, hf)


# ------------------------------------------------------------------------------------ properties

positive_floats = st.floats(0.5, 100.0)


@st.composite
def configs(draw: st.DrawFn) -> Phi3Config:
    heads_per_group, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([8, 16, 48, 96]))
    partial = draw(st.sampled_from([0.5, 0.75, 1.0]))
    max_positions = draw(st.integers(2, 2**20))
    pairs = int(head_dim * partial) // 2
    factors = st.lists(positive_floats, min_size=pairs, max_size=pairs).map(tuple)
    scaling = draw(
        st.none()
        | st.builds(
            RopeScaling,
            short_factor=factors,
            long_factor=factors,
            attention_factor=st.none() | positive_floats,
            factor=st.none() | positive_floats,
        )
    )
    token = st.integers(0, 10**6)
    return Phi3Config(
        vocab_size=draw(st.integers(1, 2**31 - 1)),
        hidden_size=draw(st.integers(1, 10**5)),
        intermediate_size=draw(st.integers(1, 10**5)),
        num_hidden_layers=draw(st.integers(1, 200)),
        num_attention_heads=heads_per_group * groups,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=draw(st.integers(2, max_positions)),
        rms_norm_eps=draw(st.floats(1e-12, 1.0)),
        rope_theta=draw(st.floats(1.0, 1e9)),
        partial_rotary_factor=partial,
        rope_scaling=scaling,
        sliding_window=draw(st.none() | st.integers(1, 2**20)),
        tie_word_embeddings=draw(st.booleans()),
        hidden_act="silu",
        bos_token_id=draw(st.none() | token),
        eos_token_ids=tuple(draw(st.lists(token, max_size=3))),
        pad_token_id=draw(st.none() | token),
        dtype=draw(st.sampled_from([None, "float32", "float16", "bfloat16"])),
    )


@given(configs())
def test_to_dict_reads_back_to_an_equal_config(config: Phi3Config) -> None:
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = Phi3Config.from_dict(json.loads(text))
    assert again == config and hash(again) == hash(config)
    assert json.dumps(again.to_dict()) == text


@given(configs())
def test_frequencies_are_positive_finite_and_of_the_right_length(config: Phi3Config) -> None:
    for long in (False, True):
        inv_freq = config.inv_freq(long=long)
        assert inv_freq.shape == (config.rotary_dim // 2,) and inv_freq.dtype == np.float32
        assert np.all(np.isfinite(inv_freq) & (inv_freq > 0))
    assert math.isfinite(config.attention_factor) and config.attention_factor > 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=300)
@given(
    field=st.sampled_from([*LONG_CONTEXT, "head_dim", "rope_parameters", "quantization_config"]),
    value=json_values,
)
def test_any_value_is_read_or_refused_with_a_config_error(field: str, value: Any) -> None:
    try:
        config = Phi3Config.from_dict(changed(LONG_CONTEXT, **{field: value}))
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert Phi3Config.from_dict(config.to_dict()) == config


@given(field=st.sampled_from([*IN_PARAMETERS, "type", "factor"]), value=json_values)
def test_any_rope_value_is_read_or_refused_with_a_config_error(field: str, value: Any) -> None:
    rope = {**IN_PARAMETERS, field: value}
    try:
        config = Phi3Config.from_dict(changed(LONG_CONTEXT, rope_scaling=rope))
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert Phi3Config.from_dict(config.to_dict()) == config
