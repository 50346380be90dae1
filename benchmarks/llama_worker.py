"""llama.cpp behind a pipe, for against_llama.py: a line of work in, a line of seconds out.

Needs the extra `bench`: llama-cpp-python, built on this machine.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import llama_cpp as llama


@llama.llama_log_callback
def _silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


class Model:
    """One context with room for 8 sequences."""

    def __init__(self, path: str, threads: int):
        llama.llama_log_set(_silent, None)
        llama.llama_backend_init()
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 0
        start = time.perf_counter()
        self._model = llama.llama_model_load_from_file(path.encode(), options)
        context = llama.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max = 4096, 2048, 512, 8
        context.n_threads = context.n_threads_batch = threads
        if hasattr(context, "kv_unified"):
            context.kv_unified = True
        self._context = llama.llama_init_from_model(self._model, context)
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(2048, 0, 1)
        self.load_seconds = time.perf_counter() - start

    def seconds(self, batch: int, context: int, new: int, samples: int) -> list[float]:
        """As phi3c.bench.workloads.seconds: of `samples` runs, after one that is not counted."""
        llama.llama_memory_clear(self._memory, True)
        for sequence in range(batch):
            for start in range(0, context, 512):
                end = min(start + 512, context)
                self._run([(sequence, p) for p in range(start, end)], [])
        found = []
        for step in range(samples + 1):
            if new > 1:
                llama.llama_memory_clear(self._memory, True)
                places = [(0, p) for p in range(new)]
                found.append(self._run(places, [new - 1]))
            else:
                places = [(sequence, context + step) for sequence in range(batch)]
                found.append(self._run(places, list(range(batch))))
        return found[1:]

    def _run(self, places: list[tuple[int, int]], wanted: list[int]) -> float:
        """places: sequence and position of each token; wanted: which give logits."""
        batch = self._batch
        batch.n_tokens = len(places)
        for i, (sequence, position) in enumerate(places):
            batch.token[i] = 300 + (7919 * position + sequence) % 30000
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i in wanted
        start = time.perf_counter()
        status = llama.llama_decode(self._context, batch)
        llama.llama_synchronize(self._context)
        assert status == 0, status
        return time.perf_counter() - start


def peak_bytes() -> int:
    """The most memory that was resident."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    model = Model(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"load_seconds": model.load_seconds}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        if work is None:
            print(json.dumps({"peak": peak_bytes()}), flush=True)
        else:
            print(json.dumps({"seconds": model.seconds(**work)}), flush=True)


if __name__ == "__main__":
    main()
