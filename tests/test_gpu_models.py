"""Models compiled for a GPU, on each kind that is here (CI's is Vulkan on Mesa's lavapipe), against
the same models on the CPU and against transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import BASE, build
from cuda_device import needs_gpu
from vulkan_device import needs_device
from vulkan_validation import validated

import phi3c
from phi3c.engine.engine import Engine
from phi3c.engine.request import Request
from phi3c.engine.sampler import SamplingParams
from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import ConfigError, DeviceError, InputError, OutOfMemoryError, TargetError
from phi3c.runtime import device
from phi3c.verify import verify
from phi3c.vulkan import devices

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from function_parity import outputs  # noqa: E402

TOY = ROOT / "examples" / "toy" / "checkpoint"
ADAPTERS = ROOT / "examples" / "toy" / "adapters"
PROMPTS = ("reverse hello", "sort 4 2 9 1", "upper abc", "17 + 25", "copy the quick brown fox")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("vulkan", marks=needs_device),
        pytest.param(
            "cuda:native",
            marks=needs_gpu,
        ),
    ],
)
def gpu(request) -> str:
    """A target whose device is here."""
    return request.param


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """toy(target, quantization, **options) → its artifact, made once."""
    made: dict[tuple, Path] = {}

    def get(target: str, quantization: str, **options) -> Path:
        key = (target, quantization, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("toy") / "artifact"
            phi3c.compile(TOY, target, quantization, folder, **options)
            made[key] = folder
        return made[key]

    return get


def answers(folder: Path, requests: list[Request]) -> list[list[int]]:
    """Greedy tokens of each, all in one batch."""
    engine = Engine(phi3c.load(folder), Tokenizer.from_folder(folder), 2048, 16)
    for name in sorted({r.adapter for r in requests} - {None}):
        engine.model.load_adapter(ADAPTERS / name, name)
    handles = engine.generate(requests)
    assert not any(handle.error for handle in handles), handles
    return [handle.outputs[0].token_ids for handle in handles]


def greedy(prompt: str, adapter: str | None = None) -> Request:
    message = [{"role": "user", "content": prompt}]
    return Request(message, SamplingParams(temperature=0, max_tokens=24), adapter=adapter)


@pytest.mark.parametrize("quantization", ["q0f32", "q0f16", "q4f32_1", "q4f16_1"])
def test_the_toy_answers_as_on_the_cpu(gpu, toy, quantization):
    """The same tokens, though a GPU's activations are float16 in the schemes of that width."""
    requests = [greedy(prompt) for prompt in PROMPTS]
    there = answers(toy(gpu, quantization), requests)
    on_cpu = quantization if quantization.startswith("q0") else f"{quantization}:float"
    assert there == answers(toy("cpu", on_cpu), requests)


@pytest.mark.parametrize("quantization", ["q0f32", "q4f16_1"])
def test_every_function_is_the_cpus(gpu, toy, quantization):
    on_cpu = quantization if quantization.startswith("q0") else f"{quantization}:float"
    there, here = (phi3c.load(toy(*made)) for made in ((gpu, quantization), ("cpu", on_cpu)))
    found, expected = outputs(there), outputs(here)
    assert set(found) == set(here.manifest.functions) - {"copy_slots"}
    for name, value in expected.items():
        error = np.abs(found[name].astype(np.float64) - value).max() / np.abs(value).max()
        assert error <= (1e-5 if quantization == "q0f32" else 1e-2), (name, error)


@pytest.mark.parametrize("quantization", ["q0f32", "q4f16_1"])
def test_the_toy_is_right_at_every_boundary(gpu, toy, quantization):
    """Pages, chunks, LongRoPE's original context, the whole context: against transformers."""
    report = verify(toy(gpu, quantization), TOY)
    assert report.ok, report
    assert {check.boundary for check in report.checks} >= {"page", "original_max", "context_length"}


@needs_device
def test_a_tvm_with_a_vulkan_runtime_of_its_own(toy, monkeypatch):
    """As if ours were TVM's: only what TVM offers of a device is used."""
    requests = [greedy(prompt) for prompt in PROMPTS[:2]]
    expected = answers(toy("vulkan", "q0f32"), requests)
    monkeypatch.setattr(device, "tvm_has_vulkan", lambda: True)
    monkeypatch.delattr(device, "devices")
    assert answers(toy("vulkan", "q0f32"), requests) == expected
    with pytest.raises(DeviceError, match="found vulkan:99; .* TVM's own Vulkan runtime finds it"):
        phi3c.load(toy("vulkan", "q0f32"), device="vulkan:99")


