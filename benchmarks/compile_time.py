"""Compile time and library size of a config, without weights.

python benchmarks/compile_time.py configs/phi-3-mini-4k.json --quantization q0f16
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

from phi3c.adapters.layout import AdapterLayout
from phi3c.compiler import compile_library
from phi3c.config import Phi3Config
from phi3c.manifest import Limits
from phi3c.packing import parameter_specs
from phi3c.quantization.scheme import parse_scheme
from phi3c.targets import parse_target
from phi3c.tensor_file import tensor_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--quantization", default="q0f16")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--max-loras", type=int, default=0)
    parser.add_argument("--max-rank", type=int, default=16)
    args = parser.parse_args()
    place = parse_target(args.target)
    scheme = parse_scheme(args.quantization).on(place.device)
    for path in args.configs:
        config = Phi3Config.from_file(path)
        specs = parameter_specs(config, scheme, place.kernels)
        layout = AdapterLayout.of(config, args.max_loras, args.max_rank, scheme.kv_dtype)
        limits = Limits(8, min(4096, config.max_position_embeddings), 512)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "model.so"
            start = time.perf_counter()
            made = compile_library(config, scheme, place, limits, library, layout)
            seconds = time.perf_counter() - start
            result = {
                "config": path.name,
                "quantization": scheme.name,
                "max_loras": args.max_loras,
                "layers": config.num_hidden_layers,
                "functions": len(made.spec.method_names),
                "seconds": round(seconds, 2),
                "library_bytes": library.stat().st_size,
                "parameter_bytes": sum(tensor_bytes(*spec[1:]) for spec in specs),
                "target": place.name,
                "kernels": None if made.needs is None else made.needs.kernels,
                "cpu": place.mcpu,
                "cores": os.cpu_count(),
                "python": platform.python_version(),
            }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
