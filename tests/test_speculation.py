"""Speculation: the same tokens as without it, whatever is drafted, and every page accounted for."""

from __future__ import annotations

import numpy as np
import pytest
from test_engine import LENGTHS, MODELS, OPTIONS, alone, check_pages, random_ids, request, run_all

import phi3c
from phi3c.engine.draft import Draft
from phi3c.engine.engine import Engine
from phi3c.engine.prompt_lookup import PromptLookup

LOOKUP = PromptLookup(tokens=5, shortest=1, adaptive=False)
LOOKUP_TREE = PromptLookup(tokens=4, shortest=1, branches=3, adaptive=False)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request, build_model) -> phi3c.CompiledPhi3:
    built = build_model(request.param, compile_options=OPTIONS, **MODELS[request.param])
    return phi3c.load(built.compiled.artifact.path, threads=1)


@pytest.fixture(scope="module")
def plain(build_model) -> phi3c.CompiledPhi3:
    built = build_model("engine-plain", compile_options=OPTIONS)
    return phi3c.load(built.compiled.artifact.path, threads=1)


@pytest.mark.parametrize("pages", [9, 40])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("lookup", [LOOKUP, LOOKUP_TREE], ids=["chain", "tree"])
def test_lookup_leaves_greedy_tokens_as_they_are(model, pages, prefix_cache, lookup):
    engine = Engine(model, None, pages * 16, prefix_cache=prefix_cache, speculation=lookup)
    prompts = [random_ids(n, seed=i % 2) for i, n in enumerate(LENGTHS)]
    handles = [engine.submit(request(p, 5 + 7 * i)) for i, p in enumerate(prompts)]
    run_all(engine)
    for i, (handle, prompt) in enumerate(zip(handles, prompts, strict=True)):
        assert handle.outputs[0].token_ids == alone(model, prompt, 5 + 7 * i)
    metrics = engine.metrics()
    assert 0 < metrics.accepted_tokens < metrics.drafted_tokens
    assert pages == 40 or metrics.preemptions > 0
