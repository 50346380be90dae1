"""Run as a program, with an artifact and a file to write: logits of a prompt in chunks, of decoding
steps alone and in a batch, of a tree of drafts, with and without adapters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tvm_ffi

import phi3c
from phi3c.runtime.logit_row import LogitRow

PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 60, 21)]


def logits(folder: Path, adapters: Sequence[Path]) -> np.ndarray:
    """`[rows, vocab]`. Sequences take the adapters in turn."""
    model = phi3c.load(folder)
    cache = model.create_paged_kv_cache(max_total_seq_len=128)
    for adapter in adapters:
        model.load_adapter(adapter, adapter.name)
    slots = [model.acquire_adapter(adapter.name) for adapter in adapters]
    rows = []

    def forward(run, ids, tokens, lengths, *more, plain=(), **options):
        """plain: sequences without an adapter."""
        if slots:
            of = [-1 if i in plain else slots[i % len(slots)] for i in ids]
            options["token_slot"] = np.repeat(of, lengths)
        with cache.forward(ids, lengths, **options):
            tensor = run(model.embed(tokens), *more, cache)[0]
        found = tensor.numpy().reshape(-1, tensor.shape[-1])
        rows.extend(found)
        check_rows(model.logit_rows(tensor, [False] * len(found)), found)

    cache.add_sequence(0)
    forward(model.prefill, [0], PROMPT[:18], [18])
    forward(model.prefill, [0], PROMPT[18:20], [2])
    forward(model.decode, [0], PROMPT[20:], [1])
    cache.fork_sequence(0, 1)
    cache.add_sequence(2)
    ends = np.array([0, 4])
    forward(model.batch_prefill, [1, 2], [7, *PROMPT[:4]], [1, 4], ends)
    forward(model.batch_decode, [0, 1, 2], [5, 6, 7], [1, 1, 1])
    forward(model.batch_verify, [2], [40, 41, 42, 43], [4], tree_parents=[-1, 0, 0, 2])
    cache.commit_accepted_token_tree_nodes([2], [3])
    forward(model.batch_decode, [0, 2], [8, 9], [1, 1], plain=[2])
    return np.array(rows)


def check_rows(rows: list[LogitRow], expected: np.ndarray) -> None:
    """What a sampler looks into, against the logits."""
    for row, logits in zip(rows, expected, strict=True):
        assert row.argmax() == logits.argmax()
        np.testing.assert_array_equal(row.tops, LogitRow(logits).tops)
        np.testing.assert_array_equal(row.logits, logits)


def _refuse(source):
    raise AssertionError("compiled when it is loaded")


if __name__ == "__main__":
    import tvm  # noqa: F401 (registers the function that is replaced)

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", _refuse, override=True)
    artifact, target, *adapters = map(Path, sys.argv[1:])
    np.save(target, logits(artifact, adapters))
