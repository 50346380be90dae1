"""Requests with LoRA adapters in the engine: the toy's adapters, one batch, few slots."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_engine import check_pages

import phi3c
from phi3c.cli import main
from phi3c.engine.answer import answers_together
from phi3c.engine.engine import Engine
from phi3c.engine.request import Handle, Request
from phi3c.engine.sampler import SamplingParams
from phi3c.errors import AdapterError, AdapterInUseError, InputError

TOY = Path(__file__).parent.parent / "examples" / "toy"
sys.path.insert(0, str(TOY))
import tasks  # noqa: E402

NAMES = list(tasks.ADAPTER_TASKS)
GREEDY = SamplingParams(temperature=0, max_tokens=24)
ROOM = 16 * 200


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> phi3c.CompiledPhi3:
    """With slots for two of the three adapters, all of which are loaded."""
    folder = tmp_path_factory.mktemp("adapters") / "toy"
    options = dict(quantization="q0f32", max_batch_size=8, max_loras=2, max_rank=32)
    phi3c.compile(TOY / "checkpoint", output=folder, **options)
    model = phi3c.load(folder, threads=1)
    for name in NAMES:
        model.load_adapter(TOY / "adapters" / name, name)
    return model


def made_prompts(count: int, names: Sequence[str], seed: int = 3) -> list[tuple[str, tasks.Prompt]]:
    """(task, prompt), short, crossing original_max and past it, shuffled."""
    kinds = (tasks.short_prompts, tasks.crossing_prompts, tasks.long_prompts)
    each = -(-count // (len(names) * len(kinds)))
    made = [(name, p) for name in names for kind in kinds for p in kind(name, each, seed)]
    random.Random(0).shuffle(made)
    return made[:count]


def adapter_of(task: str) -> str | None:
    return task if task in NAMES else None


def run(engine: Engine, requests: Sequence[Request]) -> list[Handle]:
    handles = [engine.submit(request) for request in requests]
    while not engine.idle:
        engine.step()
        check_pages(engine)
    return handles


def texts(handles: Sequence[Handle]) -> list[list[str]]:
    return [[output.text for output in handle.outputs] for handle in handles]


def request(task: str, prompt: tasks.Prompt, **options) -> Request:
    return Request(prompt.messages(), GREEDY, adapter=adapter_of(task), **options)


def idle(model: phi3c.CompiledPhi3) -> bool:
    """Nothing holds an adapter: every one can be unloaded. They are loaded again."""
    for name in NAMES:
        model.unload_adapter(name)
        model.load_adapter(TOY / "adapters" / name, name)
    return True


def test_every_task_is_solved_by_its_adapter_in_one_mixed_batch(toy):
    """Three adapters of the ranks 16, 20 and 4 and the model itself; two slots, few pages, so that
    adapters are swapped and sequences preempted."""
    prompts = made_prompts(600, [*NAMES, *tasks.TASKS])
    engine = Engine(toy, max_total_seq_len=16 * 60)
    rng = random.Random(2)
    handles = run(engine, [request(*p, priority=rng.choice([0, 0, 1])) for p in prompts])
    right = {task: [] for task in (*NAMES, *tasks.TASKS)}
    for handle, (task, prompt) in zip(handles, prompts, strict=True):
        right[task].append(handle.outputs[0].text == prompt.answer)
    print({task: f"{sum(answers)} of {len(answers)}" for task, answers in right.items()})
    assert all(sum(right[task]) >= 0.99 * len(right[task]) for task in NAMES)
    assert sum(map(sum, right.values())) >= 0.99 * len(prompts)
    assert engine.metrics().preemptions > 0
    assert idle(toy)


@pytest.mark.parametrize("quantization", ["q0f16", "q4f16_1", "q4f16_1:float"])
def test_tasks_are_solved_in_other_schemes(quantization, tmp_path):
    """Float16 pools beside linears of every kind."""
    options = dict(quantization=quantization, max_loras=3, max_rank=32)
    phi3c.compile(TOY / "checkpoint", output=tmp_path / "toy", **options)
    model = phi3c.load(tmp_path / "toy", threads=1)
    for name in NAMES:
        model.load_adapter(TOY / "adapters" / name, name)
    prompts = made_prompts(30, NAMES)
    handles = run(Engine(model), [request(*one) for one in prompts])
    wrong = [h for h, (_, p) in zip(handles, prompts, strict=True) if h.outputs[0].text != p.answer]
    assert len(wrong) <= 2, [h.outputs[0].text for h in wrong]


def test_the_model_itself_cannot_solve_the_adapters_tasks(toy):
    prompts = made_prompts(60, NAMES)
    handles = run(Engine(toy), [Request(p.messages(), GREEDY) for _, p in prompts])
    assert (
        sum(h.outputs[0].text == p.answer for h, (_, p) in zip(handles, prompts, strict=True)) <= 1
    )


@pytest.mark.parametrize("speculation", [None, phi3c.PromptLookup(tokens=4, shortest=1)])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_same_alone_and_in_any_company(toy, speculation, prefix_cache):
    prompts = made_prompts(48, [*NAMES, "reverse"], seed=5)
    # The same question to all: only the adapter tells their pages apart.
    same = prompts[0][1].messages()
    requests = [Request(same, GREEDY, adapter=name) for name in [None, *NAMES]]
    requests += [request(*p) for p in prompts]
    requests += [request(*p, n=3) for p in prompts[:4]]
    alone = [texts(run(Engine(toy, max_total_seq_len=ROOM), [r]))[0] for r in requests]
    options = dict(prefix_cache=prefix_cache, speculation=speculation)
    engine = Engine(toy, max_total_seq_len=16 * 50, **options)
    for seed in (0, 1):
        order = list(range(len(requests)))
        random.Random(seed).shuffle(order)
        found = texts(run(engine, [requests[i] for i in order]))
        assert found == [alone[i] for i in order]
    assert len({alone[i][0] for i in range(1 + len(NAMES))}) > 1
    assert idle(toy)


def test_a_name_that_is_loaded_again_does_not_see_old_pages(toy):
    prompt = made_prompts(1, ["rotate"])[0][1].messages()
    toy.unload_adapter("rotate")
    engine = Engine(toy, max_total_seq_len=ROOM)
    found = {}
    for task in ("rotate", "down", "rotate"):
        toy.load_adapter(TOY / "adapters" / task, "changing")
        handles = run(engine, [Request(prompt, GREEDY, adapter="changing")] * 2)
        assert texts(handles)[0] == texts(handles)[1]
        assert found.setdefault(task, texts(handles)[0]) == texts(handles)[0]
        assert handles[0].cached_tokens == 0
        toy.unload_adapter("changing")
    assert found["rotate"] != found["down"]
    toy.load_adapter(TOY / "adapters" / "rotate", "rotate")
    under_another_name = run(engine, [Request(prompt, GREEDY, adapter="rotate")])
    assert texts(under_another_name)[0] == found["rotate"]


def test_an_adapter_stays_loaded_while_a_request_wants_it(toy):
    engine = Engine(toy, max_total_seq_len=ROOM)
    (name, prompt), *_ = made_prompts(1, NAMES)
    waiting = engine.submit(request(name, prompt))
    with pytest.raises(AdapterInUseError, match=f"adapter '{name}': found 1 request of it"):
        toy.unload_adapter(name)
    engine.step()
    with pytest.raises(AdapterInUseError):
        toy.unload_adapter(name)
    engine.cancel(waiting)
    assert idle(toy)


def test_one_that_waits_for_a_slot_is_not_passed_for_ever(toy):
    """Two adapters that are always in demand have the slots; the third gets one all the same, and
    meanwhile one of the two goes on, as does the model itself."""
    engine = Engine(toy, max_total_seq_len=ROOM)
    busy = iter(made_prompts(400, ["rotate", "shout"]))
    for _ in range(4):
        engine.submit(request(*next(busy)))
    engine.step()
    third = engine.submit(request(*made_prompts(1, ["down"])[0]))
    behind: list[Handle] = []
    plain = engine.submit(request(*made_prompts(1, ["reverse"])[0]))
    steps = 0
    while not third.outputs[0].token_ids:
        behind += [engine.submit(request(*next(busy))) for _ in range(2)]
        engine.step()
        steps += 1
        assert steps <= GREEDY.max_tokens + 4, "those in the slots have not so much left to do"
    assert plain.outputs[0].token_ids
    assert any(handle.outputs[0].token_ids for handle in behind)
    while not third.done:
        engine.step()
    engine.abort_all()
    assert idle(toy)


def test_more_wait_for_slots_than_there_are(toy):
    """Each adapter has its turn: no request is passed by more than a batch of later ones."""
    engine = Engine(toy, max_total_seq_len=ROOM)
    prompts = made_prompts(60, NAMES)
    handles = [engine.submit(request(*one)) for one in prompts]
    passed = 0
    while not engine.idle:
        engine.step()
        first = next((i for i, h in enumerate(handles) if not h.outputs[0].token_ids), None)
        if first is not None:
            later = sum(bool(h.outputs[0].token_ids) for h in handles[first:])
            passed = max(passed, later)
    assert passed <= 24, "three batches of 8"
    assert idle(toy)


def test_an_interrupt_at_admission_keeps_no_slot(toy, monkeypatch):
    engine = Engine(toy, max_total_seq_len=ROOM)
    name, prompt = made_prompts(1, NAMES)[0]
    handle = engine.submit(request(name, prompt))
    scheduler = engine._scheduler
    calls, yielding = iter(range(4)), scheduler._yielding

    def interrupted(sequence):
        if next(calls) % 2:  # the one behind the slot
            raise KeyboardInterrupt
        return yielding(sequence)

    with monkeypatch.context() as patched:
        patched.setattr(scheduler, "_yielding", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                engine.step()
            assert scheduler.waiting[0].slot >= 0
    again = engine.submit(request(name, prompt))
    engine.cancel(handle)
    while not again.done:
        engine.step()
    assert again.outputs[0].text == prompt.answer
    assert idle(toy)


def test_a_request_fails_where_all_slots_are_held_elsewhere(toy):
    for name in ("rotate", "shout"):
        toy.acquire_adapter(name)
    engine = Engine(toy, max_total_seq_len=ROOM)
    stuck = engine.submit(request(*made_prompts(1, ["down"])[0]))
    held = engine.submit(request(*made_prompts(1, ["rotate"])[0]))
    while not engine.idle:
        engine.step()
    assert "adapter 'down': found every slot held outside the engine" in str(stuck.error)
    assert held.outputs[0].text
    for name in ("rotate", "shout"):
        toy.release_adapter(name)
    assert idle(toy)


def test_none_is_preempted_for_one_that_finds_no_pages(toy):
    """A slot could be had, from one of lower priority, but pages could not."""
    engine = Engine(toy, max_total_seq_len=16 * 40, prefix_cache=False)
    long = [5] * (16 * 29 - 30)
    engine.submit(Request(long, SamplingParams(temperature=0, max_tokens=24), priority=1))
    for name in ("rotate", "shout"):
        engine.submit(request(*made_prompts(1, [name])[0]))
    engine.step()
    assert len(engine._scheduler.running) == 3
    params = SamplingParams(temperature=0, max_tokens=4)
    urgent = engine.submit(Request([6] * 16 * 19, params, adapter="down", priority=1))
    engine.step()
    assert engine.metrics().preemptions == 0
    while not engine.idle:
        engine.step()
    assert urgent.outputs[0].token_ids
    assert idle(toy)


def test_none_is_preempted_in_vain(toy):
    """Equals of the newcomer use both adapters too: sending the lower ones back frees no slot."""
    engine = Engine(toy, max_total_seq_len=ROOM)
    for name in ("rotate", "shout"):
        prompt = made_prompts(1, [name])[0]
        engine.submit(request(*prompt, priority=1))
        engine.submit(request(*prompt))
    engine.step()
    urgent = engine.submit(request(*made_prompts(1, ["down"])[0], priority=1))
    engine.step()
    assert engine.metrics().preemptions == 0
    while not engine.idle:
        engine.step()
    assert urgent.outputs[0].text
    assert idle(toy)


def test_a_higher_priority_takes_a_slot(toy):
    engine = Engine(toy, max_total_seq_len=ROOM)
    for name in ("rotate", "shout"):
        engine.submit(request(*made_prompts(1, [name])[0]))
    engine.step()
    urgent = engine.submit(request(*made_prompts(1, ["down"])[0], priority=1))
    engine.step()
    assert engine.metrics().preemptions == 1
    assert urgent in [sequence.handle for sequence in engine._scheduler.running]
    assert not [s for s in engine._scheduler.running if s.handle.adapter.name == "shout"]
    while not engine.idle:
        engine.step()
    assert idle(toy)


def test_unknown_adapters_are_refused(toy, tmp_path):
    engine = Engine(toy, max_total_seq_len=ROOM)
    with pytest.raises(AdapterError, match="adapter 'nobody': not loaded; accepted: rotate"):
        engine.submit(Request([5], GREEDY, adapter="nobody"))
    assert engine.idle
    with pytest.raises(InputError, match="adapter: found 5; accepted: a name, or None"):
        Request([5], GREEDY, adapter=5)
    phi3c.compile(TOY / "checkpoint", output=tmp_path / "plain")
    plain = Engine(phi3c.load(tmp_path / "plain"), max_total_seq_len=ROOM)
    with pytest.raises(AdapterError, match="compiled with max_loras 0; accepted: with max_loras 1"):
        plain.submit(Request([5], GREEDY, adapter="rotate"))


def test_generate(tmp_path, capsys, monkeypatch):
    """A checkpoint is compiled with a slot for each adapter; an artifact must have them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = str(TOY / "checkpoint")
    rotate, down = (f"{name}={TOY / 'adapters' / name}" for name in ("rotate", "down"))
    argv = ["generate", checkpoint, "--quiet", "--quantization", "q0f32", "--max-rank", "32"]
    assert main([*argv, "-p", "rotate planet", "--adapter", rotate]) == 0
    assert capsys.readouterr().out == "lanetp\n"
    assert main([*argv, "-p", "down 52917", "--adapter", rotate, "--adapter", down]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rotate: ") and lines[1] == "down: 97521"
    assert main([*argv, "-p", "down 52917", "--adapter", rotate, "--adapter", down, "--json"]) == 0
    one, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["adapter"], other["adapter"], other["text"]) == ("rotate", "down", "97521")
    argv = ["generate", checkpoint, "--quiet", "-p", "x", "--adapter", down]
    assert main([*argv, "--max-rank", "16"]) == 2  # before anything is compiled
    assert "rank 20" in capsys.readouterr().err
    assert main([*argv[:-3], "down 52917", "--adapter", down]) == 0
    assert capsys.readouterr().out == "97521\n"


