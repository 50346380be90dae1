"""Is an artifact what it should be: its files (sha256), and its logits against its checkpoint.

The logits are compared at every length where decoders go wrong. For each boundary of the artifact
(a page, a prefill chunk, the sliding window, LongRoPE's original context, the end of the context)
it decodes greedily across it, and prefills across it in whole chunks and in chunks of 7; the oracle
then computes every step of the same tokens without a cache, in float32 with the weights as the
artifact's scheme rounds them. What the rounding itself costs is another question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .artifact import MANIFEST, WEIGHTS_MANIFEST, Artifact, ConvertedWeights
from .config import Phi3Config
from .errors import CheckpointError, InputError
from .quantization.scheme import Scheme, parse_scheme
from .reference import reference_logits
from .runtime.compiled import load
from .runtime.single_sequence import SingleSequence
from .sources import ConfigFile, Source, resolve_source

REACH = 4  # tokens on either side of a boundary
SMALL_CHUNK = 7
ORACLES = ("transformers", "numpy")

# Token ids [n], first → logits of positions first … n−1, all with the factors that n tokens take.
Oracle = Callable[[list[int], int], np.ndarray]


@dataclass(frozen=True)
class Check:
    """One way across one boundary.

    tokens: length of the sequence in the end; steps: logits compared; error: the largest, over the
    logit scale; differs_at: position of the first greedy token that is not the oracle's, or None.
    """

    boundary: str
    at: int
    case: str
    tokens: int
    steps: int
    error: float
    differs_at: int | None
    ok: bool


@dataclass(frozen=True)
class Report:
    """oracle: what the artifact was compared with; tolerance: largest error allowed."""

    oracle: str
    tolerance: float
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


@dataclass(frozen=True)
class Sums:
    """A folder whose files were found to be what was written."""

    path: str
    files: int
    bytes: int


def check_integrity(path: Path) -> Sums:
    """Reads every file of an artifact or of converted weights. Raises ArtifactError."""
    is_weights = (path / WEIGHTS_MANIFEST).is_file() and not (path / MANIFEST).is_file()
    found = ConvertedWeights.open(path) if is_weights else Artifact.open(path)
    found.check_integrity()
    files = [file for file in found.path.iterdir() if file.is_file()]  # all are known
    return Sums(str(path), len(files), sum(file.stat().st_size for file in files))


def verify(
    path: str | Path,
    against: str | Path,
    oracle: str | None = None,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Runs artifact `path` and checkpoint `against` over random prompts (from `seed`).

    oracle: "transformers" or "numpy"; by default transformers if it is installed. Raises
    ArtifactError, CheckpointError, ConfigError, InputError.
    """
    artifact = Artifact.open(path)
    source = resolve_source(against)
    if isinstance(source, ConfigFile):
        raise CheckpointError(f"{against}: a config without weights; accepted: a checkpoint")
    config = artifact.manifest.config
    if source.config != config:
        raise CheckpointError(
            f"{against}: its config is not the artifact's: {_difference(source.config, config)}"
        )
    scheme = parse_scheme(artifact.manifest.quantization).on(artifact.manifest.target.device)
    name, logits = _oracle(oracle, source, scheme)
    tolerance = scheme.tolerance
    sequence = SingleSequence(load(path, device, threads))
    rng = np.random.default_rng(seed)
    plan = list(_plan(artifact))
    checks = []
    for done, (boundary, at, case, prompt, end) in enumerate(plan):
        if progress:
            progress("verify", done, len(plan))
        ids = rng.integers(0, config.vocab_size, prompt).tolist()
        ids, found = _run(sequence, ids, end, SMALL_CHUNK if case == "chunks of 7" else None)
        first = len(ids) - len(found)
        expected = _expected(logits, config, ids, first)
        checks.append(_compare(boundary, at, case, first, found, expected, tolerance))
    if progress:
        progress("verify", len(plan), len(plan))
    return Report(name, tolerance, tuple(checks))


