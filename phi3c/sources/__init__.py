"""What a user names as a model, and what the compiler takes from it.

A checkpoint folder, a Hugging Face repo id (downloaded into a folder), a GGUF file, a config .json
(random weights), or a folder of ours whose weights are converted already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from ..artifact import MANIFEST, Artifact, ConvertedWeights, manifest_name
from ..config import Phi3Config
from ..errors import CheckpointError
from ..hub import download, is_repo_id
from ..manifest import TEXT_FILES as TEXT_FILES
from ..weights import Checkpoint, RandomWeights, Weights


class Source(ABC):
    """A model as its user has it. path: the folder or file that holds it."""

    def __init__(self, path: Path, config: Phi3Config):
        self.path = path
        self.config = config

    @abstractmethod
    def weights(self) -> Weights:
        """Its tensors, checked against the config. Raises CheckpointError."""

    @abstractmethod
    def text_files(self) -> dict[str, bytes]:
        """Those of TEXT_FILES that it has. Raises CheckpointError."""

    @abstractmethod
    def input_files(self) -> list[Path]:
        """Every file that a compilation reads."""


class CheckpointFolder(Source):
    """config.json, safetensors and tokenizer files in a folder."""

    def weights(self) -> Weights:
        return Checkpoint(self.path, self.config)

    def text_files(self) -> dict[str, bytes]:
        return {name: _read(self.path / name) for name in TEXT_FILES if self._has(name)}

    def input_files(self) -> list[Path]:
        globs = ("*.json", "*.jinja", "*.safetensors")
        return sorted(file for glob in globs for file in self.path.glob(glob))

    def _has(self, name: str) -> bool:
        return (self.path / name).is_file()


class ConfigFile(Source):
    """A config alone: weights are drawn from a seed, and there is no tokenizer."""

    def __init__(self, path: Path, config: Phi3Config, seed: int):
        super().__init__(path, config)
        self._seed = seed

    def weights(self) -> Weights:
        return RandomWeights(self.config, self._seed)

    def text_files(self) -> dict[str, bytes]:
        return {}

    def input_files(self) -> list[Path]:
        return [self.path]


class ConvertedFolder(Source):
    """Converted weights, or an artifact: the compiler takes their parameters as they are."""

    def __init__(self, converted: ConvertedWeights):
        super().__init__(converted.path, converted.manifest.config)
        self.converted = converted

    def weights(self) -> Weights:
        raise CheckpointError(f"{self.path}: converted weights; accepted: {_ACCEPTED}")

    def text_files(self) -> dict[str, bytes]:
        return {name: _read(self.path / name) for name in self.converted.manifest.files}

    def input_files(self) -> list[Path]:
        return [self.path / self.converted.MANIFEST]


def resolve_source(
    source: str | Path, seed: int = 0, accept: Callable[[Phi3Config], None] = lambda config: None
) -> Source:
    """Raises CheckpointError, ConfigError, ArtifactError. Downloads what a repo id names.

    seed: of the random weights of a config .json. accept: may refuse the config, by raising, before
    gigabytes are downloaded.
    """
    path = Path(source).expanduser()
    found = _local(path, seed)
    if found is not None:
        accept(found.config)
        return found
    if not is_repo_id(str(source)):
        raise CheckpointError(f"{source}: no such file or folder; accepted: {_ACCEPTED}")
    folder = download(str(source), TEXT_FILES, accept)
    config = Phi3Config.from_file(folder)
    accept(config)  # of a folder that was there already
    return CheckpointFolder(folder, config)


def _local(path: Path, seed: int) -> Source | None:
    """What is there, or None."""
    if path.is_dir():
        ours = manifest_name(path)
        if ours is not None:
            return ConvertedFolder((Artifact if ours == MANIFEST else ConvertedWeights).open(path))
        return CheckpointFolder(path, Phi3Config.from_file(path))
    if not path.is_file():
        return None
    suffix = path.suffix.lower()
    if suffix == ".json":
        return ConfigFile(path, Phi3Config.from_file(path), seed)
    if suffix == ".gguf":
        from .gguf_file import GgufFile

        return GgufFile(path)
    raise CheckpointError(f"{path}: a file; accepted: {_ACCEPTED}")


_ACCEPTED = (
    "a checkpoint folder, a .gguf file, a config .json, or a Hugging Face repo id (owner/name)"
)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read ({err.strerror})") from None
