"""The sampler against a slow twin, against transformers' warpers, and by counting its draws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3c.engine.generation_config import generation_defaults, generation_eos_token_ids
from phi3c.engine.logprobs import logprobs
from phi3c.engine.race import RaceNumbers
from phi3c.engine.sampler import Sampler, SamplingParams, filtered_distribution
from phi3c.errors import CheckpointError, InputError
from phi3c.runtime.logit_row import LogitRow

VOCAB = 200


def slow_distribution(logits: np.ndarray, params: SamplingParams) -> list[float]:
    """Every filter token by token, in plain Python."""
    logits = logits.tolist()  # float64 from here on
    top = max(logits)
    weights = {i: math.exp((x - top) / params.temperature) for i, x in enumerate(logits)}
    if params.top_k:
        kth = sorted(logits, reverse=True)[min(params.top_k, len(logits)) - 1]
        weights = {i: w for i, w in weights.items() if logits[i] >= kth}
    if params.top_p < 1:
        total = sum(weights.values())
        dropped = 0.0
        for i in sorted(weights, key=lambda i: (weights[i], -i)):
            dropped += weights[i] / total
            if dropped > 1 - params.top_p or len(weights) == 1:
                break
            del weights[i]
    top = max(weights.values())
    weights = {i: w for i, w in weights.items() if w >= params.min_p * top}
    total = sum(weights.values())
    return [weights.get(i, 0.0) / total for i in range(len(logits))]


def fast_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    ids, probs = filtered_distribution(logits, params)
    assert len(set(ids.tolist())) == len(ids)
    dense = np.zeros(logits.size)
    dense[ids] = probs
    return dense


def random_logits(seed: int, vocab: int = VOCAB, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.5),
    SamplingParams(top_k=1),
    SamplingParams(top_k=17),
    SamplingParams(top_k=10**9),
    SamplingParams(top_p=0.0),
    SamplingParams(top_p=0.35),
    SamplingParams(top_p=0.9),
    SamplingParams(min_p=0.07),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=1.7, top_k=9, top_p=0.95, min_p=0.2),
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_distribution_matches_slow_twin(params: SamplingParams, seed: int) -> None:
    logits = random_logits(seed)
    np.testing.assert_allclose(
        fast_distribution(logits, params), slow_distribution(logits, params), rtol=1e-9, atol=0
    )


@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=40),
    temperature=st.sampled_from([0.1, 0.5, 1.0, 3.0]),
    top_k=st.integers(0, 45),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_any_parameters_give_a_distribution(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Many ties. The sums of the filters may round differently, so only invariants are checked."""
    row = np.array(logits, dtype=np.float32) / 4
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=1)
    probs = fast_distribution(row, params)
    assert probs.sum() == pytest.approx(1)
    assert probs[row.argmax()] == probs.max() > 0
    plain = fast_distribution(row, SamplingParams(temperature=temperature, top_k=top_k))
    assert plain[probs > 0].sum() >= min(top_p, plain.max()) - 1e-9 or min_p > 0
    assert probs[Sampler(params).sample(row)] > 0


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_distribution_matches_transformers(params: SamplingParams, seed: int) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(seed)
    scores = torch.from_numpy(logits)[None].double()
    if params.temperature != 1:
        scores = process.TemperatureLogitsWarper(params.temperature)(None, scores)
    if params.top_k:
        scores = process.TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = process.TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = process.MinPLogitsWarper(params.min_p)(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    np.testing.assert_allclose(fast_distribution(logits, params), expected, rtol=1e-6, atol=1e-12)


def test_top_k_ties_match_transformers() -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.array([1, 3, 2, 2, 2, 0], dtype=np.float32)
    kept = process.TopKLogitsWarper(2)(None, torch.from_numpy(logits)[None])[0] > -math.inf
    assert (fast_distribution(logits, SamplingParams(top_k=2)) > 0).tolist() == kept.tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=7),
        SamplingParams(seed=8, temperature=0.6, top_k=12),
        SamplingParams(seed=9, temperature=1.4, top_p=0.8, min_p=0.05),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Pearson's chi-square, whose mean is the degrees of freedom and variance twice that."""
    logits = random_logits(3, vocab=30, scale=1.5)
    probs = fast_distribution(logits, params)
    sampler, draws = Sampler(params), 20000
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=30)
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * draws
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    freedom = expected.size - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("params", [*SETTINGS, SamplingParams(top_p=0.5, temperature=0.2)], ids=str)
@pytest.mark.parametrize("vocab", [1, 63, 64, 200, 1000, 5003])
def test_the_race_against_a_slow_twin(params: SamplingParams, vocab: int) -> None:
    """Every token's number over its probability, and the least of them."""
    for seed in range(6):
        logits = random_logits(seed, vocab, scale=(0.0, 0.5, 3.0)[seed % 3])
        if seed == 5:
            logits[::3] = -np.inf  # as a grammar does
            logits[0] = 0
        sampler = Sampler(SamplingParams(**{**vars(params), "seed": seed}))
        row = LogitRow(logits)
        numbers = RaceNumbers(sampler._key, 2, row.table.shape).of(np.arange(vocab))
        with np.errstate(divide="ignore"):
            times = numbers / fast_distribution(logits, params)
        order = [i for i in np.argsort(times, kind="stable").tolist() if times[i] < np.inf]
        assert sampler.likeliest(logits, 1, ahead=2) == order[:1]
        assert sampler.likeliest(logits, 7, ahead=2) == order[:7]


