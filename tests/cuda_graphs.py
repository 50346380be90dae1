"""Run as a program that sees a stub of NVIDIA's driver, with an artifact and perhaps an adapter:
decode steps as CUDA graphs against the same steps launched kernel by kernel."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import phi3c
from phi3c.cuda import graph
from phi3c.runtime.compiled import CompiledPhi3

PROMPT = [int(t) for t in np.random.default_rng(5).integers(3, 60, 30)]


def stub(name: str) -> ctypes.c_int:
    """A counter of the stub's."""
    return ctypes.c_int.in_dll(ctypes.CDLL("libcuda.so.1"), f"stub_{name}")


def launches() -> tuple[int, int]:
    """(kernels one by one, graphs) until now."""
    return stub("kernels").value, stub("graph_launches").value


class Steps:
    """A cache with a sequence 0, and what its forwards returned."""

    def __init__(self, model: CompiledPhi3, **options):
        self.model, self.rows = model, []
        self.cache = model.create_paged_kv_cache(max_total_seq_len=512, **options)
        self.forward(model.prefill, [0], PROMPT[:18])

    def forward(self, run, ids, tokens, slots=None):
        """Tokens are the sequences' own, as many of each; sequences that are not there begin."""
        for i in ids:
            try:
                self.cache.sequence_length(i)
            except phi3c.errors.SequenceError:
                self.cache.add_sequence(i)
        with self.cache.forward(ids, [len(tokens) // len(ids)] * len(ids), token_slot=slots):
            found = run(self.model.embed(tokens), self.cache)[0]
        self.rows.append(found.numpy())
        return found


def workout(model: CompiledPhi3, slot: int | None) -> tuple[list[np.ndarray], int]:
    """What each forward returned, and how many were decode steps: their context, batch, sequences
    and adapters change, with prefills among them."""
    steps = Steps(model)
    decode, batch = model.decode, model.batch_decode
    held = []
    for token in PROMPT[18:21]:
        held.append(steps.forward(decode, [0], [token]))
    held.append(steps.forward(model.prefill, [2], PROMPT[:20]))  # works in other memory
    held.append(steps.forward(model.prefill, [0], PROMPT[:12]))
    for token in PROMPT[21:24]:
        held.append(steps.forward(decode, [0], [token]))  # a third block
    steps.cache.fork_sequence(0, 1)
    for ids in ([0, 1], [1, 0], [1, 2]):
        held.append(steps.forward(batch, ids, [7, 8]))
    steps.cache.popn(1, 9)
    held.append(steps.forward(batch, [2, 1], [13, 14]))
    for token in (15, 16):
        held.append(steps.forward(model.decode_to_last_hidden_states, [2], [token]))
    if slot is not None:
        for slots in ([slot, -1], [-1, slot]):
            held.append(steps.forward(batch, [0, 1], [15, 16], slots))
    for tensor, then in zip(held, steps.rows[1:], strict=True):
        assert np.array_equal(tensor.numpy(), then)  # what is held stays as it was
    return steps.rows, len(held) - 2


def check_equal(model: CompiledPhi3, slot: int | None) -> None:
    graphs = model.decode_graphs
    before = launches()
    with graphs.paused():
        expected, steps = workout(model, slot)
    between = launches()
    assert between[1] == before[1] and graphs.captures == 0
    found, _ = workout(model, slot)
    assert graphs.failure is None
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    # Decoding with 2 and with 4 blocks, the batch with 8, without the head, with adapters; the step
    # after popn has 4 blocks, and stays the only one.
    captures = 4 + (slot is not None)
    assert graphs.captures == captures
    assert launches()[1] - between[1] == steps - (captures + 1)


def check_one_launch(model: CompiledPhi3) -> None:
    """A step is embed's kernel and a graph."""
    steps = Steps(model)
    counts = []
    for token in (5, 6, 7):
        before = launches()
        steps.forward(model.decode, [0], [token])
        counts.append(tuple(now - then for now, then in zip(launches(), before, strict=True)))
    # Embedding, rope, head; of a layer: qkv, rope, attention's two, o, gate and up, down.
    assert counts[0][0] == 3 + 7 * model.manifest.kv_layout.layers
    print(f"(kernels, graphs) of a step when its shapes come first, and then: {counts}")
    assert counts[0][1] == 0 and counts[1] == (2 * counts[0][0] - 1, 1) and counts[2] == (1, 1)


def check_bounds(folder: Path) -> None:
    """Graphs are few, and go with their cache and with the model."""
    graph.MOST_GRAPHS = 2  # this program's last checks
    model = phi3c.load(folder)
    steps = Steps(model)
    functions = (model.decode, model.batch_decode, model.decode_to_last_hidden_states)
    for run in functions:
        for token in (5, 6):
            steps.forward(run, [0], [token])
        assert stub("graphs").value <= 2
    assert model.decode_graphs.captures == 3 and stub("graphs").value == 2
    before = launches()
    steps.forward(functions[0], [0], [7])  # the first one went, and is made again
    assert launches()[1] == before[1] + 1 and model.decode_graphs.captures == 4
    with model.kernel_times() as times:
        steps.forward(model.decode, [0], [8])
    assert launches()[1] == before[1] + 1 and sum(time.count for time in times.values()) > 20
    other = Steps(model)
    for token in (5, 6):
        other.forward(model.decode, [0], [token])
    assert stub("graphs").value == 3
    del steps
    gc.collect()
    assert stub("graphs").value == 1
    graph.MOST_BYTES = 1
    for token in (5, 6):
        other.forward(model.batch_decode, [0], [token])
    assert stub("graphs").value == 1  # the new one
    del other, model, functions, run
    gc.collect()
    assert stub("graphs").value == 0 == stub("streams").value


@contextmanager
def capturable(kernels: int):
    before = stub("capturable").value
    stub("capturable").value = kernels
    yield
    stub("capturable").value = before


def check_failure(folder: Path) -> None:
    """A driver that cannot capture, and a capture that fails half way: quiet, and for good."""
    for kernels in 0, 5:
        model = phi3c.load(folder)
        steps = Steps(model)
        with capturable(kernels):
            for token in (5, 6):
                steps.forward(model.decode, [0], [token])
        before = launches()
        steps.forward(model.decode, [0], [7])
        assert launches()[1] == before[1] and model.decode_graphs.captures == 0
        assert "CUDA" in model.decode_graphs.failure and "\n" not in model.decode_graphs.failure
        assert stub("graphs").value == 0 == stub("streams").value
        expected = Steps(model)
        for token in (5, 6, 7):
            expected.forward(model.decode, [0], [token])
        assert all(np.array_equal(a, b) for a, b in zip(steps.rows, expected.rows, strict=True))


def check_pages(model: CompiledPhi3) -> None:
    """Pages that are longer than a context: no more blocks are listed than planned for."""
    steps = Steps(model, page_size=256)
    with steps.cache.forward([0], [1]):
        assert steps.cache.forward_inputs()["block_ids"].size == 2


if __name__ == "__main__":
    folder, *adapter = map(Path, sys.argv[1:])
    graph._FEWEST_BLOCKS = 2  # short contexts: idle parts and new graphs as in long ones
    model = phi3c.load(folder)
    slot = None
    if adapter:
        model.load_adapter(adapter[0], "one")
        slot = model.acquire_adapter("one")
    check_equal(model, slot)
    check_one_launch(model)
    check_pages(model)
    del model
    gc.collect()
    if not adapter:
        check_bounds(folder)
        check_failure(folder)
