"""What a folder of ours says of itself: frozen dataclasses and their JSON.

Two kinds of folder carry one: an artifact (manifest.json), and converted weights without a library
(weights.json), whose entries are the first part of an artifact's. The last entry is the sha256 of
all others, so that an edit by hand is noticed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from .adapters.layout import AdapterLayout
from .config import Phi3Config
from .errors import ArtifactError, ConfigError
from .tensor_file import TensorInfo

FORMAT_VERSION = 5
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SUM = "manifest_sha256"


@dataclass(frozen=True)
class TensorSpec:
    """Shape (named extents are symbolic) and dtype of an input, output or page tensor."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class FunctionInfo:
    """One function of the library. Pages, pools of adapters and parameters follow the inputs, as
    tuples, if it takes them.

    workspace_bytes: storage that the memory planner gave it, at the artifact's limits.
    """

    inputs: tuple[TensorSpec, ...]
    takes_pages: bool
    takes_adapters: bool
    takes_parameters: bool
    workspace_bytes: int


@dataclass(frozen=True)
class Limits:
    """What the artifact was compiled for.

    max_batch_size: sequences in a forward; context_length: tokens in a sequence;
    prefill_chunk_size: new tokens in a forward.
    """

    max_batch_size: int
    context_length: int
    prefill_chunk_size: int

    def listed_blocks(self, block_tokens: int) -> int:
        """The most KV blocks that a forward lists."""
        return self.max_batch_size * -(-self.context_length // block_tokens)


@dataclass(frozen=True)
class KVLayout:
    """page_shape: of one layer's tensor without its leading extent, the number of blocks.

    block_tokens: tokens in a block; bytes_per_token: keys and values of all layers.
    """

    block_tokens: int
    page_shape: tuple[int, ...]
    dtype: str
    layers: int
    bytes_per_token: int


@dataclass(frozen=True)
class DeviceNeeds:
    """The most that any kernel asks of a GPU.

    kernels: how many there are; threads: of a workgroup; shared_bytes: of its memory;
    argument_bytes: arguments that are no buffers; arch: the least, of CUDA.

    Of Vulkan: features: those of VulkanDevice that must be there; storage_buffers: of a kernel;
    workgroup: threads along each axis; grid: workgroups along each axis, where their number does
    not depend on a call; subgroup_size, subgroup_operations: exactly, and Vulkan's flags; 0 where
    no kernel relies on them.
    """

    kernels: int
    threads: int
    shared_bytes: int
    argument_bytes: int = 0
    arch: str = ""
    features: tuple[str, ...] = ()
    storage_buffers: int = 0
    workgroup: tuple[int, int, int] = (0, 0, 0)
    grid: tuple[int, int, int] = (0, 0, 0)
    subgroup_size: int = 0
    subgroup_operations: int = 0


@dataclass(frozen=True)
class TargetInfo:
    """device: what runs the kernels; needs: of it, None on a CPU. mcpu, mtriple, cpu_flags: what
    the code needs of the CPU, by LLVM's and Linux's names."""

    name: str
    device: str
    needs: DeviceNeeds | None
    mcpu: str
    mtriple: str
    cpu_flags: tuple[str, ...]


@dataclass(frozen=True)
class MergedAdapter:
    """A LoRA adapter that is a part of the weights. name: of its folder or repo; rank: the largest
    of its linears'; digest: sha256 of its contents."""

    name: str
    rank: int
    digest: str


@dataclass(frozen=True)
class WeightsManifest:
    """Converted weights. layout: whose kernels read them; files: name → sha256 of TEXT_FILES."""

    FORMAT: ClassVar[str] = "phi3c-weights"

    config: Phi3Config
    quantization: str
    layout: str
    parameters: tuple[TensorInfo, ...]
    parameters_sha256: str
    files: dict[str, str]
    merged_adapter: MergedAdapter | None

    def to_json(self) -> str:
        head = {"format": self.FORMAT, "format_version": FORMAT_VERSION}
        body = head | asdict(self) | {"config": self.config.to_dict()}
        return json.dumps(body | {SUM: contents_sha256(body)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> WeightsManifest:
        """Raises ArtifactError: not JSON, not ours, another version, edited, fields missing."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise ArtifactError(f"{path}: not JSON") from None
        if not isinstance(data, dict) or data.get("format") != cls.FORMAT:
            raise ArtifactError(f"{path}: not the manifest of {_KINDS[cls.FORMAT]}")
        if data.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format_version: found {data.get('format_version')!r}; accepted: "
                f"{FORMAT_VERSION}. Make it again with this phi3c"
            )
        if data.pop(SUM, None) != contents_sha256(data):
            raise ArtifactError(
                f"{path}: edited by hand or damaged: its {SUM} is not that of its contents; "
                "make it again"
            )
        try:
            return cls(**cls._fields(data))
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as err:
            raise ArtifactError(f"{path}: broken manifest: {type(err).__name__} {err}") from None

    @classmethod
    def _fields(cls, data: dict[str, Any]) -> dict[str, Any]:
        if foreign := sorted(set(data["files"]) - set(TEXT_FILES)):
            raise ValueError(f"files: found {foreign[0]!r}; accepted: {', '.join(TEXT_FILES)}")
        merged = data["merged_adapter"]
        return {
            "config": Phi3Config.from_dict(data["config"], "config"),
            "quantization": str(data["quantization"]),
            "layout": str(data["layout"]),
            "parameters": tuple(
                TensorInfo(t["name"], tuple(t["shape"]), t["dtype"], t["sha256"])
                for t in data["parameters"]
            ),
            "parameters_sha256": str(data["parameters_sha256"]),
            "files": {str(name): str(digest) for name, digest in data["files"].items()},
            "merged_adapter": None if merged is None else MergedAdapter(**merged),
        }


@dataclass(frozen=True)
class Manifest(WeightsManifest):
    """All that is known of an artifact before it is run."""

    FORMAT: ClassVar[str] = "phi3c"

    target: TargetInfo
    limits: Limits
    kv_layout: KVLayout
    adapters: AdapterLayout | None  # None: it has no slots for any
    functions: dict[str, FunctionInfo]
    library_sha256: str
    versions: dict[str, str]

    @classmethod
    def _fields(cls, data: dict[str, Any]) -> dict[str, Any]:
        target, kv, adapters = data["target"], data["kv_layout"], data["adapters"]
        return super()._fields(data) | {
            "target": _target(target),
            "limits": Limits(**data["limits"]),
            "kv_layout": KVLayout(**kv | {"page_shape": tuple(kv["page_shape"])}),
            "adapters": None if adapters is None else AdapterLayout(**adapters),
            "functions": {name: _function(entry) for name, entry in data["functions"].items()},
            "library_sha256": str(data["library_sha256"]),
            "versions": dict(data["versions"]),
        }


_KINDS = {WeightsManifest.FORMAT: "weights converted by phi3c", Manifest.FORMAT: "a phi3c artifact"}


def _target(entry: dict[str, Any]) -> TargetInfo:
    needs = entry["needs"]
    known = {
        "needs": None if needs is None else _needs(needs),
        "cpu_flags": tuple(entry["cpu_flags"]),
    }
    return TargetInfo(**entry | known)


def _needs(entry: dict[str, Any]) -> DeviceNeeds:
    tuples = {name: tuple(entry[name]) for name in ("features", "workgroup", "grid")}
    return DeviceNeeds(**entry | tuples)


def _function(entry: dict[str, Any]) -> FunctionInfo:
    return FunctionInfo(
        inputs=tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"]) for t in entry["inputs"]),
        takes_pages=bool(entry["takes_pages"]),
        takes_adapters=bool(entry["takes_adapters"]),
        takes_parameters=bool(entry["takes_parameters"]),
        workspace_bytes=int(entry["workspace_bytes"]),
    )


def contents_sha256(body: dict[str, Any]) -> str:
    """Of the entries, whatever their order and spacing."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
