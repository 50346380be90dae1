"""`phi3c verify`: right artifacts pass, and each known kind of wrong is found where it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import longrope, make_checkpoint

from phi3c.cli import main
from phi3c.errors import CheckpointError, InputError
from phi3c.runtime.kv_cache import PagedKVCache
from phi3c.verify import verify

SHAPE = dict(rope_scaling=longrope(16), original_max_position_embeddings=32, sliding_window=20)
OPTIONS = dict(prefill_chunk_size=24, context_length=60)
BOUNDARIES = {
    "page": 16,
    "prefill_chunk_size": 24,
    "sliding_window": 20,
    "original_max": 32,
    "context_length": 60,
}


@pytest.fixture
def model(build_model):
    return build_model("verify", compile_options=OPTIONS.items(), **SHAPE)


@pytest.mark.parametrize("oracle", ["transformers", "numpy"])
def test_a_right_artifact(model, oracle):
    report = verify(model.compiled.artifact.path, model.folder, oracle=oracle)
    assert report.ok and report.oracle == oracle and report.tolerance == 1e-4
    assert {c.boundary: c.at for c in report.checks} == BOUNDARIES
    assert {c.case for c in report.checks} == {"decode", "prefill", "chunks of 7"}
    assert all(c.error <= 1e-5 and c.differs_at is None for c in report.checks)
    decoded = [c for c in report.checks if c.case == "decode" and c.boundary != "context_length"]
    assert all(c.tokens == c.at + 4 and c.steps == 9 for c in decoded)


def wrong_at(model) -> set[str]:
    report = verify(model.compiled.artifact.path, model.folder)
    assert not report.ok
    return {c.boundary for c in report.checks if not c.ok}


def test_factors_chosen_by_chunk_are_caught(model, monkeypatch):
    inputs = PagedKVCache.forward_inputs

    def by_chunk(cache):
        found = inputs(cache)
        found["factor_set"][:] = len(found["factor_set"]) > 32
        return found

    monkeypatch.setattr(PagedKVCache, "forward_inputs", by_chunk)
    assert wrong_at(model) == {"original_max", "context_length"}  # all that is longer than 32


def test_wrong_slots_are_caught(model, monkeypatch):
    inputs = PagedKVCache.forward_inputs

    def shifted(cache):
        found = inputs(cache)
        found["slots"][found["positions"] == 16] += 1  # the first token of the second page
        return found

    monkeypatch.setattr(PagedKVCache, "forward_inputs", shifted)
    assert "page" in wrong_at(model)


def test_other_weights_are_wrong_everywhere(model, tmp_path, capsys):
    make_checkpoint(tmp_path / "other", seed=1, **SHAPE)
    artifact = str(model.compiled.artifact.path)
    assert main(["verify", artifact, "--against", str(tmp_path / "other")]) == 1
    shown = capsys.readouterr().out
    assert shown.count("WRONG") == 15 and "15 of 15 wrong" in shown


def test_command_line(model, capsys):
    artifact = str(model.compiled.artifact.path)
    assert main(["verify", artifact, "--against", str(model.folder)]) == 0
    assert "right at every boundary" in capsys.readouterr().out
    assert main(["verify", artifact, "--against", str(model.folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and len(report["checks"]) == 15
    assert np.isfinite([c["error"] for c in report["checks"]]).all()


def test_refusals(model, tmp_path):
    artifact = model.compiled.artifact.path
    with pytest.raises(InputError, match="oracle: found 'mlx'; accepted: transformers, numpy"):
        verify(artifact, model.folder, oracle="mlx")
    with pytest.raises(CheckpointError, match="a config without weights"):
        verify(artifact, model.folder / "config.json")
    make_checkpoint(tmp_path / "other", **SHAPE | {"sliding_window": 21})
    with pytest.raises(CheckpointError, match="sliding_window: found 21; accepted: 20"):
        verify(artifact, tmp_path / "other")