def test_race_numbers_are_independent_exponentials() -> None:
    """In the block and out of it: their law, and no correlation within or between positions."""
    shape, positions = (5, 7), 4000
    every = np.arange(35)
    found = np.array([RaceNumbers(11, i, shape).of(every) for i in range(positions)])
    for column in found.T:  # Kolmogorov and Smirnov's distance, 1.95 is passed once in a thousand
        expected = 1 - np.exp(-np.sort(column))
        distance = np.abs(expected - (np.arange(positions) + 0.5) / positions).max()
        assert distance * math.sqrt(positions) < 2.2
    correlations = np.corrcoef(np.hstack([found[1:], found[:-1]]).T) - np.eye(70)
    assert np.abs(correlations).max() < 5.5 / math.sqrt(positions)
    for i in range(3):
        numbers = RaceNumbers(11, i, shape)
        ids, in_blocks = numbers.in_blocks(np.array([4, 0]))
        assert (in_blocks == found[i][ids]).all()
        assert numbers.least() == pytest.approx(found[i].reshape(shape).min(axis=0))


@pytest.mark.parametrize(
    "params", [SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.7)], ids=str
)
def test_draws_of_a_large_vocabulary_follow_the_distribution(params: SamplingParams) -> None:
    """Likely tokens one by one, the others by what their ids leave when divided by 16."""
    logits = random_logits(3, vocab=6000, scale=2.0)
    probs = fast_distribution(logits, params)
    sampler, draws = Sampler(params), 8000
    drawn = np.array([sampler.sample(logits) for _ in range(draws)])
    assert probs[drawn].min() > 0
    likely = np.flatnonzero(probs > 0.002)
    group = np.where(np.isin(np.arange(6000), likely), 16 + np.arange(6000), np.arange(6000) % 16)
    expected = np.bincount(group, probs) * draws
    counts = np.bincount(group[drawn], minlength=expected.size)
    some = expected > 0
    statistic = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    assert abs(statistic - some.sum() + 1) < 4 * math.sqrt(2 * some.sum())


