"""Joins config, model, scheme, target and weights into an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.frontend import nn

from .adapters.layout import MAX_LORAS, RANKS, AdapterLayout
from .adapters.peft_files import adapter_folder, read_adapter
from .adapters.weights import AdapterWeights
from .artifact import LIBRARY, OBJECTS, Artifact, file_sha256, write_manifest
from .config import Phi3Config
from .converter import Progress, check_config, weights_work
from .device_code import device_code
from .errors import ConfigError
from .linker import find_linker, links_later, pack_objects
from .manifest import DeviceNeeds, FunctionInfo, KVLayout, Limits, Manifest, TargetInfo, TensorSpec
from .model.inlining import quick_inlining
from .model.phi3 import Phi3ForCausalLM
from .output_folder import check_output, new_folder
from .passes.workspace import workspace_bytes
from .pipeline import apply, finalize_passes, kernel_lowering, plan_passes
from .quantization.scheme import Scheme, parse_scheme
from .sources import resolve_source
from .targets import Target, parse_target

DEFAULT_CONTEXT_LENGTH = 4096


def compile(
    source: str | Path,
    target: str = "cpu",
    quantization: str = "q4f16_1",
    output: str | Path = "dist/model",
    max_batch_size: int = 8,
    context_length: int | None = None,
    prefill_chunk_size: int = 512,
    max_loras: int = 0,
    max_rank: int = 16,
    *,
    merge_adapter: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """Compiles a checkpoint into an artifact folder and returns it.

    source: checkpoint folder, .gguf file, config JSON (random weights from `seed`), Hugging Face
    repo id, or a folder of `convert`.
    target: `cpu` (this machine's), `cpu:<mcpu>`, `cpu:<mcpu>:<triple>`, `cuda:<arch>`,
    `cuda:native`, `vulkan`, `vulkan:<index>`, `vulkan:native` or `metal`. For a Mac, where nothing
    here can link its library, the artifact has the objects: link.py.
    quantization: a scheme's name. output: new or empty folder, or an artifact to replace.
    max_batch_size: sequences in a forward; prefill_chunk_size: new tokens in a forward;
    context_length: tokens in a sequence, by default 4096 or the config's max_position_embeddings if
    that is less. max_loras: LoRA adapters that can be used at a time, each of at most max_rank (8,
    16, 32, 64 or 128). merge_adapter: folder or repo id of a LoRA adapter that becomes a part of
    the weights, W + B A before they are quantized; what a .gguf file stores quantized is rounded
    again where the adapter changes it.
    progress: called with (stage, done, total).

    Raises the errors of phi3c.errors before any work where it can; nothing is left at `output`
    unless the artifact is whole.
    """
    report = progress or (lambda stage, done, total: None)
    output = Path(output)
    place = parse_target(target)
    scheme = parse_scheme(quantization)
    file = OBJECTS if links_later(place) else LIBRARY
    check_adapter_limits(max_loras, max_rank)
    check_output(output)

    def limits_of(config: Phi3Config) -> Limits:
        most = _most_rows(config, place)
        return _limits(config, max_batch_size, context_length, prefill_chunk_size, most)

    def accept(config: Phi3Config) -> None:
        nonlocal adapter, layout
        limits_of(config)
        layout = AdapterLayout.of(config, max_loras, max_rank, scheme.kv_dtype)
        check_config(config, scheme, place.kernels, output)
        if merge_adapter is not None:
            adapter = read_adapter(adapter_folder(merge_adapter), config)

    adapter: AdapterWeights | None = None
    layout: AdapterLayout | None = None
    found = resolve_source(source, seed, accept)
    limits = limits_of(found.config)
    adapter_name = Path(merge_adapter or "").name
    work = weights_work(found, scheme, place.kernels, adapter, adapter_name)
    with new_folder(output) as folder:
        report("lower", 0, 1)
        library = compile_library(found.config, scheme, place, limits, folder / file, layout)
        report("lower", 1, 1)
        weights = work.write(folder, report)
        write_manifest(folder, _manifest(library, place, limits, folder / file, weights))
    return Artifact.open(output)


def _most_rows(config: Phi3Config, place: Target) -> int:
    """Tokens that a forward may have. On a GPU an axis of workgroups is of them, and kernels count
    the elements of a tensor, of which logits or a layer's gates are the largest, in 32 bits."""
    widest = max(config.vocab_size, 2 * config.intermediate_size)
    return 65535 if place.device == "cpu" else min(65535, (2**31 - 1) // widest)


def _limits(
    config: Phi3Config,
    max_batch_size: int,
    context_length: int | None,
    prefill_chunk_size: int,
    most_rows: int,
) -> Limits:
    longest = config.max_position_embeddings
    if context_length is None:
        context_length = min(DEFAULT_CONTEXT_LENGTH, longest)
    for name, value, most in (
        ("max_batch_size", max_batch_size, min(4096, most_rows)),
        ("context_length", context_length, longest),
        ("prefill_chunk_size", prefill_chunk_size, most_rows),
    ):
        if type(value) is not int or not 1 <= value <= most:
            raise ConfigError(f"{name}: found {value!r}; accepted: an integer from 1 to {most}")
    return Limits(max_batch_size, context_length, max(prefill_chunk_size, max_batch_size))


def check_adapter_limits(max_loras: int, max_rank: int) -> None:
    """Raises ConfigError."""
    if type(max_loras) is not int or not 0 <= max_loras <= MAX_LORAS:
        raise ConfigError(
            f"max_loras: found {max_loras!r}; accepted: an integer from 0 to {MAX_LORAS}"
        )
    if type(max_rank) is not int or max_rank not in RANKS:
        accepted = f"{', '.join(map(str, RANKS[:-1]))} or {RANKS[-1]}"
        raise ConfigError(f"max_rank: found {max_rank!r}; accepted: {accepted}")


@dataclass(frozen=True)
class Library:
    """What `compile_library` made."""

    model: Phi3ForCausalLM
    spec: nn.spec.ModuleSpec
    workspace: dict[str, int]
    needs: DeviceNeeds | None


def compile_library(
    config: Phi3Config,
    scheme: Scheme,
    place: Target,
    limits: Limits,
    path: Path,
    layout: AdapterLayout | None = None,
) -> Library:
    """Lowers the model and links its library to `path`; or packs its objects, into a .tar.

    Raises TargetError without a linker, and where a device cannot run a kernel.
    """
    link = pack_objects if path.suffix == ".tar" else find_linker(place)
    scheme = scheme.on(place.device)
    kernels = place.kernels.with_activations(scheme.activations)
    model = Phi3ForCausalLM(config, scheme, kernels, layout)
    spec = model.get_default_spec()
    with quick_inlining():
        mod, _ = model.export_tvm(spec)  # parameters in the order of `parameter_specs`
    bounds = {
        "n": limits.prefill_chunk_size,
        "b": limits.max_batch_size,
        "logit_rows": limits.max_batch_size,
        "m": limits.listed_blocks(place.kernels.kv_block),
    }
    with place.tvm_target:
        mod = apply(plan_passes(bounds, place.device), mod)
        workspace = workspace_bytes(mod)
        mod = apply(finalize_passes(), mod)
    with device_code(place) as built, kernel_lowering(place.device):
        executable = relax.build(mod, target=place.tvm_target, relax_pipeline=None)
        executable.export_library(str(path), fcompile=link, **built.options())
    return Library(model, spec, workspace, built.needs())


def _manifest(
    library: Library, place: Target, limits: Limits, path: Path, weights: dict[str, Any]
) -> Manifest:
    """path: of the library; weights: the fields of a WeightsManifest."""
    config, spec = library.model.config, library.spec
    page = library.model.page_spec()[0]
    block_tokens = place.kernels.kv_block
    token_values = int(np.prod(page.shape[1:])) // block_tokens * config.num_hidden_layers
    return Manifest(
        **weights,
        target=TargetInfo(
            place.name, place.device, library.needs, place.mcpu, place.mtriple, place.cpu_flags
        ),
        limits=limits,
        kv_layout=KVLayout(
            block_tokens=block_tokens,
            page_shape=tuple(page.shape[1:]),
            dtype=page.dtype,
            layers=config.num_hidden_layers,
            bytes_per_token=token_values * np.dtype(page.dtype).itemsize,
        ),
        adapters=library.model.layout,
        functions={
            name: _function(method, library.workspace[name])
            for name, method in zip(spec.method_names, spec.method_specs, strict=True)
        },
        library_sha256=file_sha256(path),
        versions={
            "phi3c": metadata.version("phi3c"),
            "tvm": tvm.__version__,
            "tvm_ffi": metadata.version("apache-tvm-ffi"),
        },
    )


def _function(method: nn.spec.MethodSpec, workspace: int) -> FunctionInfo:
    named = zip(method.arg_names, method.arg_specs, strict=True)
    tuples = ("pages", "adapters")
    inputs = [TensorSpec(n, tuple(s.shape), s.dtype) for n, s in named if n not in tuples]
    return FunctionInfo(
        inputs=tuple(inputs),
        takes_pages="pages" in method.arg_names,
        takes_adapters="adapters" in method.arg_names,
        takes_parameters=method.param_mode == "packed",
        workspace_bytes=workspace,
    )
