"""The toy checkpoint through the whole path: folder in, artifact, text out, and the right text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import phi3c
from phi3c.cli import main

TOY = Path(__file__).parent.parent / "examples" / "toy"
sys.path.insert(0, str(TOY))
import evaluate  # noqa: E402


@pytest.fixture(scope="module", params=["q0f16", "q0f32"])
def artifact(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / request.param
    return phi3c.compile(TOY / "checkpoint", quantization=request.param, output=folder)


def test_accuracy_on_held_out_questions(artifact):
    """At least 99% right per task: short, crossing original_max, and past it."""
    table = evaluate.evaluate(phi3c.load(artifact.path), count=150, seed=1)
    low = {(t, k): a for t, row in table.items() for k, a in row.items() if a < 0.99}
    assert not low


def test_command_line(artifact, capsys):
    assert main(["generate", str(artifact.path), "--prompt", "reverse hello"]) == 0
    assert capsys.readouterr().out == "olleh\n"


def test_size_of_the_checkpoint():
    assert (TOY / "checkpoint" / "model.safetensors").stat().st_size <= 8_000_000
