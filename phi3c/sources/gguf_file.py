"""A Phi-3 model in one GGUF file, as llama.cpp's convert_hf_to_gguf.py writes it.

Its config, tensors and text files by their Hugging Face names; the container: gguf_container.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Phi3Config
from ..errors import CheckpointError
from ..quantization.group import GroupedRows
from ..weights import Weights
from . import TEXT_FILES, Source
from .gguf_container import REQUIRED, Gguf, GgufTensor
from .gguf_tokenizer import GgufTokenizer

_ARCHITECTURE = "phi3"
_ROPE_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",  # gate and up in one, in transformers' order
    "ffn_down": "mlp.down_proj",
}


class GgufFile(Source):
    """A .gguf file, and the tokenizer files beside it if there is a tokenizer.json among them.

    Raises CheckpointError for a file that is not a whole Phi-3 GGUF, ConfigError for a model that
    phi3c does not support.
    """

    def __init__(self, path: Path):
        self._file = Gguf(path)
        _check_kind(self._file)
        self._tokenizer = GgufTokenizer(self._file, _vocab_size(self._file))
        super().__init__(path, _config(self._file, self._tokenizer.special))

    def weights(self) -> Weights:
        return GgufWeights(self._file, self.config)

    def text_files(self) -> dict[str, bytes]:
        tokenizer = self._tokenizer
        config = self.config.to_dict() | {"architectures": ["Phi3ForCausalLM"]}
        generation = {
            "bos_token_id": tokenizer.special["bos"],
            "eos_token_id": tokenizer.end_ids() or None,
            "pad_token_id": tokenizer.special["pad"],
        }
        files = {"config.json": _json(config), "generation_config.json": _json(generation)}
        beside = {file.name: _read(file) for file in self._beside()}
        if beside:
            self._check_beside(beside["tokenizer.json"])
            return files | {"tokenizer_config.json": tokenizer.config_json()} | beside
        tokenizer_json = tokenizer.tokenizer_json()
        if tokenizer_json is None:
            return files
        return files | {
            "tokenizer.json": tokenizer_json,
            "tokenizer_config.json": tokenizer.config_json(),
        }

    def input_files(self) -> list[Path]:
        return [self.path, *self._beside()]

    def _beside(self) -> list[Path]:
        """The tokenizer files that lie beside, none where tokenizer.json does not."""
        folder = self.path.parent
        if not (folder / "tokenizer.json").is_file():
            return []
        names = (name for name in TEXT_FILES if name != "config.json")
        return [folder / name for name in names if (folder / name).is_file()]

    def _check_beside(self, text: bytes) -> None:
        """Refuses what another model left in the folder."""
        source = self.path.parent / "tokenizer.json"
        try:
            vocabulary = json.loads(text)["model"]["vocab"]
            ids = {token: int(i) for token, i in vocabulary.items()}
        except (
            ValueError,
            ArithmeticError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ):
            raise CheckpointError(f"{source}: found no vocabulary; accepted: a tokenizer") from None
        if ids and max(ids.values()) >= self.config.vocab_size:
            raise CheckpointError(
                f"{source}: found token {max(ids.values())}; accepted: up to "
                f"{self.config.vocab_size - 1}, the rows of token_embd.weight in {self.path}"
            )
        self._tokenizer.check_same_tokens(ids, str(source))


class GgufWeights(Weights):
    """The tensors of a file, checked against a config. Raises CheckpointError."""

    def __init__(self, file: Gguf, config: Phi3Config):
        super().__init__(config)
        self._file = file
        names = dict(_tensor_names(config))
        for name in file.tensors:
            if name not in names and name not in _ROPE_FACTORS:
                raise CheckpointError(f"{file.path}: {name}: not a tensor of this config's model")
        if missing := [name for name in names if name not in file.tensors]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{file.path}: missing tensor {missing[0]}{more}")
        self._tensors = {hf_name: file.tensors[name] for name, hf_name in names.items()}
        for hf_name, tensor in self._tensors.items():
            file.check(tensor, self.shapes[hf_name])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray | GroupedRows:
        tensor = self._tensors[name]
        rows = self._file.rows(tensor, start, stop)
        floats = rows.scale if isinstance(rows, GroupedRows) else rows
        if not np.isfinite(floats).all():
            raise CheckpointError(f"{self._file.path}: {tensor.name}: found NaN or infinite values")
        return rows


def _check_kind(file: Gguf) -> None:
    parts = file.integer("split.count", 1)
    if parts > 1:
        raise CheckpointError(
            f"{file.path}: split.count: found {parts} files; accepted: one. llama.cpp joins them: "
            "llama-gguf-split --merge FIRST_FILE JOINED_FILE"
        )
    architecture = file.text("general.architecture")
    if architecture != _ARCHITECTURE:
        raise CheckpointError(
            f"{file.path}: general.architecture: found {architecture!r}; accepted: {_ARCHITECTURE}"
        )


def _vocab_size(file: Gguf) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: missing tensor token_embd.weight")
    if len(embedding.shape) != 2:
        raise CheckpointError(
            f"{file.path}: token_embd.weight: found shape {list(embedding.shape)}; accepted: two "
            "dimensions"
        )
    return embedding.shape[0]


def _config(file: Gguf, special: dict[str, int | None]) -> Phi3Config:
    """The Hugging Face config that the metadata were made of. special: ids of tokens."""

    def integer(key: str, default: Any = REQUIRED) -> Any:
        return file.integer(f"{_ARCHITECTURE}.{key}", default)

    hidden_size, heads = integer("embedding_length"), integer("attention.head_count")
    key_length = integer("attention.key_length", None)
    head_dim = key_length or hidden_size // max(heads, 1)
    config = {
        "model_type": "phi3",
        "vocab_size": _vocab_size(file),
        "hidden_size": hidden_size,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv", heads),
        "head_dim": key_length,
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": file.number("phi3.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number("phi3.rope.freq_base", 10000.0),
        "partial_rotary_factor": _fraction(integer("rope.dimension_count", head_dim), head_dim),
        "rope_scaling": _rope_scaling(file),
        "original_max_position_embeddings": integer("rope.scaling.original_context_length", None),
        "sliding_window": _sliding_window(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "pad_token_id": special["pad"],
    }
    parsed = Phi3Config.from_dict(config, name=str(file.path))
    factor = file.number("phi3.rope.scaling.attn_factor", None)
    if config["rope_scaling"] is None or factor is None:
        return parsed
    if abs(factor - parsed.attention_factor) < 1e-6:  # LongRoPE's own, rounded to float32
        return parsed
    config["rope_scaling"]["attention_factor"] = factor
    return Phi3Config.from_dict(config, name=str(file.path))


def _fraction(part: int, whole: int) -> float:
    """part / whole, such that int(whole · fraction) is part again."""
    fraction = part / max(whole, 1)
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, math.inf)


def _sliding_window(file: Gguf) -> int | None:
    """0 is what the converter writes for none."""
    window = file.integer("phi3.attention.sliding_window", None)
    if window is None:
        # Files from before July 2024 lack the key. llama.cpp's loader took the window of
        # Phi-3-mini-4k and Phi-3-medium-4k for those of their size; the 128k models' windows are
        # not below their contexts.
        layers, context = file.integer("phi3.block_count"), file.integer("phi3.context_length")
        return 2047 if layers in (32, 40) and context == 4096 else None
    return window or None


def _rope_scaling(file: Gguf) -> dict[str, Any] | None:
    factor = file.number("phi3.rope.scaling.factor", 1.0)
    # A factor alone means linear scaling in llama.cpp.
    kind = file.text("phi3.rope.scaling.type", "none" if factor in (0, 1) else "linear")
    if kind not in ("none", "longrope"):
        raise CheckpointError(
            f"{file.path}: phi3.rope.scaling.type: found {kind!r}; accepted: none, longrope"
        )
    found = [name for name in _ROPE_FACTORS if name in file.tensors]
    if not found and kind == "none":
        return None
    if missing := [name for name in _ROPE_FACTORS if name not in found]:
        raise CheckpointError(f"{file.path}: missing tensor {missing[0]}")
    long, short = (_rope_factors(file, file.tensors[name]) for name in _ROPE_FACTORS)
    return {"rope_type": "longrope", "long_factor": long, "short_factor": short}


def _rope_factors(file: Gguf, tensor: GgufTensor) -> list[float]:
    file.check(tensor, tensor.shape[:1])
    return [float(str(factor)) for factor in file.rows(tensor, 0, tensor.shape[0])]


def _tensor_names(config: Phi3Config) -> Iterator[tuple[str, str]]:
    """The file's name and Hugging Face's of every tensor of the model."""
    yield "token_embd.weight", "model.embed_tokens.weight"
    for i in range(config.num_hidden_layers):
        for name, hf_name in _BLOCK_TENSORS.items():
            yield f"blk.{i}.{name}.weight", f"model.layers.{i}.{hf_name}.weight"
    yield "output_norm.weight", "model.norm.weight"
    if not config.tie_word_embeddings:
        yield "output.weight", "lm_head.weight"


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read ({err.strerror})") from None
