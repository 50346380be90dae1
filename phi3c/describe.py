"""What the commands tell of an artifact and of an answer, as JSON types and as text."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .artifact import Artifact
from .memory import memory
from .weights import checkpoint_shapes

if TYPE_CHECKING:
    from .engine.answer import Answer
    from .readiness import Readiness
    from .verify import Report


def artifact_facts(artifact: Artifact, max_total_seq_len: int) -> dict[str, Any]:
    """All sizes are in bytes. max_total_seq_len: tokens that the KV cache is to hold."""
    manifest = artifact.manifest
    config, kv = manifest.config.to_dict(), manifest.kv_layout
    rope = config.pop("rope_scaling")
    config["rope_type"] = "default" if rope is None else rope["rope_type"]
    needed = memory(manifest, max_total_seq_len)
    return {
        "path": str(artifact.path),
        "model": config,
        "quantization": manifest.quantization,
        "target": asdict(manifest.target),
        "limits": asdict(manifest.limits),
        "parameters": {
            "count": sum(map(math.prod, checkpoint_shapes(manifest.config).values())),
            "bytes": _size(artifact, artifact.parameters.name),
        },
        "kv_cache": {
            "dtype": kv.dtype,
            "bytes_per_token": kv.bytes_per_token,
            "max_total_seq_len": max_total_seq_len,
            "bytes": needed.kv_cache,
        },
        "merged_adapter": manifest.merged_adapter and asdict(manifest.merged_adapter),
        "adapters": None if manifest.adapters is None else asdict(manifest.adapters),
        "memory": asdict(needed) | {"total": needed.total},
        "functions": {name: asdict(info) for name, info in manifest.functions.items()},
        "versions": manifest.versions,
        "files": {
            file.name: file.stat().st_size
            for file in sorted(artifact.path.iterdir())
            if file.is_file()
        },
    }


def render(facts: dict[str, Any]) -> str:
    """`artifact_facts` as text, one topic a line and one function a line."""
    model, target, kv = facts["model"], facts["target"], facts["kv_cache"]
    limits, parameters = facts["limits"], facts["parameters"]
    heads = f"{model['num_attention_heads']} heads ({model['num_key_value_heads']} kv)"
    rope = f"rope {model['rope_type']}"
    if model["rope_type"] != "default":
        rope += f" from {model['original_max_position_embeddings']}"
    window = model["sliding_window"]
    rows = [
        ("artifact", facts["path"]),
        (
            "model",
            f"{model['model_type']}, {model['num_hidden_layers']} layers, hidden "
            f"{model['hidden_size']}, {heads} of {model['head_dim']}, intermediate "
            f"{model['intermediate_size']}, vocabulary {model['vocab_size']}",
        ),
        (
            "positions",
            f"{model['max_position_embeddings']}, {rope}, "
            + ("no sliding window" if window is None else f"sliding window {window}"),
        ),
        ("quantization", facts["quantization"]),
        ("target", f"{target['name']} ({target['mcpu']}, {target['mtriple']})"),
        ("limits", ", ".join(f"{name} {value}" for name, value in limits.items())),
        ("parameters", f"{parameters['count']:,}, {human_size(parameters['bytes'])}"),
        (
            "KV cache",
            f"{kv['dtype']}, {human_size(kv['bytes_per_token'])} a token, "
            f"{human_size(kv['bytes'])} for {kv['max_total_seq_len']} tokens",
        ),
        ("adapters", _adapters(facts["adapters"], facts["merged_adapter"])),
        (
            "memory",
            ", ".join(f"{name} {human_size(size)}" for name, size in facts["memory"].items()),
        ),
        ("versions", ", ".join(f"{name} {value}" for name, value in facts["versions"].items())),
        ("files", ", ".join(f"{name} {human_size(size)}" for name, size in facts["files"].items())),
    ]
    lines = [f"{name:13}{value}" for name, value in rows]
    lines.append("functions")
    for name, info in facts["functions"].items():
        inputs = ", ".join(_spec(spec) for spec in info["inputs"])
        lines.append(f"  {name}({inputs}), workspace {human_size(info['workspace_bytes'])}")
    return "\n".join(lines)


def answer_facts(answer: Answer) -> dict[str, Any]:
    """Tokens per second are those of the model; null where there is nothing to measure."""

    def rate(tokens: int, seconds: float) -> float | None:
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    output = answer.output
    decoded = len(output.token_ids) - 1  # the first one comes with the prefill
    return {
        "adapter": answer.handle.request.adapter,
        "prompt_tokens": len(answer.handle.prompt_ids),
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "prefill_tokens": answer.prefill_tokens,
        "prefill_seconds": answer.prefill_seconds,
        "prefill_tokens_per_second": rate(answer.prefill_tokens, answer.prefill_seconds),
        "decode_seconds": answer.decode_seconds,
        "decode_tokens_per_second": rate(decoded, answer.decode_seconds),
    }


def render_report(report: Report) -> str:
    """What `phi3c verify` found: a line for each way across each boundary, then the verdict."""
    head = ("boundary", "at", "case", "tokens", "error", "differs at", "")
    rows = [head]
    for check in report.checks:
        differs = "-" if check.differs_at is None else str(check.differs_at)
        verdict = "ok" if check.ok else "WRONG"
        size = (check.boundary, str(check.at), check.case, str(check.tokens))
        rows.append((*size, f"{check.error:.1e}", differs, verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    wrong = sum(not check.ok for check in report.checks)
    verdict = f"{wrong} of {len(report.checks)} wrong" if wrong else "right at every boundary"
    lines.append(
        f"{verdict}: error is of the logit scale, against {report.oracle} in float32; "
        f"accepted: {report.tolerance:g}"
    )
    return "\n".join(lines)


def _adapters(layout: dict[str, Any] | None, merged: dict[str, Any] | None) -> str:
    within = f", {merged['name']} (rank {merged['rank']}) merged into the weights" if merged else ""
    if layout is None:
        return f"no slots{within}"
    return (
        f"{layout['max_loras']} slots of rank {layout['max_rank']}, {layout['dtype']}, "
        f"{human_size(layout['bytes_per_slot'])} a slot{within}"
    )


def _spec(spec: dict[str, Any]) -> str:
    return f"{spec['name']} [{', '.join(map(str, spec['shape']))}] {spec['dtype']}"


def _size(artifact: Artifact, name: str) -> int | None:
    file = artifact.path / name
    return file.stat().st_size if file.is_file() else None


def human_size(size: int | None) -> str:
    """12.3 MiB."""
    if size is None:
        return "missing"
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.1f} {units[0]}" if units[0] != "bytes" else f"{size} bytes"


def render_readiness(found: list[Readiness]) -> str:
    """A line for each target, its devices and what is missing below it."""
    lines = []
    for one in found:
        can = [
            f"{verb}: {'yes' if yes else 'no'}"
            for verb, yes in (("compiles", one.lowers and one.links), ("runs", bool(one.devices)))
        ]
        lines.append(f"{one.target:8} {'  '.join(can)}")
        lines += [f"         {device}" for device in one.devices]
        lines += [f"         missing: {what}" for what in one.missing]
    return "\n".join(lines)
