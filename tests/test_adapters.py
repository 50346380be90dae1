"""LoRA adapters in a compiled model: each row against the reference with its adapter merged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from conftest import TinyModel, longrope
from test_parity import new_cache, tokens

import phi3c
from phi3c import describe
from phi3c.adapters.layout import TARGETS, layer_targets, target_shape
from phi3c.config import Phi3Config
from phi3c.errors import ConfigError, InputError, OutOfMemoryError
from phi3c.memory import memory
from phi3c.quantization.scheme import parse_scheme
from phi3c.reference import reference_logits
from phi3c.runtime import host

# name → scheme, fields of transformers' config that differ from conftest.BASE
WIDE = dict(hidden_size=128, intermediate_size=192, head_dim=32)
MODELS = {
    "gqa": ("q0f32", dict()),
    "mha-tied": ("q0f32", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "odd-sizes": (
        "q0f32",
        dict(
            hidden_size=36,
            intermediate_size=52,
            num_attention_heads=3,
            num_key_value_heads=1,
            num_hidden_layers=1,
        ),
    ),
    "longrope": (
        "q0f32",
        dict(rope_scaling=longrope(16), original_max_position_embeddings=32),
    ),
    "int8": ("q4f16_1", WIDE),
    "int8-mqa": ("q8f32_1", WIDE | dict(num_key_value_heads=1)),
    "float": ("q4f32_1:float", WIDE),
}
SLOTS = dict(max_loras=4, max_rank=64, max_batch_size=5)
BASE = -1


@dataclass(frozen=True)
class LowRank:
    a: np.ndarray  # [r, in]
    b: np.ndarray  # [out, r]


@dataclass(frozen=True)
class Adapter:
    rank: int
    low_rank: dict[tuple[int, str], LowRank]


def random_adapter(config: Phi3Config, rank: int, seed: int, keep=lambda key: True) -> Adapter:
    """As large as half of the weights. keep: of a (layer, target)."""
    rng = np.random.default_rng(seed)
    low_rank = {}
    for key in filter(keep, layer_targets(config)):
        out_features, in_features = target_shape(config, key[1])
        a = rng.standard_normal((rank, in_features)) / in_features**0.5
        b = rng.standard_normal((out_features, rank)) * 0.6 / rank**0.5
        low_rank[key] = LowRank(a.astype(np.float32), b.astype(np.float32))
    return Adapter(rank, low_rank)


def some_adapters(config: Phi3Config) -> list[Adapter]:
    """Of ranks 4, 16 and 64, and one with another rank in every module, some left out."""
    adapters = [random_adapter(config, rank, seed=rank) for rank in (4, 16, 64)]
    last = config.num_hidden_layers - 1
    parts = [
        random_adapter(config, 3 + 5 * i, 100 + i, lambda key, t=t: key == (last, t))
        for i, t in enumerate(("o_proj", "gate_up_proj"))
    ]
    low_rank = parts[0].low_rank | parts[1].low_rank
    return [*adapters, Adapter(max(part.rank for part in parts), low_rank)]


class WithAdapters:
    """A tiny model, its artifact with slots and adapters in them, and the one without."""

    def __init__(self, build_model, name: str):
        quantization, fields = MODELS[name]
        self.scheme = parse_scheme(quantization)

        def build(kind: str, options) -> TinyModel:
            fixed = dict(quantization=quantization, compile_options=tuple(options.items()))
            return build_model(f"{name}-{kind}", **fixed, **fields)

        self.model = build("adapters", SLOTS)
        self.plain = build("no-adapters", {"max_batch_size": SLOTS["max_batch_size"]})
        self.pools = self.model.compiled.adapter_pools
        self.adapters = some_adapters(self.model.config)
        for slot, adapter in enumerate(self.adapters):
            self.pools.write(slot, adapter)

    def expected(self, slot: int, ids) -> np.ndarray:
        """Logits of every position `[n, vocab]`, of W + B A merged densely."""
        modules = {} if slot == BASE else self.adapters[slot].low_rank

        def weights(name: str) -> np.ndarray:
            weight = self.scheme.rounded(name, self.model.weights(name)).astype(np.float64)
            for (layer, target), m in modules.items():
                if name.startswith(f"model.layers.{layer}.") and f".{target}." in name:
                    weight = weight + m.b.astype(np.float64) @ m.a.astype(np.float64)
            return weight

        return reference_logits(self.model.config, weights, np.asarray(ids))

    def check(self, found, slot: int, ids) -> None:
        """found: logits of the last positions of `ids`, `[k, vocab]`."""
        expected = self.expected(slot, ids)[-len(found) :]
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error <= (5e-2 if self.scheme.int8_activations else 1e-4), (slot, error)


@pytest.fixture(scope="module", params=list(MODELS))
def loaded(request, build_model) -> WithAdapters:
    return WithAdapters(build_model, request.param)


def per_token(slots, lengths) -> list[int]:
    return np.repeat(slots, lengths).tolist()


def sequences(model: TinyModel, lengths, **options):
    """A cache with a sequence of each length to come, and their tokens."""
    cache = new_cache(model, **options)
    for i, n in enumerate(lengths):
        cache.add_sequence(i, max_length=n if model.config.needs_long_factors(n) else None)
    return cache, [tokens(model, n, seed=10 + i) for i, n in enumerate(lengths)]


def test_one_sequence(loaded):
    for slot in range(BASE, 4):
        cache, [ids] = sequences(loaded.model, [12])
        run = loaded.model.compiled
        with cache.forward([0], [9], token_slot=[slot] * 9):
            logits = run.prefill(run.embed(ids[:9]), cache)[0].numpy()[0]
        loaded.check(logits, slot, ids[:9])
        for n in range(9, 12):
            with cache.forward([0], [1], token_slot=[slot]):
                logits = run.decode(run.embed(ids[n : n + 1]), cache)[0].numpy()[0]
            loaded.check(logits, slot, ids[: n + 1])


SLOT_OF = [2, BASE, 0, 1, 3]  # of each sequence: rank 64 beside the base model beside rank 4 …
LENGTHS = [7, 1, 16, 5, 3]


def mixed_forwards(model: TinyModel, slots: list[int]) -> list[np.ndarray]:
    """Logits `[sequences, tokens, vocab]` of a prefill, two decode steps and a verification."""
    run, all_ids = model.compiled, range(len(LENGTHS))
    cache, ids = sequences(model, [n + 5 for n in LENGTHS])
    found = []
    with cache.forward(all_ids, LENGTHS, token_slot=per_token(slots, LENGTHS)):
        embed = run.embed(np.concatenate([s[:n] for s, n in zip(ids, LENGTHS, strict=True)]))
        last = np.cumsum(LENGTHS) - 1
        found.append(run.batch_prefill(embed, last, cache)[0].numpy()[0][:, None])
    for step in range(2):
        with cache.forward(all_ids, [1] * len(ids), token_slot=slots):
            new = [s[n + step] for s, n in zip(ids, LENGTHS, strict=True)]
            found.append(run.batch_decode(run.embed(new), cache)[0].numpy())
    with cache.forward(all_ids, [3] * len(ids), token_slot=per_token(slots, [3] * len(ids))):
        new = np.concatenate([s[n + 2 : n + 5] for s, n in zip(ids, LENGTHS, strict=True)])
        logits = run.batch_verify(run.embed(new), cache)[0].numpy()[0]
        found.append(logits.reshape(len(ids), 3, -1))
    return found


def test_mixed_batch(loaded):
    _, ids = sequences(loaded.model, [n + 5 for n in LENGTHS])
    ends = (0, 1, 2, 5)  # tokens after the prompt that each forward has seen
    for end, logits in zip(ends, mixed_forwards(loaded.model, SLOT_OF), strict=True):
        for i, slot in enumerate(SLOT_OF):
            loaded.check(logits[i], slot, ids[i][: LENGTHS[i] + end])


def test_base_rows_have_the_bits_of_a_build_without_adapters(loaded):
    mixed = mixed_forwards(loaded.model, SLOT_OF)
    alone = mixed_forwards(loaded.model, [BASE] * len(SLOT_OF))
    plain = mixed_forwards(loaded.plain, [BASE] * len(SLOT_OF))
    base = SLOT_OF.index(BASE)
    for a, b, c in zip(mixed, alone, plain, strict=True):
        np.testing.assert_array_equal(a[base], c[base])
        np.testing.assert_array_equal(b, c)


def test_many_rows_and_hidden_states(loaded):
    """A prompt of several tiles, beside others, through the functions without the LM head."""
    slots, lengths = [1, BASE, 2], [70, 9, 17]
    cache, ids = sequences(loaded.model, lengths, prefill_chunk_size=96)
    run = loaded.model.compiled
    with cache.forward(range(3), lengths, token_slot=per_token(slots, lengths)):
        embed = run.embed(np.concatenate(ids))
        hidden = run.batch_prefill_to_last_hidden_states(embed, cache)[0]
        logits = run.get_logits(hidden).numpy()[0]
    for slot, own, end in zip(slots, ids, np.cumsum(lengths), strict=True):
        loaded.check(logits[end - len(own) : end], slot, own)


@pytest.fixture(scope="module")
def one(build_model) -> WithAdapters:
    return WithAdapters(build_model, "gqa")


def last_logits(model: TinyModel, slot: int, ids) -> np.ndarray:
    cache, run = new_cache(model), model.compiled
    cache.add_sequence(0)
    with cache.forward([0], [len(ids)], token_slot=[slot] * len(ids)):
        return run.prefill(run.embed(ids), cache)[0].numpy()[0]


def test_slots_are_swapped_and_cleared(build_model):
    """A smaller adapter leaves nothing of the larger one that was there."""
    one = WithAdapters(build_model, "gqa")
    ids = tokens(one.model, 8)
    small = random_adapter(one.model.config, 2, seed=5, keep=lambda key: key == (0, "qkv_proj"))
    try:
        one.adapters[2] = small
        one.pools.write(2, small)
        one.check(last_logits(one.model, 2, ids), 2, ids)
        assert one.pools.ranks.tolist() == [4, 16, 2, 8]
        one.pools.clear(2)
        with pytest.raises(InputError, match="token_slot: found 2, an empty slot"):
            last_logits(one.model, 2, ids)
    finally:
        one.pools.write(2, some_adapters(one.model.config)[2])


def test_what_does_not_fit_changes_nothing(one):
    ids = tokens(one.model, 8)
    before = last_logits(one.model, 1, ids)
    too_high = random_adapter(one.model.config, 65, seed=1)
    with pytest.raises(InputError, match=r"adapter: found rank 65; accepted: up to 64 \(max_rank"):
        one.pools.write(1, too_high)
    infinite = random_adapter(one.model.config, 4, seed=1)
    infinite.low_rank[1, "down_proj"].b[3, 2] = np.inf
    with pytest.raises(InputError, match=r"layer 1, down_proj, B: found inf; accepted: up to 3.4"):
        one.pools.write(1, infinite)
    np.testing.assert_array_equal(last_logits(one.model, 1, ids), before)


@pytest.mark.parametrize(
    ("token_slot", "message"),
    [
        ([0, 0], r"token_slot: found 2 entries; accepted: 3, one a token"),
        ([0, 4, 0], r"token_slot: found 4; accepted: -1 to 3"),
        ([0, 0, -2], r"token_slot: found -2; accepted: -1 to 3"),
        (["a", 0, 0], r"accepted: integers"),
    ],
)
def test_wrong_token_slots(one, token_slot, message):
    cache = new_cache(one.model)
    cache.add_sequence(0)
    with pytest.raises(InputError, match=message):
        cache.begin_forward([0], [3], token_slot=token_slot)
    with cache.forward([0], [3]):  # nothing has changed
        pass


def test_an_artifact_without_slots(one):
    assert one.plain.compiled.adapter_pools is None
    assert one.plain.compiled.manifest.adapters is None
    cache = new_cache(one.plain)
    cache.add_sequence(0)
    with pytest.raises(InputError, match="found 0; accepted: -1, as the artifact has max_loras 0"):
        cache.begin_forward([0], [1], token_slot=[0])
    assert not any("adapters" in name for name in one.plain.compiled.manifest.functions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_loras=-1), "max_loras: found -1; accepted: an integer from 0 to 1024"),
        (dict(max_loras=1025), "max_loras: found 1025; accepted"),
        (dict(max_loras=True), "max_loras: found True; accepted"),
        (dict(max_loras=2, max_rank=12), "max_rank: found 12; accepted: 8, 16, 32, 64 or 128"),
        (dict(max_rank="16"), "max_rank: found '16'; accepted"),
    ],
)
def test_wrong_limits(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        phi3c.compile("configs/tiny.json", output=tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


def test_pools_that_kernels_cannot_count_are_refused(tmp_path):
    config = "configs/phi-3-medium-4k.json"
    message = r"max_loras: found 1024; accepted: up to \d+ of rank 128 for this model"
    with pytest.raises(ConfigError, match=message):
        phi3c.compile(config, output=tmp_path / "x", max_loras=1024, max_rank=128)
    assert not list(tmp_path.iterdir())


def test_the_artifact_tells_of_its_slots(one):
    artifact, config = one.model.compiled.artifact, one.model.config
    layout = artifact.manifest.adapters
    assert (layout.max_loras, layout.max_rank, layout.dtype) == (4, 64, "float32")
    sizes = [sum(target_shape(config, target)) for target in TARGETS]
    padding = sum(-target_shape(config, target)[0] % 16 for target in TARGETS)
    values = (sum(sizes) + padding) * 64 * config.num_hidden_layers
    assert layout.bytes_per_slot == 4 * values
    assert memory(artifact.manifest, 0).adapters == 4 * layout.bytes_per_slot
    facts = describe.artifact_facts(artifact, 100)
    assert facts["adapters"]["max_rank"] == 64
    assert facts["memory"]["adapters"] == 4 * layout.bytes_per_slot
    assert "adapters     4 slots of rank 64, float32, " in describe.render(facts)
    plain = describe.artifact_facts(one.plain.compiled.artifact, 100)
    assert plain["adapters"] is None and "adapters     no slots" in describe.render(plain)


def test_slots_count_when_an_artifact_is_loaded(one, monkeypatch):
    monkeypatch.setattr(host, "available_memory", lambda: 1000)
    with pytest.raises(OutOfMemoryError, match=r"weights .*, workspace .*, adapters .*; found"):
        phi3c.load(one.model.compiled.artifact.path)