def _plan(artifact: Artifact) -> Iterator[tuple[str, int, str, int, int]]:
    """(boundary, at, case, tokens in the prompt, tokens in the end)."""
    config, limits = artifact.manifest.config, artifact.manifest.limits
    boundaries = [
        ("page", artifact.manifest.kv_layout.block_tokens),
        ("prefill_chunk_size", limits.prefill_chunk_size),
        ("sliding_window", config.sliding_window),
        ("original_max", config.original_max_position_embeddings),
        ("context_length", limits.context_length),
    ]
    for boundary, at in boundaries:
        if at is None or at > limits.context_length:
            continue
        end = min(at + REACH, limits.context_length)
        yield boundary, at, "decode", max(1, min(at, end) - REACH), end
        yield boundary, at, "prefill", max(1, end - 1), end
        yield boundary, at, "chunks of 7", max(1, end - 1), end


def _run(
    sequence: SingleSequence, prompt: list[int], end: int, chunk: int | None
) -> tuple[list[int], np.ndarray]:
    """Prefills, then decodes greedily to `end` tokens; the logits of each step `[steps, vocab]`."""
    sequence.clear()
    ids, chunk = list(prompt), chunk or len(prompt)
    for start in range(0, len(ids), chunk):
        logits = sequence.extend(ids[start : start + chunk])
    steps = [logits]
    while len(ids) < end:
        ids.append(int(steps[-1].argmax()))
        steps.append(sequence.extend(ids[-1:]))
    return ids, np.stack(steps)


def _expected(oracle: Oracle, config: Phi3Config, ids: list[int], first: int) -> np.ndarray:
    """Logits of positions first … n−1, each with the factors that its own length takes."""
    switch = config.original_max_position_embeddings
    if not config.needs_long_factors(len(ids)) or first >= switch:
        return oracle(ids, first)
    return np.concatenate([oracle(ids[:switch], first), oracle(ids, switch)])


def _compare(
    boundary: str,
    at: int,
    case: str,
    first: int,
    found: np.ndarray,
    expected: np.ndarray,
    tolerance: float,
) -> Check:
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    differs = np.flatnonzero(found.argmax(axis=1) != expected.argmax(axis=1))
    # Float32 leaves no room for another token; a narrower type may swap two that nearly tie.
    tokens_ok = not len(differs) or tolerance > 1e-4
    return Check(
        boundary=boundary,
        at=at,
        case=case,
        tokens=first + len(found),
        steps=len(found),
        error=error,
        differs_at=first + 1 + int(differs[0]) if len(differs) else None,
        ok=bool(error <= tolerance and tokens_ok),  # NaN is not ok
    )


def _oracle(name: str | None, source: Source, scheme: Scheme) -> tuple[str, Oracle]:
    if name is None:
        installed = find_spec("torch") and find_spec("transformers")
        name = "transformers" if installed else "numpy"
    if name == "transformers":
        return name, _transformers_oracle(source, scheme)
    if name == "numpy":
        rounded = _rounded(source, scheme)
        return name, lambda ids, first: reference_logits(source.config, rounded, ids)[first:]
    raise InputError(f"oracle: found {name!r}; accepted: {', '.join(ORACLES)}")


def _rounded(source: Source, scheme: Scheme) -> Callable[[str], np.ndarray]:
    """Hugging Face name → the tensor as the scheme rounds it, float32."""
    weights = source.weights()

    def tensor(name: str) -> np.ndarray:
        return scheme.rounded(name, weights.rows(name, 0, weights.shapes[name][0]))

    return tensor


def _transformers_oracle(source: Source, scheme: Scheme) -> Oracle:
    import torch
    import transformers

    rounded = _rounded(source, scheme)
    with _quiet(transformers), torch.no_grad():
        # Our own reader's weights: transformers' may choose other files of a folder, even pickles.
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**source.config.to_dict()))
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(rounded(name)))
    model.eval()

    @torch.no_grad()
    def logits(ids: list[int], first: int) -> np.ndarray:
        keep = len(ids) - first
        return model(torch.tensor([ids]), logits_to_keep=keep, use_cache=False).logits[0].numpy()

    return logits


@contextmanager
def _quiet(transformers) -> Iterator[None]:
    """No warnings and bars of its loader."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _difference(a: Phi3Config, b: Phi3Config) -> str:
    x, y = a.to_dict(), b.to_dict()
    key = next(k for k in x if x[k] != y.get(k))
    return f"{key}: found {x[key]!r}; accepted: {y.get(key)!r}"
