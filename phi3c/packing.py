"""A source's tensors → the parameter arrays of an artifact, in order, on all cores.

Tensors are read, quantized and laid out in blocks of rows that fit a core's cache, a few blocks
ahead of the one that is asked for, so that neither a tensor's float32 form nor the checkpoint is
ever whole in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from .config import Phi3Config
from .errors import SchemeError
from .kernels.family import Kernels
from .kernels.layout import PANEL
from .model.phi3 import Phi3ForCausalLM
from .quantization.group import GroupedRows, GroupQuantization
from .quantization.scheme import Scheme, cast
from .tensor_file import tensor_bytes
from .weights import Weights, checkpoint_shapes

_BLOCK_VALUES = 2**18  # 1 MiB as float32
Report = Callable[[int, int], None]  # (bytes of parameters made, bytes in all)
Spec = tuple[str, tuple[int, ...], str]  # name, shape, dtype
_Block = tuple[str, int, int]  # tensor, first row, one past the last


def parameter_specs(config: Phi3Config, scheme: Scheme, kernels: Kernels) -> list[Spec]:
    """The parameters of a model in the order of its functions' arguments.

    Raises SchemeError if the scheme's groups do not divide the model's dimensions.
    """
    for name, shape in checkpoint_shapes(config).items():
        kind = scheme.kind(name)
        if len(shape) == 2 and isinstance(kind, GroupQuantization):
            kind.check(name, shape[1])
    model = Phi3ForCausalLM(config, scheme, kernels)
    return [
        (name, tuple(int(extent) for extent in p.shape), p.dtype)
        for name, p in model.named_parameters()
    ]


def packed_parameters(
    specs: Sequence[Spec], weights: Weights, kernels: Kernels, scheme: Scheme, report: Report
) -> Iterator[np.ndarray]:
    """The arrays of `specs`. Raises CheckpointError, and SchemeError where a value does not fit."""
    tensors = [(name, list(group)) for name, group in groupby(specs, key=lambda s: _tensor(s[0]))]
    blocks = [block for name, _ in tensors for block in _blocks(name, weights.shapes[name])]
    done, total = 0, sum(tensor_bytes(shape, dtype) for _, shape, dtype in specs)
    with _Ahead(_Pack(weights, kernels, scheme), blocks) as packed:
        for _, parts in tensors:
            arrays = [np.empty(shape, dtype) for _, shape, dtype in parts]
            filled = 0
            while filled < len(arrays[0]):
                made = packed.next()
                for array, part in zip(arrays, made, strict=True):
                    array[filled : filled + len(part)] = part
                filled += len(made[0])
                done += sum(part.nbytes for part in made)
                report(done, total)
            yield from arrays


def _tensor(parameter: str) -> str:
    """The checkpoint's tensor that a parameter is made of."""
    return parameter.removesuffix(".q").removesuffix(".scale")


def _blocks(name: str, shape: tuple[int, ...]) -> Iterator[_Block]:
    rows, features = shape[0], shape[1] if len(shape) == 2 else 1
    step = max(1, _BLOCK_VALUES // features // PANEL) * PANEL
    for start in range(0, rows, step):
        yield name, start, min(start + step, rows)


@dataclass(frozen=True)
class _Pack:
    """One block of a tensor → its part of each parameter."""

    weights: Weights
    kernels: Kernels
    scheme: Scheme

    def __call__(self, block: _Block) -> tuple[np.ndarray, ...]:
        name, start, stop = block
        rows = self.weights.rows(name, start, stop)
        if len(self.weights.shapes[name]) == 1:
            return (cast(rows, "float32"),)
        kind = self.scheme.kind(name)
        if isinstance(kind, GroupQuantization):
            q, scale = kind.quantize(rows)
            self._check(name, scale, rows)
            return self.kernels.pack_groups(q, scale, kind.bits)
        plain = cast(rows, kind)
        self._check(name, plain, rows)
        stored = plain.view(np.uint16) if kind == "bfloat16" else plain
        return (self.kernels.pack_weight(stored),)

    def _check(self, name: str, kept: np.ndarray, rows: np.ndarray | GroupedRows) -> None:
        if not np.isfinite(kept).all():
            largest = float(np.abs(cast(rows, "float32")).max())
            raise SchemeError(
                f"{name}: found {largest:g}, beyond the {kept.dtype} of {self.scheme.name}; "
                "accepted: a scheme with a wider type, such as q0f32"
            )


class _Ahead:
    """Results of `work` on each block, in order; workers stay a few blocks ahead of the reader."""

    def __init__(self, work: _Pack, blocks: Sequence[_Block]):
        cores = os.cpu_count() or 1
        self._work = work
        self._todo = iter(blocks)
        self._pool = ThreadPoolExecutor(cores)
        self._pending: deque[Future] = deque()
        for _ in range(4 * cores):
            self._submit()

    def next(self) -> tuple[np.ndarray, ...]:
        result = self._pending.popleft().result()
        self._submit()
        return result

    def _submit(self) -> None:
        if (block := next(self._todo, None)) is not None:
            self._pending.append(self._pool.submit(self._work, block))

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)
