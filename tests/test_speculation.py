"""Speculation: the same tokens as without it, whatever is drafted, and every page accounted for."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import LENGTHS, MODELS, OPTIONS, alone, check_pages, random_ids, request, run_all
from test_soak import prompts

import phi3c
from phi3c.engine.draft import NO_DRAFT, Draft
from phi3c.engine.draft_model import DraftModel, _Followed
from phi3c.engine.engine import Engine
from phi3c.engine.prompt_lookup import PromptLookup, PromptLookupDrafter
from phi3c.engine.request import Handle
from phi3c.engine.sequence import Sequence
from phi3c.engine.speculation import Pace, Speculation, _Costs
from phi3c.errors import InputError
from phi3c.runtime.logit_row import LogitRow
from phi3c.runtime.single_sequence import SingleSequence

TOY = Path(__file__).parent.parent / "examples" / "toy"
VOCAB = 199


@dataclass(frozen=True)
class Scripted:
    """Drafts out of known answers, mixed with wrong guesses: what a test wants to see accepted.

    answers: prompt → the tokens after it.
    """

    answers: dict[tuple[int, ...], list[int]]
    depth: int = 6
    branches: int = 1
    always_right: bool = False
    adaptive: bool = False
    made: list[Draft] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def start(self, model, cache_tokens) -> Scripted:
        return self

    def nodes(self, depth: int) -> int:
        return depth * self.branches

    def propose(self, wanted: Seq[tuple[Sequence, int]]) -> list[Draft]:
        drafts = [self._draft(sequence, depth) for sequence, depth in wanted]
        self.made.extend(drafts)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        pass

    def _draft(self, sequence: Sequence, depth: int) -> Draft:
        answer = self.answers[tuple(sequence.handle.prompt_ids)]
        at = len(sequence.output.token_ids)
        right = answer[at : at + depth]
        if self.always_right:
            return Draft.of_paths([right])
        paths = []
        for _ in range(self.branches):
            known = self.random.randint(0, len(right))
            wrong = [self.random.randrange(VOCAB) for _ in range(depth - known)]
            paths.append(right[:known] + wrong)
        return self.random.choice([Draft.of_paths(paths)] * 5 + [NO_DRAFT])


@pytest.fixture(scope="module", params=list(MODELS))
def model(request, build_model) -> phi3c.CompiledPhi3:
    built = build_model(request.param, compile_options=OPTIONS, **MODELS[request.param])
    return phi3c.load(built.compiled.artifact.path, threads=1)


@pytest.fixture(scope="module")
def plain(build_model) -> phi3c.CompiledPhi3:
    built = build_model("engine-plain", compile_options=OPTIONS)
    return phi3c.load(built.compiled.artifact.path, threads=1)


@pytest.fixture(scope="module")
def other(build_model) -> phi3c.CompiledPhi3:
    """A draft model unlike all others: it crosses elsewhere, and takes fewer sequences."""
    options = OPTIONS | dict(max_batch_size=3, context_length=90)
    changes = dict(rope_scaling=MODELS["engine-longrope"]["rope_scaling"])
    built = build_model(
        "draft",
        compile_options=options,
        hidden_size=64,
        num_hidden_layers=1,
        original_max_position_embeddings=50,
        seed=1,
        **changes,
    )
    return phi3c.load(built.compiled.artifact.path, threads=1)


PROMPTS = [random_ids(n, seed=i % 2) for i, n in enumerate(LENGTHS)]
COUNTS = [5 + 7 * i for i in range(len(LENGTHS))]


def check_answers(model, options, pages: int, prefix_cache: bool) -> Engine:
    engine = Engine(
        model, max_total_seq_len=pages * 16, prefix_cache=prefix_cache, speculation=options
    )
    handles = [engine.submit(request(p, n)) for p, n in zip(PROMPTS, COUNTS, strict=True)]
    run_all(engine)
    for handle, prompt, count in zip(handles, PROMPTS, COUNTS, strict=True):
        assert handle.outputs[0].token_ids == alone(model, prompt, count)
    metrics = engine.metrics()
    assert metrics.finished == len(LENGTHS) and metrics.pages_used == 0
    assert metrics.generated_tokens == sum(COUNTS)
    assert pages == 40 or metrics.preemptions > 0
    assert 0 < metrics.accepted_tokens <= metrics.drafted_tokens
    return engine


def scripted(model, **options) -> Scripted:
    pairs = zip(PROMPTS, COUNTS, strict=True)
    return Scripted({tuple(p): alone(model, p, n) for p, n in pairs}, **options)


@pytest.mark.parametrize("pages", [9, 40])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("branches", [1, 3])
def test_greedy_tokens_are_those_without_speculation(model, pages, prefix_cache, branches):
    """Partly right chains and trees, in batches with prompts and sequences without a draft."""
    check_answers(model, scripted(model, branches=branches), pages, prefix_cache)
    lookup = PromptLookup(tokens=5, shortest=1, branches=branches, adaptive=False)
    check_answers(model, lookup, pages, prefix_cache)


def test_right_drafts_save_steps(model):
    options = scripted(model, always_right=True)
    engine = check_answers(model, options, 40, prefix_cache=False)
    metrics = engine.metrics()
    assert metrics.accepted_tokens == metrics.drafted_tokens > 0.6 * sum(COUNTS)
    slow = Engine(model, max_total_seq_len=40 * 16)
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        slow.submit(request(prompt, count))
    run_all(slow)
    assert metrics.steps < 0.6 * slow.metrics().steps


@pytest.mark.parametrize("pages", [9, 40])
@pytest.mark.parametrize("width", [1, 3])
def test_a_draft_model_leaves_greedy_tokens_as_they_are(model, other, pages, width):
    options = DraftModel(other, depth=4, width=width, adaptive=False)
    engine = Engine(model, max_total_seq_len=pages * 16, speculation=options)
    handles = [engine.submit(request(p, n)) for p, n in zip(PROMPTS, COUNTS, strict=True)]
    while not engine.idle:
        engine.step()
        check_pages(engine)
        check_followed(engine)
    for handle, prompt, count in zip(handles, PROMPTS, COUNTS, strict=True):
        assert handle.outputs[0].token_ids == alone(model, prompt, count)
    assert engine.metrics().drafted_tokens > 50
    drafter = engine._speculation._drafter
    assert not drafter._followed and drafter._cache.num_free_pages == pages


def check_followed(engine: Engine) -> None:
    """The draft model's cache holds what the drafter says, of sequences that have not ended."""
    drafter = engine._speculation._drafter
    sequences = {s.id: s for s in [*engine._scheduler.running, *engine._scheduler.waiting]}
    assert drafter._followed.keys() == drafter._cache._table.sequences.keys()
    for seq_id, followed in drafter._followed.items():
        held = followed.known + len(followed.guessed)
        assert drafter._cache.sequence_length(seq_id) == held
        assert followed.known <= len(sequences[seq_id].tokens)


