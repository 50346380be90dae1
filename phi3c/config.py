"""Phi-3-family model configuration: Hugging Face JSON in, one frozen dataclass out.

This is the only module that reads a `config.json`. It accepts the forms that real checkpoints use
(Phi-3's, with `rope_scaling`, and the `rope_parameters` form that transformers 5 saves), turns
them into one canonical form, and refuses with a `ConfigError` whatever the compiler would get
wrong: other architectures, biases, activations, rope types and pre-quantized weights. Keys that do
not change inference (dropout, initializer_range, auto_map, ...) are ignored. Defaults for absent
keys are those of transformers' `Phi3Config`.

The rotary maths is LongRoPE (arXiv 2402.13753) as transformers computes it.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from phi3c.errors import ConfigError

__all__ = ["Phi3Config", "RopeScaling"]

T = TypeVar("T")

_SUPPORTED = "'phi3' (Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4, Phi-4-mini)"
_OTHER_ARCHITECTURES = {
    "phi": "Phi-1 and Phi-2",
    "phi3small": "Phi-3-small",
    "phi3_v": "Phi-3-vision",
    "phimoe": "Phi-3.5-MoE",
    "phi4mm": "Phi-4-multimodal",
    "phi4_multimodal": "Phi-4-multimodal",
    "phi4flash": "Phi-4-mini-flash",
}
_LONGROPE_TYPES = ("longrope", "su", "yarn")  # su and yarn: what the first Phi-3 files called it
_ROPE_TYPES = "'longrope' ('su' and 'yarn' in old Phi-3 files), 'default' or null"
_LONGROPE_KEYS = ("short_factor", "long_factor", "attention_factor", "factor")
_DTYPES = ("float32", "float16", "bfloat16")
_MAX_INT = 2**31 - 1  # token ids, positions and shapes are int32 further down

# transformers' Phi3Config defaults, for keys that a file leaves out.
_DEFAULT_MAX_POSITIONS = 4096
_DEFAULT_ORIGINAL_MAX = 4096
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_RMS_NORM_EPS = 1e-5
_DEFAULT_BOS, _DEFAULT_EOS, _DEFAULT_PAD = 1, 32000, 32000


def _refusal(field: str, found: str, accepted: str) -> ConfigError:
    return ConfigError(f"{field}: found {found}; accepted: {accepted}")


def _show(value: Any) -> str:
    """A value on one short line, null as JSON writes it."""
    return "null" if value is None else reprlib.repr(value)


def _int(field: str, value: Any, least: int = 1, otherwise: str = "") -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # some tools write 4096.0
    if type(value) is not int or not least <= value <= _MAX_INT:
        raise _refusal(field, _show(value), f"an integer from {least} to {_MAX_INT}{otherwise}")
    return value


def _float(field: str, value: Any, accepted: str, is_valid: Callable[[float], bool]) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not (math.isfinite(number) and is_valid(number)):
        raise _refusal(field, _show(value), accepted)
    return number


def _positive(field: str, value: Any) -> float:
    return _float(field, value, "a finite number above 0", lambda number: number > 0)


def _theta(field: str, value: Any) -> float:
    # Near 3.4e38 theta leaves float32; below 1 the frequencies would grow along the head.
    return _float(field, value, "a number from 1 to 1e38", lambda number: 1 <= number <= 1e38)


def _fraction(field: str, value: Any) -> float:
    return _float(field, value, "a number above 0, up to 1", lambda number: 0 < number <= 1)


def _bool(field: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _refusal(field, _show(value), "true or false")
    return value


def _token_id(field: str, value: Any) -> int | None:
    return None if value is None else _int(field, value, 0, ", or null")


def _factors(field: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise _refusal(field, _show(value), "a list of positive numbers")
    return tuple(_positive(f"{field}[{i}]", item) for i, item in enumerate(value))


def _rope_type(field: str, value: Any) -> str:
    if value in _LONGROPE_TYPES:
        return "longrope"
    if value != "default":
        raise _refusal(field, _show(value), _ROPE_TYPES)
    return value


def _dtype(field: str, value: Any) -> str:
    if value not in _DTYPES:
        raise _refusal(field, _show(value), f"one of {', '.join(_DTYPES)}, or null")
    return value


def _required(source: Mapping[str, Any], field: str) -> Any:
    if source.get(field) is None:
        raise _refusal(field, "nothing" if field not in source else "null", "a value (required)")
    return source[field]


def _agreed(
    places: Iterable[tuple[str, Any]], parse: Callable[[str, Any], T], default: T | None = None
) -> T | None:
    """The one value that all places giving one agree on; null counts as not given."""
    found = [(path, parse(path, value)) for path, value in places if value is not None]
    for path, value in found[1:]:
        first_path, first = found[0]
        if value != first:
            raise _refusal(
                path.rpartition(".")[2],
                f"{_show(first)} in {first_path} and {_show(value)} in {path}",
                "one value, or the same in both places",
            )
    return found[0][1] if found else default


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """LongRoPE's two factor sets (`rope_scaling` of type longrope, su or old Phi-3 yarn).

    short_factor, long_factor: one divisor of the rotary frequency per pair of dimensions, in
        rotary order: rotary_dim / 2 entries each.
    attention_factor: multiplies cos and sin; None: derived, see `Phi3Config.attention_factor`.
    factor: the context extension that the attention factor is derived from; None:
        max_position_embeddings / original_max_position_embeddings.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        for field in ("short_factor", "long_factor"):
            object.__setattr__(self, field, _factors(field, getattr(self, field)))
        for field in ("attention_factor", "factor"):
            value = getattr(self, field)
            object.__setattr__(self, field, None if value is None else _positive(field, value))


