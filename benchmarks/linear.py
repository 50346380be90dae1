"""Speed of one linear by number of rows, on weights that are not in a cache.

python benchmarks/linear.py 3072x8192 --weights q4 --rows 1,8,128 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import tvm

from phi3c.bench.kernel import load_kernel
from phi3c.kernels.cpu import CpuKernels
from phi3c.kernels.weight_format import GroupFormat
from phi3c.quantization.group import GroupQuantization
from phi3c.runtime.threads import physical_cores
from phi3c.targets import parse_target

COLD_BYTES = 1e9  # of copies that are used in turn: more than any cache
SECONDS = 1.2
BITS = {"q3": 3, "q4": 4, "q8": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", help="OUTxIN")
    parser.add_argument("--rows", default="1,2,4,8,16,64,128")
    parser.add_argument("--weights", choices=[*BITS, "float16", "float32"], default="q4")
    parser.add_argument("--float", action="store_true", help="activations stay float32")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--warm", action="store_true", help="one copy of the weights")
    args = parser.parse_args()
    out_features, in_features = map(int, args.shape.split("x"))
    place = parse_target("cpu")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((out_features, in_features), dtype=np.float32)
    quantize = None
    if bits := BITS.get(args.weights):
        quantization = GroupQuantization(bits, 32, "float16")
        form = GroupFormat(bits, quantization.zero, "float16")
        packed = place.kernels.pack_groups(*quantization.quantize(weight), bits)
    else:
        form = args.weights
        packed = [place.kernels.pack_weight(weight.astype(form))]
    if args.float or not bits:
        kernel = place.kernels.linear(out_features, in_features, form, False)
    else:
        kernel = place.kernels.int8_linear(out_features, in_features, form, False)
        rounding = place.kernels.quantize_rows(in_features, form.zero)
        quantize = load_kernel(rounding, place, args.threads)
    linear = load_kernel(kernel, place, args.threads)
    size = sum(array.nbytes for array in packed)
    copies = 1 if args.warm else max(2, int(COLD_BYTES // size))
    weights = [[tvm.runtime.tensor(array) for array in packed] for _ in range(copies)]
    for rows in map(int, args.rows.split(",")):
        x = rng.standard_normal((rows, in_features), dtype=np.float32)
        inputs = quantized(quantize, place.kernels, x) if quantize else tvm.runtime.tensor(x)
        out = tvm.runtime.tensor(np.zeros((rows, out_features), np.float32))
        found: list[float] = []
        while sum(found) < SECONDS or len(found) < 5:
            start = time.perf_counter()
            linear(inputs, *weights[len(found) % copies], out)
            found.append(time.perf_counter() - start)
        median = statistics.median(found[1:])
        rate = 2 * rows * out_features * in_features / 1e9
        print(
            f"{rows:5} rows {median * 1e6:9.0f} us {rate / median:7.0f} Gop/s "
            f"({rate / max(found):.0f}–{rate / min(found):.0f}) {size / median / 1e9:6.1f} GB/s"
        )


def quantized(quantize, kernels: CpuKernels, x: np.ndarray) -> tvm.runtime.Tensor:
    rows, groups = x.shape[0], x.shape[1] // 32
    made = tvm.runtime.tensor(np.zeros((rows, groups, kernels.int8_words), np.int32))
    quantize(tvm.runtime.tensor(x), made)
    return made


if __name__ == "__main__":
    main()
