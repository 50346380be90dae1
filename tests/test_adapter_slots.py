"""Which adapter is in which slot, beside a model that looks through everything it remembers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3c.errors import AdapterError, AdapterInUseError
from phi3c.runtime.adapter_slots import AdapterSlots

NAMES = "abcdef"


class History:
    """The rules, read off a list of all that has happened: (event, name) or ("put", name, slot)."""

    def __init__(self, slots: int):
        self.slots = slots
        self.events: list[tuple] = []
        self.loaded: dict[str, bool] = {}  # name → pinned

    def since_load(self, name: str) -> list[tuple]:
        at = max(i for i, event in enumerate(self.events) if event[:2] == ("load", name))
        return self.events[at:]

    def requests(self, name: str, begun: str = "acquire", ended: str = "release") -> int:
        events = [event[:2] for event in self.since_load(name)]
        return events.count((begun, name)) - events.count((ended, name))

    def holders(self, name: str) -> int:
        return self.requests(name, "hold", "drop")

    def slot(self, name: str) -> int | None:
        slot = None
        for event in self.since_load(name):
            if event[:2] == ("put", name):
                slot = event[2]
            elif event[0] == "put" and event[2] == slot:
                slot = None
        return slot

    def written(self, name: str) -> bool:
        """Whether its slot has held it since it was put there."""
        marks = [e[0] for e in self.since_load(name) if e[1] == name and e[0] in ("put", "wrote")]
        return bool(marks) and marks[-1] == "wrote" and self.slot(name) is not None

    def taken(self) -> set[int]:
        return {slot for name in self.loaded if (slot := self.slot(name)) is not None}

    def evictable(self) -> list[str]:
        """Idle longest first."""
        idle = [
            name
            for name, pinned in self.loaded.items()
            if self.slot(name) is not None and not self.requests(name) and not pinned
        ]
        return sorted(
            idle,
            key=lambda name: max(
                i
                for i, event in enumerate(self.events)
                if event[0] in ("acquire", "release") and event[1] == name
            ),
        )

    def may_load(self, name: str, pinned: bool) -> bool:
        after = [*self.loaded.values(), pinned]
        places = self.slots - after.count(True)
        return name not in self.loaded and places >= (1 if after.count(False) else 0)


_EVENTS = "load unload acquire acquire release fail hold drop".split()


@settings(max_examples=300, deadline=None)
@given(slots=st.integers(1, 4), data=st.data())
def test_random_traces(slots, data):
    found, history = AdapterSlots(slots), History(slots)
    generations: list[int] = []
    for _ in range(data.draw(st.integers(0, 60))):
        event = data.draw(st.sampled_from(_EVENTS))
        name = data.draw(st.sampled_from(NAMES))
        if event == "load":
            pinned = data.draw(st.booleans())
            if not history.may_load(name, pinned):
                with pytest.raises(AdapterError):
                    found.load(name, pinned)
                continue
            generations.append(found.load(name, pinned))
            history.loaded[name] = pinned
            history.events.append(("load", name))
        elif name not in history.loaded:
            for call in (
                found.unload, found.acquire, found.release, found.hold, found.drop,
                found.generation, found.wrote,
            ):  # fmt: skip
                with pytest.raises(AdapterError, match=f"adapter '{name}': not loaded"):
                    call(name)
        elif event == "unload":
            if count := max(history.requests(name), history.holders(name)):
                with pytest.raises(AdapterInUseError, match=f"found {count} request"):
                    found.unload(name)
                continue
            assert found.unload(name) == history.slot(name)
            del history.loaded[name]
        elif event in ("hold", "drop"):
            if event == "drop" and not history.holders(name):
                with pytest.raises(AdapterError, match="dropped more often than held"):
                    found.drop(name)
                continue
            (found.hold if event == "hold" else found.drop)(name)
            history.events.append((event, name))
        elif event == "release":
            if not history.requests(name):
                with pytest.raises(AdapterError, match="released more often than acquired"):
                    found.release(name)
                continue
            found.release(name)
            history.events.append(("release", name))
        else:
            there, victims = history.slot(name), history.evictable()
            free = set(range(slots)) - history.taken()
            grant = found.acquire(name)
            if there is not None:
                assert grant == (there, not history.written(name))
            elif free:
                assert grant is not None and grant[0] in free and grant[1]
            elif victims:
                assert grant == (history.slot(victims[0]), True)
            else:
                assert grant is None
            if grant is not None:
                if there is None:
                    history.events.append(("put", name, grant[0]))
                history.events.append(("acquire", name))
                if grant[1] and event == "fail":  # while it was written
                    found.release(name)
                    history.events.append(("release", name))
                elif grant[1]:
                    found.wrote(name)
                    history.events.append(("wrote", name))
        assert list(found.names) == list(history.loaded)
        for one in history.loaded:
            assert found.slot(one) == history.slot(one)
            assert found.requests(one) == history.requests(one)
    assert generations == sorted(set(generations))


def loaded(slots: int, *names: str, pinned: str = "") -> AdapterSlots:
    made = AdapterSlots(slots)
    for name in names:
        made.load(name, pinned=name in pinned)
    return made


def test_the_least_recently_used_slot_is_taken():
    slots = loaded(2, "a", "b", "c")
    assert slots.acquire("a") == (0, True) and slots.acquire("b") == (1, True)
    slots.wrote("a")
    assert slots.acquire("c") is None and slots.requests("c") == 0
    slots.release("b")
    slots.release("a")  # the last to be used
    assert slots.acquire("c") == (1, True)
    assert slots.slot("b") is None and slots.acquire("a") == (0, False)


def test_a_slot_that_was_not_written_is_written_by_the_next():
    """As after an interrupt between taking it and writing it."""
    slots = loaded(1, "a", "b")
    assert slots.acquire("a") == (0, True) and slots.acquire("a") == (0, True)
    slots.wrote("a")
    assert slots.acquire("a") == (0, False)
    for _ in range(3):
        slots.release("a")
    assert slots.acquire("b") == (0, True)
    slots.release("b")
    assert slots.acquire("a") == (0, True), "another had the slot meanwhile, if not for long"


def test_a_pinned_adapter_keeps_its_slot():
    slots = loaded(2, "a", "b", "c", pinned="a")
    for name in "ab":
        slots.acquire(name)
        slots.release(name)
    assert slots.acquire("c") == (1, True) and slots.slot("a") == 0
    assert slots.acquire("b") is None


@pytest.mark.parametrize("before, pinned", [("a", True), ("ab", False)])
def test_pins_leave_a_slot_to_the_others(before, pinned):
    slots = loaded(2, "a", "b", pinned=before)
    message = (
        "adapter 'c': found 2 pinned adapters in 2 slots (max_loras); accepted: up to 1 pinned "
        "beside those that are not"
    )
    with pytest.raises(AdapterError, match=re.escape(message)):
        slots.load("c", pinned)


def test_more_pins_than_slots():
    with pytest.raises(AdapterError, match=r"found 2 pinned .* 1 slots .*: up to 1 pinned$"):
        loaded(1, "a", "b", pinned="ab")


def test_a_name_loaded_again_is_another_generation():
    slots = loaded(1, "a")
    first = slots.generation("a")
    with pytest.raises(AdapterError, match="'a': found one that is loaded .*; accepted: another"):
        slots.load("a")
    slots.unload("a")
    assert slots.load("a") > first


def test_an_adapter_in_use_is_not_unloaded():
    slots = loaded(1, "a")
    slots.acquire("a")
    slots.acquire("a")
    with pytest.raises(AdapterInUseError, match="'a': found 2 requests of it; accepted: none"):
        slots.unload("a")
    slots.release("a")
    slots.release("a")
    slots.unload("a")
    with pytest.raises(AdapterError, match="'a': not loaded; accepted: none is loaded"):
        slots.acquire("a")
