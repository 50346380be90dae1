"""Adapters from files in a compiled model: every row against transformers with PEFT's deltas."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyModel
from test_adapter_files import SPLIT, merged_by_peft, save_adapter

import phi3c
from phi3c.adapters.layout import TARGETS
from phi3c.errors import AdapterError, AdapterInUseError, InputError

SLOTS = dict(max_loras=2, max_rank=16, max_batch_size=4, prefill_chunk_size=64)
ADAPTERS = {
    "four": dict(r=4, lora_alpha=8, target_modules=list(TARGETS)),
    "sixteen": dict(r=16, lora_alpha=8, use_rslora=True, target_modules=list(TARGETS)),
    "split": dict(r=5, lora_alpha=9, target_modules=SPLIT),
    "one-layer": dict(r=3, lora_alpha=6, target_modules=["o_proj"], layers_to_transform=[1]),
}


@dataclass(frozen=True)
class Loaded:
    """base: a model whose artifact has slots; with_adapter: the same with the weights of one."""

    base: TinyModel
    folders: dict[str, Path]
    with_adapter: dict[str | None, TinyModel]

    @property
    def model(self) -> phi3c.CompiledPhi3:
        return self.base.compiled


@pytest.fixture(scope="module")
def adapters(build_model, tmp_path_factory) -> Loaded:
    base = build_model("adapter-files", compile_options=tuple(SLOTS.items()))
    tmp = tmp_path_factory.mktemp("adapter-files")
    folders, oracles = {}, {None: base}
    for seed, (name, lora) in enumerate(ADAPTERS.items()):
        save_adapter(tmp / name, seed=seed, **lora)
        oracle = merged_by_peft(base.folder, tmp / name, split=lora["target_modules"] is SPLIT)
        folders[name], oracles[name] = tmp / name, replace(base, oracle=oracle)
    return Loaded(base, folders, oracles)


@pytest.fixture
def model(adapters) -> phi3c.CompiledPhi3:
    """Without any adapter loaded."""
    for adapter in adapters.model.adapters():
        while True:  # what a test that failed has left
            try:
                adapters.model.release_adapter(adapter.name)
            except AdapterError:
                break
        adapters.model.unload_adapter(adapter.name)
    return adapters.model


def ids_of(row: int) -> list[int]:
    return np.random.default_rng(row).integers(0, 199, 5 + row).tolist()


def check(adapters: Loaded, names: list[str | None], slots: list[int]) -> None:
    """One batch, a prompt and two steps, each row of which has an adapter."""
    model = adapters.model
    cache = model.create_paged_kv_cache(max_total_seq_len=256)
    texts = [ids_of(row) for row in range(len(names))]
    for row in range(len(names)):
        cache.add_sequence(row)
    rows = list(range(len(names)))
    lengths = [len(ids) for ids in texts]
    token_slot = np.repeat(slots, lengths)
    with cache.forward(rows, lengths, token_slot=token_slot):
        last = np.cumsum(lengths) - 1
        logits = model.batch_prefill(model.embed(np.concatenate(texts)), last, cache)[0].numpy()[0]
    for _ in range(2):
        for row, name in enumerate(names):
            oracle = adapters.with_adapter[name]
            oracle.check(logits[row], oracle.last_logits(texts[row]))
            texts[row].append(int(logits[row].argmax()))
        with cache.forward(rows, [1] * len(rows), token_slot=slots):
            embed = model.embed([ids[-1] for ids in texts])
            logits = model.batch_decode(embed, cache)[0].numpy()[:, 0]


def test_a_mixed_batch(adapters, model):
    model.load_adapter(adapters.folders["sixteen"], "a")
    model.load_adapter(adapters.folders["split"], "b")
    slots = [model.acquire_adapter("a"), model.acquire_adapter("b")]
    check(adapters, ["sixteen", None, "split", "sixteen"], [slots[0], -1, slots[1], slots[0]])


def test_more_adapters_than_slots(adapters, model):
    for name, folder in adapters.folders.items():
        model.load_adapter(folder, name)
    assert [adapter.rank for adapter in model.adapters()] == [4, 16, 15, 3]
    # Each in turn, larger ones before smaller ones, so that nothing of them may be left.
    for name in ("sixteen", "split", "four", "one-layer", "sixteen"):
        slot = model.acquire_adapter(name)
        check(adapters, [name, None], [slot, -1])
        model.release_adapter(name)
    slots = [model.acquire_adapter(name) for name in ("four", "one-layer")]
    assert model.acquire_adapter("split") is None
    check(adapters, ["four", "one-layer"], slots)
    with pytest.raises(AdapterInUseError, match="'four': found 1 request"):
        model.unload_adapter("four")


def test_unloaded_and_loaded_again_under_another_name(adapters, model):
    first = model.load_adapter(adapters.folders["four"], "a")
    check(adapters, ["four"], [model.acquire_adapter("a")])
    model.release_adapter("a")
    model.unload_adapter("a")
    with pytest.raises(InputError, match="token_slot: found 0, an empty slot; accepted: slots of"):
        check(adapters, [None], [0])
    again = model.load_adapter(adapters.folders["four"], "b")
    other = model.load_adapter(adapters.folders["one-layer"], "a")
    assert first.digest == again.digest != other.digest
    assert len({first.generation, again.generation, other.generation}) == 3
    slots = [model.acquire_adapter("a"), model.acquire_adapter("b")]
    check(adapters, ["one-layer", "four"], slots)


def test_an_adapter_that_does_not_fit_changes_nothing(adapters, model, tmp_path):
    model.load_adapter(adapters.folders["four"], "a")
    slot = model.acquire_adapter("a")
    save_adapter(tmp_path, r=6, target_modules=SPLIT)
    with pytest.raises(AdapterError, match=r"rank 18 \(q_proj 6 \+ .*; accepted: up to 16 \(max_r"):
        model.load_adapter(tmp_path, "b")
    assert [adapter.name for adapter in model.adapters()] == ["a"]
    check(adapters, ["four"], [slot])


def test_loading_beside_forwards(adapters, model):
    """Another thread loads and unloads all the while; rows stay those of their adapters."""
    model.load_adapter(adapters.folders["four"], "a")
    slot, errors, stop = model.acquire_adapter("a"), [], threading.Event()

    def load_others() -> None:
        try:
            while not stop.is_set():
                for name, folder in adapters.folders.items():
                    model.load_adapter(folder, name)
                    model.unload_adapter(name)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=load_others)
    thread.start()
    try:
        model.load_adapter(adapters.folders["sixteen"], "b")
        for _ in range(3):
            check(adapters, ["four", "sixteen"], [slot, model.acquire_adapter("b")])
            model.release_adapter("b")
    finally:
        stop.set()
        thread.join()
    assert not errors
