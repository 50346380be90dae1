"""adapter_config.json, as PEFT writes it: the scale of each module, and what is refused.

Of PEFT's LoRA it takes whatever adds B(A x) times a constant. A switch that changes the maths in
another way is refused by its name, so that no adapter is silently computed as another.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError

CONFIG_FILE = "adapter_config.json"

# Switches of PEFT's LoraConfig that must be off: false, null or empty.
_MUST_BE_EMPTY = (
    "use_dora",  # weights are normalised, then scaled by a magnitude
    "modules_to_save",  # whole layers beside the adapter
    "trainable_token_indices",  # rows of the embedding
    "lora_bias",
    "fan_in_fan_out",  # of linears that store their weight transposed
    "target_parameters",
    "layer_replication",
    "use_qalora",  # inputs are averaged over groups
    "megatron_config",
)
# The same, but an empty object is one of defaults, which is on.
_MUST_BE_NULL = (
    "alora_invocation_tokens",  # only tokens after these are adapted
    "use_bdlora",
    "arrow_config",  # routes tokens among adapters
    "kasa_config",
    "monteclora_config",
)
# Ways to initialise that leave the base model as it is. Others (pissa, olora, corda, loftq,
# lora_ga) take something from its weights, and the adapter is trained beside the rest.
_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Names of other switches that LoraConfig has, which do not change what a trained adapter computes.
_HARMLESS = ("use_rslora", "eva_config", "corda_config", "loftq_config", "lora_ga_config")
_HARMLESS += ("velora_config", "runtime_config")


@dataclass(frozen=True)
class PeftScales:
    """alphas: (pattern of module names, alpha) in order, the first that matches counts."""

    alpha: float
    alphas: tuple[tuple[str, float], ...]
    rslora: bool

    def scale(self, module: str, rank: int) -> float:
        """Of the module of that name in the base model, from the rank that its tensors have."""
        alpha = next((a for p, a in self.alphas if _matches(p, module)), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_peft_config(folder: Path) -> PeftScales:
    """Raises AdapterError: missing, broken, or of an adapter that is not supported."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder}: no {CONFIG_FILE}; accepted: PEFT's adapter folder") from None
    except OSError as err:
        raise AdapterError(f"{path}: cannot be read ({err.strerror})") from None
    except (ValueError, RecursionError):
        raise AdapterError(f"{path}: not valid JSON") from None
    if not isinstance(config, Mapping):
        raise AdapterError(f"{path}: found a JSON {type(config).__name__}; accepted: an object")
    try:
        return _scales(config)
    except AdapterError as err:
        raise AdapterError(f"{path}: {err}") from None


def _scales(config: Mapping[str, Any]) -> PeftScales:
    _refuse_other_methods(config)
    if "r" in config:
        _rank("r", config["r"])
    for pattern, rank in _patterns(config, "rank_pattern"):  # the tensors' own ranks are used
        _rank(f"rank_pattern: {_show(pattern)}", rank)
    if "lora_alpha" not in config:
        raise _refusal("lora_alpha", "nothing", "a number (required)")
    return PeftScales(
        alpha=_number("lora_alpha", config["lora_alpha"]),
        alphas=tuple(
            (pattern, _number(f"alpha_pattern: {_show(pattern)}", alpha))
            for pattern, alpha in _patterns(config, "alpha_pattern")
        ),
        rslora=_flag(config, "use_rslora"),
    )


def _refuse_other_methods(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _refusal("peft_type", _show(config.get("peft_type")), '"LORA"')
    if (bias := config.get("bias") or "none") != "none":
        raise _refusal("bias", _show(bias), '"none"')
    init = config.get("init_lora_weights")
    if not (init is None or type(init) is bool or init in _INITS):
        raise _refusal(
            "init_lora_weights",
            _show(init),
            f"{', '.join(_INITS)}, true or false. Another may change the base model: PEFT's "
            "save_pretrained converts such an adapter if path_initial_model_for_weight_conversion "
            "is given",
        )
    for key, value in config.items():
        if key in _MUST_BE_NULL:
            is_on = value is not None and value is not False
        else:
            is_switch = key.startswith("use_") or key.endswith("_config")
            unknown = is_switch and key not in _HARMLESS
            is_on = bool(value) and (key in _MUST_BE_EMPTY or unknown)
        if is_on:
            raise _refusal(key, _show(value), "false, null, or nothing (not supported)")


# A file from anywhere must not be able to hold the interpreter's lock for long.
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_CHOICE = re.compile(r"(?<!\\)(\(\??|[*+?]\??|\{)")  # where a match may have to be tried again
_MOST_CHOICES = 3


def _patterns(config: Mapping[str, Any], field: str) -> list[tuple[str, Any]]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise _refusal(field, _show(patterns), "an object of patterns of module names")
    for pattern in patterns:
        slow = len(pattern) > 200 or len(_CHOICE.findall(pattern)) > _MOST_CHOICES
        if slow or _REPEATED_GROUP.search(pattern):
            found = f"{_show(pattern)}, which may take very long to match"
            accepted = f"up to {_MOST_CHOICES} of *, +, ?, {{}} and groups, no group repeated"
            raise _refusal(field, found, accepted)
        try:
            re.compile(_whole(pattern))
        except (re.error, RecursionError, OverflowError) as err:
            raise _refusal(field, f"{_show(pattern)} ({err})", "regular expressions") from None
    return list(patterns.items())


def _matches(pattern: str, module: str) -> bool:
    """Whether it is the end of the name, from a dot on, or all of it: PEFT's rule."""
    return re.match(_whole(pattern), module) is not None


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _rank(field: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise _refusal(field, _show(value), "1 or more")


def _number(field: str, value: Any) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not math.isfinite(number):
        raise _refusal(field, _show(value), "a finite number")
    return number


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field) or False
    if type(value) is not bool:
        raise _refusal(field, _show(value), "true or false")
    return value


def _refusal(field: str, found: str, accepted: str) -> AdapterError:
    return AdapterError(f"{field}: found {found}; accepted: {accepted}")


def _show(value: Any) -> str:
    """As the file has it, on one short line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:56] + " ..."