@pytest.mark.parametrize("temperature", [0.05, 0.8, 3.0])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.7, 0.95, 0.9999])
def test_top_p_of_a_large_vocabulary(temperature: float, top_p: float) -> None:
    """Against a sort of everything in float64, up to float32's rounding of the mass."""
    for seed in range(4):
        logits = random_logits(seed, 20000, scale=(1.0, 4.0)[seed % 2])
        if seed > 1:
            logits = np.round(logits)  # thousands of ties
        params = SamplingParams(temperature=temperature, top_p=top_p)
        found = np.flatnonzero(fast_distribution(logits, params))
        order = np.lexsort((np.arange(logits.size), -logits))
        weights = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
        mass = np.cumsum(weights) / weights.sum()
        assert (found == np.sort(order[: found.size])).all()  # a beginning of the order
        assert mass[found.size - 1] >= top_p - 1e-6
        assert found.size == 1 or mass[found.size - 2] < top_p + 1e-6


@pytest.mark.parametrize("vocab", [3, 200, 5000])
def test_logprobs_against_a_slow_twin(vocab: int) -> None:
    logits = np.round(random_logits(0, vocab) * 4) / 4  # with ties
    scores = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    for top in (0, 1, 5, 20):
        own, likeliest = logprobs(logits, 2, top)
        assert own == pytest.approx(scores[2], abs=1e-5)
        expected = sorted(range(vocab), key=lambda i: (-scores[i], i))[:top]
        assert list(likeliest) == expected
        assert list(likeliest.values()) == pytest.approx(scores[expected].tolist(), abs=1e-5)


def test_seed_fixes_the_tokens_whatever_else_runs() -> None:
    rows = [random_logits(i) for i in range(50)]
    params = SamplingParams(seed=11)
    alone = [Sampler(params).sample(rows[0])]
    one, other = Sampler(params), Sampler(SamplingParams(seed=5))
    mixed = []
    for row in rows:
        other.sample(row)
        np.random.random()
        mixed.append(one.sample(row))
    again = Sampler(params)
    assert mixed == [again.sample(row) for row in rows]
    assert mixed[:1] == alone


def test_streams_and_unseeded_samplers_differ() -> None:
    rows = [random_logits(i, scale=0.1) for i in range(20)]

    def tokens(sampler: Sampler) -> list[int]:
        return [sampler.sample(row) for row in rows]

    seeded = SamplingParams(seed=3)
    assert tokens(Sampler(seeded)) == tokens(Sampler(seeded, stream=0))
    assert tokens(Sampler(seeded, stream=1)) != tokens(Sampler(seeded, stream=2))
    assert tokens(Sampler(SamplingParams())) != tokens(Sampler(SamplingParams()))


def test_the_random_numbers_of_a_position_do_not_depend_on_those_before() -> None:
    """A row that leaves a single token must not shift the tokens after it."""
    peaked = np.array([0, 100, 0], dtype=np.float32)
    flat = [random_logits(i) for i in range(10)]
    params = SamplingParams(seed=2, top_p=0.9)
    one, two = Sampler(params), Sampler(params)
    one.sample(peaked), two.sample(flat[0])
    assert [one.sample(row) for row in flat] == [two.sample(row) for row in flat]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_the_likeliest_begin_with_what_is_sampled_then(params: SamplingParams) -> None:
    rows = [random_logits(i) for i in range(6)]
    sampler = Sampler(SamplingParams(**{**vars(params), "seed": 4}))
    guesses = [sampler.likeliest(row, 5, ahead) for ahead, row in enumerate(rows)]
    assert [guess[0] for guess in guesses] == [sampler.sample(row) for row in rows]
    for guess, row in zip(guesses, rows, strict=True):
        possible = np.flatnonzero(fast_distribution(row, params))
        assert len(set(guess)) == len(guess) == min(5, possible.size)
        assert set(guess) <= set(possible.tolist())
    greedy = Sampler(SamplingParams(temperature=0))
    assert greedy.likeliest(np.array([1, 5, -np.inf, 5, 2]), 9) == [1, 3, 4, 0]


def test_greedy_takes_the_lowest_of_equals() -> None:
    params = SamplingParams(temperature=0)
    logits = np.array([1, 5, 2, 5], dtype=np.float32)
    assert Sampler(params).sample(logits) == 1
    ids, probs = filtered_distribution(logits, params)
    assert ids.tolist() == [1] and probs.tolist() == [1.0]


