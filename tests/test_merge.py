"""An adapter that is compiled into the weights, beside PEFT's merge_and_unload."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyModel, build
from peft import PeftModel
from test_adapter_files import SPLIT, merged_by_peft, save_adapter
from test_convert import CONFIG, KERNELS, Grouped
from test_gguf import Type, write
from transformers import Phi3ForCausalLM as HFModel

import phi3c
from phi3c.adapters.layout import TARGETS
from phi3c.adapters.peft_files import read_adapter
from phi3c.adapters.weights import AdapterWeights, LowRank
from phi3c.cli import main
from phi3c.errors import AdapterError, CheckpointError
from phi3c.kernels.cpu import layout
from phi3c.merged_weights import MergedWeights
from phi3c.packing import packed_parameters, parameter_specs
from phi3c.quantization.scheme import parse_scheme
from phi3c.sources import resolve_source
from phi3c.weights import RandomWeights

IDS = [3, 150, 7, 42, 42, 198, 1, 77]
LIMITS = dict(max_batch_size=2, context_length=64, prefill_chunk_size=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> TinyModel:
    return build(tmp_path_factory.mktemp("merge"), "base", compile_options=LIMITS)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, r=4, lora_alpha=16, target_modules=list(TARGETS))
    return folder


def logits(model: phi3c.CompiledPhi3) -> np.ndarray:
    """Of the last of IDS."""
    cache = model.create_paged_kv_cache(max_batch_size=1, max_total_seq_len=32)
    cache.add_sequence(0)
    with cache.forward([0], [len(IDS)]):
        return model.prefill(model.embed(IDS), cache)[0].numpy().reshape(-1)


def merged(base: TinyModel, adapter: Path, output: Path, name: str = "q0f32"):
    artifact = phi3c.compile(
        base.folder, quantization=name, output=output, merge_adapter=adapter, **LIMITS
    )
    return phi3c.load(artifact.path)


def test_logits_are_those_of_peft(base, adapter, tmp_path):
    model = PeftModel.from_pretrained(HFModel.from_pretrained(base.folder), adapter)
    oracle = replace(base, oracle=model.merge_and_unload().eval())
    assert np.abs(oracle.last_logits(IDS) - base.last_logits(IDS)).max() > 0.1
    oracle.check(logits(merged(base, adapter, tmp_path / "a")), oracle.last_logits(IDS))


def test_names_of_split_checkpoints(base, tmp_path):
    save_adapter(tmp_path, r=3, target_modules=SPLIT, layers_to_transform=[1])
    oracle = replace(base, oracle=merged_by_peft(base.folder, tmp_path, split=True))
    assert np.abs(oracle.last_logits(IDS) - base.last_logits(IDS)).max() > 0.1
    oracle.check(logits(merged(base, tmp_path, tmp_path / "a")), oracle.last_logits(IDS))


def test_a_config_is_a_source_too(adapter, tmp_path, base):
    config = base.folder / "config.json"
    plain, other = (
        phi3c.compile(config, output=tmp_path / name, merge_adapter=merge, **LIMITS)
        for name, merge in (("plain", None), ("merged", adapter))
    )
    changed = [
        one.name
        for one, two in zip(plain.manifest.parameters, other.manifest.parameters, strict=True)
        if one.sha256 != two.sha256
    ]
    linears = {name.rpartition(".weight")[0].rpartition(".")[2] for name in changed}
    assert linears == set(TARGETS) and len(changed) == 2 * 4 * 2  # quantized values and scales


def test_a_gguf_is_rounded_again_only_where_the_adapter_adds(tmp_path):
    save_adapter(tmp_path, r=4, target_modules=["o_proj"], layers_to_transform=[1])
    source, name = tmp_path / "m.gguf", "model.layers.1.self_attn.o_proj.weight"
    write(source, kind=Type.Q4_0)
    plain, other = (
        phi3c.compile(source, output=tmp_path / out, merge_adapter=merge, **LIMITS)
        for out, merge in (("plain", None), ("merged", tmp_path))
    )
    before, after = plain.map_parameters(), other.map_parameters()
    changed = [one for one in before if not np.array_equal(before[one], after[one])]
    assert changed == [f"{name}.q", f"{name}.scale"]
    kind = parse_scheme("q4f16_1").kind(name)
    low_rank = read_adapter(tmp_path, other.manifest.config).low_rank[1, "o_proj"]
    whole = resolve_source(source).weights().tensor(name) + low_rank.b @ low_rank.a
    found = kind.dequantize(
        layout.unpack_groups(after[changed[0]], kind.bits, 64),
        layout.unpack_scales(after[changed[1]], 64),
    )
    np.testing.assert_array_equal(found, kind.dequantize(*kind.quantize(whole)))


# Rows and blocks


def some_adapter() -> AdapterWeights:
    """Of two of CONFIG's linears."""
    rng = np.random.default_rng(1)

    def low_rank(out_features: int, in_features: int) -> LowRank:
        a = rng.standard_normal((3, in_features), dtype=np.float32)
        return LowRank(a, rng.standard_normal((out_features, 3), dtype=np.float32))

    pair = {(0, "o_proj"): low_rank(96, 96), (0, "gate_up_proj"): low_rank(320, 96)}
    return AdapterWeights(3, pair, "")