@pytest.mark.parametrize("quantization", ["q0f32", "q4f16_1"])
def test_adapters_in_one_batch(gpu, toy, quantization):
    """Three adapters and the base model side by side, more adapters than slots."""
    requests = [greedy(f"{task} hello", task) for task in ("rotate", "down", "shout")]
    requests += [greedy("reverse hello"), greedy("rotate world", "rotate")]
    options = {"max_loras": 2, "max_rank": 32}
    there = answers(toy(gpu, quantization, **options), requests)
    on_cpu = quantization if quantization.startswith("q0") else f"{quantization}:float"
    assert there == answers(toy("cpu", on_cpu, **options), requests)
    assert there[0] != answers(toy("cpu", on_cpu, **options), [greedy("rotate hello")])[0]


def tiny(gpu, tmp_path, name: str, **overrides):
    """A random model on the GPU, to be compared with transformers."""
    options = dict(target=gpu, context_length=256) | overrides.pop("options", {})
    return build(tmp_path, name, compile_options=tuple(options.items()), **overrides)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("window", {"sliding_window": 24}),
        ("mha-tied", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("partial-rope", {"partial_rotary_factor": 0.5}),
    ],
)
def test_logits_of_a_mixed_batch(gpu, tmp_path, name, overrides):
    """A prompt in chunks beside decoding sequences, across the window."""
    model = tiny(gpu, tmp_path, name, **overrides)
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 199, n).tolist() for n in (60, 7, 33)]
    cache = model.compiled.create_paged_kv_cache(max_total_seq_len=512)
    for i in range(3):
        cache.add_sequence(i)
    done = [0, 0, 0]
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        ids = [i for i in range(3) if done[i] < len(texts[i])]
        parts = [texts[i][done[i] : done[i] + (11 if i == 0 else 5)] for i in ids]
        with cache.forward(ids, [len(part) for part in parts]):
            ends = np.cumsum([len(part) for part in parts]) - 1
            embed = model.compiled.embed(np.concatenate(parts))
            logits = model.compiled.batch_prefill(embed, ends, cache)[0].numpy()[0]
        for row, i, part in zip(logits, ids, parts, strict=True):
            done[i] += len(part)
            model.check(row, model.last_logits(texts[i][: done[i]]))
    with cache.forward([0, 1, 2], [1, 1, 1]):
        embed = model.compiled.embed([5, 6, 7])
        logits = model.compiled.batch_decode(embed, cache)[0].numpy()[:, 0]
    for i, row in enumerate(logits):
        model.check(row, model.last_logits([*texts[i], 5 + i]))


def test_a_tree_of_drafts_and_a_fork(gpu, tmp_path):
    model = tiny(gpu, tmp_path, "tree")
    compiled, cache = model.compiled, model.compiled.create_paged_kv_cache()
    prompt = list(range(10, 31))
    cache.add_sequence(0)
    with cache.forward([0], [len(prompt)]):
        compiled.prefill(compiled.embed(prompt), cache)
    cache.fork_sequence(0, 1)
    draft, parents = [40, 41, 42, 43], [-1, 0, 0, 2]
    with cache.forward([0], [4], tree_parents=parents):
        logits = compiled.batch_verify(compiled.embed(draft), cache)[0].numpy()[0]
    paths = [[40], [40, 41], [40, 42], [40, 42, 43]]
    for row, path in zip(logits, paths, strict=True):
        model.check(row, model.last_logits(prompt + path))
    cache.commit_accepted_token_tree_nodes([0], [3])
    with cache.forward([0, 1], [1, 1]):
        logits = compiled.batch_decode(compiled.embed([50, 51]), cache)[0].numpy()[:, 0]
    model.check(logits[0], model.last_logits([*prompt, 40, 42, 43, 50]))
    model.check(logits[1], model.last_logits([*prompt, 51]))


