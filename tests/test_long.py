"""Right at every length: LongRoPE's switch and the sliding window, against transformers.

original_max is 32 and the window 16, so that every boundary is crossed in a few tokens. The oracle
recomputes each length from scratch, which is what transformers' generate() amounts to.
"""

from __future__ import annotations

import numpy as np
import pytest
from conftest import longrope
from test_parity import decode, new_cache, prefill, tokens

from phi3c.errors import RopeFactorError, SequenceError
from phi3c.runtime.single_sequence import SingleSequence

ROPE = dict(rope_scaling=longrope(16), original_max_position_embeddings=32)
WINDOW = dict(sliding_window=16)
MODELS = {"longrope": ROPE, "window": WINDOW, "longrope-window": ROPE | WINDOW}


@pytest.fixture(params=list(MODELS))
def model(request, build_model):
    return build_model(request.param, **MODELS[request.param])


@pytest.fixture
def rope_model(build_model):
    return build_model("longrope", **ROPE)


@pytest.fixture
def window_model(build_model):
    return build_model("window", **WINDOW)


def greedy(model, prompt, total: int, chunk: int | None = None):
    """Greedy tokens up to `total`, each step checked against a full recomputation."""
    sequence = SingleSequence(model.compiled)
    ids = list(map(int, prompt))
    for start in range(0, len(ids), chunk or len(ids)):
        logits = sequence.extend(ids[start : start + (chunk or len(ids))])
    while True:
        expected = model.last_logits(ids)
        model.check(logits, expected)
        assert logits.argmax() == expected.argmax(), len(ids)
        if len(ids) == total:
            return ids
        ids.append(int(logits.argmax()))
        logits = sequence.extend(ids[-1:])


def test_prompt_24_decoded_to_80(model):
    greedy(model, tokens(model, 24), 80)


@pytest.mark.parametrize("chunk", [48, 24, 7, 1])
def test_prompt_48_in_chunks(model, chunk):
    greedy(model, tokens(model, 48), 52, chunk)


@pytest.mark.parametrize("chunk", [40, 7])
def test_prompt_40_decoded_to_120(model, chunk):
    greedy(model, tokens(model, 40), 120, chunk)


