"""The artifact on disk: its parameter file, its manifest, and a folder that is whole or not there.

Tests of whole artifacts share two compilations of the same model.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import phi3c
from phi3c.artifact import MANIFEST, Artifact, file_sha256
from phi3c.errors import ArtifactError
from phi3c.manifest import FORMAT_VERSION, SUM, Manifest, contents_sha256
from phi3c.output_folder import check_output, new_folder
from phi3c.tensor_file import ALIGNMENT, map_tensors, write_tensors

TINY = Path(__file__).parent.parent / "configs" / "tiny.json"
PROMPT = [5, 250, 17, 17, 3]


def compile_tiny(output: Path) -> Artifact:
    return phi3c.compile(
        TINY,
        quantization="q0f32",
        output=output,
        max_batch_size=2,
        context_length=64,
        prefill_chunk_size=16,
        max_loras=1,
        max_rank=8,
    )


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> list[Artifact]:
    """The same model compiled twice, to folders of different names."""
    tmp = tmp_path_factory.mktemp("twice")
    return [compile_tiny(tmp / "tiny_model"), compile_tiny(tmp / "deeper" / "another")]


@pytest.fixture
def artifact(twice, tmp_path) -> Artifact:
    """A copy to break."""
    return Artifact.open(shutil.copytree(twice[0].path, tmp_path / "copy"))


def edit_manifest(folder: Path, **changes) -> None:
    """Replaces top-level entries of the manifest, its sum as well."""
    file = folder / MANIFEST
    file.write_text(signed(json.loads(file.read_text()) | changes))


def signed(entries: dict) -> str:
    """The manifest with these entries, and the sum that they have."""
    body = {key: value for key, value in entries.items() if key != SUM}
    return json.dumps(body | {SUM: contents_sha256(body)})


def flip_byte(path: Path, index: int) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(data)


# The parameter file


def arrays_of(specs, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(shape) * 50).clip(0).astype(dtype) for _, shape, dtype in specs]


def tensor_specs():
    """Lists of (name, shape, dtype); sizes both in and out of step with the alignment."""
    shape = st.lists(st.sampled_from([1, 2, 3, 5, 16, 33]), min_size=1, max_size=3).map(tuple)
    spec = st.tuples(
        st.text('abé."\\_ 0', min_size=1, max_size=12).filter(lambda name: name[0] != "_"),
        shape,
        st.sampled_from(["float32", "float16", "uint8"]),
    )
    return st.lists(spec, max_size=6, unique_by=lambda s: s[0])


@settings(max_examples=80, deadline=None)
@given(specs=tensor_specs(), seed=st.integers(0, 99))
def test_tensors_are_mapped_as_they_were_written(specs, seed):
    arrays = arrays_of(specs, seed)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "params.safetensors"
        infos = write_tensors(path, specs, iter(arrays))
        mapped, read = map_tensors(path), load_file(path)
        assert [(i.name, i.shape, i.dtype) for i in infos] == specs
        assert list(mapped) == [name for name, _, _ in specs]
        assert path.stat().st_size % ALIGNMENT == 0
        for info, array in zip(infos, arrays, strict=True):
            for found in (mapped[info.name], read[info.name]):
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array)
            assert mapped[info.name].ctypes.data % ALIGNMENT == 0
        again = Path(tmp) / "again.safetensors"
        write_tensors(again, specs, arrays)
        assert again.read_bytes() == path.read_bytes()


def test_a_tensors_sha256_is_that_of_its_bytes(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    [info] = write_tensors(tmp_path / "p", [("a", (2, 3), "float32")], [array])
    (tmp_path / "raw").write_bytes(array.tobytes())
    assert info.sha256 == file_sha256(tmp_path / "raw")


def test_arrays_are_taken_one_at_a_time(tmp_path):
    """The second is asked for when the first is in the file."""
    specs = [("a", (64,), "uint8"), ("b", (64,), "uint8")]

    def stream():
        yield np.full(64, 7, np.uint8)
        nonlocal taken
        taken = True
        yield np.full(64, 9, np.uint8)

    taken = False
    write_tensors(tmp_path / "p", specs, stream())
    assert taken
    with pytest.raises(ValueError, match="shorter"):
        write_tensors(tmp_path / "p", specs, [np.zeros(64, np.uint8)])
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "p", specs[:1], [np.zeros(64, np.float32)])


def test_writing_to_a_mapped_array_leaves_the_file_alone(tmp_path):
    path = tmp_path / "p"
    write_tensors(path, [("a", (4,), "float32")], [np.ones(4, np.float32)])
    before = path.read_bytes()
    map_tensors(path)["a"][:] = 5
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 20, -64, -1])
def test_a_truncated_parameter_file_is_refused(tmp_path, kept):
    path = tmp_path / "p"
    write_tensors(path, [("a", (40,), "float32")], [np.ones(40, np.float32)])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=str(path)):
        map_tensors(path)


def test_a_parameter_file_with_more_behind_it_is_refused(tmp_path):
    path = tmp_path / "p"
    write_tensors(path, [("a", (16,), "float32")], [np.ones(16, np.float32)])
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="its header tells of"):
        map_tensors(path)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"not json", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
        ([], b""),
        ({"a": 1}, b""),
        ({"a": {"dtype": "F32", "shape": [1]}}, b""),
        (entry(dtype="I99"), b"1234"),
        (entry(shape=[2]), b"1234"),
        (entry(shape="x"), b"1234"),
        (entry(offsets=[0, 5]), b"12345"),
        (entry(offsets=[-4, 0]), b""),
        (entry(offsets=["0", "4"]), b"1234"),
        ({"__metadata__": {"format": "pt"}} | entry(), b"1234"),
    ],
)
def test_a_broken_or_foreign_parameter_file_is_refused(tmp_path, header, data):
    path = tmp_path / "p"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ArtifactError, match=str(path)):
        map_tensors(path)


def test_tensors_that_are_not_aligned_are_refused(tmp_path):
    """Another writer's file: the kernels load whole vectors."""
    path = tmp_path / "p"
    save_file({"a": np.ones(3, np.float32), "b": np.ones(16, np.float32)}, path)
    with pytest.raises(ArtifactError, match="multiple of 64"):
        map_tensors(path)


