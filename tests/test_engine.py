"""The engine: every request gets what it would get alone, and every page is accounted for."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from conftest import longrope
from hypothesis import given, settings
from hypothesis import strategies as st

import phi3c
from phi3c.engine.engine import Engine
from phi3c.engine.request import Handle, Request
from phi3c.engine.sampler import SamplingParams
from phi3c.engine.scheduler import deal
from phi3c.engine.sequence import Sequence
from phi3c.errors import CacheFullError, ContextLengthError, InputError
from phi3c.runtime.single_sequence import SingleSequence

OPTIONS = dict(max_batch_size=4, prefill_chunk_size=24, context_length=120)
MOST_STEPS = 3000  # of any test here
# name → fields that differ from conftest.BASE: plain, across the LongRoPE switch, with a window
MODELS = {
    "engine-plain": dict(),
    "engine-longrope": dict(rope_scaling=longrope(16), original_max_position_embeddings=32),
    "engine-window": dict(sliding_window=20),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request, build_model) -> phi3c.CompiledPhi3:
    built = build_model(request.param, compile_options=OPTIONS, **MODELS[request.param])
    return phi3c.load(built.compiled.artifact.path, threads=1)


@pytest.fixture(scope="module")
def plain(build_model) -> phi3c.CompiledPhi3:
    built = build_model("engine-plain", compile_options=OPTIONS)
    return phi3c.load(built.compiled.artifact.path, threads=1)


def random_ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 199, n).tolist()


def request(prompt, max_tokens: int, **options) -> Request:
    params = {"temperature": 0, "ignore_eos": True} | options.pop("params", {})
    return Request(prompt, SamplingParams(max_tokens=max_tokens, **params), **options)


def alone(model, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens of one sequence in a cache of its own."""
    sequence, out = SingleSequence(model), []
    logits = sequence.extend(prompt)
    while True:
        out.append(int(logits.argmax()))
        if len(out) == n:
            return out
        logits = sequence.extend(out[-1:])


def check_pages(engine: Engine) -> None:
    """free + used + cached = all, used being what running sequences hold."""
    cache, prefixes = engine._cache, engine._prefixes
    held = {p for s in cache._table.sequences.values() for p in s.pages}
    kept = set(prefixes.pages) if prefixes is not None else set()
    metrics = engine.metrics()
    assert metrics.pages_used == len(held)
    assert metrics.pages_cached == len(kept - held)
    assert metrics.pages_free == cache.num_pages - len(held | kept)
    running = {s.id for s in engine._scheduler.running}
    assert running == set(cache._table.sequences)
    for sequence in engine._scheduler.running:
        assert cache.sequence_length(sequence.id) == sequence.computed


def run_all(engine: Engine) -> list[Handle]:
    done = []
    for _ in range(MOST_STEPS):
        if engine.idle:
            return done
        done += engine.step()
        check_pages(engine)
    raise AssertionError("no end: sequences send each other back")


LENGTHS = [1, 5, 16, 17, 30, 40, 25, 64, 3]


@pytest.mark.parametrize("pages", [9, 40])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_greedy_tokens_are_those_of_the_request_alone(model, pages, prefix_cache):
    """With few pages sequences are preempted; prompts of one seed share their beginnings."""
    engine = Engine(model, max_total_seq_len=pages * 16, prefix_cache=prefix_cache)
    prompts = [random_ids(n, seed=i % 2) for i, n in enumerate(LENGTHS)]
    handles = [engine.submit(request(p, 5 + 7 * i)) for i, p in enumerate(prompts)]
    done = run_all(engine)
    assert set(done) == set(handles) and all(handle.done for handle in handles)
    for i, (handle, prompt) in enumerate(zip(handles, prompts, strict=True)):
        [output] = handle.outputs
        assert output.token_ids == alone(model, prompt, 5 + 7 * i)
        assert output.finish_reason == "length"
    metrics = engine.metrics()
    assert metrics.finished == len(LENGTHS) and metrics.pages_used == 0
    assert pages == 40 or metrics.preemptions > 0
    assert (metrics.cached_tokens > 0) == prefix_cache or metrics.preemptions == 0


