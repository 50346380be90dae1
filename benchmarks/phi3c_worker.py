"""phi3c behind a pipe, for against_llama.py: a line of work in, a line of seconds out."""

from __future__ import annotations

import json
import sys
import time

import phi3c
from phi3c.bench.machine import peak_memory
from phi3c.bench.workloads import Work, seconds


def main() -> None:
    start = time.perf_counter()
    model = phi3c.load(sys.argv[1], threads=int(sys.argv[2]))
    print(json.dumps({"load_seconds": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        if work is None:
            print(json.dumps({"peak": peak_memory()["peak"]}), flush=True)
        else:
            samples = work.pop("samples")
            print(json.dumps({"seconds": seconds(model, Work(**work), samples)}), flush=True)


if __name__ == "__main__":
    main()
