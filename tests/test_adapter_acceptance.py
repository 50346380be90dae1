"""One batch of the engine: the base model, ranks 4, 16 and 64, unfused names, some layers only.

Each row's log-probabilities are against transformers with what PEFT merges into its weights; again
from the prefix cache, and after every name was unloaded and loaded as another adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from conftest import TinyModel
from test_adapter_files import SPLIT, merged_by_peft, save_adapter

from phi3c.adapters.layout import TARGETS
from phi3c.engine.engine import Engine
from phi3c.engine.request import Handle, Request
from phi3c.engine.sampler import SamplingParams

ADAPTERS = {
    "four": dict(r=4, lora_alpha=8, target_modules=list(TARGETS)),
    "sixteen": dict(r=16, lora_alpha=8, use_rslora=True, target_modules=list(TARGETS)),
    "sixty-four": dict(r=64, lora_alpha=16, target_modules=list(TARGETS)),
    "unfused": dict(r=5, lora_alpha=9, target_modules=SPLIT),
    "one layer": dict(r=3, lora_alpha=6, target_modules=["o_proj"], layers_to_transform=[1]),
}
SLOTS = dict(max_loras=5, max_rank=64, max_batch_size=6, prefill_chunk_size=256)
PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=20)


def check(
    engine: Engine, oracles: Mapping[str | None, TinyModel], loaded: Mapping[str | None, str | None]
) -> list[Handle]:
    """The same prompt with each adapter (what it is → its name) in one batch."""
    ids = np.random.default_rng(0).integers(3, 199, 40).tolist()
    handles = [engine.submit(Request(ids, PARAMS, adapter=name)) for name in loaded.values()]
    while not engine.idle:
        engine.step()
    for what, handle in zip(loaded, handles, strict=True):
        text, output = list(ids), handle.outputs[0]
        assert len(output.token_ids) == PARAMS.max_tokens
        for token, (own, likeliest) in zip(output.token_ids, output.logprobs, strict=True):
            logits = torch.tensor(oracles[what].last_logits(text)).double()
            expected = torch.log_softmax(logits, -1).numpy()
            assert token == expected.argmax()
            found = {token: own} | likeliest
            errors = [abs(value - expected[i]) for i, value in found.items()]
            assert max(errors) < 5e-5, (what, max(errors))
            text.append(token)
    return handles


def test_every_row_is_that_of_its_adapter(build_model, tmp_path):
    base = build_model("acceptance", compile_options=tuple(SLOTS.items()))
    oracles: dict[str | None, TinyModel] = {None: base}
    for seed, (what, lora) in enumerate(ADAPTERS.items()):
        save_adapter(tmp_path / what, seed=seed, **lora)
        split = lora["target_modules"] is SPLIT
        oracles[what] = replace(base, oracle=merged_by_peft(base.folder, tmp_path / what, split))
    model = base.compiled
    for what in ADAPTERS:
        model.load_adapter(tmp_path / what, what)
    engine = Engine(model, max_total_seq_len=2048)
    same: dict[str | None, str | None] = {None: None} | {what: what for what in ADAPTERS}
    first = check(engine, oracles, same)
    assert engine.metrics().sequence_steps == 3 * len(same)  # every step had all of them
    assert [handle.cached_tokens for handle in first] == [0] * len(same)
    again = check(engine, oracles, same)
    assert [handle.cached_tokens for handle in again] == [32] * len(same)

    for what in ADAPTERS:
        model.unload_adapter(what)
    names = list(ADAPTERS)
    moved: dict[str | None, str | None] = dict(zip(names, [*names[1:], names[0]], strict=True))
    for what, name in moved.items():
        model.load_adapter(tmp_path / what, name)
    after = check(engine, oracles, {None: None} | moved)
    assert [handle.cached_tokens for handle in after] == [32] + [0] * len(moved)