def test_a_shared_prefix_is_computed_once(plain):
    engine = Engine(plain)
    prefix = random_ids(64)
    engine.submit(request([*prefix, 5], 1))
    run_all(engine)
    first = engine.metrics().computed_tokens
    handles = [engine.submit(request([*prefix, token], 2)) for token in (6, 7, 8)]
    run_all(engine)
    assert engine.metrics().computed_tokens - first == 3 * (1 + 1)
    for handle, token in zip(handles, (6, 7, 8), strict=True):
        assert handle.outputs[0].token_ids == alone(plain, [*prefix, token], 2)


def test_samples_of_one_request_fork_its_prompt(plain):
    params = dict(temperature=1.0, seed=7)
    engine = Engine(plain, prefix_cache=False)
    handle = engine.submit(request(random_ids(30), 12, n=6, params=params))  # more than run at once
    other = engine.submit(request(random_ids(20, seed=3), 30, params=params))
    run_all(engine)
    texts = [tuple(output.token_ids) for output in handle.outputs]
    assert len(set(texts)) == 6 and all(len(ids) == 12 for ids in texts)
    again = Engine(plain)
    handle2 = again.submit(request(random_ids(30), 12, n=6, params=params))
    run_all(again)
    assert [tuple(output.token_ids) for output in handle2.outputs] == texts
    assert other.done


def test_priority_goes_first_and_takes_the_place_of_others(plain):
    engine = Engine(plain)
    low = [engine.submit(request(random_ids(20, seed=i), 40)) for i in range(4)]
    engine.step()
    high = engine.submit(request(random_ids(20, seed=9), 5, priority=1))
    for _ in range(6):
        engine.step()
    assert high.done and not any(handle.done for handle in low)
    assert engine.metrics().preemptions == 1
    run_all(engine)
    for i, handle in enumerate(low):
        assert handle.outputs[0].token_ids == alone(plain, random_ids(20, seed=i), 40)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_priority_takes_the_pages_of_others(plain, prefix_cache):
    """Only as many as it needs, the latest first; then those go on, and never take them back."""
    engine = Engine(plain, max_total_seq_len=10 * 16, prefix_cache=prefix_cache)
    low = [engine.submit(request(random_ids(60, seed=i), 20)) for i in range(2)]
    for _ in range(8):
        engine.step()
    assert all(handle.outputs[0].token_ids for handle in low)
    equal = engine.submit(request(random_ids(60, seed=8), 5))
    high = engine.submit(request(random_ids(60, seed=9), 10, priority=1))
    while not high.done:
        engine.step()
        check_pages(engine)
        assert high in {s.handle for s in engine._scheduler.running} or high.done
        assert not equal.outputs[0].token_ids
    assert engine.metrics().preemptions == 1 and not low[1].done
    run_all(engine)
    for i, handle in enumerate([*low, equal, high]):
        ids = random_ids(60, seed=(0, 1, 8, 9)[i])
        assert handle.outputs[0].token_ids == alone(plain, ids, (20, 20, 5, 10)[i])
    assert engine.metrics().preemptions == 1


def test_nobody_is_sent_back_in_vain(plain):
    """Where the pages of all lower priorities would not do, they stay where they are."""
    engine = Engine(plain, max_total_seq_len=8 * 16)
    first = engine.submit(request(random_ids(80), 10, priority=2))
    low = engine.submit(request(random_ids(10, seed=1), 30))
    for _ in range(5):
        engine.step()
    high = engine.submit(request(random_ids(50, seed=2), 5, priority=1))
    engine.step()
    assert {s.handle for s in engine._scheduler.running} == {first, low}
    run_all(engine)
    assert high.outputs[0].token_ids == alone(plain, random_ids(50, seed=2), 5)


