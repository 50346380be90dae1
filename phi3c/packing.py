"""Checkpoint tensors → the parameter arrays of an artifact, one tensor at a time.

A large tensor is converted in blocks of rows, on all cores, so that its float32 form is never whole
in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
from tvm.relax.frontend import nn

from .config import Phi3Config
from .errors import SchemeError
from .kernels.cpu import CpuKernels
from .quantization.group import GroupQuantization
from .quantization.scheme import Scheme
from .weights import checkpoint_shapes

_BLOCK_ROWS = 2048  # a whole number of weight panels
Tensors = Callable[[str], np.ndarray]  # Hugging Face name → array
Report = Callable[[int, int], None]  # (tensors done, tensors in all)


def check_scheme(config: Phi3Config, scheme: Scheme) -> None:
    """Raises SchemeError if the scheme's groups do not divide the model's dimensions."""
    if isinstance(scheme.weight, GroupQuantization):
        for name, shape in checkpoint_shapes(config).items():
            if len(shape) == 2:
                scheme.weight.check(name, shape[1])


def packed_parameters(
    parameters: list[tuple[str, nn.Parameter]],
    tensors: Tensors,
    kernels: CpuKernels,
    scheme: Scheme,
    report: Report,
) -> Iterator[np.ndarray]:
    """The arrays of `parameters`, in order. Raises SchemeError where a value does not fit."""
    names = [name for name, _ in groupby(parameters, key=lambda p: _source(p[0]))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, name in enumerate(names):
            report(done, len(names))
            array = tensors(name)
            if array.ndim == 1:
                yield array.astype(np.float32)
                continue
            starts = range(0, len(array), _BLOCK_ROWS)
            blocks = pool.map(
                lambda start, array=array, name=name: _pack_block(
                    name, array[start : start + _BLOCK_ROWS], kernels, scheme
                ),
                starts,
            )
            for parts in zip(*blocks, strict=True):
                yield np.concatenate(parts) if len(parts) > 1 else parts[0]
    report(len(names), len(names))


def _source(parameter: str) -> str:
    """The checkpoint's tensor that a parameter is made of."""
    return parameter.removesuffix(".q").removesuffix(".scale")


def _pack_block(
    name: str, rows: np.ndarray, kernels: CpuKernels, scheme: Scheme
) -> tuple[np.ndarray, ...]:
    if isinstance(scheme.weight, GroupQuantization):
        q, scale = scheme.weight.quantize(rows)
        _check_finite(name, scale, rows, scheme)
        return kernels.pack_groups(q, scale, scheme.weight.bits)
    with np.errstate(over="ignore"):
        cast = rows.astype(scheme.weight)
    _check_finite(name, cast, rows, scheme)
    return (kernels.pack_weight(cast),)


def _check_finite(name: str, cast: np.ndarray, rows: np.ndarray, scheme: Scheme) -> None:
    if not np.isfinite(cast).all():
        largest = float(np.abs(rows.astype(np.float32)).max())
        raise SchemeError(
            f"{name}: found {largest:g}, beyond the {cast.dtype} of {scheme.name}; accepted: a "
            "scheme with a wider type, such as q0f32"
        )