def test_extreme_numbers() -> None:
    logits = np.array([-3e38, 3e38, 0, -np.inf], dtype=np.float32)
    for temperature in (5e-324, 1e-3, 1.0, 1e308):
        params = SamplingParams(temperature=temperature, top_p=0.5, seed=0)
        assert Sampler(params).sample(logits) in (0, 1, 2)
    assert Sampler(SamplingParams(temperature=5e-324)).sample(logits) == 1
    masked = np.full(50, -np.inf, dtype=np.float32)
    masked[33] = -1e30
    for params in SETTINGS:
        assert Sampler(params).sample(masked) == 33
    assert Sampler(SamplingParams()).sample(np.zeros(1, dtype=np.float16)) == 0


@pytest.mark.parametrize("temperature", [0, 1])
def test_unusable_logits_are_named(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature))
    with pytest.raises(RuntimeError, match="NaN"):
        sampler.sample(np.array([1, np.nan, 2], dtype=np.float32))
    with pytest.raises(RuntimeError, match=r"\+inf"):
        sampler.sample(np.array([1, np.inf], dtype=np.float32))
    with pytest.raises(RuntimeError, match="nothing but -inf"):
        sampler.sample(np.full(3, -np.inf, dtype=np.float32))
    for shape in ((0,), (1, 4), ()):
        with pytest.raises(InputError, match="logits"):
            sampler.sample(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "1", None, True, [1.0]]),
        ("top_p", [-0.1, 1.1, math.nan, "1", None, True]),
        ("min_p", [-0.1, 1.1, math.nan, "1", None, False]),
        ("top_k", [-1, 1.5, 2.0, True, "5", None]),
        ("seed", [-1, 2**64, 1.0, True, "5"]),
        ("max_tokens", [0, -1, 1.0, True, "5"]),
        ("stop", ["x", None, [""], [1], {"a"}]),
        ("ignore_eos", [None, 1, "no"]),
    ],
)
def test_bad_parameters_name_the_field(field: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(InputError, match=rf"^{field}: found .*; accepted: ") as error:
            SamplingParams(**{field: value})
        assert isinstance(error.value, ValueError)
        assert "\n" not in str(error.value)


def test_good_parameters() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**64 - 1), stop=["a", "b"]
    )
    assert params.stop == ("a", "b")
    assert hash(params) == hash(params)
    assert SamplingParams(temperature=0).greedy and not params.greedy
    Sampler(params).sample(random_logits(0))


def write(folder: Path, config: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def test_generation_defaults(tmp_path: Path) -> None:
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert generation_defaults(tmp_path) == greedy
    assert generation_defaults(write(tmp_path, {"temperature": 0.6, "top_p": 0.9})) == greedy
    assert generation_defaults(write(tmp_path, {"do_sample": True})) == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "min_p": 0.0,
    }
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": None}
    defaults = generation_defaults(write(tmp_path, config))
    assert defaults == {"temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.0}
    assert SamplingParams(**defaults).temperature == 0.6


def test_generation_eos(tmp_path: Path) -> None:
    assert generation_eos_token_ids(tmp_path) == frozenset()
    assert generation_eos_token_ids(write(tmp_path, {"eos_token_id": None})) == frozenset()
    assert generation_eos_token_ids(write(tmp_path, {"eos_token_id": 0})) == {0}
    assert generation_eos_token_ids(write(tmp_path, {"eos_token_id": [7, 9]})) == {7, 9}
    for bad in ("</s>", -1, True, [1, None], 1.0):
        with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id: found"):
            generation_eos_token_ids(write(tmp_path, {"eos_token_id": bad}))


def test_broken_generation_config_is_named(tmp_path: Path) -> None:
    for bad in ({"do_sample": "yes"}, {"do_sample": True, "top_p": 2}, [1]):
        with pytest.raises(CheckpointError, match="generation_config.json: .*accepted"):
            generation_defaults(write(tmp_path, bad))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json: cannot be read"):
        generation_defaults(tmp_path)