@dataclass(frozen=True, kw_only=True)
class Phi3Config:
    """A Phi-3-family model's shape and constants, under their Hugging Face names.

    Lengths (`*_position_embeddings`, `sliding_window`) are in tokens. A constructed object is
    valid: every way to make one, `dataclasses.replace` included, runs the same checks.

    original_max_position_embeddings: the longest total length that LongRoPE's short factors
        serve; max_position_embeddings when there is no scaling.
    sliding_window: how many last tokens a query attends to, itself included; None: all.
    rope_scaling: None: plain rotary embedding.
    eos_token_ids: empty when the checkpoint names none.
    dtype: the dtype that the checkpoint says its weights have, if it says so.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    tie_word_embeddings: bool
    hidden_act: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str | None

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], name: str = "config.json") -> Phi3Config:
        """Reads a parsed Hugging Face config; `name` starts every error message."""
        try:
            return cls(**_fields_from_json(d))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Phi3Config:
        """Reads a config JSON, or the config.json of a checkpoint folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            parsed = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(
                f"{path}: cannot be read ({reason}); "
                "accepted: a config JSON, or a folder with a config.json"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path}: not valid JSON ({error}); accepted: a config JSON"
            ) from None
        return cls.from_dict(parsed, name=str(path))

    def __post_init__(self) -> None:
        def put(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            put(field, _int(field, getattr(self, field)))
        if self.sliding_window is not None:
            put("sliding_window", _int("sliding_window", self.sliding_window, 1, ", or null"))
        put("rms_norm_eps", _positive("rms_norm_eps", self.rms_norm_eps))
        put("rope_theta", _theta("rope_theta", self.rope_theta))
        put(
            "partial_rotary_factor",
            _fraction("partial_rotary_factor", self.partial_rotary_factor),
        )
        _bool("tie_word_embeddings", self.tie_word_embeddings)
        put("bos_token_id", _token_id("bos_token_id", self.bos_token_id))
        put("pad_token_id", _token_id("pad_token_id", self.pad_token_id))
        put(
            "eos_token_ids",
            tuple(
                _int("eos_token_id", i, 0, ", a list of them, or null") for i in self.eos_token_ids
            ),
        )
        if self.hidden_act != "silu":
            raise _refusal("hidden_act", _show(self.hidden_act), "'silu'")
        if self.dtype is not None:
            _dtype("dtype", self.dtype)

        if self.num_attention_heads % self.num_key_value_heads:
            raise _refusal(
                "num_key_value_heads",
                f"{self.num_key_value_heads} for {self.num_attention_heads} attention heads",
                "a divisor of num_attention_heads",
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise _refusal(
                "partial_rotary_factor",
                f"{self.partial_rotary_factor} with head_dim {self.head_dim}, "
                f"which rotates {self.rotary_dim} dimensions",
                "one that rotates an even number of dimensions above 0",
            )
        if self.rope_scaling is None:
            # The field is about LongRoPE only, and transformers writes 4096 for any other model.
            put("original_max_position_embeddings", self.max_position_embeddings)
        else:
            put(
                "original_max_position_embeddings",
                # From 2: the attention factor divides by ln(original_max).
                _int("original_max_position_embeddings", self.original_max_position_embeddings, 2),
            )
            self._check_longrope(self.rope_scaling)

    def _check_longrope(self, scaling: RopeScaling) -> None:
        if self.original_max_position_embeddings > self.max_position_embeddings:
            raise _refusal(
                "original_max_position_embeddings",
                f"{self.original_max_position_embeddings}",
                f"at most max_position_embeddings ({self.max_position_embeddings}); "
                f"{_DEFAULT_ORIGINAL_MAX} where the file gives none",
            )
        pairs = self.rotary_dim // 2
        for field in ("short_factor", "long_factor"):
            factors = getattr(scaling, field)
            if len(factors) != pairs:
                raise _refusal(field, f"{len(factors)} entries", f"{pairs} (rotary_dim / 2)")
            with np.errstate(over="ignore", under="ignore", divide="ignore"):
                inv_freq = self.inv_freq(long=field == "long_factor")
            if not np.all(np.isfinite(inv_freq) & (inv_freq > 0)):
                raise _refusal(
                    field,
                    f"{_show(factors)} with rope_theta {self.rope_theta}",
                    "factors whose frequencies are positive, finite float32 numbers",
                )

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of each head are rotated; even."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_query_groups(self) -> int:
        """How many query heads share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by, with the short and the long factors alike.

        LongRoPE's sqrt(1 + ln s / ln original_max), s the context extension, unless the checkpoint
        gives the number itself; 1 without scaling.
        """
        if self.rope_scaling is None:
            return 1.0
        if self.rope_scaling.attention_factor is not None:
            return self.rope_scaling.attention_factor
        extension = self.rope_scaling.factor
        if extension is None:
            extension = self.max_position_embeddings / self.original_max_position_embeddings
        if extension <= 1.0:
            return 1.0
        return math.sqrt(1 + math.log(extension) / math.log(self.original_max_position_embeddings))

    def rope_factors(self, long: bool) -> np.ndarray:
        """LongRoPE's divisors of the frequencies, float32 [rotary_dim / 2]; ones without it."""
        if self.rope_scaling is None:
            return np.ones(self.rotary_dim // 2, dtype=np.float32)
        scaling = self.rope_scaling
        return np.array(scaling.long_factor if long else scaling.short_factor, dtype=np.float32)

    def inv_freq(self, long: bool) -> np.ndarray:
        """Rotary frequencies in radians per position, float32 [rotary_dim / 2].

        1 / (factor[i] * theta^(2i / rotary_dim)), every step rounded to float32 as transformers
        does. Only the power is taken in float64: numpy's float32 power is off by a unit in the
        last place at every fifth entry or so, and rounding the float64 one is what torch gives
        (the odd entry aside, where torch itself is one unit off).
        """
        exponents = np.arange(0, self.rotary_dim, 2).astype(np.float32)
        exponents /= np.float32(self.rotary_dim)
        theta = np.float64(np.float32(self.rope_theta))
        powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
        return np.float32(1) / (self.rope_factors(long) * powers)

    def needs_long_factors(self, total_length: int) -> bool:
        """Whether a sequence of this many tokens in all takes the long factors, for all of them.

        The length that counts is the whole sequence's, not a chunk's and not the batch's.
        """
        return (
            self.rope_scaling is not None and total_length > self.original_max_position_embeddings
        )

    def to_dict(self) -> dict[str, Any]:
        """The canonical config, of JSON types only; `from_dict` reads it to an equal object."""
        scaling = self.rope_scaling
        rope_scaling = None
        if scaling is not None:
            rope_scaling = {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factor),
                "long_factor": list(scaling.long_factor),
            }
            if scaling.attention_factor is not None:
                rope_scaling["attention_factor"] = scaling.attention_factor
            if scaling.factor is not None:
                rope_scaling["factor"] = scaling.factor
        return {
            "model_type": "phi3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
            "rope_scaling": rope_scaling,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": self.hidden_act,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
            "dtype": self.dtype,
        }


def _fields_from_json(d: Any) -> dict[str, Any]:
    """Finds each field of `Phi3Config` in a Hugging Face config, wherever the file keeps it."""
    if not isinstance(d, Mapping):
        raise _refusal("the whole file", f"a JSON {type(d).__name__}", "a JSON object")
    _refuse_other_models(d)

    heads = _int("num_attention_heads", _required(d, "num_attention_heads"))
    hidden_size = _int("hidden_size", _required(d, "hidden_size"))
    head_dim = d.get("head_dim")
    if head_dim is None:
        if hidden_size % heads:
            raise _refusal(
                "hidden_size",
                f"{hidden_size} for {heads} attention heads",
                "a multiple of num_attention_heads, or a head_dim beside it",
            )
        head_dim = hidden_size // heads
    key_value_heads = d.get("num_key_value_heads")
    eos = d.get("eos_token_id", _DEFAULT_EOS)
    if eos is None:
        eos = []

    rope_dicts = _rope_dicts(d)

    def anywhere(field: str) -> list[tuple[str, Any]]:
        inside = [(f"{at}.{field}", rope.get(field)) for at, rope in rope_dicts]
        return [(field, d.get(field)), *inside]

    rope_scaling = _rope_scaling(rope_dicts)
    original_max = None
    if rope_scaling is not None:
        original_max = _agreed(
            anywhere("original_max_position_embeddings"), _int, _DEFAULT_ORIGINAL_MAX
        )
    return {
        "vocab_size": _required(d, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _required(d, "intermediate_size"),
        "num_hidden_layers": _required(d, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if key_value_heads is None else key_value_heads,
        "head_dim": head_dim,
        "max_position_embeddings": d.get("max_position_embeddings", _DEFAULT_MAX_POSITIONS),
        "original_max_position_embeddings": original_max,
        "rms_norm_eps": d.get("rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
        "rope_theta": _agreed(anywhere("rope_theta"), _theta, _DEFAULT_ROPE_THETA),
        "partial_rotary_factor": _agreed(anywhere("partial_rotary_factor"), _fraction, 1.0),
        "rope_scaling": rope_scaling,
        "sliding_window": d.get("sliding_window"),
        "tie_word_embeddings": d.get("tie_word_embeddings", False),
        "hidden_act": d.get("hidden_act", "silu"),
        "bos_token_id": d.get("bos_token_id", _DEFAULT_BOS),
        "eos_token_ids": eos if isinstance(eos, list | tuple) else [eos],
        "pad_token_id": d.get("pad_token_id", _DEFAULT_PAD),
        "dtype": _agreed([(key, d.get(key)) for key in ("dtype", "torch_dtype")], _dtype),
    }


def _refuse_other_models(d: Mapping[str, Any]) -> None:
    """Refuses what would load and then compute something else than the checkpoint means."""
    model_type = _required(d, "model_type")
    if model_type != "phi3":
        known = isinstance(model_type, str) and model_type in _OTHER_ARCHITECTURES
        what = f" ({_OTHER_ARCHITECTURES[model_type]}: another architecture)" if known else ""
        raise _refusal("model_type", _show(model_type) + what, _SUPPORTED)
    for field in ("attention_bias", "mlp_bias", "lm_head_bias"):
        if d.get(field) is not None and _bool(field, d[field]):
            raise _refusal(field, "true", "false, null or nothing")
    if d.get("quantization_config") is not None:
        quantization = d["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise _refusal(
            "quantization_config",
            _show(method or quantization),
            "null or nothing: an unquantized checkpoint (phi3c quantizes it itself)",
        )


def _rope_dicts(d: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects that hold rotary settings, each with its name in the file."""
    found = []
    for at in ("rope_scaling", "rope_parameters"):
        rope = d.get(at)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise _refusal(at, _show(rope), "an object or null")
        for key, value in rope.items():
            if isinstance(value, Mapping):
                raise _refusal(f"{at}.{key}", "an object", "one set of values for all layers")
        for key in ("short_mscale", "long_mscale"):
            if rope.get(key) is not None:
                raise _refusal(
                    f"{at}.{key}",
                    _show(rope[key]),
                    "null or nothing: it belongs to Phi-3-small and Phi-3.5-MoE, "
                    f"other architectures than {_SUPPORTED}",
                )
        found.append((at, rope))
    return found


def _rope_scaling(rope_dicts: list[tuple[str, Mapping[str, Any]]]) -> RopeScaling | None:
    types = [
        (f"{at}.{key}", rope.get(key)) for at, rope in rope_dicts for key in ("rope_type", "type")
    ]
    values = {
        key: [(f"{at}.{key}", rope.get(key)) for at, rope in rope_dicts] for key in _LONGROPE_KEYS
    }
    if _agreed(types, _rope_type, "default") == "default":
        for path, value in (place for places in values.values() for place in places):
            if value is not None:
                raise _refusal(
                    path, f"{_show(value)} without a scaling rope_type", "it beside 'longrope'"
                )
        return None

    short_factor = _agreed(values["short_factor"], _factors)
    long_factor = _agreed(values["long_factor"], _factors)
    for field, factors in (("short_factor", short_factor), ("long_factor", long_factor)):
        if factors is None:
            named = {value for _, value in types if value is not None}
            if named == {"yarn"}:  # the real YaRN, not what old Phi-3 files called so
                raise _refusal(
                    "rope_type",
                    f"'yarn' without {field}",
                    f"{_ROPE_TYPES}; 'yarn' only with short_factor and long_factor",
                )
            raise _refusal(field, "nothing", "a list of rotary_dim / 2 positive numbers")
    return RopeScaling(
        short_factor=short_factor,
        long_factor=long_factor,
        attention_factor=_agreed(values["attention_factor"], _positive),
        factor=_agreed(values["factor"], _positive),
    )
