"""Downloading checkpoints: from a small hub of our own, through huggingface_hub itself."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import constants, file_download, snapshot_download
from huggingface_hub.utils import tqdm as hub_tqdm
from safetensors.numpy import save

from phi3c.config import Phi3Config
from phi3c.errors import CheckpointError, ConfigError
from phi3c.hub import download, download_files
from phi3c.sources import TEXT_FILES, resolve_source
from phi3c.weights import checkpoint_shapes

REPO = "owner/tiny"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONFIG = (Path(__file__).parent.parent / "configs" / "tiny.json").read_bytes()
TEXT = {
    "config.json": CONFIG,
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"model_max_length": 256}',  # equal files are fetched once
}
# What real repos have beside, none of it needed.
OTHERS = {
    ".gitattributes": b"x",
    "README.md": b"# A model",
    "configuration_phi3.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "pytorch_model-00001-of-00002.bin": b"pickle",
    "consolidated.safetensors": b"the same once more",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "original/tokenizer.json": b"{}",
    "phi3.Q4_K.gguf": b"GGUF",
}


class FakeHub:
    """One repo, REPO, as the hub serves it. Attributes may be changed while it serves."""

    def __init__(self) -> None:
        self.files = {**TEXT, SINGLE: os.urandom(5000)}
        self.commit = "a" * 40
        self.refuse_api: tuple[int, dict[str, str], bytes] | None = None
        self.refuse_files: tuple[int, dict[str, str], bytes] | None = None
        self.cuts: dict[str, list[int]] = {}  # file → after how many bytes its next GETs are cut
        self.requests: list[tuple[str, str, str | None]] = []  # method, file or path, Range
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def fetched(self) -> list[str]:
        """Files whose bytes were asked for, in order."""
        return [file for method, file, _ in self.requests if method == "GET" and file in self.files]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        match = re.fullmatch(rf"/{REPO}/resolve/(main|{self.commit})/(.+)", path)
        name = match[2] if match else path
        if path != "/api/agent-harnesses":  # huggingface_hub's own, for its User-Agent header
            self.requests.append((request.command, name, request.headers["Range"]))
        if path.startswith("/api/models/"):
            status, headers, body = self.refuse_api or self._describe(path)
        elif self.refuse_files:
            status, headers, body = self.refuse_files
        else:
            status, headers, body = self._file(name, request.headers["Range"])
        cuts = self.cuts.get(name, []) if request.command == "GET" else []
        sent = body[: cuts.pop(0)] if cuts else body
        request.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(sent)
        request.close_connection = len(sent) < len(body)

    def _describe(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if path != f"/api/models/{REPO}":
            return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        siblings = []
        for name, content in self.files.items():
            file = {"rfilename": name, "size": len(content), "blobId": etag("", content)}
            if name.endswith(".safetensors"):
                sha256 = etag(name, content)
                file["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(file)
        description = {"id": REPO, "sha": self.commit, "siblings": siblings}
        return 200, {"Content-Type": "application/json"}, json.dumps(description).encode()

    def _file(self, name: str, ranged: str | None) -> tuple[int, dict[str, str], bytes]:
        headers = {"X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        if name not in self.files:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        content = self.files[name]
        headers["ETag"] = f'"{etag(name, content)}"'
        if ranged is None:
            return 200, headers, content
        start = int(re.fullmatch(r"bytes=(\d+)-", ranged)[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return 206, headers, content[start:]


def etag(name: str, content: bytes) -> str:
    digest = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1
    return digest(content).hexdigest()


def index_of(*files: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor{i}": f for i, f in enumerate(files)}}).encode()


def shard(hub: FakeHub) -> None:
    """Two shards and an index in place of the one weight file."""
    del hub.files[SINGLE]
    hub.files |= {SHARDS[1]: os.urandom(4000), SHARDS[0]: os.urandom(6000)}
    hub.files[INDEX] = index_of(*SHARDS, SHARDS[0])


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for huggingface_hub, which has read the environment already."""
    folder = tmp_path / "hf" / "hub"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its retries
    return folder