@pytest.mark.parametrize("name", ["q0f32", "q0f16", "q4f16_1", "q8f16_1"])
@pytest.mark.parametrize("grouped", [False, True])
def test_linears_are_merged_before_they_are_quantized(name, grouped, monkeypatch):
    monkeypatch.setattr("phi3c.packing._BLOCK_VALUES", 2048)  # several blocks each
    scheme, adapter = parse_scheme(name), some_adapter()
    base = Grouped(CONFIG, 4) if grouped else RandomWeights(CONFIG, 0)
    weights = MergedWeights(base, CONFIG, adapter)
    specs = parameter_specs(CONFIG, scheme, KERNELS)
    arrays = packed_parameters(specs, weights, KERNELS, scheme, lambda done, total: None)
    found = {spec[0]: array for spec, array in zip(specs, arrays, strict=True)}
    deltas = {
        "model.layers.0.self_attn.o_proj.weight": adapter.low_rank[0, "o_proj"],
        "model.layers.0.mlp.gate_up_proj.weight": adapter.low_rank[0, "gate_up_proj"],
    }
    for tensor, shape in base.shapes.items():
        if len(shape) == 1:
            continue
        kept = scheme.rounded(tensor, base.rows(tensor, 0, shape[0]))
        if low_rank := deltas.get(tensor):
            whole = base.tensor(tensor) + low_rank.b @ low_rank.a
            kept = scheme.rounded(tensor, whole)
        if scheme.name.startswith("q0"):
            values = layout.unpack_panels(found[tensor], shape[0])
        else:
            kind = scheme.kind(tensor)
            q = layout.unpack_groups(found[f"{tensor}.q"], kind.bits, shape[0])
            values = kind.dequantize(q, layout.unpack_scales(found[f"{tensor}.scale"], shape[0]))
        # A product may be one bit off in blocks; then a rounding may go the other way.
        off = np.abs(values - kept) > 1e-6 * np.abs(kept).max()
        assert off.mean() < (1e-3 if tensor in deltas else 1e-9), tensor


# What is refused, before any work


def test_converted_weights_are_refused(base, adapter, tmp_path):
    converted = phi3c.convert(base.folder, output=tmp_path / "w")
    for source in (converted.path, base.compiled.artifact.path):
        with pytest.raises(CheckpointError, match="merge_adapter: .*: found weights that are conv"):
            phi3c.compile(source, output=tmp_path / "x", merge_adapter=adapter, **LIMITS)
    assert not (tmp_path / "x").exists()


def test_an_adapter_that_does_not_fit(base, adapter, tmp_path):
    with pytest.raises(AdapterError, match=r"lora_A.weight: found shape \[4, 96\]; accepted: "):
        phi3c.compile(
            Path(__file__).parent.parent / "configs" / "phi-3-mini-4k.json",
            output=tmp_path / "x",
            merge_adapter=adapter,
        )
    assert not (tmp_path / "x").exists()


def test_the_command(base, adapter, tmp_path, capsys):
    out, command = tmp_path / "a", ["compile", str(base.folder), "--quantization", "q0f32"]
    command += ["--max-batch-size", "2", "--context-length", "64", "--prefill-chunk-size", "16"]
    assert main([*command, "-o", str(out), "--merge-adapter", str(adapter)]) == 0
    expected = merged(base, adapter, tmp_path / "b")
    assert (out / "params.safetensors").read_bytes() == (expected.artifact.parameters.read_bytes())
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"no slots, {adapter.name} (rank " in shown and "merged into the weights" in shown
    assert main(["inspect", str(base.compiled.artifact.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merged_adapter"] is None
    again = phi3c.compile(out, quantization="q0f32", output=tmp_path / "again", **LIMITS)
    assert again.manifest.merged_adapter == expected.manifest.merged_adapter
    assert again.manifest.merged_adapter.name == adapter.name
    assert main([*command, "-o", str(out), "--merge-adapter", str(tmp_path / "no")]) == 2
    assert "no: no such folder; accepted: a folder with adapter_config" in capsys.readouterr().err
