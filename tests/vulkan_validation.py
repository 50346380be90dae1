"""Vulkan's validation layer, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

VALIDATION = "VK_LAYER_KHRONOS_validation"


def has_validation() -> bool:
    return any(
        (Path(folder) / "vulkan/explicit_layer.d/VkLayer_khronos_validation.json").exists()
        for folder in ("/usr/share", "/usr/local/share", "/etc")
    )


validated = pytest.mark.skipif(
    not has_validation(), reason="no validation layer (Debian: apt install vulkan-validationlayers)"
)
