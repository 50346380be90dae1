"""Converts a source's weights once, for artifacts to be compiled from: `phi3c convert`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from .adapters.weights import AdapterWeights
from .artifact import (
    PARAMETERS,
    ConvertedWeights,
    file_sha256,
    write_manifest,
    write_text_files,
)
from .config import Phi3Config
from .errors import ArtifactError, CheckpointError, SchemeError
from .kernels.family import Kernels
from .manifest import MergedAdapter, WeightsManifest
from .merged_weights import MergedWeights
from .output_folder import check_output, check_space, new_folder
from .packing import packed_parameters, parameter_specs
from .quantization.scheme import Scheme, parse_scheme
from .sources import ConvertedFolder, Source, resolve_source
from .targets import parse_target
from .tensor_file import tensor_bytes, write_tensors

Progress = Callable[[str, int, int], None]  # (stage, done, total)
_ROOM = 64 << 20  # bytes of disk for all but the parameters: library, tokenizer, manifest


def convert(
    source: str | Path,
    quantization: str = "q4f16_1",
    output: str | Path = "dist/weights",
    target: str = "cpu",
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> ConvertedWeights:
    """Converts a checkpoint into a folder that `compile` takes as its source.

    source: checkpoint folder, .gguf file, config JSON (random weights from `seed`), or Hugging Face
    repo id. quantization: a scheme's name. output: new or empty folder, or one of ours to replace.
    target: whose kernels will read the weights; those of every CPU are laid out alike. progress:
    called with (stage, bytes done, bytes in all).

    Raises the errors of phi3c.errors, before any work where it can; nothing is left at `output`
    unless it is whole.
    """
    report = progress or (lambda stage, done, total: None)
    output = Path(output)
    scheme, kernels = parse_scheme(quantization), parse_target(target).kernels
    check_output(output)
    found = resolve_source(
        source, seed, lambda config: check_config(config, scheme, kernels, output)
    )
    work = weights_work(found, scheme, kernels)
    with new_folder(output) as folder:
        write_manifest(folder, WeightsManifest(**work.write(folder, report)))
    return ConvertedWeights.open(output)


def check_config(config: Phi3Config, scheme: Scheme, kernels: Kernels, output: Path) -> None:
    """Raises SchemeError, and ArtifactError if the disk is too small."""
    specs = parameter_specs(config, scheme, kernels)
    check_space(output, sum(tensor_bytes(shape, dtype) for _, shape, dtype in specs) + _ROOM)


def weights_work(
    source: Source,
    scheme: Scheme,
    kernels: Kernels,
    adapter: AdapterWeights | None = None,
    adapter_name: str = "",
) -> Conversion | Reuse:
    """What puts a source's weights into a new folder, checked as far as it can be.

    adapter: to merge into them; adapter_name: for the manifest. Raises CheckpointError,
    SchemeError, ArtifactError.
    """
    if not isinstance(source, ConvertedFolder):
        return Conversion(source, scheme, kernels, adapter, adapter_name)
    if adapter is not None:
        raise CheckpointError(
            f"merge_adapter: {source.path}: found weights that are converted already; accepted: "
            "with the checkpoint, .gguf file or config .json that they were made of"
        )
    return Reuse(source, scheme, kernels)


class Conversion:
    """Of a source's tensors to a scheme, in the kernels' layout; merges an adapter into them."""

    def __init__(
        self,
        source: Source,
        scheme: Scheme,
        kernels: Kernels,
        adapter: AdapterWeights | None = None,
        adapter_name: str = "",
    ):
        self._config, self._scheme, self._kernels = source.config, scheme, kernels
        self._specs = parameter_specs(source.config, scheme, kernels)
        self._weights = source.weights()
        self._merged: MergedAdapter | None = None
        if adapter is not None:
            self._merged = MergedAdapter(adapter_name, adapter.rank, adapter.digest)
            self._weights = MergedWeights(self._weights, source.config, adapter)
        self._text_files = source.text_files()

    def write(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Writes parameters and text files; returns the fields of a WeightsManifest."""
        arrays = packed_parameters(
            self._specs,
            self._weights,
            self._kernels,
            self._scheme,
            lambda done, total: progress("weights", done, total),
        )
        infos = write_tensors(folder / PARAMETERS, self._specs, arrays)
        return {
            "config": self._config,
            "quantization": self._scheme.name,
            "layout": self._kernels.weight_layout,
            "parameters": tuple(infos),
            "parameters_sha256": file_sha256(folder / PARAMETERS),
            "files": write_text_files(folder, self._text_files),
            "merged_adapter": self._merged,
        }


class Reuse:
    """Of weights that are converted already: the same file, linked where the disk is the same."""

    def __init__(self, source: ConvertedFolder, scheme: Scheme, kernels: Kernels):
        self._source, self._scheme, self._weights = source, scheme, source.converted
        manifest = self._weights.manifest
        converted = parse_scheme(manifest.quantization)
        if (scheme.linear, scheme.vocabulary) != (converted.linear, converted.vocabulary):
            raise SchemeError(
                f"quantization: found {scheme.name!r}; accepted: {manifest.quantization}, which "
                f"{source.path} was converted to"
            )
        found = [(info.name, info.shape, info.dtype) for info in manifest.parameters]
        wanted = parameter_specs(source.config, scheme, kernels)
        if manifest.layout != kernels.weight_layout or found != wanted:
            raise ArtifactError(
                f"{source.path}: its weights are laid out for {manifest.layout} by another version "
                "or for another target; convert the checkpoint again"
            )

    def write(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """As Conversion.write. Raises ArtifactError if a file is not what was converted."""
        progress("weights", 0, 1)
        self._weights.check_integrity()
        try:
            os.link(self._weights.parameters, folder / PARAMETERS)
        except OSError:  # another disk, or one without links
            shutil.copyfile(self._weights.parameters, folder / PARAMETERS)
        write_text_files(folder, self._source.text_files())
        progress("weights", 1, 1)
        kept = {f.name: getattr(self._weights.manifest, f.name) for f in fields(WeightsManifest)}
        return kept | {"quantization": self._scheme.name}
