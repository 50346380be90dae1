"""The memory of intermediate results: planned once, and shared by the functions of an artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import phi3c
from phi3c.artifact import Artifact

ROOT = Path(__file__).parent.parent
CHUNK = 2048

# Anonymous bytes after each function has run with as many tokens as it takes.
SCRIPT = """
import json, sys
from pathlib import Path
import phi3c

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

model = phi3c.load(sys.argv[1], threads=1)
chunk = model.manifest.limits.prefill_chunk_size
cache = model.create_paged_kv_cache(max_total_seq_len=chunk + 64)

def run(name, tokens, *args):
    for _ in range(2):
        cache.add_sequence(0)
        with cache.forward([0], [tokens]):
            getattr(model, name)(model.embed([3] * tokens), *args, cache)
        cache.remove_sequence(0)
    return anonymous()

run("decode", 1)  # what is touched once, whatever runs
first = run("decode", 1)
found = {"prefill": run("prefill", chunk) - first}
for name, tokens, args in (
    ("batch_prefill", chunk, ([chunk - 1],)),
    ("prefill_to_last_hidden_states", chunk, ()),
    ("batch_decode", 1, ()),
    ("decode", 1, ()),
    ("prefill", chunk, ()),
):
    found[name + " again"] = run(name, tokens, *args) - first
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_functions_take_turns_in_one_workspace(tmp_path):
    config = json.loads((ROOT / "configs" / "tiny.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "max_position_embeddings": 4096}
    config |= {"original_max_position_embeddings": 4096, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = dict(prefill_chunk_size=CHUNK, context_length=CHUNK + 64, max_batch_size=2)
    phi3c.compile(tmp_path / "config.json", output=tmp_path / "model", **options)
    planned = {
        name: info.workspace_bytes
        for name, info in Artifact.open(tmp_path / "model").manifest.functions.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(planned, found)
    assert planned["prefill"] > 10e6 > 20 * planned["decode"]
    assert found["prefill"] < 1.3 * planned["prefill"]
    output = CHUNK * 512 * 4  # hidden states are returned, and belong to the caller
    for name, grown in found.items():
        assert grown < found["prefill"] + output + 0.1 * planned["prefill"], name
