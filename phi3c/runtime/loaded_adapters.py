"""The adapters of a loaded model: kept packed in memory, and written to slots when they are used.

`load` may be called beside a running model, in another thread: it touches nothing that is shared
until everything is read and packed, and then only the table of names. Slots are written by
`acquire` alone, which belongs to the thread that runs forwards.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.layout import TARGETS, AdapterLayout
from ..adapters.packed import PackedAdapter, pack_adapter
from ..adapters.peft_files import adapter_folder, read_adapter
from ..config import Phi3Config
from ..errors import AdapterError
from .adapter_pools import AdapterPools
from .adapter_slots import AdapterSlots


@dataclass(frozen=True)
class Adapter:
    """A loaded LoRA adapter.

    generation: a number of its own, also where a name is loaded again; rank: the largest of its
    linears'; bytes: of memory that keeps it, beside its slot; layers, targets: those where it
    changes something; digest: sha256 of its contents.
    """

    name: str
    generation: int
    rank: int
    pinned: bool
    bytes: int
    layers: tuple[int, ...]
    targets: tuple[str, ...]
    digest: str


class LoadedAdapters:
    """layout: None for an artifact without slots, which refuses every call but `adapters`."""

    def __init__(
        self, config: Phi3Config, layout: AdapterLayout | None, pools: AdapterPools | None
    ):
        self._config = config
        self._layout = layout
        self._pools = pools
        self._slots = AdapterSlots(layout.max_loras if layout else 0)
        self._loaded: dict[str, tuple[Adapter, PackedAdapter]] = {}
        self._lock = threading.Lock()

    def load(self, source: str | Path, name: str, pinned: bool = False) -> Adapter:
        """Reads a folder or repo id. Raises AdapterError, and CheckpointError of the hub's; nothing
        has changed then."""
        layout = self._with_slots()
        if not isinstance(name, str) or not name:
            raise AdapterError(f"adapter name: found {name!r}; accepted: a string, not empty")
        if not isinstance(pinned, bool):
            raise AdapterError(f"pinned: found {pinned!r}; accepted: true or false")
        with self._lock:
            self._slots.check_load(name, pinned)  # before the work, and again after it
        folder = adapter_folder(source)
        weights = read_adapter(folder, self._config, layout.max_rank)
        try:
            packed = pack_adapter(weights, layout.dtype)
        except AdapterError as err:
            raise AdapterError(f"{folder}: {err}") from None
        covered = {target for _, target in packed.pairs}
        with self._lock:
            adapter = Adapter(
                name,
                self._slots.load(name, pinned),
                packed.rank,
                pinned,
                packed.bytes,
                tuple(sorted({layer for layer, _ in packed.pairs})),
                tuple(target for target in TARGETS if target in covered),
                weights.digest,
            )
            self._loaded[name] = adapter, packed
        return adapter

    def unload(self, name: str) -> None:
        """Raises AdapterError for an unknown name, AdapterInUseError while a request holds it."""
        self._with_slots()
        with self._lock:
            slot = self._slots.unload(name)
            del self._loaded[name]
            if slot is not None:
                self._pools.clear(slot)

    def adapters(self) -> Sequence[Adapter]:
        """In the order of loading."""
        with self._lock:
            return [adapter for adapter, _ in self._loaded.values()]

    def hold(self, name: str) -> Adapter:
        """It stays loaded until `drop`. Raises AdapterError."""
        self._with_slots()
        with self._lock:
            self._slots.hold(name)
            return self._loaded[name][0]

    def drop(self, name: str) -> None:
        """A request that held it has ended."""
        with self._lock:
            self._slots.drop(name)

    def acquire(self, name: str) -> int | None:
        """The slot of an adapter for one more request, written now unless it is there.

        None where every slot is in use or pinned. Not during a forward. Raises AdapterError.
        """
        self._with_slots()
        with self._lock:
            grant = self._slots.acquire(name)
            if grant is None:
                return None
            slot, must_write = grant
            if must_write:
                try:
                    self._pools.write_packed(slot, self._loaded[name][1])
                except BaseException:
                    self._slots.release(name)
                    raise
                self._slots.wrote(name)
            return slot

    def release(self, name: str) -> None:
        """A request that acquired it is done. Raises AdapterError."""
        self._with_slots()
        with self._lock:
            self._slots.release(name)

    def _with_slots(self) -> AdapterLayout:
        if self._layout is None:
            raise AdapterError(
                "adapters: found an artifact compiled with max_loras 0; accepted: with max_loras 1 "
                "or more"
            )
        return self._layout