# The manifest


def test_the_manifest_reads_back(twice):
    manifest = twice[0].manifest
    assert Manifest.from_json(manifest.to_json(), Path("m")) == manifest
    assert manifest.quantization == "q0f32"
    assert manifest.limits.context_length == 64
    assert manifest.kv_layout.layers == manifest.config.num_hidden_layers == 2
    assert manifest.parameters_sha256 == file_sha256(twice[0].parameters)


def test_a_missing_folder_or_manifest_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder"):
        Artifact.open(tmp_path / "none")
    with pytest.raises(ArtifactError, match=f"not a compiled artifact: it has no {MANIFEST}"):
        Artifact.open(tmp_path)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ArtifactError, match="cannot be read"):
        Artifact.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "not the manifest of a phi3c artifact"),
        ("{}", "not the manifest of a phi3c artifact"),
        ('{"manifest_version": 3, "name": "x"}', "not the manifest of a phi3c artifact"),
        ('{"format": "phi3c"}', "format_version: found None; accepted: 5"),
        ('{"format": "phi3c", "format_version": 99}', "found 99; accepted: 5. Make it again"),
        ('{"format": "phi3c", "format_version": 3}', "found 3; accepted: 5. Make it again"),
        ('{"format": "phi3c", "format_version": 5}', "edited by hand or damaged"),
        (signed({"format": "phi3c", "format_version": 5}), "broken manifest"),
        (signed({"format": "phi3c-weights", "format_version": 5}), "not the manifest of a phi3c"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path, text, message):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError) as error:
        Artifact.open(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_a_manifest_that_is_no_text_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Artifact.open(tmp_path)


def test_a_manifest_without_any_of_its_fields_is_refused(twice):
    whole = json.loads(twice[0].manifest.to_json())
    within = [
        (),
        ("target",),
        ("limits",),
        ("kv_layout",),
        ("adapters",),
        ("functions", "prefill"),
        ("functions", "prefill", "inputs", 0),
        ("parameters", 0),
    ]
    for path in within:
        place = whole
        for key in path:
            place = place[key]
        for field in list(place):
            value = place.pop(field)
            for text in [json.dumps(whole)] + [signed(whole)] * (field != SUM):
                with pytest.raises(ArtifactError):
                    Manifest.from_json(text, Path("m"))
            place[field] = value
    assert Manifest.from_json(json.dumps(whole), Path("m")) == twice[0].manifest


@pytest.mark.parametrize("field", ["limits", "kv_layout", "adapters", "functions", "versions"])
def test_a_manifest_edited_by_hand_is_refused(artifact, field):
    file = artifact.path / MANIFEST
    body = json.loads(file.read_text())
    key, value = next(iter(body[field].items()))
    body[field][key] = 4096 if isinstance(value, int) else None
    file.write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="edited by hand or damaged"):
        Artifact.open(artifact.path)