@pytest.fixture
def hub(cache, monkeypatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    point_at(hub.url, monkeypatch)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def point_at(endpoint: str, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def unplug(monkeypatch) -> str:
    """No network from here on. Returns the host that cannot be reached."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    point_at(f"http://{host}", monkeypatch)
    return host


def refused(*parts: str, repo_id: str = REPO) -> None:
    """Asserts that the download is refused in one line that has all parts."""
    with pytest.raises(CheckpointError) as error:
        download(repo_id, TEXT_FILES)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert error.value.__suppress_context__ or error.value.__context__ is None


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


# What is downloaded


@pytest.mark.parametrize("sharded", [False, True])
def test_only_needed_files_are_asked_for(hub, sharded):
    if sharded:
        shard(hub)
    needed = set(hub.files)
    hub.files |= OTHERS
    folder = download(REPO, TEXT_FILES)
    assert names(folder) == needed
    for name in needed:
        assert (folder / name).read_bytes() == hub.files[name]
    assert sorted(hub.fetched()) == sorted(needed)  # each once
    asked = {name for _, name, _ in hub.requests}
    assert asked == needed | {f"/api/models/{REPO}"}


def test_an_index_goes_before_a_single_file(hub):
    single = hub.files[SINGLE]
    shard(hub)
    hub.files[SINGLE] = single
    folder = download(REPO, TEXT_FILES)
    assert SINGLE not in hub.fetched() and set(SHARDS) <= names(folder)


def test_config_comes_first_and_weights_last(hub):
    shard(hub)
    download(REPO, TEXT_FILES)
    order = hub.fetched()
    assert order[:2] == ["config.json", INDEX]
    assert tuple(order[-2:]) == SHARDS


def test_the_folder_is_a_checkpoint(hub):
    config = Phi3Config.from_dict(json.loads(CONFIG))
    shapes = checkpoint_shapes(config)
    hub.files[SINGLE] = save({name: np.ones(shape, np.float16) for name, shape in shapes.items()})
    source = resolve_source(REPO)
    assert source.config == config
    assert source.weights().tensor("model.norm.weight").shape == (config.hidden_size,)
    assert source.text_files() == TEXT


def test_a_second_download_asks_for_nothing(hub):
    folder = download(REPO, TEXT_FILES)
    hub.requests.clear()
    assert download(REPO, TEXT_FILES) == folder
    assert [name for _, name, _ in hub.requests] == [f"/api/models/{REPO}"]


def test_a_new_commit_brings_only_what_changed(hub, monkeypatch):
    old = download(REPO, TEXT_FILES)
    hub.requests.clear()
    hub.commit = "b" * 40
    hub.files["tokenizer.json"] = b'{"model": {"new": 1}}'
    disk_has(20 + len(hub.files["tokenizer.json"]), monkeypatch)
    folder = download(REPO, TEXT_FILES)
    assert folder != old and names(folder) == set(hub.files)
    assert hub.fetched() == ["tokenizer.json"]


# Some files of a repo: an adapter's

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def adapter_repo(hub: FakeHub) -> None:
    hub.files = {name: name.encode() for name in ADAPTER}
    hub.files |= {"README.md": b"# An adapter", "adapter_model.bin": b"pickle"}
    hub.files |= {"optimizer.pt": b"pickle", "checkpoint-10/adapter_config.json": b"{}"}


def fetch_adapter() -> Path:
    return download_files(REPO, ADAPTER, "a LoRA adapter")


def test_only_the_files_asked_for(hub):
    adapter_repo(hub)
    folder = fetch_adapter()
    assert names(folder) == set(ADAPTER) and hub.fetched() == list(ADAPTER)
    assert (folder / ADAPTER[1]).read_bytes() == hub.files[ADAPTER[1]]


def test_files_in_the_cache_serve_without_a_network(hub, monkeypatch):
    adapter_repo(hub)
    folder = fetch_adapter()
    host = unplug(monkeypatch)
    assert fetch_adapter() == folder
    (folder / ADAPTER[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{host} cannot .*; {ADAPTER[1]} of {REPO} not in"):
        fetch_adapter()


def test_a_repo_without_a_file(hub):
    adapter_repo(hub)
    del hub.files[ADAPTER[1]]
    with pytest.raises(
        CheckpointError, match=r"no adapter_model.safetensors .*\(but adapter_model.b"
    ):
        fetch_adapter()
    del hub.files[ADAPTER[0]]
    with pytest.raises(CheckpointError, match="no adapter_config.json in the repo; accepted: the "):
        fetch_adapter()
    assert hub.fetched() == []


# What is refused before any weight is downloaded


def refused_without_weights(hub: FakeHub, *parts: str) -> None:
    refused(*parts)
    assert not [name for _, name, _ in hub.requests if name.endswith((".safetensors", ".bin"))]


def test_another_architecture(hub):
    hub.files["config.json"] = json.dumps({**json.loads(CONFIG), "model_type": "llama"}).encode()
    with pytest.raises(ConfigError, match="model_type: found 'llama'"):
        download(REPO, TEXT_FILES)
    assert hub.fetched() == ["config.json"]


def test_no_config(hub):
    del hub.files["config.json"]
    refused_without_weights(hub, f"{REPO}: no config.json in the repo")


def test_pickles_only(hub):
    del hub.files[SINGLE]
    hub.files |= {"pytorch_model.bin": b"pickle", "consolidated.00.pth": b"pickle"}
    refused_without_weights(hub, "found consolidated.00.pth, a pickle", "accepted: " + SINGLE)


@pytest.mark.parametrize(
    "others, hint", [({}, INDEX), ({"phi.Q4_K.gguf": b"", "onnx/model.bin": b""}, ".gguf files")]
)
def test_no_weights(hub, others, hint):
    del hub.files[SINGLE]
    hub.files |= others
    refused_without_weights(hub, "no weights in the repo; accepted: " + SINGLE, hint)


def test_a_shard_that_the_repo_lacks(hub):
    shard(hub)
    del hub.files[SHARDS[1]]
    refused_without_weights(hub, f"{REPO}: {INDEX} names {SHARDS[1]}, not in the repo")


@pytest.mark.parametrize(
    "name", ["../../evil.safetensors", "/etc/evil.safetensors", "onnx/a.safetensors", "..", 7, None]
)
def test_an_index_that_names_other_folders(hub, name):
    shard(hub)
    hub.files[INDEX] = index_of(SHARDS[0], name)
    refused_without_weights(hub, f"found file {name!r}", "no folders")


def test_an_index_that_names_a_pickle(hub):
    hub.files |= {INDEX: index_of("pytorch_model.bin"), "pytorch_model.bin": b"pickle"}
    refused_without_weights(hub, "found file 'pytorch_model.bin'", "*.safetensors")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"weight_map": []}', b"\xff", b"[" * 100_000])
def test_an_index_that_is_none(hub, content):
    shard(hub)
    hub.files[INDEX] = content
    refused_without_weights(hub, INDEX, "not a weight index")


def test_an_index_without_files(hub):
    shard(hub)
    hub.files[INDEX] = index_of()
    refused_without_weights(hub, INDEX, "names no file")


# The disk


def disk_has(free: int, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))


def test_too_small_a_disk(hub, cache, monkeypatch):
    hub.files[SINGLE] = bytes(30_000_000)
    disk_has(20_000_000, monkeypatch)
    refused_without_weights(hub, "0.03 GB are still", str(cache), "has 0.02 GB free")


def test_what_is_cached_needs_no_space(hub, monkeypatch):
    shard(hub)
    hub.cuts[SHARDS[1]] = [0] * 6  # the first try and all retries
    refused("cannot be reached")
    hub.requests.clear()
    disk_has(len(hub.files[SHARDS[1]]) - 1, monkeypatch)
    refused_without_weights(hub, "still to be downloaded")
    disk_has(len(hub.files[SHARDS[1]]), monkeypatch)
    download(REPO, TEXT_FILES)
    assert hub.fetched() == [SHARDS[1]]


def test_a_disk_that_fills_up(hub, cache, monkeypatch):
    http_get = file_download.http_get

    def fill(url, file, **kwargs):
        if url.endswith(SINGLE):
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return http_get(url, file, **kwargs)

    monkeypatch.setattr(file_download, "http_get", fill)
    refused(str(cache), os.strerror(errno.ENOSPC))
    assert SINGLE not in names(cache)
    assert b"half" not in [path.read_bytes() for path in cache.rglob("*") if path.is_file()]


def test_a_cache_that_is_a_file(hub, cache):
    cache.parent.mkdir()
    cache.write_text("")
    refused(str(cache))


# Interruptions


def test_a_cut_download_goes_on_where_it_was_cut(hub):
    hub.cuts[SINGLE] = [3000, 1000]
    folder = download(REPO, TEXT_FILES)
    assert (folder / SINGLE).read_bytes() == hub.files[SINGLE]
    ranges = [r for method, name, r in hub.requests if (method, name) == ("GET", SINGLE)]
    assert ranges == [None, "bytes=3000-", "bytes=4000-"]


def test_an_interrupted_download_keeps_whole_files_and_no_half_ones(hub, cache):
    shard(hub)
    hub.cuts[SHARDS[1]] = [2000] + [0] * 6
    refused("no network: 127.0.0.1:", "cannot be reached")
    assert SHARDS[0] in names(cache) and SHARDS[1] not in names(cache)
    hub.requests.clear()
    hub.cuts.clear()
    folder = download(REPO, TEXT_FILES)
    assert hub.fetched() == [SHARDS[1]]
    assert (folder / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]


# Without a network


def test_no_network_and_no_cache(cache, monkeypatch):
    host = unplug(monkeypatch)
    refused(
        f"no network: {host} cannot be reached",
        f"{REPO}: no such folder, and not in the cache {cache}",
    )


def test_no_network_and_a_whole_cache(hub, monkeypatch):
    shard(hub)
    folder = download(REPO, TEXT_FILES)
    unplug(monkeypatch)
    assert download(REPO, TEXT_FILES) == folder


def test_no_network_and_half_a_cache(hub, cache, monkeypatch):
    folder = download(REPO, TEXT_FILES)
    (folder / SINGLE).unlink()
    host = unplug(monkeypatch)
    refused(f"no network: {host} cannot", f"; {SINGLE} of {REPO} not in the cache {cache}")


def test_no_network_halfway(hub, monkeypatch):
    list_files = hub._describe

    def list_and_vanish(path):
        unplug(monkeypatch)
        return list_files(path)

    hub._describe = list_and_vanish
    refused("no network: 127.0.0.1:", "cannot be reached")


def test_offline_and_a_whole_cache(hub, monkeypatch):
    folder = download(REPO, TEXT_FILES)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(REPO, TEXT_FILES) == folder
    assert hub.requests == []


def test_offline_and_no_cache(hub, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set", f"{REPO}: no such folder, and not in the cache {cache}")
    assert hub.requests == []


def test_offline_and_half_a_cache(hub, cache, monkeypatch):
    shard(hub)
    folder = download(REPO, TEXT_FILES)
    for name in SHARDS:
        (folder / name).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set", f"{SHARDS[0]} and 1 more of {REPO} not in the cache {cache}")


def test_offline_uses_the_newest_whole_folder(hub, monkeypatch):
    folder = download(REPO, TEXT_FILES)
    hub.commit, hub.files[SINGLE] = "b" * 40, os.urandom(3000)
    hub.cuts[SINGLE] = [0] * 6
    refused("cannot be reached")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(REPO, TEXT_FILES) == folder


def test_offline_after_another_tool_has_downloaded_all(hub, monkeypatch):
    tree = [
        {"type": "file", "path": name, "size": len(content), "oid": etag("", content)}
        for name, content in hub.files.items()
    ]
    describe = hub._describe

    def with_tree(path):
        if "/tree/" in path:
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        return describe(path.removesuffix("/revision/main"))

    hub._describe = with_tree
    folder = snapshot_download(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(REPO, TEXT_FILES) == Path(folder)


# What the hub refuses


@pytest.mark.parametrize("status", [404, 401])  # 401: absent or private, to who is not logged in
def test_no_such_repo(hub, status):
    hub.refuse_api = (status, {"X-Error-Code": "RepoNotFound"}, b"")
    refused(f"{REPO}: no such folder, nor such a repo at {hub.url}", "private", "hf auth login")
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    "repo_id",
    ["a/b/c", "-a/b", "a/b--c", "a/b..c", "a/b.git", "a/" + "b" * 100, "a b/c", "", "é/b"],
)
def test_no_repo_id(hub, repo_id):
    refused(f"{repo_id!r}: not a repo id; accepted: owner/name", repo_id=repo_id)
    assert hub.requests == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repo(hub, status):
    hub.refuse_files = (status, {"X-Error-Code": "GatedRepo"}, b"")
    refused(
        f"{REPO}: a gated repo",
        f"accept its terms at {hub.url}/{REPO}",
        "hf auth login",
        "HF_TOKEN",
    )
    assert hub.fetched() == []


def test_a_gated_repo_that_is_cached(hub):
    folder = download(REPO, TEXT_FILES)
    hub.refuse_api = hub.refuse_files = (403, {"X-Error-Code": "GatedRepo"}, b"")
    assert download(REPO, TEXT_FILES) == folder


def test_a_token_that_is_not_valid(hub):
    message = "Invalid credentials in Authorization header"
    hub.refuse_api = (401, {"X-Error-Message": message}, b"")
    refused("refused the token (401)", "hf auth login")


def test_the_token_is_sent(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    seen = []
    answer = hub._answer
    hub._answer = lambda request: (seen.append(request.headers["Authorization"]), answer(request))
    download(REPO, TEXT_FILES)
    assert set(seen) == {"Bearer hf_test"}


@pytest.mark.parametrize("part", ["refuse_api", "refuse_files"])
@pytest.mark.parametrize(
    "status, headers, body, message",
    [
        (500, {}, b"Out\nof order", "HTTP 500: Out of order"),
        (503, {}, b"", "HTTP 503"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, b"", "disabled"),
        (429, {}, b"", "(429): try again later"),
        (429, {"Retry-After": "7"}, b"", "(429): try again in 7 s"),
    ],
)
def test_other_refusals(hub, part, status, headers, body, message):
    setattr(hub, part, (status, headers, body))
    if part == "refuse_files":
        message = message.partition(":")[0]  # asked by HEAD, which brings no body
    refused(message, hub.url)


def test_a_broken_hub_and_a_whole_cache(hub):
    folder = download(REPO, TEXT_FILES)
    hub.refuse_api = (500, {}, b"")
    assert download(REPO, TEXT_FILES) == folder


@pytest.mark.parametrize("body", [b"<html>Log in</html>", b"[]", b"{}", b'{"id": "owner/tiny"}'])
def test_a_server_that_is_no_hub(hub, body):
    hub.refuse_api = (200, {}, body)
    refused(hub.url, "does not answer as a Hugging Face hub")


def test_files_without_the_headers_of_a_hub(hub):
    hub.refuse_files = (200, {}, b"<html>Log in</html>")
    refused(hub.url, "does not answer as a Hugging Face hub")


def test_a_failure_of_xet(hub, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Data processing error:\nCAS service error")

    monkeypatch.setattr(file_download, "http_get", fail)
    refused(f"{REPO}: Data processing error: CAS service error")


# What is printed


class Terminal(io.StringIO):
    def __init__(self, is_one: bool):
        super().__init__()
        self.isatty = lambda: is_one


@pytest.fixture
def warnings_of_hub() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("is_terminal, disabled", [(True, None), (True, True), (False, None)])
def test_progress_is_for_terminals_only(hub, monkeypatch, is_terminal, disabled, warnings_of_hub):
    # The module of this name is hidden by the class of this name.
    module = sys.modules[hub_tqdm.__module__]
    monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", disabled)
    monkeypatch.setattr(sys, "stderr", Terminal(is_terminal))
    warning = {"X-HF-Warning": "auth; You are sending unauthenticated requests"}
    file = hub._file
    hub._file = lambda *args: (lambda status, headers, body: (status, headers | warning, body))(
        *file(*args)
    )
    hub.cuts[SINGLE] = [3000]  # huggingface_hub warns that it resumes
    download(REPO, TEXT_FILES)
    assert (SINGLE in sys.stderr.getvalue()) is (is_terminal and not disabled)
    assert warnings_of_hub == []
    assert logging.getLogger("huggingface_hub").level == logging.WARNING


def run(*args: str, hub: FakeHub, home: Path, **env: str) -> subprocess.CompletedProcess:
    ours = ("HF_", "TRANSFORMERS_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    env = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), **env}
    return subprocess.run(
        [sys.executable, "-m", "phi3c", *args], env=env, capture_output=True, text=True, timeout=300
    )


def test_the_command_line_says_it_in_one_line(hub, tmp_path):
    home = tmp_path / "home"
    done = run("compile", "owner/absent", "-o", str(tmp_path / "out"), hub=hub, home=home)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert f"owner/absent: no such folder, nor such a repo at {hub.url}" in done.stderr
    assert not (tmp_path / "out").exists()