@pytest.mark.parametrize("pages", [9, 40])
def test_a_model_that_drafts_for_itself_is_always_right(model, pages):
    """With samples too, as it takes the same random numbers."""
    options = DraftModel(model, depth=4, adaptive=False)
    for params in (dict(), dict(temperature=1.3, seed=5), dict(temperature=0.8, top_p=0.9, seed=6)):
        engine = Engine(model, max_total_seq_len=pages * 16, speculation=options)
        for prompt, count in zip(PROMPTS, COUNTS, strict=True):
            engine.submit(request(prompt, count, params=params))
        run_all(engine)
        metrics = engine.metrics()
        assert metrics.accepted_tokens == metrics.drafted_tokens > 0.3 * sum(COUNTS)


SAMPLING = [
    dict(temperature=1.0, seed=7),
    dict(temperature=0.7, top_k=20, seed=8),
    dict(temperature=1.5, top_p=0.8, min_p=0.02, seed=9),
    dict(temperature=1.0, seed=10, repetition_penalty=1.3, frequency_penalty=0.5),
    dict(temperature=1.0, seed=11, presence_penalty=1.0, logit_bias={5: 4.0, 6: 4.0}, logprobs=2),
    dict(temperature=0, frequency_penalty=1.0, logit_bias={5: 2.0}, logprobs=3),
]


