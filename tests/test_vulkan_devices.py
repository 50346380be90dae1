"""Artifacts on devices that lack something, which vulkan_shim.c plays: they run, or are refused
when they are loaded, in one line."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
from vulkan_cases import Cases, built_shim
from vulkan_device import needs_device

import phi3c

TINY = Path(__file__).parent.parent / "configs" / "tiny.json"
PRELUDE = """
import sys
import pytest
import phi3c
from phi3c import cli
from phi3c.errors import DeviceError

def logits(path):
    model = phi3c.load(path)
    cache = model.create_paged_kv_cache(max_total_seq_len=64)
    cache.add_sequence(0)
    with cache.forward([0], [5]):
        found, _ = model.prefill(model.embed([5, 6, 7, 8, 9]), cache)
    return found.numpy().tobytes().hex()

def refused(path, message):
    with pytest.raises(DeviceError, match=message) as caught:
        phi3c.load(path)
    assert "\\n" not in str(caught.value)
    assert cli.main(["bench", path]) == 1
    sys.stderr.flush()
"""

pytestmark = needs_device


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """artifact(scheme) → a tiny model for `vulkan`, made once."""
    made: dict[str, Path] = {}

    def get(scheme: str) -> str:
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("artifact") / "tiny"
            options = dict(max_batch_size=2, context_length=64, prefill_chunk_size=128)
            phi3c.compile(TINY, "vulkan", scheme, made[scheme], **options)
        return str(made[scheme])

    return get


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    return built_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def case(pytestconfig, tmp_path_factory):
    """case(code, loader, **environment) → what it printed."""
    if "XDG_RUNTIME_DIR" not in os.environ:  # else the loader complains
        os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("run"))
    running = Cases(Path(pytestconfig.cache.mkdir("vulkan")))

    def run(code: str, loader: Path | None = None, **environment) -> str:
        return running.run(PRELUDE + textwrap.dedent(code), loader, **environment)

    yield run
    running.close()


def test_float16_is_only_stored(artifact, case, shim):
    """A device without arithmetic of 8 and 16 bits gives the same logits."""
    code = f"print(logits({artifact('q4f16_1')!r}))"
    without = "from phi3c.vulkan import devices\nassert not devices()[0].shader_float16\n"
    assert case(without + code, shim, SHIM_NO_NARROW=1) == case(code, shim)


def test_schemes_of_32_bits_need_no_16_bit_storage(artifact, case, shim):
    code = f"print(logits({artifact('q0f32')!r}))"
    assert case(code, shim, SHIM_NO_16BIT=1) == case(code, shim)


def test_schemes_of_16_bits_need_16_bit_storage(artifact, case, shim):
    message = "has no 16-bit storage .storageBuffer16BitAccess., which kernels need"
    printed = case(f"refused({artifact('q4f16_1')!r}, {message!r})", shim, SHIM_NO_16BIT=1)
    assert one_line(printed).startswith("phi3c: error: vulkan:0 (")


def test_small_devices_are_refused(artifact, case, shim):
    message = "kernels need 256 threads in a workgroup; it accepts 63"
    case(f"refused({artifact('q0f32')!r}, {message!r})", shim, SHIM_SMALL=1)


def test_rows_that_do_not_fit_on_an_axis_are_refused(artifact, case, shim):
    message = r"kernels need \(128, 128, 1\) workgroups; it accepts \(100, "
    printed = case(f"refused({artifact('q0f32')!r}, {message!r})", shim, SHIM_FEW_WORKGROUPS=1)
    one_line(printed)


def test_no_device_is_told(artifact, case, shim):
    message = "found vulkan:0; accepted: one that is there: none, as no driver is installed"
    printed = case(f"refused({artifact('q0f32')!r}, {message!r})", shim, SHIM_NO_DEVICES=1)
    assert "apt install mesa-vulkan-drivers" in one_line(printed)


def test_no_loader_is_told(artifact, case):
    message = "found no Vulkan loader .* apt install libvulkan1"
    loader = Path("/nowhere/libvulkan.so.1")
    assert "libvulkan1" in one_line(case(f"refused({artifact('q0f32')!r}, {message!r})", loader))


def test_a_native_target_is_told_too(case, shim, tmp_path):
    for options, message in (
        (dict(loader=shim, SHIM_NO_DEVICES=1), "accepted: a device that is there: none"),
        (dict(loader=Path("/nowhere/libvulkan.so.1")), "but no device: vulkan: found no Vulkan lo"),
    ):
        argv = ["compile", str(TINY), "--target", "vulkan:native", "-o", str(tmp_path / "made")]
        printed = one_line(case(f"assert cli.main({argv!r}) == 2", **options))
        assert message in printed and "'vulkan:native'" in printed


def one_line(printed: str) -> str:
    """What the command line printed of an error."""
    (line,) = printed.splitlines()
    assert line.startswith("phi3c: error: ")
    return line
