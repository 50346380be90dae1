"""What a checkpoint's `generation_config.json` says about sampling and about where to stop.

The values are those that transformers' `generate` would use: greedy unless `do_sample` is true,
and `top_k` 50 where a sampling file leaves it out. Beam search, penalties and length limits of
that file are not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3c.engine.sampler import SamplingParams
from phi3c.errors import CheckpointError, InputError

__all__ = ["generation_defaults", "generation_eos_token_ids", "read_json_object"]

_FILE = "generation_config.json"
_GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
_SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0}


def generation_defaults(folder: str | Path) -> dict[str, Any]:
    """Keyword arguments for `SamplingParams`: temperature, top_p, top_k and min_p.

    No file, or one without `do_sample: true`, means greedy.
    """
    path = Path(folder) / _FILE
    config = read_json_object(path)
    do_sample = config.get("do_sample")
    if do_sample not in (None, True, False):
        raise CheckpointError(f"{path}: do_sample: found {do_sample!r}; accepted: true or false")
    if not do_sample:
        return dict(_GREEDY)
    found = {name: config[name] for name in _SAMPLING if config.get(name) is not None}
    try:
        SamplingParams(**(_SAMPLING | found))
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return _SAMPLING | found


def generation_eos_token_ids(folder: str | Path) -> frozenset[int]:
    """The end-of-sequence ids of the file, one or many; empty where it names none."""
    path = Path(folder) / _FILE
    found = read_json_object(path).get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise CheckpointError(
                f"{path}: eos_token_id: found {found!r}; accepted: a token id, or a list of them"
            )
    return frozenset(ids)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file; CheckpointError for anything else."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found {type(value).__name__}; accepted: a JSON object")
    return value
