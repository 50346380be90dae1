"""A folder that PEFT saved a LoRA adapter to: adapter_config.json, adapter_model.safetensors.

Modules are named as in transformers' Phi-3, or as in checkpoints that keep q, k, v and gate, up
apart. Those become one adapter of the fused linear: the parts' A above each other, their B in
diagonal blocks, which is exact.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401 (numpy's bfloat16, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from ..config import Phi3Config
from ..errors import AdapterError
from .layout import TARGETS, target_shape
from .peft_config import CONFIG_FILE, PeftScales, read_peft_config
from .weights import AdapterWeights, LowRank

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_DTYPES = ("F32", "F16", "BF16")
_BLOCK_OF = {"qkv_proj": "self_attn", "o_proj": "self_attn"}
_BLOCK_OF |= {"gate_up_proj": "mlp", "down_proj": "mlp"}
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>0|[1-9]\d{0,5})\."
    r"(?P<block>self_attn|mlp)\.(?P<linear>\w+))\.lora_(?P<side>A|B)\.weight"
)
_KEYS = (
    "base_model.model.model.layers.<n>.<linear>.lora_A.weight and lora_B.weight, a linear being "
    "self_attn.qkv_proj (or q_proj, k_proj, v_proj), self_attn.o_proj, mlp.gate_up_proj (or "
    "gate_proj, up_proj), mlp.down_proj"
)


def adapter_folder(source: str | Path) -> Path:
    """The folder that `source` names, or a Hugging Face repo id (owner/name), downloaded.

    Raises AdapterError, and CheckpointError where the hub does not give the files.
    """
    from ..hub import download_files, is_repo_id

    if not isinstance(source, str | Path):
        raise AdapterError(f"adapter: found {source!r}; accepted: a folder or a repo id")
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # no home of that name
        path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not is_repo_id(str(source)):
        found = "a file" if path.exists() else "no such folder"
        raise AdapterError(
            f"{source}: {found}; accepted: a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or a "
            "Hugging Face repo id (owner/name)"
        )
    return download_files(str(source), (CONFIG_FILE, WEIGHTS_FILE), "a LoRA adapter")


def read_adapter(folder: Path, config: Phi3Config, max_rank: int | None = None) -> AdapterWeights:
    """The adapter in a folder, for a model of this config. Raises AdapterError.

    max_rank: the largest rank of a linear, after parts are joined, that is accepted.
    """
    scales = read_peft_config(folder)
    path = folder / WEIGHTS_FILE
    _check_file(path)
    try:
        with safe_open(path, framework="np") as file:
            linears = _joined(_modules(file, path, config), path, config)
            _check_ranks(linears, folder, max_rank)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                read = pool.map(lambda linear: _read(linear, file, path, scales), linears)
                low_ranks, digests = zip(*read, strict=True)
    except (SafetensorError, OSError) as err:
        raise AdapterError(f"{path}: not a whole safetensors file ({err})") from None
    return AdapterWeights(
        rank=max(linear.rank for linear in linears),
        low_rank={(one.layer, one.target): w for one, w in zip(linears, low_ranks, strict=True)},
        digest=hashlib.sha256(b"".join(digests)).hexdigest(),
    )


@dataclass(frozen=True)
class _Module:
    """A linear that PEFT adapted, of that name in the base model.

    rows: which of the target's output rows are its own; keys: of its tensors by side, A and B.
    """

    name: str
    layer: int
    linear: str
    target: str
    rows: slice
    rank: int
    keys: dict[str, str]


@dataclass(frozen=True)
class _Linear:
    """A target of a layer, and the modules that adapt it: itself, or its parts, in order."""

    layer: int
    target: str
    out_features: int
    modules: tuple[_Module, ...]

    @property
    def rank(self) -> int:
        return sum(module.rank for module in self.modules)


def _check_file(path: Path) -> None:
    if path.is_file():
        return
    if pickle := next((name for name in _PICKLES if (path.parent / name).exists()), None):
        raise AdapterError(
            f"{path.parent}: found {pickle}, a pickle, which can run code when read; accepted: "
            f"{WEIGHTS_FILE}. Convert it where you trust it: PeftModel.from_pretrained(model, "
            "folder).save_pretrained(new_folder)"
        )
    raise AdapterError(f"{path.parent}: no {WEIGHTS_FILE}; accepted: PEFT's adapter folder")


# The header


def _modules(file, path: Path, config: Phi3Config) -> list[_Module]:
    """Of all tensors, whose names and shapes fit the model. Raises AdapterError."""
    linears = {linear: (target, rows) for target, linear, rows in _linears(config)}
    keys: dict[tuple[str, int, str], dict[str, str]] = {}  # by name, layer and linear
    left_over = []
    for key in file.keys():
        match = _KEY.fullmatch(key)
        known = match and match["linear"] in linears
        if not known or match["block"] != _BLOCK_OF[linears[match["linear"]][0]]:
            left_over.append(key)
            continue
        layer = int(match["layer"])
        if layer >= config.num_hidden_layers:
            raise AdapterError(
                f"{path}: {key}: found layer {layer}; accepted: 0 to "
                f"{config.num_hidden_layers - 1}, the layers of this model"
            )
        keys.setdefault((match["module"], layer, match["linear"]), {})[match["side"]] = key
    _refuse_left_over(left_over, path, matched=bool(keys))
    modules = []
    for (name, layer, linear), sides in keys.items():
        target, rows = linears[linear]
        shape = (rows.stop - rows.start, target_shape(config, target)[1])
        rank = _checked_rank(sides, shape, file, path)
        modules.append(_Module(name, layer, linear, target, rows, rank, sides))
    return modules


def _linears(config: Phi3Config) -> Iterator[tuple[str, str, slice]]:
    """(target, linear, rows of the target) of what may be adapted: targets and their parts."""
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    sizes = {"qkv_proj": (query, key, key), "gate_up_proj": (config.intermediate_size,) * 2}
    for target in TARGETS:
        yield target, target, slice(0, target_shape(config, target)[0])
        start = 0
        for part, rows in zip(_PARTS.get(target, ()), sizes.get(target, ()), strict=True):
            yield target, part, slice(start, start + rows)
            start += rows


def _refuse_left_over(keys: Sequence[str], path: Path, matched: bool) -> None:
    for mark, what in (
        ("lm_head", "the LM head"),
        ("embed_tokens", "the embedding"),
        ("lora_embedding_", "an embedding"),
    ):
        if key := next((key for key in keys if mark in key), None):
            raise AdapterError(f"{path}: {key}: found weights of {what}; accepted: {_KEYS}")
    if not matched:
        first = f", such as {keys[0]}" if keys else ""
        raise AdapterError(
            f"{path}: no tensor matches this model: found {len(keys)} tensors{first}; accepted: "
            f"{_KEYS}"
        )
    if keys:
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise AdapterError(
            f"{path}: {keys[0]}{more}: not a part of a LoRA adapter of this model; accepted: "
            f"{_KEYS}"
        )


def _checked_rank(keys: dict[str, str], shape: tuple[int, int], file, path: Path) -> int:
    """Of the tensors of a linear `[out, in]`. keys: by side. Raises AdapterError."""
    for side, other in (("A", "B"), ("B", "A")):
        if side not in keys:
            missing = keys[other].replace(f"lora_{other}", f"lora_{side}")
            raise AdapterError(f"{path}: {keys[other]}: found without {missing}; accepted: both")
    out_features, in_features = shape
    a, b = (file.get_slice(keys[side]) for side in "AB")
    for key, view in ((keys["A"], a), (keys["B"], b)):
        if view.get_dtype() not in _DTYPES:
            raise AdapterError(
                f"{path}: {key}: found dtype {view.get_dtype()}; accepted: {', '.join(_DTYPES)}"
            )
    a_shape, b_shape = a.get_shape(), b.get_shape()
    if len(a_shape) != 2 or a_shape[1] != in_features:
        raise AdapterError(
            f"{path}: {keys['A']}: found shape {a_shape}; accepted: [rank, {in_features}], "
            "from this model's dimensions"
        )
    rank = a_shape[0]
    if rank == 0:
        raise AdapterError(f"{path}: {keys['A']}: found rank 0; accepted: 1 or more")
    if b_shape != [out_features, rank]:
        raise AdapterError(
            f"{path}: {keys['B']}: found shape {b_shape}; accepted: {[out_features, rank]}, from "
            "this model's dimensions and the rank of lora_A"
        )
    return rank


def _joined(modules: Iterable[_Module], path: Path, config: Phi3Config) -> list[_Linear]:
    """By layer and target, in order. Raises AdapterError for one that comes whole and in parts."""
    groups: dict[tuple[int, int], list[_Module]] = {}
    for module in sorted(modules, key=lambda module: module.rows.start):
        groups.setdefault((module.layer, TARGETS.index(module.target)), []).append(module)
    linears = []
    for (layer, target), members in sorted(groups.items()):
        whole = [module for module in members if module.linear == module.target]
        if whole and len(members) > 1:
            part = next(module for module in members if module is not whole[0])
            raise AdapterError(
                f"{path}: layer {layer}: found {whole[0].keys['A']} and {part.keys['A']}; "
                f"accepted: either {whole[0].target} or its parts"
            )
        name = TARGETS[target]
        linears.append(_Linear(layer, name, target_shape(config, name)[0], tuple(members)))
    return linears


def _check_ranks(linears: Sequence[_Linear], folder: Path, max_rank: int | None) -> None:
    largest = max(linears, key=lambda linear: linear.rank)
    if max_rank is None or largest.rank <= max_rank:
        return
    parts = " + ".join(f"{module.linear} {module.rank}" for module in largest.modules)
    sum_of = f" ({parts})" if len(largest.modules) > 1 else ""
    raise AdapterError(
        f"{folder}: layer {largest.layer}: {largest.target}: found rank {largest.rank}{sum_of}; "
        f"accepted: up to {max_rank} (max_rank)"
    )


# The tensors


def _read(linear: _Linear, file, path: Path, scales: PeftScales) -> tuple[LowRank, bytes]:
    """A linear's weights, and the sha256 of what they were made of."""
    digest = hashlib.sha256(f"{linear.layer} {linear.target}".encode())
    parts = []
    for module in linear.modules:
        scale = scales.scale(module.name, module.rank)
        digest.update(f" {module.linear} {module.rank} {scale!r}".encode())
        a, b = (_tensor(file, module.keys[side], path, digest) for side in "AB")
        with np.errstate(over="ignore"):
            b *= np.float32(scale)
        parts.append((module.rows, a, b))
        if not np.isfinite(b).all():
            raise AdapterError(
                f"{path}: {module.keys['B']}: found values beyond float32 once scaled by {scale:g} "
                f"({CONFIG_FILE})"
            )
    if len(linear.modules) == 1 and linear.modules[0].linear == linear.target:
        return LowRank(*parts[0][1:]), digest.digest()
    joined = np.zeros((linear.out_features, linear.rank), np.float32)
    start = 0
    for rows, a, b in parts:
        joined[rows, start : start + len(a)] = b
        start += len(a)
    return LowRank(np.concatenate([a for _, a, _ in parts]), joined), digest.digest()


def _tensor(file, key: str, path: Path, digest) -> np.ndarray:
    """As float32; its bytes go into the digest."""
    array = file.get_tensor(key)
    digest.update(f" {array.dtype} ".encode())
    digest.update(array.view(np.uint8))
    values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise AdapterError(f"{path}: {key}: found NaN or infinite values")
    return values