def run_sampled(model, options=None, **engine_options) -> list[list]:
    engine = Engine(model, speculation=options, **engine_options)
    handles = [
        engine.submit(request(prompt, 30, n=1 + i % 2, params=params))
        for i, (prompt, params) in enumerate(zip(PROMPTS, SAMPLING, strict=False))
    ]
    run_all(engine)
    if options is not None and not options.adaptive:
        assert engine.metrics().drafted_tokens > 0
    return [[(o.token_ids, o.logprobs) for o in handle.outputs] for handle in handles]


def test_a_seed_gives_the_same_samples_with_and_without(model, other):
    """Whatever is drafted and however many pages there are; penalties and logprobs included."""
    expected = run_sampled(model)
    lookup = PromptLookup(tokens=5, shortest=1, branches=2, adaptive=False)
    for options in (
        lookup,
        PromptLookup(shortest=1),
        DraftModel(other, width=2, adaptive=False),
        DraftModel(model, adaptive=False),
        DraftModel(model, width=3),
        Scripted({tuple(p): e[0][0] for p, e in zip(PROMPTS, expected, strict=False)}),
    ):
        for extra in (dict(), dict(max_total_seq_len=9 * 16, prefix_cache=False)):
            found = run_sampled(model, options, **extra)
            for a, b in zip(found, expected, strict=True):
                for (ids, logprobs), (expected_ids, expected_logprobs) in zip(a, b, strict=True):
                    assert ids == expected_ids
                    for own, other_own in zip(logprobs, expected_logprobs, strict=True):
                        assert own[0] == pytest.approx(other_own[0], abs=1e-4)


