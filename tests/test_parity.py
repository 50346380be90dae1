"""Every compiled function against transformers, over the shapes that the family's models have."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import longrope

from phi3c.reference import reference_logits

# name → fields of transformers' config that differ from conftest.BASE
SHAPES = {
    "gqa": dict(),
    "mha": dict(num_key_value_heads=4),
    "mqa-tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "odd-sizes": dict(
        vocab_size=131,
        hidden_size=36,
        intermediate_size=52,
        num_attention_heads=3,
        num_key_value_heads=1,
        num_hidden_layers=1,
    ),
    "wide-head": dict(head_dim=24),
    "partial-rotary": dict(partial_rotary_factor=0.75, tie_word_embeddings=True),
    "q0f16": dict(quantization="q0f16"),
}


@pytest.fixture(params=list(SHAPES))
def model(request, build_model):
    return build_model(request.param, **SHAPES[request.param])


def tokens(model, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, n)


def prefill(model, cache, seq_id: int, ids) -> np.ndarray:
    with cache.forward([seq_id], [len(ids)]):
        logits, _ = model.compiled.prefill(model.compiled.embed(ids), cache)
    return logits.numpy()


def decode(model, cache, seq_id: int, token: int) -> np.ndarray:
    with cache.forward([seq_id], [1]):
        logits, _ = model.compiled.decode(model.compiled.embed([token]), cache)
    return logits.numpy()


def new_cache(model, **options):
    return model.compiled.create_paged_kv_cache(**{"max_total_seq_len": 512} | options)


def test_reference_is_transformers(model):
    ids = tokens(model, 40)
    expected = model.logits(ids)
    found = reference_logits(model.config, model.weights, ids)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 90])
def test_prefill_then_decode(model, n):
    ids = tokens(model, n + 6)
    cache = new_cache(model)
    cache.add_sequence(0)
    logits = prefill(model, cache, 0, ids[:n])
    assert logits.shape == (1, 1, model.config.vocab_size) and logits.dtype == np.float32
    expected = model.logits(ids)
    model.check(logits, expected[n - 1])
    for i in range(n, n + 6):
        logits = decode(model, cache, 0, ids[i])
        model.check(logits, expected[i])
        if model.tolerance <= 1e-4:
            assert logits.argmax() == expected[i].argmax()


@pytest.mark.parametrize("chunk", [1, 7, 16, 31])
def test_chunked_prefill(model, chunk):
    ids = tokens(model, 64, seed=chunk)
    cache = new_cache(model)
    cache.add_sequence(5)
    for start in range(0, 64, chunk):
        logits = prefill(model, cache, 5, ids[start : start + chunk])
    model.check(logits, model.last_logits(ids))


def test_batch_of_mixed_lengths(model):
    prompts = [tokens(model, n, seed=n) for n in (1, 16, 37)]
    cache = new_cache(model)
    for i in range(3):
        cache.add_sequence(i)
    lengths = [len(p) for p in prompts]
    last = np.cumsum(lengths) - 1
    with cache.forward([0, 1, 2], lengths):
        embed = model.compiled.embed(np.concatenate(prompts))
        logits, _ = model.compiled.batch_prefill(embed, last, cache)
    assert logits.numpy().shape == (1, 3, model.config.vocab_size)
    for i in range(3):
        model.check(logits.numpy()[0, i], model.last_logits(prompts[i]))
    order = [2, 0, 1]  # the order of a batch is free
    for step in range(18):
        new = tokens(model, 3, seed=100 + step)
        with cache.forward(order, [1, 1, 1]):
            embed = model.compiled.embed(new).numpy().reshape(3, 1, -1)
            logits, _ = model.compiled.batch_decode(embed, cache)
        for row, i in enumerate(order):
            prompts[i] = np.append(prompts[i], new[row])
    assert logits.numpy().shape == (3, 1, model.config.vocab_size)
    for row, i in enumerate(order):
        model.check(logits.numpy()[row, 0], model.last_logits(prompts[i]))


def test_mixed_prefill_and_decode_in_one_forward(model):
    a, b = tokens(model, 21, seed=1), tokens(model, 30, seed=2)
    cache = new_cache(model)
    cache.add_sequence(0)
    cache.add_sequence(1)
    prefill(model, cache, 0, a[:20])
    with cache.forward([0, 1], [1, 30]):
        embed = model.compiled.embed(np.concatenate([a[20:], b]))
        logits, _ = model.compiled.batch_prefill(embed, [0, 30], cache)
    model.check(logits.numpy()[0, 0], model.last_logits(a))
    model.check(logits.numpy()[0, 1], model.last_logits(b))


@pytest.mark.parametrize("position", [-1, 7, 16, 32])
def test_fork(model, position):
    ids = tokens(model, 40)
    cache = new_cache(model)
    cache.add_sequence(0)
    prefill(model, cache, 0, ids)
    cache.fork_sequence(0, 1, position)
    kept = 40 if position == -1 else position
    assert cache.sequence_length(1) == kept
    child, parent = tokens(model, 5, seed=3), tokens(model, 5, seed=4)
    with cache.forward([0, 1], [5, 5]):
        embed = model.compiled.embed(np.concatenate([parent, child]))
        logits, _ = model.compiled.batch_prefill(embed, [4, 9], cache)
    model.check(logits.numpy()[0, 0], model.last_logits([*ids, *parent]))
    model.check(logits.numpy()[0, 1], model.last_logits([*ids[:kept], *child]))
    cache.remove_sequence(0)
    logits = decode(model, cache, 1, 9)
    model.check(logits, model.last_logits([*ids[:kept], *child, 9]))


@pytest.mark.parametrize("n", [1, 5, 23, 39])
def test_popn(model, n):
    ids = tokens(model, 40)
    cache = new_cache(model)
    cache.add_sequence(0)
    prefill(model, cache, 0, ids)
    cache.popn(0, n)
    new = tokens(model, 20, seed=5)
    logits = prefill(model, cache, 0, new)
    model.check(logits, model.last_logits([*ids[: 40 - n], *new]))


def test_verify_chain(model):
    ids, drafts = tokens(model, 30), tokens(model, 5, seed=6)
    cache = new_cache(model)
    cache.add_sequence(0)
    prefill(model, cache, 0, ids)
    with cache.forward([0], [5]):
        logits, _ = model.compiled.batch_verify(model.compiled.embed(drafts), cache)
    model.check(logits.numpy()[0], model.logits([*ids, *drafts])[30:])
    cache.commit_accepted_token_tree_nodes([0], [2])
    assert cache.sequence_length(0) == 33
    logits = decode(model, cache, 0, 8)
    model.check(logits, model.last_logits([*ids, *drafts[:3], 8]))


TREE = [-1, 0, 0, 1, 1, 2, -1, 6]  # two roots, branches, siblings far apart


def path_to(leaf: int) -> list[int]:
    path = []
    while leaf >= 0:
        path.append(leaf)
        leaf = TREE[leaf]
    return path[::-1]


@pytest.mark.parametrize("leaf", [-1, 0, 4, 5, 7])
def test_verify_tree(model, leaf):
    ids, drafts = tokens(model, 30), tokens(model, len(TREE), seed=7)
    other, chain = tokens(model, 14, seed=8), tokens(model, 3, seed=9)
    cache = new_cache(model)
    cache.add_sequence(0)
    cache.add_sequence(1)
    prefill(model, cache, 0, ids)
    prefill(model, cache, 1, other)
    with cache.forward([0, 1], [len(TREE), 3], tree_parents=[*TREE, -1, 0, 1]):
        embed = model.compiled.embed(np.concatenate([drafts, chain]))
        logits, _ = model.compiled.batch_verify(embed, cache)
    logits = logits.numpy()[0]
    for node in range(len(TREE)):
        expected = model.last_logits([*ids, *drafts[path_to(node)]])
        model.check(logits[node], expected)
    model.check(logits[len(TREE) :], model.logits([*other, *chain])[14:])
    cache.commit_accepted_token_tree_nodes([0, 1], [leaf, 1])
    accepted = drafts[path_to(leaf)]
    assert cache.sequence_length(0) == 30 + len(accepted)
    logits = decode(model, cache, 0, 11)
    model.check(logits, model.last_logits([*ids, *accepted, 11]))
    logits = decode(model, cache, 1, 12)
    model.check(logits, model.last_logits([*other, *chain[:2], 12]))


def test_hidden_state_variants_and_get_logits(model):
    ids = tokens(model, 20)
    run = model.compiled
    expected = model.logits([*ids, 3, 4])
    cache = new_cache(model)
    cache.add_sequence(0)
    with cache.forward([0], [20]):
        hidden, _ = run.prefill_to_last_hidden_states(run.embed(ids), cache)
    assert hidden.numpy().shape == (1, 20, model.config.hidden_size)
    model.check(run.get_logits(hidden), expected[:20])
    with cache.forward([0], [1]):
        hidden, _ = run.decode_to_last_hidden_states(run.embed([3]), cache)
    assert hidden.numpy().shape == (1, 1, model.config.hidden_size)
    model.check(run.get_logits(hidden), expected[20])
    with cache.forward([0], [1]):
        hidden, _ = run.batch_decode_to_last_hidden_states(run.embed([4]), cache)
    model.check(run.get_logits(hidden), expected[21])
    for name in ("batch_prefill", "batch_verify"):
        cache.popn(0, 2)
        with cache.forward([0], [2]):
            function = getattr(run, f"{name}_to_last_hidden_states")
            hidden, _ = function(run.embed([3, 4]), cache)
        assert hidden.numpy().shape == (1, 2, model.config.hidden_size)
        model.check(run.get_logits(hidden), expected[20:])


def test_inputs_may_be_lists_numpy_or_tvm(model):
    ids = [1, 2, 3]
    run = model.compiled
    expected = model.last_logits(ids)
    tensor = run.embed(np.array(ids, np.int64))
    for embed in (tensor, tensor.numpy(), tensor.numpy().tolist()):
        cache = new_cache(model)
        cache.add_sequence(0)
        with cache.forward([0], [3]):
            logits, returned = run.prefill(embed, cache)
        assert returned is cache
        model.check(logits, expected)


def test_longrope_side_by_side(build_model):
    """Short-factor and long-factor sequences in one batch, each as if it were alone."""
    model = build_model("longrope", rope_scaling=longrope(16), original_max_position_embeddings=32)
    short, long = tokens(model, 20, seed=1), tokens(model, 50, seed=2)
    cache = new_cache(model)
    cache.add_sequence(0)
    cache.add_sequence(1, max_length=60)
    with cache.forward([0, 1], [20, 50]):
        embed = model.compiled.embed(np.concatenate([short, long]))
        logits, _ = model.compiled.batch_prefill(embed, [19, 69], cache)
    model.check(logits.numpy()[0, 0], model.last_logits(short))
    model.check(logits.numpy()[0, 1], model.last_logits(long))
