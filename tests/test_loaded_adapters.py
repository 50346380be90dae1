"""Adapters that are loaded, swapped and dropped while others are in use."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from test_adapter_files import CONFIG, KEY, SPLIT, put, rewrite, save_adapter

from phi3c.adapters.layout import TARGETS, AdapterLayout
from phi3c.adapters.packed import PackedAdapter, pack_adapter
from phi3c.adapters.peft_files import read_adapter
from phi3c.adapters.weights import AdapterWeights, LowRank
from phi3c.errors import AdapterError, AdapterInUseError
from phi3c.runtime.loaded_adapters import Adapter, LoadedAdapters


class Slots:
    """Pools that remember what was written."""

    def __init__(self) -> None:
        self.written: list[tuple[int, PackedAdapter]] = []
        self.cleared: list[int] = []

    def clear(self, slot: int) -> None:
        self.cleared.append(slot)

    def write_packed(self, slot: int, adapter: PackedAdapter) -> None:
        self.written.append((slot, adapter))


def made(max_loras: int, dtype: str = "float32") -> tuple[LoadedAdapters, Slots]:
    pools = Slots()
    layout = AdapterLayout.of(CONFIG, max_loras, 8, dtype)
    return LoadedAdapters(CONFIG, layout, pools), pools


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Adapters of ranks 1, 2, 3."""
    tmp = tmp_path_factory.mktemp("adapters")
    for rank in (1, 2, 3):
        save_adapter(tmp / str(rank), seed=rank, r=rank, target_modules=list(TARGETS))
    return [tmp / str(rank) for rank in (1, 2, 3)]


# What is kept


@pytest.mark.parametrize("dtype, error", [("float32", 1e-7), ("float16", 1e-3)])
def test_an_adapter_is_packed_as_it_is(dtype, error, folders):
    weights = read_adapter(folders[2], CONFIG)
    packed = pack_adapter(weights, dtype)
    assert packed.rank == 3 and list(packed.pairs) == list(weights.low_rank)
    for key, (a, panels) in packed.pairs.items():
        low_rank = weights.low_rank[key]
        assert a.dtype == panels.dtype == dtype and panels.shape[1:] == (3, 16)
        b = panels.swapaxes(1, 2).reshape(-1, 3)[: len(low_rank.b)]
        delta = low_rank.b @ low_rank.a
        found = b.astype("f4") @ a.astype("f4")
        assert np.abs(found - delta).max() <= error * np.abs(delta).max()


def low_rank(a: list, b: list) -> AdapterWeights:
    """Of two ranks, one output row each."""
    columns = np.zeros((128, 2), np.float32)
    columns[:2] = np.diag(b)
    rows = np.outer(a, np.ones(64)).astype(np.float32)
    return AdapterWeights(2, {(0, "qkv_proj"): LowRank(rows, columns)}, "")


@pytest.mark.parametrize(
    "a, b", [([1, 3], [1e-7, 3e-7]), ([1e-6, 2], [3e5, 1e-9]), ([0, 1], [1, 0])]
)
def test_small_and_large_values_keep_their_bits_in_float16(a, b):
    pair = pack_adapter(low_rank(a, b), "float16").pairs[0, "qkv_proj"]
    rows, columns = pair[0].astype("f8")[:, 0], pair[1].astype("f8")[0, [0, 1], [0, 1]]
    np.testing.assert_allclose(rows * columns, np.multiply(a, b), rtol=1e-3, atol=0)


def test_values_beyond_float16(tmp_path, folders):
    weights = low_rank([1e5, 1], [1e5, 1])
    with pytest.raises(AdapterError, match="layer 0: qkv_proj: found values beyond float16"):
        pack_adapter(weights, "float16")
    pack_adapter(weights, "float32")
    save_adapter(tmp_path, r=4, target_modules=["qkv_proj"])
    for side, shape in (("A", (4, 64)), ("B", (128, 4))):
        rewrite(tmp_path, put(KEY.format(side), np.full(shape, 1e6, np.float32)))
    adapters, _ = made(1, "float16")
    with pytest.raises(AdapterError, match=f"{tmp_path}: layer 0: qkv_proj: found values beyond"):
        adapters.load(tmp_path, "a")
    assert not adapters.adapters()


