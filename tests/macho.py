"""The head and the symbols of a 64-bit Mach-O file (mach-o/loader.h, nlist.h)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

ARM64 = 0x0100000C
OBJECT, DYLIB = 1, 6
_MAGIC, _SYMTAB, _BUILD_VERSION = 0xFEEDFACF, 0x2, 0x32
_EXTERNAL, _TYPE, _IN_SECTION = 0x01, 0x0E, 0x0E


@dataclass(frozen=True)
class MachO:
    """defined, undefined: external symbols, without C's underscore; platform: 1 is macOS."""

    cpu: int
    kind: int
    platform: int | None
    defined: frozenset[str]
    undefined: frozenset[str]


def parse(data: bytes) -> MachO:
    magic, cpu, _, kind, count, _, _, _ = struct.unpack_from("<8I", data)
    assert magic == _MAGIC, hex(magic)
    at, platform, names = 32, None, {True: set(), False: set()}
    for _ in range(count):
        command, size = struct.unpack_from("<2I", data, at)
        if command == _BUILD_VERSION:
            (platform,) = struct.unpack_from("<I", data, at + 8)
        if command == _SYMTAB:
            symbols, number, strings, _ = struct.unpack_from("<4I", data, at + 8)
            for i in range(number):
                text, what = struct.unpack_from("<IB", data, symbols + 16 * i)
                if what & _EXTERNAL:
                    begin = strings + text
                    name = data[begin : data.index(b"\0", begin)].decode().removeprefix("_")
                    names[what & _TYPE == _IN_SECTION].add(name)
        at += size
    return MachO(cpu, kind, platform, frozenset(names[True]), frozenset(names[False]))
