"""A safetensors file whose tensors can be mapped: each starts at a multiple of 64 bytes.

The format: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data. Its data may
have no holes, so a tensor whose size is not a multiple of 64 is followed by a `_pad.<n>` tensor.
Mapped pages are private and copy-on-write: processes share them, and none can write to the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import ArtifactError

ALIGNMENT = 64
_PAD = "_pad."
_TO_NUMPY = {
    "F32": "float32",
    "F16": "float16",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
}
_FROM_NUMPY = {v: k for k, v in _TO_NUMPY.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file. sha256: of its bytes, hexadecimal."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


def tensor_bytes(shape: Sequence[int], dtype: str) -> int:
    """Size of a tensor's data."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def write_tensors(
    path: Path,
    specs: Sequence[tuple[str, tuple[int, ...], str]],
    arrays: Iterable[np.ndarray],
) -> list[TensorInfo]:
    """Streams `arrays`, in the order of `specs` (name, shape, dtype), into a file.

    Holds one array at a time. Returns what was written.
    """
    header: dict[str, dict] = {}
    offset = 0
    for name, shape, dtype in specs:
        size = tensor_bytes(shape, dtype)
        header[name] = {
            "dtype": _FROM_NUMPY[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
        if pad := -offset % ALIGNMENT:
            header[f"{_PAD}{len(header)}"] = {
                "dtype": "U8",
                "shape": [pad],
                "data_offsets": [offset, offset + pad],
            }
            offset += pad
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    infos = []
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape, dtype), array in zip(specs, arrays, strict=True):
            array = np.ascontiguousarray(array)
            assert array.shape == tuple(shape) and array.dtype == dtype, (name, array.shape, dtype)
            data = memoryview(array).cast("B")
            file.write(data)
            file.write(b"\0" * (-len(data) % ALIGNMENT))
            infos.append(TensorInfo(name, tuple(shape), dtype, hashlib.sha256(data).hexdigest()))
    return infos


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Name → array mapped from the file, without a copy.

    Raises ArtifactError: unreadable, cut short, or not a file that `write_tensors` writes.
    """
    try:
        total = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > total:
                raise ArtifactError(f"{path}: truncated: the header is cut off")
            header = json.loads(file.read(length))
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read ({err.strerror})") from None
    except ArtifactError:
        raise
    except (ValueError, RecursionError):
        raise ArtifactError(f"{path}: not a safetensors file: its header is no JSON") from None
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: not a safetensors file: its header is no JSON object")
    end = start = 8 + length
    for name, entry in header.items():
        if (why := _misfit(entry, start, end - start)) is not None:
            raise ArtifactError(f"{path}: {name}: {why}")
        end = start + entry["data_offsets"][1]
    if total != end:
        raise ArtifactError(f"{path}: truncated: {total} bytes, its header tells of {end}")
    mapped = np.memmap(path, np.uint8, mode="c")
    arrays = {}
    for name, entry in header.items():
        if not name.startswith(_PAD):
            low, high = (start + x for x in entry["data_offsets"])
            arrays[name] = mapped[low:high].view(_TO_NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _misfit(entry: object, start: int, offset: int) -> str | None:
    """What is wrong with a header's entry whose data should begin `offset` bytes into the data."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "not a tensor's entry: dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TO_NUMPY:
        return f"dtype: found {dtype!r}; accepted: {', '.join(_TO_NUMPY)}"
    if not isinstance(shape, list) or not all(type(x) is int and x >= 0 for x in shape):
        return f"shape: found {shape!r}; accepted: a list of sizes"
    size = tensor_bytes(shape, _TO_NUMPY[dtype])
    if offsets != [offset, offset + size]:
        return f"data_offsets: found {offsets!r}; accepted: {[offset, offset + size]}"
    if dtype != "U8" and (start + offset) % ALIGNMENT:
        return f"begins at byte {start + offset}; accepted: a multiple of {ALIGNMENT}"
    return None
