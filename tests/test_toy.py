"""The toy checkpoint through the whole path: folder in, artifact, text out, and the right text."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

import phi3c
from phi3c.cli import main

TOY = Path(__file__).parent.parent / "examples" / "toy"
sys.path.insert(0, str(TOY))
import evaluate  # noqa: E402


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """scheme → artifact and its accuracy, each made once."""

    @cache
    def get(scheme: str):
        folder = tmp_path_factory.mktemp("toy") / scheme
        made = phi3c.compile(TOY / "checkpoint", quantization=scheme, output=folder)
        return made, evaluate.evaluate(phi3c.load(folder), count=150, seed=1)

    return get


@pytest.fixture(params=["q0f16", "q0f32"])
def artifact(request, compiled):
    return compiled(request.param)[0]


@pytest.mark.parametrize("scheme", ["q0f16", "q0f32"])
def test_accuracy_on_held_out_questions(compiled, scheme):
    """At least 99% right per task: short, crossing original_max, and past it."""
    _, table = compiled(scheme)
    low = {(t, k): a for t, row in table.items() for k, a in row.items() if a < 0.99}
    assert not low


def test_the_recommended_4_bit_scheme_keeps_the_answers(compiled):
    """Within half a point of float32 in each task."""
    exact, rounded = compiled("q0f32")[1], compiled("q4f16_hq")[1]
    for task in exact:
        assert mean(rounded[task].values()) >= mean(exact[task].values()) - 0.005, task


def test_command_line(artifact, capsys):
    assert main(["generate", str(artifact.path), "--prompt", "reverse hello"]) == 0
    assert capsys.readouterr().out == "olleh\n"


def test_size_of_the_checkpoint():
    assert (TOY / "checkpoint" / "model.safetensors").stat().st_size <= 8_000_000
