"""Weights by their Hugging Face names, read some rows of one tensor at a time.

Names, shapes and files are checked against the config before any tensor is read: a checkpoint with
a tensor missing, left over, twice, or of another shape is refused.
"""

from __future__ import annotations

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401 (numpy's bfloat16, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from .config import Phi3Config
from .errors import CheckpointError
from .quantization.group import GroupedRows

_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")


def checkpoint_shapes(config: Phi3Config) -> dict[str, tuple[int, ...]]:
    """Hugging Face name → shape of every tensor that a checkpoint of this config holds."""
    c = config
    h, heads = c.hidden_size, c.num_attention_heads * c.head_dim
    qkv = heads + 2 * c.num_key_value_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, h)}
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (h,)
        shapes[layer + "self_attn.qkv_proj.weight"] = (qkv, h)
        shapes[layer + "self_attn.o_proj.weight"] = (h, heads)
        shapes[layer + "post_attention_layernorm.weight"] = (h,)
        shapes[layer + "mlp.gate_up_proj.weight"] = (2 * c.intermediate_size, h)
        shapes[layer + "mlp.down_proj.weight"] = (h, c.intermediate_size)
    shapes["model.norm.weight"] = (h,)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, h)
    return shapes


class Weights(ABC):
    """Tensors of a model, by Hugging Face name. Safe to use from several threads."""

    def __init__(self, config: Phi3Config):
        self.shapes = checkpoint_shapes(config)

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> np.ndarray | GroupedRows:
        """Rows start … stop−1 (elements of a vector), all finite. Raises CheckpointError.

        float32, float16 or bfloat16 (ml_dtypes); GroupedRows where the source is quantized.
        """

    def tensor(self, name: str) -> np.ndarray:
        """All rows, as float."""
        rows = self.rows(name, 0, self.shapes[name][0])
        return rows.values() if isinstance(rows, GroupedRows) else rows


class Checkpoint(Weights):
    """A folder's safetensors, checked against a config. Raises CheckpointError."""

    def __init__(self, folder: Path, config: Phi3Config):
        super().__init__(config)
        self.folder = folder
        self._file_of = self._scan(config)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        path = self._file_of[name]
        with _open(path) as file:
            array = file.get_slice(name)[start:stop]
        if not np.isfinite(array).all():
            raise CheckpointError(f"{path}: {name}: found NaN or infinite values")
        return array

    def _scan(self, config: Phi3Config) -> dict[str, Path]:
        file_of: dict[str, Path] = {}
        tied_head: Path | None = None
        for path in _weight_files(self.folder):
            with _open(path) as file:
                for name in _names(path):
                    if name.endswith(".rotary_emb.inv_freq"):
                        continue  # a buffer of old checkpoints; the config says the same
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        tied_head = path
                        continue
                    if name in file_of:
                        raise CheckpointError(f"{name}: found in {file_of[name]} and in {path}")
                    self._check(name, file.get_slice(name), path)
                    file_of[name] = path
        if missing := [name for name in self.shapes if name not in file_of]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{self.folder}: missing tensor {missing[0]}{more}")
        if tied_head is not None:
            self._check_tied(tied_head, file_of["model.embed_tokens.weight"])
        return file_of

    def _check(self, name: str, view, path: Path) -> None:
        if name not in self.shapes:
            raise CheckpointError(f"{path}: {name}: not a tensor of this config's model")
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if shape != self.shapes[name]:
            raise CheckpointError(
                f"{path}: {name}: found shape {list(shape)}; accepted: "
                f"{list(self.shapes[name])}, from config.json"
            )
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name}: found dtype {dtype}; accepted: {', '.join(_DTYPES)}"
            )

    def _check_tied(self, head_path: Path, embed_path: Path) -> None:
        rows, step = self.shapes["model.embed_tokens.weight"][0], 4096
        with _open(head_path) as head, _open(embed_path) as embed:
            one, other = (
                head.get_slice("lm_head.weight"),
                embed.get_slice("model.embed_tokens.weight"),
            )
            same = one.get_shape() == other.get_shape() and all(
                np.array_equal(one[at : min(at + step, rows)], other[at : min(at + step, rows)])
                for at in range(0, rows, step)
            )
        if not same:
            raise CheckpointError(
                f"{head_path}: lm_head.weight differs from model.embed_tokens.weight, but "
                "config.json says tie_word_embeddings"
            )


class RandomWeights(Weights):
    """Weights drawn from a seed, for compiling from a config alone (speed and shape checks)."""

    _BLOCK = 512  # rows that are drawn together

    def __init__(self, config: Phi3Config, seed: int):
        super().__init__(config)
        self._seed = seed

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """float32; a value depends on the seed, the tensor's name and its place alone."""
        size, first = self._BLOCK, start // self._BLOCK
        blocks = [self._block(name, i) for i in range(first, -(-stop // size))]
        array = np.concatenate(blocks)[start - first * size : stop - first * size]
        if array.ndim == 1:
            array += 1  # norm weights
        return array

    def _block(self, name: str, index: int) -> np.ndarray:
        rows, *features = self.shapes[name]
        rows = min(self._BLOCK, rows - index * self._BLOCK)
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode()), index])
        return rng.standard_normal((rows, *features), dtype=np.float32) * np.float32(0.02)


def _open(path: Path):
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, but {_INDEX} names it") from None
    except (SafetensorError, OSError) as err:
        raise CheckpointError(f"{path}: not a whole safetensors file ({err})") from None


def _names(path: Path) -> list[str]:
    """Of all tensors in the header, twice what is there twice; safetensors takes the last."""
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    names: list[str] = []

    def seen(pairs: list[tuple[str, object]]) -> dict:
        names[:] = [name for name, _ in pairs]  # the outermost object comes last
        return dict(pairs)

    json.loads(header, object_pairs_hook=seen)
    return [name for name in names if name != "__metadata__"]


def _weight_files(folder: Path) -> Iterator[Path]:
    index = folder / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(f"{index}: not a weight index (no weight_map)") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                raise CheckpointError(
                    f"{index}: found file {name!r}; accepted: names in the folder"
                )
        return iter([folder / name for name in names])
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if files:  # beside a model.safetensors others hold the same again (consolidated.safetensors)
        return iter(files)
    if pickles := sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt*")]):
        raise CheckpointError(
            f"{folder}: found {pickles[0]}, a pickle, which can run code when read; accepted: "
            "*.safetensors. Convert it where you trust it: AutoModelForCausalLM"
            ".from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise CheckpointError(f"{folder}: no *.safetensors file")
