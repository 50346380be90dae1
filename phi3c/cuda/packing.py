"""What a library carries beside its host code: TVM's bytes, with machine code for CUDA's source.

TVM packs modules that are no host code into one blob: a tree of imports, then kind and bytes of
each. A CUDA module's bytes are a format's name, its functions' signatures, and code, with 64-bit
little-endian lengths. Source says "cuda", and the runtime has it compiled when it is loaded; for
"fatbin" it gives the code to the driver.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import tvm_ffi

# TVM's loader finds the blob by this name (tvm/ffi/extra/module.h).
_SYMBOL = "__tvm_ffi__library_bin"
_HOST = b"_lib"  # the kind that stands for the host code, without bytes
_ASSEMBLY = """\
    .section .rodata
    .globl {symbol}
    .type {symbol}, %object
    .balign 64
{symbol}:
    .incbin "{blob}"
    .size {symbol}, {size}
    .section .note.GNU-stack, "", %progbits
"""


def pack_imports(codes: Mapping[str, bytes]) -> Callable[[tvm_ffi.Module, bool, str, str], str]:
    """What `export_library` takes as fpack_imports. codes: source → fat binary."""

    def pack(module: tvm_ffi.Module, is_system_lib: bool, prefix: str, folder: str) -> str:
        assert not is_system_lib and not prefix
        packed = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module)
        blob, assembly = Path(folder) / "modules.bin", Path(folder) / "modules.s"
        blob.write_bytes(compiled_blob(packed.numpy().tobytes(), codes))
        text = _ASSEMBLY.format(symbol=_SYMBOL, blob=blob, size=blob.stat().st_size)
        assembly.write_text(text)
        return str(assembly)

    return pack


def compiled_blob(blob: bytes, codes: Mapping[str, bytes]) -> bytes:
    """The blob with the code of every CUDA module in its source's place.

    Raises KeyError for a source that has no code in `codes`.
    """
    reader = _Reader(blob)
    assert reader.number() == len(blob) - 8
    rows, children = reader.numbers(), reader.numbers()
    parts = [_numbers(rows), _numbers(children)]
    for _ in range(len(rows) - 1):
        kind = reader.text()
        parts.append(_text(kind))
        if kind != _HOST:
            data = reader.text()
            parts.append(_text(_compiled(data, codes) if kind == b"cuda" else data))
    assert reader.ended()
    body = b"".join(parts)
    return struct.pack("<Q", len(body)) + body


def _compiled(module: bytes, codes: Mapping[str, bytes]) -> bytes:
    source = next((s for s in codes if module.endswith(_text(s.encode()))), None)
    if source is None:
        raise KeyError("a CUDA module whose source was not compiled")
    head = _text(b"cuda")
    assert module.startswith(head)
    signatures = module[len(head) : -len(_text(source.encode()))]
    return _text(b"fatbin") + signatures + _text(codes[source])


class _Reader:
    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def number(self) -> int:
        self._at += 8
        return struct.unpack_from("<Q", self._data, self._at - 8)[0]

    def numbers(self) -> list[int]:
        return [self.number() for _ in range(self.number())]

    def text(self) -> bytes:
        size = self.number()
        self._at += size
        return self._data[self._at - size : self._at]

    def ended(self) -> bool:
        return self._at == len(self._data)


def _numbers(values: list[int]) -> bytes:
    return struct.pack(f"<{len(values) + 1}Q", len(values), *values)


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data