# Loading and swapping


def test_what_a_loaded_adapter_says_of_itself(tmp_path):
    save_adapter(tmp_path, r=2, target_modules=["v_proj", "down_proj"], layers_to_transform=[1])
    adapters, pools = made(2)
    found = adapters.load(str(tmp_path), "one", pinned=True)
    digest = read_adapter(tmp_path, CONFIG).digest
    size = 4 * 2 * (64 + 128 + 96 + 64)
    assert found == Adapter("one", 1, 2, True, size, (1,), ("qkv_proj", "down_proj"), digest)
    assert adapters.adapters() == [found] and not pools.written


def test_more_adapters_than_slots(folders):
    adapters, pools = made(2)
    for folder, name in zip(folders, "abc", strict=True):
        adapters.load(folder, name)
    assert adapters.acquire("a") == 0 and adapters.acquire("b") == 1
    assert adapters.acquire("c") is None
    adapters.release("a")
    assert adapters.acquire("c") == 0
    assert adapters.acquire("c") == 0  # a second request
    assert [(slot, adapter.rank) for slot, adapter in pools.written] == [(0, 1), (1, 2), (0, 3)]
    with pytest.raises(AdapterInUseError, match="'c': found 2 requests"):
        adapters.unload("c")


def test_a_failed_load_changes_nothing(folders, tmp_path):
    adapters, pools = made(1)
    first = adapters.load(folders[0], "a")
    save_adapter(tmp_path, r=4, target_modules=SPLIT)
    for source, name, found in (
        (tmp_path, "b", r"found rank 12 .* up to 8 \(max_rank\)"),
        (tmp_path / "no", "b", "no such folder"),
        (folders[1], "a", "loaded under this name"),
        (folders[1], "", "adapter name: found ''; accepted: a string"),
        (folders[1], None, "adapter name: found None"),
    ):
        with pytest.raises(AdapterError, match=found):
            adapters.load(source, name)
    assert adapters.adapters() == [first] and adapters.acquire("a") == 0
    adapters.release("a")
    adapters.unload("a")
    assert pools.cleared == [0]
    again = adapters.load(folders[0], "a")
    assert again.digest == first.digest and again.generation > first.generation


def test_a_slot_that_could_not_be_written_is_not_used(folders, monkeypatch):
    adapters, pools = made(1)
    adapters.load(folders[0], "a")

    def fail(slot, adapter):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pools, "write_packed", fail)
        with pytest.raises(KeyboardInterrupt):
            adapters.acquire("a")
    assert adapters.acquire("a") == 0 and len(pools.written) == 1
    adapters.release("a")
    adapters.unload("a")


def test_an_artifact_without_slots():
    adapters = LoadedAdapters(CONFIG, None, None)
    assert adapters.adapters() == []
    for call in (
        lambda: adapters.load("x", "a"),
        lambda: adapters.unload("a"),
        lambda: adapters.acquire("a"),
        lambda: adapters.release("a"),
        lambda: adapters.hold("a"),
    ):
        with pytest.raises(AdapterError, match="compiled with max_loras 0; accepted: with"):
            call()


def test_loading_beside_a_running_model(folders):
    """Threads load and unload; this one acquires and releases. A name that two load is one's."""
    adapters, pools = made(2)
    adapters.load(folders[0], "base")
    errors: list[Exception] = []
    lost: list[str] = []

    def load_and_unload(number: int) -> None:
        try:
            for turn in range(6):
                name = f"{number}-{turn}"
                loaded = adapters.load(folders[turn % 3], name)
                assert loaded in adapters.adapters()
                adapters.unload(name)
            try:
                adapters.load(folders[1], "shared")
            except AdapterError:
                lost.append("shared")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=load_and_unload, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        slot = adapters.acquire("base")
        assert slot == 0
        adapters.release("base")
    assert not errors and lost == ["shared"] * 2
    assert [adapter.name for adapter in adapters.adapters()] == ["base", "shared"]
    generations = [adapter.generation for adapter in adapters.adapters()]
    assert len(pools.written) == 1 and generations == sorted(set(generations))
