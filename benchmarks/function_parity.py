"""The largest difference of each function's output between two builds of the same weights."""

from __future__ import annotations

import numpy as np

from phi3c.runtime.compiled import CompiledPhi3

TOKENS = 24


def parity(there: CompiledPhi3, here: CompiledPhi3) -> dict[str, float]:
    """Function → largest difference / largest value."""
    found, expected = outputs(there), outputs(here)
    errors = {}
    for name, value in expected.items():
        error = np.abs(found[name].astype(np.float64) - value).max() / np.abs(value).max()
        errors[name] = float(error)
    print(f"\nlargest difference from the CPU, of {TOKENS} tokens")
    for name, error in errors.items():
        print(f"{name:40}{error:10.1e}")
    return errors


def outputs(model: CompiledPhi3) -> dict[str, np.ndarray]:
    """Of every function, each on a sequence that begins with the same tokens."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, TOKENS).tolist()
    found = {"embed": model.embed(ids).numpy()}
    for name in model.manifest.functions:
        if name in ("embed", "copy_slots", "get_logits", "block_maxima"):
            continue
        cache = model.create_paged_kv_cache(max_total_seq_len=256)
        cache.add_sequence(0)
        run = getattr(model, name)
        if "decode" in name:
            with cache.forward([0], [TOKENS - 1]):
                model.prefill(model.embed(ids[:-1]), cache)
            with cache.forward([0], [1]):
                found[name] = run(model.embed(ids[-1:]), cache)[0].numpy()
            continue
        extra = [[TOKENS - 1]] if name == "batch_prefill" else []
        with cache.forward([0], [TOKENS]):
            found[name] = run(model.embed(ids), *extra, cache)[0].numpy()
    found["get_logits"] = model.get_logits(found["prefill_to_last_hidden_states"]).numpy()
    return found