def test_a_prefix_that_comes_with_others_is_computed_once(plain):
    """Those that arrive together with the first wait for its pages, and others pass them."""
    engine = Engine(plain)
    prefix = random_ids(64)
    handles = [engine.submit(request([*prefix, 5 + i, 6], 3)) for i in range(3)]
    other = engine.submit(request(random_ids(10, seed=1), 1))
    engine.step()
    assert other.done
    run_all(engine)
    assert engine.metrics().computed_tokens == 64 + 3 * (2 + 2) + 10
    for i, handle in enumerate(handles):
        assert handle.outputs[0].token_ids == alone(plain, [*prefix, 5 + i, 6], 3)
        assert handle.cached_tokens == (0 if i == 0 else 64)


def test_waiting_digests_nothing_twice(plain, monkeypatch):
    engine = Engine(plain, max_total_seq_len=8 * 16)
    engine.submit(request(random_ids(70), 40))
    handle = engine.submit(request(random_ids(70, seed=1), 10))
    calls, digest = [], hashlib.blake2b

    def counted(data, **options):
        calls.append(data)
        return digest(data, **options)

    monkeypatch.setattr("phi3c.engine.prefix_cache.hashlib.blake2b", counted)
    for _ in range(20):
        engine.step()
    assert len(calls) == len(set(calls)) <= 4 + 4 and not handle.outputs[0].token_ids
    run_all(engine)


def test_times_are_counted(plain):
    engine = Engine(plain)
    for i in range(3):
        engine.submit(request(random_ids(10, seed=i), 5, n=1 + i, params={"temperature": 1.0}))
    start = time.perf_counter()
    run_all(engine)
    seconds, metrics = time.perf_counter() - start, engine.metrics()
    assert metrics.first_tokens == 3 and metrics.later_tokens == 6 * 4
    assert metrics.generated_tokens == 6 * 5
    assert 0 < metrics.time_to_first_token < seconds
    assert 0 < metrics.time_per_token <= seconds / 4
    assert 1 <= metrics.mean_batch <= 4 and 0 < metrics.overhead < 1
    assert Engine(plain).metrics().time_per_token == 0 == Engine(plain).metrics().overhead


def test_a_long_prompt_does_not_block_a_short_one(plain):
    engine = Engine(plain)
    long = engine.submit(request(random_ids(100), 5))
    short = engine.submit(request(random_ids(10, seed=1), 1))
    engine.step()
    assert short.done and not long.outputs[0].token_ids
    run_all(engine)


@given(budget=st.integers(0, 60), needs=st.lists(st.integers(1, 40), max_size=8))
def test_deal(budget, needs):
    counts = deal(budget, needs)
    assert sum(counts) == min(budget, sum(needs))
    assert all(count <= need for count, need in zip(counts, needs, strict=True))
    # Nobody has less than another, but for what it does not need or does not divide.
    for a, need in zip(counts, needs, strict=True):
        assert a == need or all(b <= a + 1 for b in counts)


def test_cancel_gives_everything_back(plain):
    engine = Engine(plain, prefix_cache=False)
    handles = [engine.submit(request(random_ids(40, seed=i), 50, n=2)) for i in range(5)]
    for _ in range(8):
        engine.step()
    engine.cancel(handles[0])
    engine.cancel(handles[0])  # does nothing
    check_pages(engine)
    assert {o.finish_reason for o in handles[0].outputs} == {"cancelled"}
    engine.abort_all()
    assert engine.idle and engine.step() == []
    metrics = engine.metrics()
    assert metrics.pages_free == engine._cache.num_pages and metrics.cancelled == 5


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "message"),
    [
        ([], 5, InputError, "prompt: found no tokens; accepted: at least one"),
        ([1, 199], 5, InputError, r"prompt\[1\]: found 199; accepted: 0 to 198"),
        ([1, True], 5, InputError, r"prompt\[1\]: found True"),
        ([1] * 120, 5, ContextLengthError, "found 120 tokens; accepted: up to 119"),
        ([1] * 60, 60, CacheFullError, "need 8 KV pages of 16 tokens at once; accepted: up to 5"),
        ("text", 5, InputError, "as the engine has no tokenizer"),
    ],
)
def test_what_can_never_run_is_refused(plain, prompt, max_tokens, error, message):
    engine = Engine(plain, max_total_seq_len=80)
    with pytest.raises(error, match=message):
        engine.submit(request(prompt, max_tokens))
    assert engine.idle