def test_two_layers_of_phi3_mini(gpu, tmp_path):
    """Real shapes, random weights, against the same artifact on the CPU."""
    quantization = "q4f16_1"
    config = json.loads((ROOT / "configs" / "phi-3-mini-4k.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    options = dict(max_batch_size=2, context_length=256, prefill_chunk_size=64)
    found = {}
    for target, scheme in ((gpu, quantization), ("cpu", f"{quantization}:float")):
        folder = tmp_path / target.partition(":")[0]
        phi3c.compile(tmp_path / "config.json", target, scheme, folder, **options)
        model = phi3c.load(folder)
        cache = model.create_paged_kv_cache(max_total_seq_len=256)
        cache.add_sequence(0)
        ids = np.random.default_rng(1).integers(0, 32064, 26)
        logits = []
        for part in (ids[:17], ids[17:25], ids[25:]):  # the three kinds of linear
            with cache.forward([0], [len(part)]):
                run = model.decode if len(part) == 1 else model.prefill
                logits.append(run(model.embed(part), cache)[0].numpy().ravel())
        found[target] = np.array(logits)
    error = np.abs(found[gpu] - found["cpu"]).max() / np.abs(found["cpu"]).max()
    assert error <= 2e-2, error


def test_a_long_prompt_at_once_and_in_chunks(gpu, tmp_path):
    """1,100 tokens, of which CUDA's tensor cores take large tiles, in linears and in attention."""
    config = dict(BASE, hidden_size=512, intermediate_size=4096, num_attention_heads=32)
    config |= dict(num_key_value_heads=8, num_hidden_layers=1, max_position_embeddings=2048)
    config |= dict(original_max_position_embeddings=2048, model_type="phi3")
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = dict(max_batch_size=2, context_length=1280, prefill_chunk_size=1100)
    ids = np.random.default_rng(1).integers(3, 199, 1100)
    found = {}
    for target in (gpu, "cpu"):
        folder = tmp_path / target.partition(":")[0]
        phi3c.compile(tmp_path / "config.json", target, "q0f16", folder, **options)
        model = phi3c.load(folder)
        for chunk in (1100, 300):
            cache = model.create_paged_kv_cache(max_total_seq_len=1280)
            cache.add_sequence(0)
            for part in np.split(ids, range(chunk, 1100, chunk)):
                with cache.forward([0], [len(part)]):
                    logits = model.prefill(model.embed(part), cache)[0].numpy().ravel()
            with cache.forward([0], [1]):  # over three parts of decode_attention's and more
                after = model.decode(model.embed([7]), cache)[0].numpy().ravel()
            found[target, chunk] = np.concatenate([logits, after])
    expected = found.pop(("cpu", 1100))
    for case, value in found.items():
        assert np.abs(value - expected).max() <= 1e-2 * np.abs(expected).max(), case


@pytest.mark.parametrize("gpu", [pytest.param("cuda:native", marks=needs_gpu)])
def test_decode_steps_are_captured(gpu, toy):
    """As CUDA graphs, whose results are those of launching kernel by kernel."""
    model = phi3c.load(toy(gpu, "q4f16_1"))
    graphs = model.decode_graphs

    def decoded() -> np.ndarray:
        cache = model.create_paged_kv_cache()
        cache.add_sequence(0)
        with cache.forward([0], [8]):
            model.prefill(model.embed(range(8)), cache)
        rows = []
        for token in range(5):
            with cache.forward([0], [1]):
                rows.append(model.decode(model.embed([token]), cache)[0].numpy().ravel())
        return np.array(rows)

    with graphs.paused():
        expected = decoded()
    np.testing.assert_array_equal(decoded(), expected)
    assert graphs.failure is None and graphs.captures > 0


@needs_device
@validated
def test_no_message_of_the_validation_layer(toy, tmp_path):
    """A prompt, decoding and an adapter under Khronos' layer, which prints what it finds wrong."""
    program = (
        "import phi3c, sys\n"
        "from phi3c.engine.engine import Engine\n"
        "from phi3c.engine.tokenizer import Tokenizer\n"
        "from phi3c.engine.request import Request\n"
        "from phi3c.engine.sampler import SamplingParams\n"
        "folder = sys.argv[1]\n"
        "engine = Engine(phi3c.load(folder), Tokenizer.from_folder(folder), 1024, 16)\n"
        "engine.model.load_adapter(sys.argv[2], 'rotate')\n"
        "params = SamplingParams(temperature=0, max_tokens=8)\n"
        "asked = [Request([{'role': 'user', 'content': 'reverse hello'}], params, adapter=a)\n"
        "         for a in (None, 'rotate')]\n"
        "print([h.outputs[0].text for h in engine.generate(asked)])\n"
        "print('looks on:', 'VkLayer_khronos_validation' in open('/proc/self/maps').read())\n"
    )
    folder = toy("vulkan", "q0f32", max_loras=2, max_rank=32)
    environment = os.environ | {"VK_INSTANCE_LAYERS": "VK_LAYER_KHRONOS_validation"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(ADAPTERS / "rotate")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "olleh" in done.stdout and "looks on: True" in done.stdout
    messages = done.stdout + done.stderr
    assert "VUID" not in messages and "alidation" not in messages, messages


# Bad input


@needs_device
def test_the_benchmark_runs(tmp_path):
    """benchmarks/gpu.py, which is for GPU machines: here as far as lavapipe goes."""
    program = ROOT / "benchmarks" / "gpu.py"
    options = "--target vulkan --schemes q4f16_1 --context 32 --prefill 40 --batch 1 2"
    command = [sys.executable, program, ROOT / "configs" / "tiny.json", *options.split()]
    command += ["--peer", "none"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    found = facts["schemes"]["q4f16_1"]
    assert max(found["parity"].values()) < 1e-2 and found["chunks"] < 1e-2
    times = found["times"]
    names = {"prefill 40", "decode, batch 1, context 32", "decode, batch 2, context 32"}
    assert set(times) == names
    for name in names:
        one, floor = times[name], times[name]["floor"]
        assert one["seconds"] > 0 and one["kernels"]
        assert floor is None if "prefill" in name else 0 < floor < one["seconds"]
    assert facts["rates"]["bandwidth"] > 0


@pytest.mark.parametrize("target", ["vulkan", "cuda", "metal"])
def test_tensors_of_too_many_elements_are_refused(target, tmp_path):
    """200064 logits of a token, and 2^31 − 1 elements of a tensor."""
    config = ROOT / "configs" / "phi-4-mini.json"
    accepted = "found 10734; accepted: an integer from 1 to 10733"
    for name in ("prefill_chunk_size", "max_batch_size"):
        most = accepted if name[0] == "p" else "found 10734; accepted: an integer from 1 to 4096"
        with pytest.raises(ConfigError, match=f"{name}: {most}"):
            phi3c.compile(config, target, "q4f16_1", tmp_path / "model", **{name: 10734})
    assert not list(tmp_path.iterdir())


@needs_device
def test_a_device_of_another_kind_is_refused(toy):
    with pytest.raises(TargetError, match="device: found 'vulkan'; accepted: cpu, or None"):
        phi3c.load(toy("cpu", "q0f32"), device="vulkan")
    for name in ("cpu", "cuda", "vulkan:x", "vulkan:-1"):
        with pytest.raises(TargetError, match="accepted: vulkan, vulkan:<index>, or None"):
            phi3c.load(toy("vulkan", "q0f32"), device=name)


@needs_device
def test_a_device_that_is_not_there_is_refused(toy):
    with pytest.raises(DeviceError, match="found vulkan:99; accepted: one that is there: vulkan:0"):
        phi3c.load(toy("vulkan", "q0f32"), device="vulkan:99")


@needs_device
def test_adapters_that_the_device_cannot_hold_are_refused(toy, monkeypatch):
    folder = toy("vulkan", "q0f32", max_loras=16, max_rank=32)
    small = replace(devices()[0], max_storage_buffer_range=2**20)  # enough for the parameters
    monkeypatch.setattr(device, "devices", lambda: [small])
    message = "adapters: a pool of 16 slots of rank 32: found 2.10 MB; accepted: up to 1.05 MB"
    with pytest.raises(DeviceError, match=message):
        phi3c.load(folder)


@needs_device
def test_pages_that_the_device_cannot_hold_are_refused(toy):
    model = phi3c.load(toy("vulkan", "q0f32"))
    with pytest.raises(OutOfMemoryError, match="needs .* of memory .* available on vulkan:0"):
        model.create_paged_kv_cache(max_total_seq_len=2**31 - 1)
    most = devices()[0].max_storage_buffer_range
    tokens = most // (model.manifest.kv_layout.bytes_per_token // model.manifest.kv_layout.layers)
    with pytest.raises(DeviceError, match="a layer's pages for .*; accepted: up to .* one buffer"):
        model.create_paged_kv_cache(max_total_seq_len=tokens + 16)
    with pytest.raises(InputError):
        model.embed([10**9])
    assert model.embed([5]).numpy().shape[:2] == (1, 1)  # and the model lives