def test_a_manifest_with_a_config_that_is_not_ours_is_refused(artifact):
    config = artifact.manifest.config.to_dict() | {"hidden_act": "gelu"}
    edit_manifest(artifact.path, config=config)
    with pytest.raises(ArtifactError, match="broken manifest.*hidden_act"):
        Artifact.open(artifact.path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_manifest_with_anything_in_a_field_is_read_or_refused(twice, data):
    whole = json.loads(twice[0].manifest.to_json())
    field = data.draw(st.sampled_from(list(whole)))
    whole[field] = data.draw(JSON)
    try:
        Manifest.from_json(signed(whole), Path("m"))
    except ArtifactError as error:
        assert str(error).startswith("m: ")


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "sub/tokenizer.json", "..", ".", ""]
)
def test_a_manifests_files_cannot_leave_the_folder(artifact, name):
    edit_manifest(artifact.path, files={"config.json": "", name: ""})
    with pytest.raises(ArtifactError, match="files"):
        Artifact.open(artifact.path)


# A whole artifact


def test_the_same_inputs_give_the_same_bytes(twice):
    first, second = (
        {p.relative_to(a.path): p.read_bytes() for p in a.path.rglob("*") if p.is_file()}
        for a in twice
    )
    assert set(first) == set(second)
    assert [str(name) for name in first if first[name] != second[name]] == []
    names = {"manifest.json", "model.so", "params.safetensors", "__init__.py"}
    assert names <= {str(name) for name in first}


def test_an_intact_artifact_passes_its_checks(artifact):
    artifact.check_library()
    artifact.check_parameters()
    mapped = artifact.map_parameters()
    assert list(mapped) == [info.name for info in artifact.manifest.parameters]
    assert all(array.ctypes.data % ALIGNMENT == 0 for array in mapped.values())


@pytest.mark.parametrize("index", [0, 1000, -1])
def test_a_flipped_byte_is_found(artifact, index):
    flip_byte(artifact.library, index)
    flip_byte(artifact.parameters, index)
    for check in (artifact.check_library, artifact.check_parameters):
        with pytest.raises(ArtifactError, match="changed: sha256 .* the manifest says"):
            check()


def test_a_changed_library_is_not_loaded(artifact):
    flip_byte(artifact.library, -1)
    with pytest.raises(ArtifactError, match="model.so: changed: sha256"):
        phi3c.load(artifact.path)


def test_missing_files_are_named(artifact):
    artifact.library.unlink()
    with pytest.raises(ArtifactError, match="model.so: cannot be read"):
        phi3c.load(artifact.path)
    artifact.parameters.unlink()
    with pytest.raises(ArtifactError, match="params.safetensors: cannot be read"):
        artifact.check_parameters()
    with pytest.raises(ArtifactError, match="params.safetensors: cannot be read"):
        artifact.map_parameters()


