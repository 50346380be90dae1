"""A loaded artifact: its compiled functions as Python methods."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import tvm
from tvm.runtime import Tensor
from tvm.runtime.vm import VirtualMachine

from ..artifact import Artifact
from ..config import Phi3Config
from ..errors import ArtifactError, InputError
from ..manifest import Manifest
from ..memory import default_cache_tokens, memory
from ..vulkan import KernelTime
from .adapter_pools import AdapterPools
from .device import RunDevice, open_device
from .device_logits import device_rows
from .host import check_cpu
from .kv_cache import PagedKVCache
from .loaded_adapters import Adapter, LoadedAdapters
from .logit_row import LogitRow
from .threads import ThreadPool, check_threads

Array = np.ndarray | Sequence | Tensor


def load(path: str | Path, device: str | None = None, threads: int | None = None) -> CompiledPhi3:
    """Loads an artifact folder.

    device: `cpu`, or `cuda`, `metal` or `vulkan` with or without `:<index>`; None: the first of the
    artifact's own kind. threads: CPU threads, None for all physical cores. Raises ArtifactError
    (broken, changed, not linked, or for another CPU), TargetError (compiled for another kind of
    device), DeviceError (it is not there, or lacks what the kernels need) and OutOfMemoryError
    (weights, workspace and slots for adapters do not fit) before anything of it runs.
    """
    artifact = Artifact.open(path)
    threads = check_threads(threads)
    check_cpu(artifact)
    place = open_device(artifact, device)
    needed = memory(artifact.manifest, max_total_seq_len=0)
    parts = {"weights": needed.weights, "workspace": needed.workspace}
    if needed.adapters:
        parts["adapters"] = needed.adapters
    place.check_memory(str(path), parts)
    if (layout := artifact.manifest.adapters) is not None:
        what = f"adapters: a pool of {layout.max_loras} slots of rank {layout.max_rank}"
        largest = max(layout.pool_shapes(artifact.manifest.config), key=math.prod)
        place.check_buffer(what, largest, layout.dtype)
    artifact.check_library()
    return CompiledPhi3(artifact, threads, place)


class CompiledPhi3:
    """The functions of DESIGN's table. Inputs are numpy arrays, lists or TVM tensors.

    Forward functions run inside `with cache.forward(...)` and return (output, cache); n is the sum
    of that forward's append lengths. Raises InputError for inputs of another shape. Not for two
    Python threads at once; load the artifact twice for that, which shares weights and threads.
    """

    def __init__(self, artifact: Artifact, threads: int, device: RunDevice):
        self.artifact = artifact
        self.threads = threads
        self._device = device
        self._mapped = artifact.map_parameters()
        try:
            library = tvm.runtime.load_module(str(artifact.library))
        except Exception as err:
            reason = str(err).strip().splitlines()[-1]
            raise ArtifactError(f"{artifact.library}: cannot be loaded: {reason}") from None
        self._pool = ThreadPool(artifact.library)
        weakref.finalize(self, self._pool.end)
        self._vm = VirtualMachine(library, device.tvm)
        self._functions = {name: self._vm[name] for name in self.manifest.functions}
        self._parameters = tvm.runtime.convert(device.parameters(self._mapped.values()))
        blocks = self.manifest.limits.listed_blocks(self.manifest.kv_layout.block_tokens)
        # On CUDA, what makes a decode step one launch; None elsewhere.
        self.decode_graphs = device.decode_graphs(library, artifact.library, blocks)

        layout = self.manifest.adapters
        self.adapter_pools = layout and AdapterPools(layout, self.config, device.tvm)
        self._adapters = LoadedAdapters(self.config, layout, self.adapter_pools)

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def config(self) -> Phi3Config:
        return self.manifest.config

    def create_paged_kv_cache(
        self,
        max_batch_size: int | None = None,
        max_total_seq_len: int | None = None,
        prefill_chunk_size: int | None = None,
        page_size: int = 16,
        support_sliding_window: bool = False,
    ) -> PagedKVCache:
        """A cache for max_total_seq_len tokens (a whole number of pages) of all sequences together.

        max_batch_size, prefill_chunk_size: at most, and by default, what the artifact was compiled
        for. max_total_seq_len: by default max_batch_size sequences of the context length, but at
        most 8192 tokens. page_size: a multiple of 16. A model with a sliding window always uses
        it, and pages that have left it are freed; support_sliding_window=True asks for that and is
        refused for a model without one. Raises InputError, and OutOfMemoryError where the machine
        cannot hold the pages.
        """
        limits = self.manifest.limits
        batch = limits.max_batch_size if max_batch_size is None else max_batch_size
        chunk = limits.prefill_chunk_size if prefill_chunk_size is None else prefill_chunk_size
        if max_total_seq_len is None:
            asked = replace(limits, max_batch_size=batch)
            max_total_seq_len = max(default_cache_tokens(asked), page_size)
        return PagedKVCache(
            self.manifest,
            self._device,
            self._copy_slots,
            batch,
            max_total_seq_len,
            chunk,
            page_size,
            support_sliding_window,
        )

    def load_adapter(self, source: str | Path, name: str, pinned: bool = False) -> Adapter:
        """Loads a LoRA adapter that PEFT saved: a folder, or a Hugging Face repo id (owner/name).

        More may be loaded than the artifact has slots: they wait in memory, and one that is
        acquired takes the slot of one that is not in use, the least recently used first. A pinned
        one keeps its slot. Another thread than the one that runs forwards may load. Raises
        AdapterError (files that are broken, not supported or do not fit; a name that is taken; no
        slots), and CheckpointError where the hub does not give the files; nothing has changed then.
        """
        return self._adapters.load(source, name, pinned)

    def unload_adapter(self, name: str) -> None:
        """Forgets a loaded adapter. Raises AdapterError, and AdapterInUseError while it is
        acquired."""
        self._adapters.unload(name)

    def adapters(self) -> Sequence[Adapter]:
        """What is loaded, in the order of loading."""
        return self._adapters.adapters()

    def hold_adapter(self, name: str) -> Adapter:
        """Keeps it loaded until `drop_adapter`, in a slot or not. Raises AdapterError."""
        return self._adapters.hold(name)

    def drop_adapter(self, name: str) -> None:
        """The counterpart of `hold_adapter`."""
        self._adapters.drop(name)

    def acquire_adapter(self, name: str) -> int | None:
        """Puts an adapter into a slot, if it is in none, and keeps it there until it is released
        as often as acquired. Returns the slot, for `cache.forward(token_slot=...)`.

        None where every slot is in use or pinned. Not inside a forward, nor in another thread than
        forwards. Raises AdapterError.
        """
        return self._adapters.acquire(name)

    def release_adapter(self, name: str) -> None:
        """Takes back one acquire. Raises AdapterError if there is none."""
        self._adapters.release(name)

    def embed(self, input_ids: Array) -> Tensor:
        """Token ids `[n]` → `[1, n, hidden]`."""
        ids = self._token_ids(input_ids)
        return self._call("embed", {"input_ids": ids})

    def prefill(self, input_embed: Array, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """One sequence, `[1, n, hidden]` → logits of its last token, `[1, 1, vocab]` float32."""
        return self._forward("prefill", input_embed, cache)

    def decode(self, input_embed: Array, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """One new token of one sequence, `[1, 1, hidden]` → logits `[1, 1, vocab]` float32."""
        return self._forward("decode", input_embed, cache)

    def batch_prefill(
        self, input_embed: Array, logit_positions: Array, cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        """`[1, n, hidden]`, indices into n `[b]` → logits at them, `[1, b, vocab]` float32."""
        n = sum(cache.forward_lengths)
        positions = _integers("logit_positions", logit_positions)
        if positions.size == 0 or positions.min() < 0 or positions.max() >= n:
            raise InputError(
                f"logit_positions: found {positions.tolist()}; accepted: 0 to {n - 1}, at least one"
            )
        if positions.size > self.manifest.limits.max_batch_size:
            raise InputError(
                f"logit_positions: found {positions.size}; accepted: up to "
                f"{self.manifest.limits.max_batch_size} (max_batch_size)"
            )
        return self._forward("batch_prefill", input_embed, cache, logit_positions=positions)

    def batch_decode(self, input_embed: Array, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """One new token of each of b sequences, `[b, 1, hidden]` → `[b, 1, vocab]` float32."""
        return self._forward("batch_decode", input_embed, cache)

    def batch_verify(self, input_embed: Array, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """Draft tokens, chains or trees, `[1, n, hidden]` → logits of each `[1, n, vocab]`."""
        return self._forward("batch_verify", input_embed, cache)

    def prefill_to_last_hidden_states(
        self, input_embed: Array, cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        """As prefill, without the LM head: the final norm of every token, `[1, n, hidden]`."""
        return self._forward("prefill_to_last_hidden_states", input_embed, cache)

    def decode_to_last_hidden_states(
        self, input_embed: Array, cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        """As decode, without the LM head: `[1, 1, hidden]`."""
        return self._forward("decode_to_last_hidden_states", input_embed, cache)

    def batch_prefill_to_last_hidden_states(
        self, input_embed: Array, cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        """As batch_prefill, without the LM head: every token, `[1, n, hidden]`."""
        return self._forward("batch_prefill_to_last_hidden_states", input_embed, cache)

    def batch_decode_to_last_hidden_states(
        self, input_embed: Array, cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        """As batch_decode, without the LM head: `[b, 1, hidden]`."""
        return self._forward("batch_decode_to_last_hidden_states", input_embed, cache)

    def batch_verify_to_last_hidden_states(
        self, input_embed: Array, cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        """As batch_verify, without the LM head: `[1, n, hidden]`."""
        return self._forward("batch_verify_to_last_hidden_states", input_embed, cache)

    def get_logits(self, hidden_states: Array) -> Tensor:
        """The LM head alone: `[..., hidden]`, n rows in all → logits `[1, n, vocab]` float32."""
        hidden = self._activations("hidden_states", hidden_states, "get_logits", None)
        return self._call("get_logits", {"hidden_states": hidden})

    def logit_rows(self, logits: Tensor, whole: Sequence[bool]) -> list[LogitRow]:
        """A forward's logits, row after row, as a sampler looks into them. It waits for them.

        whole: rows that it is going to look at in full; of others it may need the largest alone.
        """
        rows = logits._create_view((1, len(whole), self.config.vocab_size))
        if "block_maxima" not in self._functions:
            return [LogitRow(row) for row in rows.numpy()[0]]
        return device_rows(rows, whole, lambda rows: self._call("block_maxima", {"logits": rows}))

    @contextmanager
    def kernel_times(self) -> Iterator[dict[str, KernelTime]]:
        """Times the kernels that run inside; the dict is filled at the end. Timing costs some time.

        On a GPU they are the kernels of the library, on the CPU the calls of the virtual machine,
        each of one kernel or more; what would be one CUDA graph is launched kernel by kernel.
        """
        with ExitStack() as stack:
            if self.decode_graphs is not None:
                stack.enter_context(self.decode_graphs.paused())
            yield stack.enter_context(self._device.kernel_times(self._vm))

    def _forward(
        self, name: str, input_embed: Array, cache: PagedKVCache, **extra: np.ndarray
    ) -> tuple[Tensor, PagedKVCache]:
        lengths = cache.forward_lengths
        inputs = self.manifest.functions[name].inputs
        if "decode" in name and (max(lengths) > 1 or not cache.forward_is_chain):
            raise InputError(f"{name}: found append lengths {lengths}; accepted: 1 for each")
        if "batch" not in name and len(lengths) != 1:
            raise InputError(f"{name}: found {len(lengths)} sequences; accepted: one")
        embed = self._activations("input_embed", input_embed, name, sum(lengths))
        values = {"input_embed": embed, **extra, **cache.forward_inputs()}
        if (slots := cache.forward_token_slot) is not None:
            ranks = self.adapter_pools.row_ranks(slots)
            if empty := sorted(set(slots[(slots >= 0) & (ranks == 0)].tolist())):
                raise InputError(
                    f"token_slot: found {empty[0]}, an empty slot; accepted: slots of acquired "
                    "adapters, and −1"
                )
            if ranks.any():
                name = f"{name}_with_adapters"
                values |= {"adapter_slot": slots, "adapter_rank": ranks}
                inputs = self.manifest.functions[name].inputs
        given = {s.name: values[s.name] for s in inputs}
        if self.decode_graphs is None or "decode" not in name:
            return self._call(name, given, cache.pages), cache
        lasting = self._lasting(name, cache.pages)
        return self.decode_graphs.run(
            name, given, lasting, cache, lambda: self._call(name, given, cache.pages)
        ), cache

    def _call(self, name: str, inputs: dict[str, np.ndarray | Tensor], pages=None):
        self._pool.use(self.threads)
        info = self.manifest.functions[name]
        given = {spec.name: inputs[spec.name] for spec in info.inputs}
        given |= self._device.inputs(
            {name: value for name, value in given.items() if not isinstance(value, Tensor)}
        )
        args = given.values()
        return self._functions[name](*args, *self._lasting(name, pages))

    def _lasting(self, name: str, pages) -> list:
        """The arguments after the inputs: what stays where it is."""
        info = self.manifest.functions[name]
        lasting = [pages] if info.takes_pages else []
        if info.takes_adapters:
            lasting.append(self.adapter_pools.tensors)
        if info.takes_parameters:
            lasting.append(self._parameters)
        return lasting

    def _copy_slots(self, source: np.ndarray, target: np.ndarray, pages) -> None:
        self._call("copy_slots", {"source": source, "target": target}, pages)

    def _token_ids(self, input_ids: Array) -> np.ndarray:
        ids = _integers("input_ids", input_ids)
        vocab, most = self.config.vocab_size, self.manifest.limits.prefill_chunk_size
        if ids.size == 0:
            raise InputError("input_ids: found no tokens; accepted: at least one")
        if ids.size > most:
            raise InputError(
                f"input_ids: found {ids.size} tokens; accepted: up to {most} at a time "
                "(prefill_chunk_size)"
            )
        outside = (ids < 0) | (ids >= vocab)
        if outside.any():
            raise InputError(
                f"input_ids: found {int(ids[outside][0])}; accepted: 0 to {vocab - 1} (vocab_size)"
            )
        return ids

    def _activations(self, what: str, value: Array, name: str, n: int | None) -> Tensor:
        """`value` in the shape that the function's first input has, for n rows (None: any)."""
        spec = self.manifest.functions[name].inputs[0]
        tensor = value
        if not isinstance(value, Tensor):
            array = np.ascontiguousarray(value, spec.dtype)
            tensor = tvm.runtime.tensor(array, self._device.tvm)
        shape, hidden = tuple(tensor.shape), spec.shape[-1]
        rows = int(np.prod(shape[:-1]))
        n = rows if n is None else n
        most = self.manifest.limits.prefill_chunk_size
        if tensor.dtype != spec.dtype or shape[-1:] != (hidden,) or rows != n or not 0 < n <= most:
            found = f"{list(shape)} {tensor.dtype}"
            raise InputError(f"{what}: found {found}; accepted: [1, {n}, {hidden}] {spec.dtype}")
        wanted = (n, 1, hidden) if spec.shape[1] == 1 else (1, n, hidden)
        return tensor if shape == wanted else tensor._create_view(wanted)


def _integers(what: str, value: Array) -> np.ndarray:
    array = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"{what}: found {array.dtype} of shape {list(array.shape)}; accepted: [n] integers"
        )
    limit = np.iinfo(np.int32)
    return np.clip(array, limit.min, limit.max).astype(np.int32)
