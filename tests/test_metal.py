"""The Metal target, compiled on any machine: no Mac is needed, and none has run it."""

from __future__ import annotations

import json
import re
import struct
import sys
import tarfile
from pathlib import Path

import pytest

import phi3c
from phi3c import linker
from phi3c.cli import main
from phi3c.errors import ArtifactError, TargetError
from phi3c.link import link
from phi3c.metal import MetalKernel, checked

ROOT = Path(__file__).parent.parent
MACHO_64, DYLIB = 0xFEEDFACF, 6
foreign = pytest.mark.skipif(sys.platform == "darwin", reason="a Mac links")


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> phi3c.Artifact:
    """Compiled where nothing links for a Mac."""
    folder = tmp_path_factory.mktemp("metal") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linker, "_clang", lambda triple: None)
        patch.setattr(linker, "_zig", lambda triple: None)
        config = ROOT / "configs" / "tiny.json"
        return phi3c.compile(config, "metal", "q4f16_1", folder, max_loras=2)


@foreign
def test_without_a_linker_the_objects_are_kept(objects):
    assert not objects.linked and objects.library.name == "model.tar"
    with tarfile.open(objects.library) as archive:
        names = archive.getnames()
        magic = [archive.extractfile(name).read(4) for name in names]
    assert len(names) >= 2 and set(magic) == {struct.pack("<I", MACHO_64)}
    objects.check_integrity()


@foreign
def test_the_objects_hold_the_source_of_every_kernel(objects):
    data, needs = objects.library.read_bytes(), objects.manifest.target.needs
    kernels = set(re.findall(rb"kernel void (\w+)\(", data))
    assert len(kernels) == needs.kernels
    # What the host's code launches is among them, by name.
    launched = set(re.findall(rb"\b\w+_kernel(?:_\d+)?\b", data))
    assert launched <= kernels
    assert needs.threads <= 1024 and needs.shared_bytes <= 32 * 1024
    # Metal has threadgroup memory in a kernel's outermost scope only: four spaces or fewer.
    assert not re.search(rb"\n {4,}threadgroup \w+ \w+\[", data)


@foreign
def test_objects_are_not_loaded(objects):
    with pytest.raises(ArtifactError, match="not linked; run `phi3c link .* or anywhere with the"):
        phi3c.load(objects.path)


@foreign
def test_linking_without_a_linker_is_refused(objects, monkeypatch):
    monkeypatch.setattr(linker, "_clang", lambda triple: None)
    monkeypatch.setattr(linker, "_zig", lambda triple: None)
    with pytest.raises(TargetError, match="ziglang"):
        link(objects.path)
    objects.check_integrity()  # as it was


@foreign
def test_linking_gives_a_library(objects, monkeypatch, tmp_path):
    """By a linker that only writes what it was given: a real one is not everywhere."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in objects.path.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    given = []

    def run(output, paths, options=None):
        given.extend(Path(path).read_bytes()[:4] for path in paths)
        Path(output).write_bytes(struct.pack("<IIII", MACHO_64, 0x0100000C, 0, DYLIB))

    monkeypatch.setattr(linker, "_clang", lambda triple: run)
    assert main(["link", str(copy), "--json"]) == 0
    linked = phi3c.Artifact.open(copy)
    assert linked.linked and not (copy / "model.tar").exists()
    linked.check_integrity()
    assert set(given) == {struct.pack("<I", MACHO_64)}
    with pytest.raises(ArtifactError, match="linked already"):
        link(copy)
    with pytest.raises(ArtifactError, match="compiled for arm64-apple-macos; this machine is"):
        phi3c.load(copy)


@foreign
def test_changed_objects_are_noticed(objects, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in objects.path.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / "model.tar").read_bytes())
    data[2000] ^= 1
    (copy / "model.tar").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.tar"):
        phi3c.Artifact.open(copy).check_integrity()


def test_compile_says_what_is_left_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(linker, "_clang", lambda triple: None)
    monkeypatch.setattr(linker, "_zig", lambda triple: None)
    config = str(ROOT / "configs" / "tiny.json")
    where = str(tmp_path / "made")
    options = ["--target", "cpu:apple-m1:arm64-apple-macos", "--quantization", "q0f16"]
    if sys.platform == "darwin":
        pytest.skip("a Mac links")
    assert main(["compile", config, "-o", where, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linked"] is False


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"threads": 1025}, "1025 threads in a threadgroup; accepted: up to 1024"),
        ({"shared_bytes": 32769}, "32769 bytes of threadgroup memory; accepted: up to 32768"),
        ({"buffers": 31}, "32 buffers; accepted: up to 31"),
    ],
)
def test_a_kernel_that_asks_for_too_much_is_named(change, what):
    fine = dict(name="linear_kernel", buffers=4, plain=1, threads=256, shared_bytes=1024)
    assert checked(MetalKernel(**fine)) == MetalKernel(**fine)
    with pytest.raises(TargetError, match=f"metal: the kernel linear_kernel: found {what}"):
        checked(MetalKernel(**fine | change))