def test_unseeded_samples_follow_the_distribution(plain):
    """The tokens of drafts that are right or wrong about a third of the time each, against the
    model's own probabilities."""
    prompt, choices, samples = random_ids(10), [4, 5, 6], 3000
    params = dict(temperature=4.0, logit_bias=dict.fromkeys(choices, 80.0))
    options = Scripted({tuple(prompt): [4, 5, 6, 4]}, depth=2, always_right=True)
    engine = Engine(plain, speculation=options)
    handles = engine.generate([request(prompt, 4, n=250, params=params)] * (samples // 250))
    assert 0.2 * samples < engine.metrics().accepted_tokens < samples
    answers = np.array([output.token_ids for handle in handles for output in handle.outputs])
    for before in ([], [4], [5], [4, 5], [4, 6], [4, 5, 6]):
        found = answers[(answers[:, : len(before)] == before).all(axis=1), len(before)]
        weights = np.exp(SingleSequence(plain).extend([*prompt, *before])[choices] / 4.0)
        expected = weights / weights.sum()
        shares = np.array([(found == token).mean() for token in choices])
        assert found.size > 40 and np.isin(found, choices).all()
        error = np.sqrt(expected * (1 - expected) / found.size)
        assert (np.abs(shares - expected) < 4 * error).all()


def test_an_end_in_the_middle_of_a_right_draft(build_model):
    """eos, a stop string and max_tokens: nothing after them is in the answer or stays computed."""
    built = build_model("engine-plain", compile_options=OPTIONS)
    model = phi3c.load(built.compiled.artifact.path, threads=1)
    prompt = random_ids(12)
    answer = alone(model, prompt, 30)
    options = Scripted({tuple(prompt): answer}, depth=12, always_right=True)
    for count in range(1, 15):
        engine = Engine(model, speculation=options)
        handle = engine.submit(request(prompt, count))
        run_all(engine)
        assert handle.outputs[0].token_ids == answer[:count]
        assert handle.outputs[0].finish_reason == "length"
    # The eos token: one that the answer holds first at 5.
    at = next(i for i in range(5, 30) if answer[i] not in answer[:i])
    engine = Engine(model, speculation=options)
    handle = engine.submit(request(prompt, 30))
    engine._scheduler.waiting[0]._eos_token_ids = frozenset([answer[at]])
    run_all(engine)
    assert handle.outputs[0].token_ids == answer[: at + 1]
    assert handle.outputs[0].finish_reason == "stop"
    assert engine.metrics().accepted_tokens < at + 1


def test_reproducible_logits_have_the_same_bits_in_any_company(rounded, monkeypatch):
    """Of drafts that the clock may switch off, in any batch, with and without preemption. (Without
    that some differ by 1e-2 of their scale, as activations are rounded to int8.)"""
    bits: dict[int, list[int]] = {}
    sample = Sequence.sample

    def sample_and_note(sequence: Sequence, row: LogitRow) -> None:
        bits.setdefault(sequence.order[1], []).append(hash(row.logits.tobytes()))
        sample(sequence, row)

    monkeypatch.setattr(Sequence, "sample", sample_and_note)
    params = dict(temperature=2.0, logit_bias=dict.fromkeys(range(20, 30), 80.0))

    def noted(
        count: int, pages: int, speculation: PromptLookup | None, reproducible: bool = True
    ) -> dict[int, list[int]]:
        bits.clear()
        engine = Engine(
            rounded,
            max_total_seq_len=pages * 16,
            prefix_cache=pages == 13,
            speculation=speculation,
            reproducible=reproducible,
        )
        for i in range(count):
            engine.submit(request(random_ids(20, seed=i), 60, params=params | dict(seed=i)))
        run_all(engine)
        assert pages == 40 or engine.metrics().preemptions > 0
        return bits.copy()

    adaptive, eager = PromptLookup(shortest=1), PromptLookup(shortest=1, adaptive=False)
    expected = noted(8, 40, None)
    assert noted(8, 40, adaptive) == noted(8, 40, eager) == expected
    assert noted(8, 13, adaptive) == noted(8, 13, None) == expected
    assert noted(3, 40, eager) == {i: expected[i] for i in (1, 2, 3)}
    assert noted(8, 40, eager, reproducible=False) != expected


def test_reproducible_prompts_of_one_token_at_a_time(plain):
    """Steps in which every part is a token, and some of them are not the last of a prompt."""
    engine = Engine(plain, reproducible=True, prefix_cache=False)
    handles = [engine.submit(request(random_ids(25, seed=i), 9)) for i in range(4)]
    run_all(engine)
    for i, handle in enumerate(handles):
        assert handle.outputs[0].token_ids == alone(plain, random_ids(25, seed=i), 9)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """The toy with the default scheme."""
    folder = tmp_path_factory.mktemp("speculation") / "toy"
    phi3c.compile(TOY / "checkpoint", output=folder, max_batch_size=4)
    return phi3c.load(folder, threads=1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculation") / "toy"
    phi3c.compile(TOY / "checkpoint", quantization="q0f32", output=folder, max_batch_size=4)
    return phi3c.load(folder, threads=1)


def toy_answer(toy, options, text="reverse abcdefgh", **params) -> tuple[Engine, Handle]:
    engine = Engine(toy, speculation=options)
    messages = [{"role": "user", "content": text}]
    handle = engine.submit(request(messages, 40, params={"ignore_eos": False} | params))
    run_all(engine)
    return engine, handle


def test_the_toy_as_its_own_draft(toy):
    for width in (1, 2):
        options = DraftModel(toy, depth=3, width=width, adaptive=False)
        engine, handle = toy_answer(toy, options)
        [output] = handle.outputs
        assert output.text == "hgfedcba" and output.finish_reason == "stop"
        metrics = engine.metrics()
        # What is drafted past the end is of no use.
        assert metrics.drafted_tokens - width * metrics.accepted_tokens <= 3 * width
        assert metrics.steps < 6


def test_a_stop_string_in_the_middle_of_a_right_draft(toy):
    options = DraftModel(toy, depth=7, adaptive=False)
    for stop, text in (("e", "hgf"), ("ed", "hgf"), ("dcb", "hgfe"), ("x", "hgfedcba")):
        for speculation in (None, options):
            engine, handle = toy_answer(toy, speculation, stop=(stop,))
            assert handle.outputs[0].text == text
            assert "".join(piece.text for piece in handle.take()) == text
            assert handle.outputs[0].finish_reason == "stop"


def test_another_vocabulary_is_refused(plain, toy, build_model, tmp_path):
    with pytest.raises(InputError, match=r"draft model .*: found vocab_size \d+; accepted: 199"):
        Engine(plain, speculation=DraftModel(toy))
    folder = tmp_path / "toy"
    phi3c.compile(TOY / "checkpoint", quantization="q0f32", output=folder, max_batch_size=4)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"reverse"', '"inverse"'))
    message = "found token .* to be 'inverse'; accepted: 'reverse'"
    with pytest.raises(InputError, match=message):
        Engine(toy, speculation=DraftModel(phi3c.load(folder, threads=1)))
    for options in (dict(depth=0), dict(width=1.5)):
        with pytest.raises(InputError, match="accepted: an integer of 1 or more"):
            DraftModel(toy, **options)
    with pytest.raises(InputError, match="shortest: found 3; accepted: up to longest, 2"):
        PromptLookup(longest=2, shortest=3)


@pytest.mark.parametrize("make", [PromptLookup, DraftModel], ids=["lookup", "model"])
def test_toy_conversations_with_cancellations(toy, make):
    """Many more than fit, and pages for few: every answer that is not cancelled is the same."""
    rng = random.Random(2)
    options = PromptLookup(shortest=1, adaptive=False)
    if make is DraftModel:
        options = DraftModel(toy, width=2, adaptive=False)
    engine = Engine(toy, max_total_seq_len=16 * 32, speculation=options)
    waiting, handles = prompts(250), []
    while waiting or not engine.idle:
        for _ in range(min(len(waiting), rng.choice([0, 0, 1, 3]))):
            prompt = waiting.pop()
            limits = {
                "ignore_eos": False,
                "temperature": rng.choice([0, 1.0]),
                "seed": len(handles),
            }
            asked = request(prompt.messages(), 24, params=limits)
            asked = replace(asked, priority=rng.choice([0, 0, 1]))  # takes pages of others
            handles.append(engine.submit(asked))
        engine.step()
        if rng.random() < 0.05 and handles:
            engine.cancel(rng.choice(handles[-8:]))
        check_pages(engine)
    metrics = engine.metrics()
    assert metrics.cancelled > 5 and metrics.preemptions > 5 and metrics.accepted_tokens > 20
    again = Engine(toy)
    expected = [again.submit(handle.request) for handle in handles]
    run_all(again)
    for handle, other_handle in zip(handles, expected, strict=True):
        [output], [other_output] = handle.outputs, other_handle.outputs
        if output.finish_reason != "cancelled":
            assert output == other_output


class Speaker:
    """As much of a sequence as a prompt lookup sees."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens


def lookup(tokens: list[int], **options) -> Draft:
    [draft] = PromptLookupDrafter(PromptLookup(**options)).propose([(Speaker(tokens), 4)])
    return draft


def test_prompt_lookup():
    assert lookup([1, 2, 3, 4, 5, 6, 7, 1, 2]).tokens == (3, 4, 5, 6)
    assert lookup([1, 2, 3, 9, 1, 2, 4, 9, 1, 2]).tokens == (4, 9, 1, 2)  # the last place
    assert lookup([3, 1, 2, 7, 1, 2, 8, 3, 1, 2]).tokens == (7, 1, 2, 8)  # the longest match
    assert lookup([7, 8, 7, 8]).tokens == (7, 8, 7, 8)  # a repetition goes on
    assert lookup([5, 5, 5]).tokens == (5, 5, 5, 5)
    assert not lookup([1, 2, 3, 1]) and lookup([1, 2, 3, 1], shortest=1).tokens == (2, 3, 1, 2)
    assert not lookup([1]) and not lookup([1, 2]) and not lookup([1, 256, 1 << 16])
    tree = lookup([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2], branches=2)
    assert tree == Draft.of_paths([[3, 5, 0, 1], [3, 4, 0, 1]])
    assert len(tree) == 7 and tree.height == 4


@given(st.lists(st.integers(0, 2) | st.integers(0, 1 << 17), max_size=60))
def test_prompt_lookup_against_a_slow_twin(tokens):
    """Found as the sequence grows, a token at a time, as in an engine."""
    speaker, drafter = Speaker([]), PromptLookupDrafter(PromptLookup(shortest=1))
    for token in tokens:
        speaker.tokens.append(token)
        [draft] = drafter.propose([(speaker, 3)])
        expected = []
        for n in range(min(4, len(speaker.tokens) - 1), 0, -1):
            suffix, last = speaker.tokens[-n:], len(speaker.tokens) - n
            at = [i for i in range(last) if speaker.tokens[i : i + n] == suffix]
            if at:
                known = list(speaker.tokens)
                while len(known) < at[-1] + n + 3:
                    known.append(known[at[-1] + len(known) - last])
                expected = known[at[-1] + n :][:3]
                break
        assert list(draft.tokens) == expected


def test_drafts():
    tree = Draft.of_paths([[1, 2, 3], [1, 4], [5]])
    assert tree.tokens == (1, 2, 3, 4, 5) and tree.parents == (-1, 0, 1, 0, -1)
    assert tree.height == 3 and [tree.depth(i) for i in range(-1, 5)] == [0, 1, 2, 3, 2, 1]
    assert tree.child(0, 4) == 3 and tree.child(-1, 5) == 4 and tree.child(0, 5) is None
    assert not NO_DRAFT and NO_DRAFT.height == 0


def test_guessing_stops_where_it_is_never_right():
    pace, costs = Pace(), _Costs()
    costs.add_forward(1, 1, 1.0)
    for n in range(2, 10):
        costs.add_forward(1, n, 1.0 + 0.1 * n)  # so a right guess pays

    def best() -> int:
        depths = np.arange(9)
        return int(np.argmax((1 + pace.expected(depths)) / costs.seconds(1, 1 + depths, depths)))

    assert best() > 1
    drafted = 0
    for _ in range(400):
        if depth := pace.choose(best()):
            drafted += 1
            pace.learn(0, depth)
    assert best() == 0 and 8 < drafted < 25  # a few at first, then trials that become rare
    for _ in range(400):  # from now on everything is right
        if depth := pace.choose(best()):
            pace.learn(depth, depth)
    assert best() == 8 and pace.pause == 8


def test_guessing_stops_where_forwards_cost_too_much():
    pace, costs = Pace(), _Costs()
    costs.add_forward(2, 2, 1.0)
    costs.add_forward(2, 3, 9.0)
    depths = np.arange(5)
    assert costs.seconds(2, 2 + depths, depths).tolist() == [1, 9, 9, 9, 9]
    for _ in range(100):
        pace.learn(4, 4)
    assert pace.expected(depths) == pytest.approx(depths, rel=1e-3)
    assert np.argmax((2 + pace.expected(depths)) / costs.seconds(2, 2 + depths, depths)) == 0
    assert not costs.wants_plain(1) and not costs.wants_plain(2) and _Costs().wants_plain(2)
    for _ in range(64):
        costs.add_forward(2, 6, 9.0)
    assert costs.wants_plain(2) and not costs.wants_plain(3)
    for _ in range(4):
        costs.add_forward(3, 6, 9.0)
    assert costs.wants_plain(3)
    costs.add_forward(4, 4, 3.0)
    assert costs.seconds(3, np.array([3]), np.array([0])) == [2]  # between those of 2 and 4
    assert _Costs().seconds(1, 1 + depths, depths).tolist() == [1] * 5


def test_an_engine_stops_guessing_that_never_helps(plain, monkeypatch):
    """Where every token costs a second, what is always wrong cannot pay."""
    prompt = random_ids(10)
    answer = alone(plain, prompt, 100)
    wrong = [(token + 1) % VOCAB for token in answer]
    options = Scripted({tuple(prompt): wrong}, always_right=True, adaptive=True)
    ran = Speculation.ran

    def timed(self, parts, seconds):
        ran(self, parts, float(sum(part.size for part in parts)))

    monkeypatch.setattr(Speculation, "ran", timed)
    engine = Engine(plain, speculation=options)
    handle = engine.submit(request(prompt, 100))
    run_all(engine)
    assert handle.outputs[0].token_ids == answer
    assert engine.metrics().accepted_tokens == 0 and 0 < len(options.made) < 40


def test_a_draft_model_goes_back_where_nothing_was_sampled():
    """Drafted for, then preempted, then back with all pages: the last token is computed again."""
    followed = _Followed(False)
    followed.known, followed.guessed = 5, [1, 2]
    assert followed.catch_up([9] * 5) == 3  # two guesses and the last token
    assert followed.known == 4 and followed.guessed == []
    followed.guessed = [7, 8]
    assert followed.catch_up([9, 9, 9, 9, 7, 3]) == 1 and followed.known == 5


def test_a_draft_model_without_a_usable_guess(plain, monkeypatch):
    options = DraftModel(plain, adaptive=False)
    engine = Engine(plain, speculation=options)
    handle = engine.submit(request(random_ids(5), 8))

    def fails(logits, count, ahead):
        raise RuntimeError("cannot sample: logits hold NaN")

    monkeypatch.setattr(engine._scheduler.waiting[0], "likeliest", fails)
    run_all(engine)
    assert handle.outputs[0].token_ids == alone(plain, random_ids(5), 8)
    assert engine.metrics().drafted_tokens == 0


def test_after_a_failed_step_everything_can_be_given_back(plain, monkeypatch):
    prompt = random_ids(10)
    options = scripted(plain, branches=3)
    options.answers[tuple(prompt)] = alone(plain, prompt, 30)
    engine = Engine(plain, speculation=options)
    engine.submit(request(prompt, 30))
    engine.step()
    [sequence] = engine._scheduler.running

    def fails(logits):
        raise OSError("gone")

    monkeypatch.setattr(sequence, "sample", fails)
    with pytest.raises(OSError, match="gone"):
        engine.step()
    engine.abort_all()
    assert engine.idle and engine.metrics().pages_used == 0


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_trace_of_requests(model, other, data):
    """Submissions, steps and cancellations in any order; the rest is as if each were alone."""
    pages = data.draw(st.integers(8, 20))
    answers = {}
    options = data.draw(
        st.sampled_from(
            [
                Scripted(answers, branches=1),
                Scripted(answers, branches=3),
                PromptLookup(shortest=1, branches=2),
                DraftModel(other, width=2, adaptive=False),
                DraftModel(model, depth=7),
            ]
        )
    )
    cached = data.draw(st.booleans())
    engine = Engine(model, max_total_seq_len=16 * pages, prefix_cache=cached, speculation=options)
    open_handles: list[tuple[Handle, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["submit", "submit", "step", "step", "step", "cancel"]))
        if action == "submit":
            length, count = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 20))
            prompt = random_ids(length)
            answers[tuple(prompt)] = alone(model, prompt, 20)
            handle = engine.submit(request(prompt, count, priority=data.draw(st.integers(0, 1))))
            open_handles.append((handle, answers[tuple(prompt)][:count]))
        elif action == "step":
            engine.step()
        elif open_handles:
            at = data.draw(st.integers(0, len(open_handles) - 1))
            engine.cancel(open_handles.pop(at)[0])
        check_pages(engine)
        if isinstance(options, DraftModel):
            check_followed(engine)
    run_all(engine)
    for handle, answer in open_handles:
        assert handle.outputs[0].token_ids == answer
    assert engine.metrics().pages_used == 0