def test_an_answer_without_a_limit_is_as_long_as_the_pages_reach(plain):
    engine = Engine(plain, max_total_seq_len=80)
    handle = engine.submit(Request(random_ids(60), SamplingParams(temperature=0, ignore_eos=True)))
    run_all(engine)
    assert handle.outputs[0].token_ids == alone(plain, random_ids(60), 21)
    with pytest.raises(InputError, match="logit_bias: found token 199; accepted: 0 to 198"):
        engine.submit(request([1], 1, params={"logit_bias": {199: 1.0}}))


def test_a_failed_request_leaves_the_others_alone(plain, monkeypatch):
    engine = Engine(plain)
    bad = engine.submit(request(random_ids(5), 30))
    good = engine.submit(request(random_ids(6), 10))
    engine.step()
    bad_sequence = next(s for s in engine._scheduler.running if s.handle is bad)

    def fails(logits):
        raise RuntimeError("cannot sample: logits hold NaN")

    monkeypatch.setattr(bad_sequence, "sample", fails)
    run_all(engine)
    assert bad.outputs[0].finish_reason == "error" and "NaN" in str(bad.error)
    assert good.outputs[0].token_ids == alone(plain, random_ids(6), 10)
    assert engine.metrics().failed == 1


def test_penalties_bias_and_logprobs(plain):
    prompt = random_ids(12)
    engine = Engine(plain)
    free = engine.submit(request(prompt, 8, params={"logprobs": 3}))
    token = alone(plain, prompt, 1)[0]
    banned = engine.submit(request(prompt, 8, params={"logit_bias": {token: -100.0}}))
    forced = engine.submit(request(prompt, 8, params={"logit_bias": {11: 100.0}}))
    once = engine.submit(
        request(prompt, 8, params={"logit_bias": {11: 1.5, 12: 1.0}, "frequency_penalty": 2.0})
    )
    run_all(engine)
    assert token not in banned.outputs[0].token_ids
    assert forced.outputs[0].token_ids == [11] * 8
    assert once.done
    for (own, top), token_id in zip(
        free.outputs[0].logprobs, free.outputs[0].token_ids, strict=True
    ):
        assert len(top) == 3 and list(top)[0] == token_id and top[token_id] == own
        assert list(top.values()) == sorted(top.values(), reverse=True) and own < 0


def window_engine(build_model, **options) -> Engine:
    built = build_model("engine-window", compile_options=OPTIONS, **MODELS["engine-window"])
    return Engine(phi3c.load(built.compiled.artifact.path, threads=1), **options)


def test_a_prefix_that_left_the_window_is_given_up(build_model):
    """Its first pages are idle behind the window of the sequence that reads its last ones."""
    engine = window_engine(build_model, max_total_seq_len=80)
    prompt = random_ids(49)
    engine.submit(request(prompt, 1))
    run_all(engine)
    handle = engine.submit(request(prompt, 40))
    run_all(engine)
    assert handle.outputs[0].token_ids == alone(engine.model, prompt, 40)


def test_a_prompt_finds_the_window_before_it(build_model):
    """In pages for one sequence: what the first one left behind its window is not needed."""
    engine = window_engine(build_model, max_total_seq_len=80)
    prompt = random_ids(90)
    first = engine.submit(request(prompt, 10))
    run_all(engine)
    computed = engine.metrics().computed_tokens
    more = [*prompt, *first.outputs[0].token_ids[:8], 7, 8, 9]
    again = engine.submit(request(more, 10))
    run_all(engine)
    assert again.cached_tokens == 96
    assert engine.metrics().computed_tokens == computed + len(more) - 96 + 9
    assert again.outputs[0].token_ids == alone(engine.model, more, 10)
    # One that leaves the first's path before the window of what is kept begins anew.
    other = [*prompt[:40], *random_ids(10, seed=1)]
    anew = engine.submit(request(other, 10))
    run_all(engine)
    assert anew.outputs[0].token_ids == alone(engine.model, other, 10)


