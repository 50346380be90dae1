"""The Metal source of an artifact: read out of its library or objects, and looked at."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from phi3c.artifact import Artifact

COMPILER = shutil.which("g++") or shutil.which("clang++")
_SHIM = Path(__file__).parent / "metal"
BYTES = {"float4": 16, "float": 4, "uint": 4, "int": 4, "half": 2, "ushort": 2}


@dataclass(frozen=True)
class MetalSource:
    """text: of one kernel; body: its lines between the outermost braces."""

    name: str
    text: str

    @property
    def body(self) -> list[str]:
        return self.text[self.text.index(f"kernel void {self.name}(") :].splitlines()[1:]

    @property
    def buffers(self) -> list[int]:
        return [int(index) for index in re.findall(r"\[\[ buffer\((\d+)\) \]\]", self.text)]

    @property
    def shared_bytes(self) -> int:
        found = re.findall(r"^ +threadgroup (\w+) \w+\[(\d+)\];", self.text, re.MULTILINE)
        return sum(BYTES[kind] * int(count) for kind, count in found)

    def nested(self, what: str) -> list[str]:
        """Lines with `what` that are inside a block of the kernel, with what opens it."""
        found, opened = [], []
        for line in self.body:
            if line.strip().startswith("}") and opened:
                opened.pop()
            if line.rstrip().endswith("{"):
                opened.append(line.strip())
            if what in line and opened[1:]:  # the first is the kernel's own, `) {`
                found.append(f"{line.strip()} in {opened[-1]}")
        return found


def parse_blob(blob: bytes) -> dict[str, MetalSource]:
    """Name → source, of the bytes of TVM's Metal module: `fmt | functions | name → source`."""
    found = {}
    for match in re.finditer(rb"#include <metal_stdlib>", blob):
        begin = match.start()
        (size,) = struct.unpack("<Q", blob[begin - 8 : begin])
        text = blob[begin : begin + size].decode()
        name = re.search(r"kernel void (\w+)\(", text)[1]
        found[name] = MetalSource(name, text)
    return found


def code_of(library: Path) -> bytes:
    """Of the library, or of all of its objects."""
    if library.suffix != ".tar":
        return library.read_bytes()
    with tarfile.open(library) as archive:
        return b"".join(archive.extractfile(entry).read() for entry in archive.getmembers())


def sources_of(artifact: Artifact) -> dict[str, MetalSource]:
    return parse_blob(code_of(artifact.library))


def launched_by(library: Path) -> set[str]:
    """The kernels that the host's code asks for by name."""
    found = re.findall(rb"\0(\w+_kernel(?:_\d+)?)(?=\0)", code_of(library))
    return {name.decode() for name in found}


def compiler_errors(sources: dict[str, MetalSource], folder: Path) -> str:
    """What a C++ compiler says of them, one after another, against the stub of Metal's library."""
    text = '#include "metal_stdlib"\nusing namespace metal;\n'
    for source in sources.values():
        text += _without_head(source.text)
    path = folder / "kernels.cc"
    path.write_text(text)
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-Wno-attributes", f"-I{_SHIM}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr


def _without_head(text: str) -> str:
    """From its structure of arguments on."""
    return text[re.search(r"^(struct|kernel) ", text, re.MULTILINE).start() :]