@pytest.mark.parametrize("lengths", [(20, 18), (20, 50), (50, 20, 33)])
def test_batch_of_short_and_long(model, lengths):
    """No sequence of a batch changes another's logits, whatever their sum."""
    prompts = [tokens(model, n, seed=n) for n in lengths]
    cache = new_cache(model)
    for i, n in enumerate(lengths):
        cache.add_sequence(i, max_length=n + 8)
    seqs = range(len(lengths))
    half = [n // 2 for n in lengths]
    for begin, end in ((np.zeros_like(half), half), (half, lengths)):
        with cache.forward(seqs, [e - b for b, e in zip(begin, end, strict=True)]):
            parts = [p[b:e] for p, b, e in zip(prompts, begin, end, strict=True)]
            embed = model.compiled.embed(np.concatenate(parts))
            last = np.cumsum([len(p) for p in parts]) - 1
            logits, _ = model.compiled.batch_prefill(embed, last, cache)
    for i in seqs:
        model.check(logits.numpy()[0, i], model.last_logits(prompts[i]))
    for step in range(8):
        new = tokens(model, len(lengths), seed=step)
        with cache.forward(seqs, [1] * len(lengths)):
            logits, _ = model.compiled.batch_decode(model.compiled.embed(new), cache)
        prompts = [np.append(p, t) for p, t in zip(prompts, new, strict=True)]
        for i in seqs:
            model.check(logits.numpy()[i, 0], model.last_logits(prompts[i]))


def test_short_sequence_may_not_cross(rope_model):
    model = rope_model
    ids = tokens(model, 33)
    cache = new_cache(model)
    cache.add_sequence(0)
    prefill(model, cache, 0, ids[:30])
    free = cache.num_free_pages
    for n in (3, 20):
        with pytest.raises(RopeFactorError, match=f"{30 + n} tokens, past .* 32"):
            cache.begin_forward([0], [n])
    assert cache.sequence_length(0) == 30 and cache.num_free_pages == free
    model.check(prefill(model, cache, 0, ids[30:32]), model.last_logits(ids[:32]))
    with pytest.raises(RopeFactorError):
        cache.begin_forward([0], [1])


def test_tree_may_not_cross_by_its_depth(rope_model):
    model = rope_model
    cache = new_cache(model)
    cache.add_sequence(0)
    prefill(model, cache, 0, tokens(model, 30))
    with pytest.raises(RopeFactorError):
        cache.begin_forward([0], [3], tree_parents=[-1, 0, 1])
    with cache.forward([0], [3], tree_parents=[-1, -1, 0]):  # three tokens, two deep
        model.compiled.batch_verify(model.compiled.embed([1, 2, 3]), cache)


def test_long_from_the_first_token(rope_model):
    """A sequence that says it will be long gives, once long, what a recomputation gives."""
    model = rope_model
    ids = tokens(model, 40)
    cache = new_cache(model)
    cache.add_sequence(0, max_length=40)
    prefill(model, cache, 0, ids[:20])
    for i in range(20, 40):
        logits = decode(model, cache, 0, ids[i])
    model.check(logits, model.last_logits(ids))
    cache.fork_sequence(0, 1, 35)  # a fork keeps the factors
    model.check(prefill(model, cache, 1, ids[35:]), model.last_logits(ids))


def test_window_pages_are_freed(window_model):
    """A sequence of any length holds about window + chunk tokens."""
    model = window_model
    chunk, window, page = 24, 16, 16
    cache = new_cache(model, prefill_chunk_size=chunk, max_total_seq_len=4 * page)
    cache.add_sequence(0)
    ids = tokens(model, 240)
    most = 0
    for start in range(0, 168, chunk):
        logits = prefill(model, cache, 0, ids[start : start + chunk])
        most = max(most, cache.num_pages - cache.num_free_pages)
    for i in range(168, 240):
        logits = decode(model, cache, 0, ids[i])
        most = max(most, cache.num_pages - cache.num_free_pages)
    model.check(logits, model.last_logits(ids))
    assert most * page <= window + chunk + page + page - 2
    cache.remove_sequence(0)
    assert cache.num_free_pages == cache.num_pages


def test_window_with_popn_and_fork(window_model):
    model = window_model
    ids = tokens(model, 120)
    cache = new_cache(model, prefill_chunk_size=24)
    cache.add_sequence(0)
    for start in range(0, 120, 20):
        prefill(model, cache, 0, ids[start : start + 20])
    cache.fork_sequence(0, 1, 110)
    cache.popn(0, 20)
    new = tokens(model, 24, seed=3)
    model.check(prefill(model, cache, 0, new), model.last_logits([*ids[:100], *new]))
    model.check(prefill(model, cache, 1, new), model.last_logits([*ids[:110], *new]))
    with pytest.raises(SequenceError, match="left the sliding window of 16"):
        cache.popn(0, 100)
    with pytest.raises(SequenceError, match="left the sliding window of 16"):
        cache.fork_sequence(0, 2, 10)


def test_window_in_a_chunk_longer_than_it_and_in_a_tree(model):
    parents = [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 3, 19, -1]
    ids, drafts = tokens(model, 60), tokens(model, len(parents), seed=1)
    cache = new_cache(model)
    cache.add_sequence(0, max_length=90)
    model.check(prefill(model, cache, 0, ids), model.last_logits(ids))
    with cache.forward([0], [len(parents)], tree_parents=parents):
        logits, _ = model.compiled.batch_verify(model.compiled.embed(drafts), cache)
    for node in range(len(parents)):
        path, at = [], node
        while at >= 0:
            path.append(at)
            at = parents[at]
        model.check(logits.numpy()[0, node], model.last_logits([*ids, *drafts[path[::-1]]]))
    cache.commit_accepted_token_tree_nodes([0], [20])
    accepted = drafts[[0, 1, 2, 3, 19, 20]]
    model.check(decode(model, cache, 0, 5), model.last_logits([*ids, *accepted, 5]))