def test_answers_together(toy):
    """In one batch, each as alone; closing one leaves the others."""
    requests = [request(*made_prompts(1, [name])[0]) for name in ("rotate", "shout")]
    alone = [texts(run(Engine(toy), [one]))[0][0] for one in requests]
    engine = Engine(toy)
    steps = [run_steps(Engine(toy), one) for one in requests]
    batch = answers_together(engine, requests)
    assert ["".join(answer) for answer in batch] == alone
    assert engine.metrics().steps == max(steps) < sum(steps)
    assert all(answer.decode_seconds > 0 < answer.prefill_seconds for answer in batch)
    first, second = answers_together(engine, requests)
    first.close()
    assert "".join(second) == alone[1]
    with pytest.raises(AdapterError):
        answers_together(engine, [requests[0], replace(requests[0], adapter="nobody")])
    assert engine.idle and idle(toy)


def run_steps(engine: Engine, one: Request) -> int:
    run(engine, [one])
    return engine.metrics().steps


def test_generate_reads_adapters_before_it_compiles(tmp_path, capsys, monkeypatch):
    """Also of what has no checkpoint folder, which is compiled first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    converted = phi3c.convert(TOY / "checkpoint", output=tmp_path / "w", quantization="q0f32")
    argv = ["generate", str(converted.path), "--quiet", "--quantization", "q0f32"]
    argv += ["-p", "down 52917", "--adapter"]
    assert main([*argv, "x=/nowhere"]) == 2
    assert "/nowhere: no such folder" in capsys.readouterr().err
    assert main([*argv, f"x={TOY / 'adapters' / 'down'}", "--max-loras", "0"]) == 2
    assert "--max-loras: found 0; accepted: 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert main([*argv, f"x={TOY / 'adapters' / 'down'}"]) == 0
    assert capsys.readouterr().out == "97521\n"


@pytest.mark.parametrize(
    "adapters, message",
    [
        (["rotate"], "--adapter: found 'rotate'; accepted: NAME=PATH"),
        (["=x"], "--adapter: found '=x'; accepted: NAME=PATH"),
        (["a=x", "a=y"], "--adapter: found 'a' twice; accepted: a name for each"),
    ],
)
def test_generate_refuses(adapters, message, capsys):
    argv = ["generate", "no/model", "-p", "x"]
    assert main([*argv, *(word for given in adapters for word in ("--adapter", given))]) == 2
    assert message in capsys.readouterr().err
