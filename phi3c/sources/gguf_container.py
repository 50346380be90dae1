"""The GGUF container: metadata, and tensors that are read some rows at a time.

The `gguf` package parses the file, which it maps into memory. Q8_0 and Q4_0 keep their integers and
scales; other quantized types become float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderField
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ..errors import CheckpointError
from ..quantization.group import GroupedRows

REQUIRED: Any = object()  # the default of metadata that must be there
_FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_GROUP = 32  # values to a scale in Q8_0 and Q4_0
_Q8_0 = np.dtype([("scale", "<f2"), ("q", "i1", _GROUP)])
_Q4_0 = np.dtype([("scale", "<f2"), ("q", "u1", _GROUP // 2)])


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the table of tensors. shape: rows first, as in numpy; offset: in the file."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int

    @property
    def type(self) -> str:
        """Its type's name in ggml."""
        return self.quantization.name

    @property
    def block(self) -> tuple[int, int]:
        """How many values are stored together, in how many bytes."""
        return GGML_QUANT_SIZES[self.quantization]

    @property
    def row_bytes(self) -> int:
        """Of a row; of an element of a vector."""
        values, size = self.block
        return (self.shape[1] if len(self.shape) > 1 else 1) // values * size


class Gguf:
    """A little-endian GGUF file.

    metadata: a string, a number, or a list of one of them.
    """

    def __init__(self, path: Path):
        """Raises CheckpointError unless the file is whole; `check` looks at single tensors."""
        self.path = path
        _check_start(path)
        try:
            reader = GGUFReader(path)
            self.metadata = {key: _contents(field) for key, field in reader.fields.items()}
        except Exception as err:  # the reader meets damage in many ways
            raise CheckpointError(f"{path}: {_reason(err)}") from None
        self._data = reader.data
        self.tensors = {
            t.name: GgufTensor(
                t.name, tuple(map(int, t.shape[::-1])), t.tensor_type, int(t.data_offset)
            )
            for t in reader.tensors
        }

    # Metadata by key, with a default unless the key is required. CheckpointError if it is absent
    # or of another type.

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        return self._value(key, default, lambda v: isinstance(v, str), "a string")

    def texts(self, key: str, default: Any = REQUIRED) -> Any:
        def fits(v: Any) -> bool:
            return isinstance(v, list) and all(isinstance(x, str) for x in v)

        return self._value(key, default, fits, "a list of strings")

    def integer(self, key: str, default: Any = REQUIRED) -> Any:
        return self._value(key, default, lambda v: type(v) is int, "an integer")

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        return self._value(key, default, lambda v: type(v) in (int, float), "a number")

    def numbers(self, key: str, default: Any = REQUIRED) -> Any:
        def fits(v: Any) -> bool:
            return isinstance(v, list) and all(type(x) in (int, float) for x in v)

        return self._value(key, default, fits, "a list of numbers")

    def flag(self, key: str, default: Any = REQUIRED) -> Any:
        return self._value(key, default, lambda v: type(v) is bool, "true or false")

    def _value(self, key: str, default: Any, fits: Callable[[Any], bool], accepted: str) -> Any:
        if key not in self.metadata:
            if default is REQUIRED:
                raise CheckpointError(
                    f"{self.path}: {key}: found nothing; accepted: {accepted} (required)"
                )
            return default
        value = self.metadata[key]
        if not fits(value):
            found = {str: "a string", list: "a list"}.get(type(value), value)
            raise CheckpointError(f"{self.path}: {key}: found {found}; accepted: {accepted}")
        return value

    # Tensors

    def check(self, tensor: GgufTensor, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError unless `rows` can read it, and it has this shape."""
        at = f"{self.path}: {tensor.name}"
        if tensor.shape != shape:
            raise CheckpointError(
                f"{at}: found shape {list(tensor.shape)}; accepted: {list(shape)}, from the "
                "metadata"
            )
        accepted = list(_FLOATS) if len(shape) == 1 else _readable_types()
        if tensor.type not in accepted:
            raise CheckpointError(f"{at}: found {tensor.type}; accepted: {', '.join(accepted)}")

    def rows(self, tensor: GgufTensor, start: int, stop: int) -> np.ndarray | GroupedRows:
        """Rows start … stop−1 of a checked tensor (elements of a vector), as Weights.rows has
        them; not checked for NaN."""
        count, size = stop - start, tensor.row_bytes
        at = tensor.offset + start * size
        raw = np.asarray(self._data[at : at + count * size])
        if dtype := _FLOATS.get(tensor.type):
            return raw.view(dtype).reshape(count, *tensor.shape[1:]).copy()
        raw = raw.reshape(count, size)
        if tensor.type == "Q8_0":
            blocks = raw.view(_Q8_0)
            return GroupedRows(
                blocks["q"].copy().reshape(count, tensor.shape[1]), blocks["scale"].copy()
            )
        if tensor.type == "Q4_0":
            blocks = raw.view(_Q4_0)
            q = np.empty((*blocks.shape, 2, _GROUP // 2), np.int8)
            q[:, :, 0] = blocks["q"] & 15  # the first half of a block
            q[:, :, 1] = blocks["q"] >> 4  # the second
            q -= 8
            return GroupedRows(q.reshape(count, tensor.shape[1]), blocks["scale"].copy())
        with np.errstate(invalid="ignore", over="ignore"):  # rows of NaN are the caller's to refuse
            return dequantize(raw, tensor.quantization)


def _check_start(path: Path) -> None:
    """Raises CheckpointError for what is no GGUF file from its first bytes on."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read ({err.strerror})") from None
    if start[:4] != b"GGUF":
        raise CheckpointError(
            f"{path}: found a file that begins with {start[:4]!r}; accepted: a GGUF file"
        )
    if len(start) == 8 and not int.from_bytes(start[4:], "little") & 0xFFFF:
        raise CheckpointError(f"{path}: found a big-endian file; accepted: little-endian")


def _contents(field: ReaderField) -> Any:
    value = field.contents()
    if field.types == [GGUFValueType.FLOAT32]:
        return float(str(np.float32(value)))  # 1e-5, not 9.999999747378752e-06: as written down
    return value


def _reason(err: Exception) -> str:
    """One line for what the reader says."""
    text = " ".join(str(err).split())
    if unknown := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", text):
        return f"found block type {unknown[1]}; accepted: {', '.join(_readable_types())}"
    if found := re.search(r"file appears to be version (\d+)", text):
        return f"found GGUF version {found[1]}; accepted: 2, 3"
    if isinstance(err, IndexError) or "reshape" in text or "must be a divisor" in text:
        return "cut short: the file ends before what its header tells of"
    return f"damaged: {text or type(err).__name__}"


@cache
def _readable_types() -> list[str]:
    """Names of the types that a matrix may have."""
    return [t.name for t in GGMLQuantizationType if t.name in _FLOATS or _is_dequantizable(t)]


def _is_dequantizable(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf package can: it says so only when it is asked to."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True
