"""What a config becomes on each kind of target: a table of targets and schemes, without weights.

python benchmarks/targets.py configs/phi-3-mini-4k.json --schemes q4f16_1 q0f16
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from phi3c.compiler import compile_library
from phi3c.config import Phi3Config
from phi3c.errors import Phi3CError
from phi3c.linker import find_linker
from phi3c.manifest import Limits
from phi3c.quantization.scheme import parse_scheme
from phi3c.targets import parse_target

TARGETS = ("cpu", "cuda:sm_80", "cuda:sm_90", "vulkan", "metal")
HEAD = ("target", "scheme", "lowers", "links", "kernels", "threads", "shared", "library", "seconds")


def row(config: Phi3Config, target: str, quantization: str) -> list[str]:
    """One line of the table; shared memory and library in KiB."""
    found = [target, quantization]
    try:
        place = parse_target(target)
        scheme = parse_scheme(quantization)
        links = _links(place)
        limits = Limits(8, min(4096, config.max_position_embeddings), 512)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / ("model.so" if links else "model.tar")
            start = time.perf_counter()
            needs = compile_library(config, scheme, place, limits, library).needs
            seconds = time.perf_counter() - start
            size = library.stat().st_size
    except Phi3CError as error:
        return [*found, f"no: {error}"]
    found += ["yes", "yes" if links else "no"]
    if needs is None:
        found += ["", "", ""]
    else:
        found += [str(needs.kernels), str(needs.threads), f"{needs.shared_bytes / 1024:.0f}"]
    return [*found, f"{size / 1024:.0f}", f"{seconds:.1f}"]


def _links(place) -> bool:
    try:
        find_linker(place)
    except Phi3CError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--schemes", nargs="+", default=["q4f16_1", "q0f16"])
    args = parser.parse_args()
    config = Phi3Config.from_file(args.config)
    print(" | ".join(HEAD))
    for target in args.targets:
        for scheme in args.schemes:
            print(" | ".join(row(config, target, scheme)), flush=True)


if __name__ == "__main__":
    main()