@pytest.mark.parametrize("count", [1, 3])
def test_pages_behind_a_window_are_free_though_a_prefix_held_them(build_model, count):
    """Whole chunks behind known pages: those are given up, and nobody is sent back for them."""
    engine = window_engine(build_model, max_total_seq_len=80 + 64 * (count - 1))
    prompts = [[*random_ids(48), *random_ids(60, seed=1 + i)] for i in range(count)]
    engine.submit(request(random_ids(49), 1))
    run_all(engine)
    handles = [engine.submit(request(prompt, 12)) for prompt in prompts]
    run_all(engine)
    for handle, prompt in zip(handles, prompts, strict=True):
        assert handle.outputs[0].token_ids == alone(engine.model, prompt, 12)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_trace_of_requests(model, data):
    """Submissions, steps and cancellations in any order; the rest is as if each were alone."""
    pages = data.draw(st.integers(8, 20))
    engine = Engine(
        model,
        max_total_seq_len=16 * pages,
        prefix_cache=data.draw(st.booleans()),
        max_step_tokens=data.draw(st.sampled_from([4, 7, None])),
    )
    open_handles: list[tuple[Handle, int, int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["submit", "submit", "step", "step", "step", "cancel"]))
        if action == "submit":
            length, count = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 20))
            priority = data.draw(st.integers(0, 2))
            n = data.draw(st.sampled_from([1, 1, 1, 2, 6]))
            handle = engine.submit(request(random_ids(length), count, n=n, priority=priority))
            open_handles.append((handle, length, count))
        elif action == "step":
            engine.step()
        elif open_handles:
            at = data.draw(st.integers(0, len(open_handles) - 1))
            engine.cancel(open_handles.pop(at)[0])
        check_pages(engine)
    run_all(engine)
    for handle, length, count in open_handles:
        for output in handle.outputs:
            assert output.token_ids == alone(model, random_ids(length), count)
    assert engine.metrics().pages_used == 0


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_nobody_starves(plain, data):
    """Among equals, however many come after it: those before it and those that ran when it came
    are done first, each with a token in every step."""
    engine = Engine(
        plain,
        max_total_seq_len=16 * data.draw(st.integers(8, 16)),
        max_step_tokens=data.draw(st.sampled_from([4, 9, None])),
    )
    draw = data.draw(st.randoms(use_true_random=False))

    def some() -> Request:
        prompt = random_ids(draw.randint(1, 60), seed=draw.randint(0, 3))
        return request(prompt, draw.randint(1, 12), n=draw.choice([1, 1, 2]))

    before = [engine.submit(some()) for _ in range(data.draw(st.integers(0, 8)))]
    handle = engine.submit(some())
    work = sum(len(h.prompt_ids) + 12 * len(h.outputs) for h in [*before, handle])
    longest = OPTIONS["max_batch_size"] * (60 + 24)  # that pass it while it waits for a prefix
    for _ in range(work + longest):
        if handle.done:
            break
        engine.step()
        while len(engine._scheduler.waiting) < 6:
            engine.submit(some())
    assert handle.done


@pytest.mark.parametrize("page_size", [32, 48])
def test_larger_pages(model, page_size):
    engine = Engine(model, max_total_seq_len=4 * page_size, page_size=page_size)
    prompts = [random_ids(n, seed=i % 2) for i, n in enumerate(LENGTHS)]
    handles = [engine.submit(request(prompt, 9)) for prompt in prompts]
    run_all(engine)
    for handle, prompt in zip(handles, prompts, strict=True):
        assert handle.outputs[0].token_ids == alone(model, prompt, 9)


