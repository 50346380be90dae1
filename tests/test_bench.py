"""`phi3c bench`: what it counts, what it runs, what it refuses; not how fast anything is."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import tvm
from conftest import compile_kernel

from phi3c.bench.machine import Others
from phi3c.bench.trace import replay, synthetic_trace
from phi3c.bench.workloads import Work, bytes_read, kernel_seconds, linear_operations, seconds
from phi3c.cli import main
from phi3c.engine.engine import Engine
from phi3c.errors import InputError
from phi3c.kernels.cpu.calibration import DOTS, READ_LANES, STREAMS, int8_products, read_stream
from phi3c.weights import checkpoint_shapes

tensor = tvm.runtime.tensor


@pytest.fixture
def model(build_model):
    size = dict(hidden_size=128, intermediate_size=192, head_dim=32)
    return build_model("q4f16_1-False", quantization="q4f16_1", tie_word_embeddings=False, **size)


def test_a_step_reads_every_weight_but_the_embedding_and_the_keys_and_values(model):
    manifest = model.compiled.manifest
    arrays = model.compiled.artifact.map_parameters()
    weights = sum(a.nbytes for name, a in arrays.items() if "embed_tokens" not in name)
    kv = manifest.kv_layout.bytes_per_token
    assert bytes_read(manifest, Work(1, 10, 1)) == weights + 10 * kv
    assert bytes_read(manifest, Work(3, 10, 1)) == weights + 30 * kv


def test_operations_are_those_of_the_linears(model):
    shapes = checkpoint_shapes(model.config)
    layers = sum(a * b for name, (a, *rest) in shapes.items() if "layers" in name for b in rest)
    head = int(np.prod(shapes["lm_head.weight"]))
    last = [n for n in shapes if "layers.1." in n and "qkv" not in n and len(shapes[n]) == 2]
    rest = sum(int(np.prod(shapes[name])) for name in last)  # not computed for 4 of 5 tokens
    manifest = model.compiled.manifest
    assert len(last) == 3
    assert linear_operations(manifest, Work(1, 0, 5)) == 2 * (5 * layers - 4 * rest + head)
    assert linear_operations(manifest, Work(1, 8, 1)) == 2 * (layers + head)
    assert linear_operations(model.compiled.manifest, Work(3, 9, 1)) == 2 * 3 * (layers + head)


@pytest.mark.parametrize("work", [Work(1, 0, 20), Work(1, 30, 1), Work(3, 17, 1)])
def test_workloads_run_as_often_as_asked(model, work):
    found = seconds(model.compiled, work, samples=4)
    assert len(found) == 4 and min(found) > 0
    kernels = kernel_seconds(model.compiled, work, samples=2)
    attention = "prefill_attention" if work.new > 1 else "decode_attention"
    assert kernels[attention][1] == model.config.num_hidden_layers
    assert seconds(model.compiled, work, samples=1)  # and timing the kernels has ended


def test_work_beyond_the_limits_is_refused(model):
    for work in (Work(1, 256, 1), Work(5, 10, 1), Work(1, 0, 257)):
        with pytest.raises(InputError, match="accepted: up to 256 in 4, the artifact's limits"):
            seconds(model.compiled, work, samples=1)


def test_others_are_a_share():
    assert 0 <= (Others().share() or 0) <= 1


def test_read_stream_reads_everything_once(isa):
    x = np.random.default_rng(0).integers(0, 9, (2, 33, STREAMS, READ_LANES)).astype(np.float32)
    out = tensor(np.zeros((2, STREAMS, READ_LANES), np.float32))
    compile_kernel(read_stream(2), isa)(tensor(x), out)
    np.testing.assert_array_equal(out.numpy(), x.sum(axis=1))


def test_int8_products_are_all_computed(isa):
    dot = isa.dot.for_bits(4)
    w, a = np.full((8, dot.lanes), 0x01020304, np.uint32), np.full(8, 0x01010101, np.int32)
    out = tensor(np.zeros((2, DOTS * dot.acc_len), dot.acc_dtype))
    kernel = compile_kernel(int8_products(isa, 2), isa)
    kernel(tensor(w), tensor(a), tensor(np.zeros(3, np.int8)), out)
    products = out.numpy().reshape(2, DOTS, dot.lanes, -1).sum(axis=-1)
    assert (products == 3 * 8 * (1 + 2 + 3 + 4)).all()


def test_command(model, capsys):
    argv = ["bench", str(model.compiled.artifact.path), "--prefill", "16", "--decode", "8"]
    argv += ["--batch-decode", "", "--samples", "2", "--threads", "1", "--profile"]
    assert main(argv) == 0
    *table, last = capsys.readouterr().out.splitlines()
    facts = json.loads(last)
    assert [result["name"] for result in facts["results"]] == ["prefill 16", "decode @8"]
    for result in facts["results"]:
        assert result["rates"]["read"] > 0 and result["rates"]["int8"] > 0
    assert any(line.startswith("decode @8") for line in table)
    assert main(["bench", str(model.compiled.artifact.path), "--batch", "0"]) == 2
    assert "accepted: positive numbers" in capsys.readouterr().err
    assert main(["bench", str(model.compiled.artifact.path), "--prefill", "abc"]) == 2
    assert "found 'abc'; accepted: numbers such as 128,512" in capsys.readouterr().err
    assert main(["bench", str(model.compiled.artifact.path), "--decode", "9000"]) == 2
    captured = capsys.readouterr()
    assert "decode @9000: needs" in captured.err and not captured.out


def test_synthetic_trace():
    trace = synthetic_trace(199, count=30, rate=10, prefix=16, longest=100)
    assert trace == synthetic_trace(199, count=30, rate=10, prefix=16, longest=100)
    assert all(a.seconds < b.seconds for a, b in pairwise(trace))
    assert len({tuple(a.prompt[:16]) for a in trace[::3]}) == 1
    for arrival in trace:
        assert 8 <= len(arrival.prompt) <= 50 and 8 <= arrival.max_tokens <= 25
        assert all(3 <= token < 199 for token in arrival.prompt)


@pytest.mark.parametrize("at_once", [1, None])
def test_replay_answers_every_request(model, at_once):
    trace = synthetic_trace(199, count=6, rate=200, prefix=8, longest=60)
    result = replay(Engine(model.compiled), trace, "x", at_once)
    assert result.tokens == sum(arrival.max_tokens for arrival in trace)
    assert len(result.first_token) == len(result.token) == 6
    assert 0 < max(result.first_token) <= result.seconds
    for token, gap in zip(result.token, result.gap, strict=True):
        assert 0 < token <= gap < result.seconds
    assert (result.metrics.sequence_steps == result.metrics.steps) == (at_once == 1)


def test_one_at_a_time_may_leave_out_what_waiting_costs(model):
    """All there at the start: the last waits for the others, or comes when they have ended."""
    trace = synthetic_trace(199, count=6, rate=0, prefix=8, longest=60)
    waited = replay(Engine(model.compiled), trace, "x", 1)
    came_late = replay(Engine(model.compiled), trace, "x", 1, queues=False)
    assert waited.first_token[-1] > waited.seconds / 2 > came_late.first_token[-1]


def test_engine_command(model, capsys):
    path = str(model.compiled.artifact.path)
    argv = ["bench", path, "--engine", "--requests", "4", "--shared-prefix", "8", "--batch", "3"]
    assert main([*argv, "--longest", "60", "--threads", "1"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    facts = json.loads(last)
    names = {title: [r["name"] for r in facts[title]] for title in list(facts)[:3]}
    assert names["concurrent"] == ["one at a time", "3 together"]
    assert names["shared prefix"] == ["1 of 128+16", "3 of 128+16"]  # the context is 256
    assert names["trace"][:2] == ["one at a time", "all at once"]
    assert names["trace"][2].endswith("a second")
    for title, replays in names.items():
        for name in (title, *replays):
            assert any(line.startswith(name) for line in table)
    one, three = (r["metrics"] for r in facts["shared prefix"])
    assert one["computed_tokens"] == 128 + 16 + 7
    assert three["computed_tokens"] == 128 + 3 * (16 + 7) and three["cached_tokens"] == 2 * 128
    assert "largest gap" in table[0]
    assert main([*argv, "--rate", "50", "--json", "--max-step-tokens", "8"]) == 0
    [only] = json.loads(capsys.readouterr().out)["trace"]
    assert only["name"] == "50 a second"
    assert main([*argv, "--max-step-tokens", "1"]) == 2
    assert "max_step_tokens: found 1; accepted: 4 (max_batch_size) to" in capsys.readouterr().err
    assert main([*argv, "--longest", "20"]) == 2
    assert "--shared-prefix 8; accepted:" in capsys.readouterr().err
