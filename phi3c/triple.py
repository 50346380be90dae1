"""Target triples (`aarch64-linux-gnu`) and this machine."""

from __future__ import annotations

import platform

_ARCHITECTURES = {"arm64": "aarch64", "amd64": "x86_64"}
_SYSTEMS = {"darwin": ("darwin", "macos")}  # others go by one name


def architecture(triple: str) -> str:
    """`arm64-apple-darwin` → aarch64."""
    first = triple.partition("-")[0].lower()
    return _ARCHITECTURES.get(first, first)


def runs_here(triple: str) -> bool:
    """Whether the triple means this machine's architecture and operating system."""
    system = platform.system().lower()
    named = any(name in triple for name in _SYSTEMS.get(system, (system,)))
    return named and architecture(triple) == architecture(platform.machine())


def this_machine() -> str:
    """For messages: `x86_64 Linux`."""
    return f"{platform.machine()} {platform.system()}"