def interrupt(sequence, monkeypatch, after: bool) -> None:
    """Ctrl-C when it is to sample next, or when it just has."""
    sample = sequence.sample

    def interrupted(logits):
        monkeypatch.setattr(sequence, "sample", sample)
        if after:
            sample(logits)
        raise KeyboardInterrupt

    monkeypatch.setattr(sequence, "sample", interrupted)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_interrupted_step_takes_nothing_from_anybody(plain, monkeypatch, steps, at, after):
    """In the first step a prompt is forked; in the fourth the first request has its last token."""
    engine = Engine(plain)
    asked = [(random_ids(16), 4, 1), (random_ids(5, seed=1), 9, 3)]
    handles = [engine.submit(request(prompt, count, n=n)) for prompt, count, n in asked]
    for _ in range(steps):
        engine.step()
    handle, index = [(handles[0], 0), (handles[1], 0), (handles[1], 1), (handles[1], 2)][at]
    made = [*engine._scheduler.running, *engine._scheduler.waiting]
    if found := [s for s in made if (s.handle, s.index) == (handle, index)]:
        interrupt(found[0], monkeypatch, after)
    else:  # it is made in this step
        another = Sequence.another

        def interrupted(sequence, seq_id, fork_index):
            fork = another(sequence, seq_id, fork_index)
            if fork_index == index:
                interrupt(fork, monkeypatch, after)
            return fork

        monkeypatch.setattr(Sequence, "another", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    check_pages(engine)
    run_all(engine)
    for handle, (prompt, count, n) in zip(handles, asked, strict=True):
        assert len(handle.outputs) == n
        for output in handle.outputs:
            assert output.token_ids == alone(plain, prompt, count)
            assert output.finish_reason == "length"
    assert engine.metrics().pages_used == 0


def test_a_smaller_step_bounds_the_wait_of_a_running_answer(plain):
    for tokens, steps in ((None, 4), (10, 10)):  # 90 tokens, 23 or 9 at a time
        engine = Engine(plain, max_step_tokens=tokens)
        running = engine.submit(request(random_ids(4), 40))
        engine.step()
        prompt = engine.submit(request(random_ids(90, seed=1), 1))
        before, largest = len(running.outputs[0].token_ids), 0
        while not prompt.done:
            computed = engine.metrics().computed_tokens
            engine.step()
            largest = max(largest, engine.metrics().computed_tokens - computed)
        assert largest == (tokens or 24)
        assert len(running.outputs[0].token_ids) - before == steps
    for wrong in (3, 25, 4.0, True):
        with pytest.raises(InputError, match="max_step_tokens: found .*accepted: 4 .* to 24 "):
            Engine(plain, max_step_tokens=wrong)


def test_metrics_are_those_of_their_time(plain):
    engine = Engine(plain)
    before = engine.metrics()
    engine.submit(request(random_ids(5), 2))
    run_all(engine)
    assert before.steps == 0 and engine.metrics().steps == 2


def fail(handle: Handle, engine: Engine, monkeypatch) -> None:
    def fails(logits):
        raise RuntimeError("cannot sample: logits hold NaN")

    [sequence] = [s for s in engine._scheduler.running if s.handle is handle]
    monkeypatch.setattr(sequence, "sample", fails)


def test_a_stream_raises_what_its_request_failed_with(plain, monkeypatch):
    engine = Engine(plain)
    handle = engine.submit(request(random_ids(5), 30))
    stream = engine.stream(handle)
    next(stream)
    fail(handle, engine, monkeypatch)
    with pytest.raises(RuntimeError, match="NaN"):
        list(stream)
    with pytest.raises(RuntimeError, match="NaN"):
        list(engine.stream(handle))


def test_pages_of_nan_are_not_found_again(plain, monkeypatch):
    engine = Engine(plain)
    bad = engine.submit(request(random_ids(64), 5))
    engine.step()
    assert len(engine._prefixes) == 1  # of 24 tokens: others may wait for it
    fail(bad, engine, monkeypatch)
    run_all(engine)
    assert bad.error is not None and len(engine._prefixes) == 0
    again = engine.submit(request(random_ids(64), 5))
    run_all(engine)
    assert again.cached_tokens == 0


def test_a_stream_without_a_tokenizer_has_tokens(plain):
    engine = Engine(plain)
    handle = engine.submit(request(random_ids(5), 6, n=2, params={"logprobs": 1}))
    pieces = list(engine.stream(handle))
    assert all(piece.text == "" and len(piece.token_ids) == 1 for piece in pieces)
    for index, output in enumerate(handle.outputs):
        own = [piece for piece in pieces if piece.index == index]
        assert [token for piece in own for token in piece.token_ids] == output.token_ids
        assert [entry for piece in own for entry in piece.logprobs] == output.logprobs


def test_leaving_a_stream_cancels(plain):
    engine = Engine(plain)
    handle = engine.submit(request(random_ids(5), 60))
    for _ in engine.stream(handle):
        break
    assert engine.idle and handle.outputs[0].finish_reason == "cancelled"
    other = Engine(plain).submit(request(random_ids(5), 60))
    with pytest.raises(InputError, match="handle: found one of another engine"):
        engine.stream(other)


def test_generate_runs_many(plain):
    engine = Engine(plain)
    prompts = [random_ids(5 + i, seed=i) for i in range(9)]
    handles = engine.generate(request(prompt, 3 + i) for i, prompt in enumerate(prompts))
    for i, (handle, prompt) in enumerate(zip(handles, prompts, strict=True)):
        assert handle.outputs[0].token_ids == alone(plain, prompt, 3 + i)
    with pytest.raises(InputError, match="found no tokens"):
        engine.generate([request(prompts[0], 3), request([], 3)])
    assert engine.idle and engine.metrics().cancelled == 1


def test_a_request_without_params_has_those_of_the_checkpoint(plain, monkeypatch):
    engine = Engine(plain)
    assert engine.submit(Request([5])).request.params == SamplingParams(temperature=0)
    explicit = SamplingParams()
    assert engine.submit(Request([5], explicit)).request.params is explicit
    found = {"temperature": 0.6, "top_p": 0.9, "top_k": 50}
    monkeypatch.setattr("phi3c.engine.engine.generation_defaults", lambda path: found)
    assert Engine(plain).submit(Request([5])).request.params == SamplingParams(**found)


def test_own_pages_found_again_are_no_hits(plain):
    """Sent back in the middle of its prompt; what it finds then it had computed itself."""
    engine = Engine(plain, max_total_seq_len=9 * 16)
    handle = engine.submit(request(random_ids(100), 5))
    engine.step()
    engine.step()
    engine.submit(request(random_ids(60, seed=9), 3, priority=1))
    run_all(engine)
    metrics = engine.metrics()
    assert metrics.preemptions == 1 and metrics.refound_tokens > 0
    assert handle.cached_tokens == metrics.cached_tokens == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: Engine("dist/mini"), "model: found 'dist/mini'; accepted: a CompiledPhi3"),
        (lambda e: e.submit("text"), "request: found 'text'; accepted: a Request"),
        (lambda e: e.submit(Request(5)), "prompt: found 5; accepted: text, a list of token ids"),
        (lambda e: e.submit(Request(None)), "prompt: found None; accepted"),
        (lambda e: e.submit(Request(b"abc")), "prompt: found b'abc'; accepted"),
        (lambda e: e.submit(Request({"role": "user"})), "prompt: found {'role': 'user'}; accepted"),
        (lambda e: Request([5], {"temperature": 0}), "params: found {'temperature': 0}; accepted"),
        (lambda e: Request([5], n=257), "n: found 257; accepted: an integer from 1 to 256"),
    ],
)
def test_mistakes_are_named(plain, make, message):
    with pytest.raises(InputError, match=message) as error:
        make(Engine(plain))
    assert "\n" not in str(error.value)
