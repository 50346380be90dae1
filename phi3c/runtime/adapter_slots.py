"""Which adapter is loaded, in use, and in which slot: bookkeeping without a tensor.

Any number of adapters may be loaded, each under a name. A request holds one by name, so that it
stays loaded. To run, it acquires it as well, which puts it into a slot unless it is there; it stays
there until another needs the place, and that takes the slot that has been idle longest. A pinned
adapter keeps its slot once it has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import AdapterError, AdapterInUseError


@dataclass
class _Entry:
    """written: whether its slot holds it; holders: requests that want it to stay; requests: running
    ones that acquired it; last_use: when the last acquired or released it.
    """

    generation: int
    pinned: bool
    slot: int | None = None
    written: bool = False
    holders: int = 0
    requests: int = 0
    last_use: int = 0


class AdapterSlots:
    """Not thread-safe; names and slots only."""

    def __init__(self, slots: int):
        self._slots = slots
        self._entries: dict[str, _Entry] = {}
        self._free = list(range(slots))[::-1]  # the lowest is taken first
        self._generations = 0
        self._clock = 0

    @property
    def names(self) -> Sequence[str]:
        """Of what is loaded, in the order of loading."""
        return list(self._entries)

    def generation(self, name: str) -> int:
        """A number that no other load has had, of this name or another. Raises AdapterError."""
        return self._entry(name).generation

    def slot(self, name: str) -> int | None:
        """Where it is, None: in no slot. Raises AdapterError."""
        return self._entry(name).slot

    def requests(self, name: str) -> int:
        """How many acquired it and did not release it yet. Raises AdapterError."""
        return self._entry(name).requests

    def check_load(self, name: str, pinned: bool) -> None:
        """Raises AdapterError if `load` would."""
        if name in self._entries:
            raise AdapterError(
                f"adapter {name!r}: found one that is loaded under this name; accepted: another "
                "name, or this one once it is unloaded"
            )
        pins = sum(entry.pinned for entry in self._entries.values()) + pinned
        others = len(self._entries) + 1 - pins
        # One that is not pinned needs a slot that is not either, or it would wait for ever.
        most = self._slots - (others > 0)
        if pins > most:
            beside = " beside those that are not" if others else ""
            raise AdapterError(
                f"adapter {name!r}: found {pins} pinned adapters in {self._slots} slots "
                f"(max_loras); accepted: up to {most} pinned{beside}"
            )

    def load(self, name: str, pinned: bool = False) -> int:
        """Adds a name and returns its generation. Raises AdapterError if the name is taken, or if
        pinned ones would leave no slot for the others."""
        self.check_load(name, pinned)
        self._generations += 1
        self._entries[name] = _Entry(self._generations, pinned)
        return self._generations

    def unload(self, name: str) -> int | None:
        """Forgets a name, and returns the slot that it leaves, if any.

        Raises AdapterError, AdapterInUseError.
        """
        entry = self._entry(name)
        if users := max(entry.requests, entry.holders):
            count = f"{users} request" + "s" * (users > 1)
            raise AdapterInUseError(
                f"adapter {name!r}: found {count} of it; accepted: none, once they have ended or "
                "were cancelled"
            )
        slot = entry.slot
        self._vacate(entry)
        del self._entries[name]
        return slot

    def hold(self, name: str) -> None:
        """One more request needs it to stay loaded. Raises AdapterError."""
        self._entry(name).holders += 1

    def drop(self, name: str) -> None:
        """A request that held it has ended. Raises AdapterError if there is none."""
        entry = self._entry(name)
        if not entry.holders:
            raise AdapterError(f"adapter {name!r}: dropped more often than held")
        entry.holders -= 1

    def acquire(self, name: str) -> tuple[int, bool] | None:
        """(slot, whether the adapter must be written to it, then `wrote`) for one more request.

        None where every slot is in use or pinned; then nothing has changed. Raises AdapterError.
        """
        entry = self._entry(name)
        if entry.slot is None:
            if not self._free and (idle := self._idlest()) is None:
                return None
            if not self._free:
                self._vacate(idle)
            entry.slot = self._free.pop()
        entry.requests += 1
        self._touch(entry)
        return entry.slot, not entry.written

    def wrote(self, name: str) -> None:
        """Its slot holds it. What is interrupted before this is written by the next who acquires
        it. Raises AdapterError."""
        self._entry(name).written = True

    def release(self, name: str) -> None:
        """A request that acquired it is done. Raises AdapterError if there is none."""
        entry = self._entry(name)
        if not entry.requests:
            raise AdapterError(f"adapter {name!r}: released more often than acquired")
        entry.requests -= 1
        self._touch(entry)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            loaded = ", ".join(self._entries) or "none is loaded"
            raise AdapterError(f"adapter {name!r}: not loaded; accepted: {loaded}")
        return self._entries[name]

    def _idlest(self) -> _Entry | None:
        """Whose slot may be taken."""
        idle = [
            entry
            for entry in self._entries.values()
            if entry.slot is not None and not entry.requests and not entry.pinned
        ]
        return min(idle, key=lambda entry: entry.last_use, default=None)

    def _vacate(self, entry: _Entry) -> None:
        if entry.slot is not None:
            self._free.append(entry.slot)
            entry.slot, entry.written = None, False

    def _touch(self, entry: _Entry) -> None:
        self._clock += 1
        entry.last_use = self._clock