def test_parameters_that_the_manifest_does_not_know_are_refused(artifact):
    [first, *others] = artifact.manifest.parameters
    for wrong in (
        replace(first, shape=(1, *first.shape)),
        replace(first, dtype="float16"),
        replace(first, name="model.other.weight"),
    ):
        manifest = replace(artifact.manifest, parameters=(wrong, *others))
        with pytest.raises(ArtifactError, match=f"{wrong.name}: found .*; the manifest says"):
            Artifact(artifact.path, manifest).map_parameters()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists CPU flags")
def test_an_artifact_for_another_cpu_is_refused(artifact):
    target = json.loads(artifact.manifest.to_json())["target"]
    edit_manifest(artifact.path, target=target | {"cpu_flags": ["no_such_flag"]})
    with pytest.raises(ArtifactError, match="whose no_such_flag this CPU lacks"):
        phi3c.load(artifact.path)


def test_an_artifact_for_another_machine_is_refused(artifact):
    target = json.loads(artifact.manifest.to_json())["target"]
    edit_manifest(artifact.path, target=target | {"mtriple": "riscv64-linux-gnu"})
    with pytest.raises(ArtifactError, match="compiled for riscv64-linux-gnu; this machine is "):
        phi3c.load(artifact.path)


def prefill_logits(model) -> np.ndarray:
    """Of PROMPT's last token."""
    cache = model.create_paged_kv_cache()
    cache.add_sequence(0)
    with cache.forward([0], [len(PROMPT)]):
        logits, _ = model.prefill(model.embed(PROMPT), cache)
    return logits.numpy()


# Names of phi3c's modules that the serve wing may load; all others are blocked.
SERVE_SCRIPT = """
import importlib.abc, json, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        package, _, rest = name.partition(".")
        unit = rest.partition(".")[0]
        if package == "phi3c" and unit not in {
            "", "adapters", "artifact", "config", "cuda", "errors", "hub", "manifest", "memory",
            "runtime", "tensor_file", "triple", "vulkan"
        }:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import tiny_model

assert tiny_model.model is tiny_model.model
assert tiny_model.load(threads=1) is not tiny_model.model
try:
    tiny_model.nothing
except AttributeError as error:
    assert "tiny_model" in str(error)
else:
    raise AssertionError("an attribute out of nowhere")

model = tiny_model.model
cache = model.create_paged_kv_cache()
cache.add_sequence(0)
prompt = json.loads(sys.argv[1])
with cache.forward([0], [len(prompt)]):
    logits, _ = model.prefill(model.embed(prompt), cache)
print(json.dumps(logits.numpy().ravel().tolist()))
"""


def run_python(script: str, *args: str, path: Path, cwd: Path) -> str:
    """The script's output, run by another Python with `path` in front of its modules."""
    root = str(Path(phi3c.__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), root])}
    done = subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, cwd=cwd, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_artifact_is_a_package_that_runs_without_the_compiler(twice, tmp_path):
    folder = twice[0].path
    out = run_python(SERVE_SCRIPT, json.dumps(PROMPT), path=folder.parent, cwd=tmp_path)
    here = prefill_logits(phi3c.load(folder))
    np.testing.assert_array_equal(np.float32(json.loads(out)), here.ravel())


def test_importing_the_package_loads_neither_model_nor_tvm(twice, tmp_path):
    script = "import sys, tiny_model; print('tvm' in sys.modules, 'phi3c' in sys.modules)"
    out = run_python(script, path=twice[0].path.parent, cwd=tmp_path)
    assert out.split() == ["False", "False"]


# Where an artifact may go


def test_new_and_empty_outputs_are_accepted(tmp_path):
    check_output(tmp_path / "new" / "deep")
    check_output(tmp_path)


def test_an_artifact_may_be_replaced_even_of_another_format(artifact):
    check_output(artifact.path)
    edit_manifest(artifact.path, format_version=FORMAT_VERSION + 1)
    check_output(artifact.path)


def test_other_things_are_never_replaced(tmp_path):
    file = tmp_path / "file"
    file.touch()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (file, dangling):
        with pytest.raises(ArtifactError, match="exists and is not a folder"):
            check_output(path)
    # A folder's name must not make its manifest ours.
    for name in ("photos", "format_version"):
        folder = tmp_path / name
        folder.mkdir()
        for manifest in (None, '{"manifest_version": 3}', "not JSON"):
            if manifest is None:
                (folder / "a.jpg").touch()
            else:
                (folder / MANIFEST).write_text(manifest)
            with pytest.raises(ArtifactError, match="is not a phi3c artifact"):
                check_output(folder)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        with new_folder(tmp_path / "out") as folder:
            (folder / "model.so").write_text("half of it")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_success_appears_whole_and_is_readable_by_others(tmp_path):
    output = tmp_path / "deep" / "out"
    with new_folder(output) as folder:
        (folder / "a").write_text("x")
        assert not output.exists()
    assert (output / "a").read_text() == "x"
    assert output.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_an_old_artifact_survives_a_failed_replacement(artifact):
    before = {p.name: p.read_bytes() for p in artifact.path.iterdir()}
    with pytest.raises(RuntimeError):
        with new_folder(artifact.path) as folder:
            (folder / "new").write_text("new")
            raise RuntimeError
    assert {p.name: p.read_bytes() for p in artifact.path.iterdir()} == before
    assert [p.name for p in artifact.path.parent.iterdir()] == [artifact.path.name]


def test_an_old_artifact_survives_when_the_new_one_cannot_be_moved(artifact, monkeypatch):
    rename = Path.rename

    def fail_for_the_new_one(self, target):
        if Path(target) == artifact.path and (self / "new").exists():
            raise OSError("disk trouble")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="disk trouble"):
        with new_folder(artifact.path) as folder:
            (folder / "new").touch()
    Artifact.open(artifact.path).check_library()
    assert [p.name for p in artifact.path.parent.iterdir()] == [artifact.path.name]


def test_a_success_replaces_the_old_artifact_whole(artifact):
    with new_folder(artifact.path) as folder:
        (folder / "only").touch()
        artifact.check_library()  # the old one still works meanwhile
    assert [p.name for p in artifact.path.iterdir()] == ["only"]
    assert [p.name for p in artifact.path.parent.iterdir()] == [artifact.path.name]


def test_an_empty_folder_becomes_the_artifact(tmp_path):
    output = tmp_path / "empty"
    output.mkdir()
    with new_folder(output) as folder:
        (folder / "a").touch()
    assert [p.name for p in output.iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_something_else_at_the_output_stops_the_work_before_it_starts(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ArtifactError):
        with new_folder(tmp_path):
            raise AssertionError("entered")
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_what_lies_beside_an_old_artifact_is_not_lost(artifact):
    (artifact.path / "__pycache__").mkdir()
    check_output(artifact.path)
    (artifact.path / "notes.txt").touch()
    with pytest.raises(ArtifactError, match="holds notes.txt, which would be lost"):
        check_output(artifact.path)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link") as folder:
        (folder / "a").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_mount_point_is_no_output(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ArtifactError, match="output is a mount point"):
        check_output(tmp_path)


KILLED = """
import os, sys
from pathlib import Path
from phi3c.output_folder import new_folder
real, renames = Path.rename, []
def rename(self, target):
    if len(renames) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    renames.append(target)
    return real(self, target)
Path.rename = rename
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "new").touch()
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_an_old_artifact_survives_a_process_killed_while_it_replaces(artifact, renames):
    """The next one that writes there puts it back, and clears up."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(artifact.path), str(renames)])
    assert done.returncode == -9
    assert artifact.path.exists() == (renames == 0)
    with pytest.raises(RuntimeError):
        with new_folder(artifact.path):
            artifact.check_integrity()
            raise RuntimeError
    assert [p.name for p in artifact.path.parent.iterdir()] == [artifact.path.name]


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(OSError, match="No space left on device: '.*out'"):
        with new_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["__init__.py", "evil.py"])
def test_code_that_was_not_written_is_found(artifact, name):
    artifact.check_integrity()
    with open(artifact.path / name, "a") as file:
        file.write("print('boo')")
    with pytest.raises(ArtifactError, match=name):
        artifact.check_integrity()
