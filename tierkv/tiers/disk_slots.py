"""The live index of the disk tier: which slot holds which key, who is reading it, which slots are free. Memory only.

    free ── reserve ──▶ being written ── commit ──▶ live ── forget ──▶ forgotten ── free (its row is gone, no reader) ──▶ free
                              │                             readers that were in time still finish ◀─┘
                              └─ abandon ──────────────────▶ forgotten

A slot comes to the free ones only after its row has gone from the manifest, so a write never overwrites what a restart could
still find, and only when nobody reads it any more. One lock, held for dictionary work only.
"""

import threading
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tierkv.keys import Key
from tierkv.tiers.disk_extents import Extents


class Place(NamedTuple):
    """A slot, the position in the batch of the block it is for, and that block's checksum (0 while unwritten)."""

    slot: int
    position: int
    checksum: int = 0


@dataclass(slots=True)
class Reservation:
    """Answer to `reserve`: positions that are here already, that another thread writes now, that found no room.

    places: where the others go.
    """

    present: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)


class Slots:
    """Slots `0 … num_slots - 1` and the keys in them. Thread-safe."""

    def __init__(self, num_slots: int, live: dict[Key, tuple[int, int]]) -> None:
        """live: slot and checksum of each key that survived."""
        self.num_slots = num_slots
        self._lock = threading.Lock()
        self._slots = {key: slot for key, (slot, _) in live.items()}
        self._checksums = array("q", bytes(8 * num_slots))
        for slot, checksum in live.values():
            self._checksums[slot] = checksum
        self._used = array("d", bytes(8 * num_slots))
        self._readers: dict[int, int] = {}
        self._writing: set[Key] = set()
        self._leaving: set[int] = set()  # forgotten and row gone, but still read
        self._extents = Extents()
        taken = set(self._slots.values())
        self._extents.free_all(slot for slot in range(num_slots) if slot not in taken)

    def __len__(self) -> int:
        return len(self._slots)

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """Which keys are live."""
        with self._lock:
            return [key in self._slots for key in keys]

    def hold(self, keys: Sequence[Key], now: float) -> list[Place]:
        """Find keys, and keep their slots from being overwritten until `release`. By slot; absent keys have no place."""
        places = []
        with self._lock:
            for position, key in enumerate(keys):
                slot = self._slots.get(key)
                if slot is not None:
                    self._readers[slot] = self._readers.get(slot, 0) + 1
                    self._used[slot] = now
                    places.append(Place(slot, position, self._checksums[slot]))
        places.sort()
        return places

    def release(self, places: Iterable[Place]) -> None:
        """End a `hold`."""
        with self._lock:
            free = []
            for place in places:
                slot = place.slot
                readers = self._readers[slot] - 1
                if readers:
                    self._readers[slot] = readers
                    continue
                del self._readers[slot]
                if slot in self._leaving:
                    self._leaving.discard(slot)
                    free.append(slot)
            self._extents.free_all(free)

    def reserve(self, keys: Sequence[Key], *, below: int) -> Reservation:
        """Give each key that is not here a slot under `below`, as few stretches as there can be."""
        answer, wanted = Reservation(), []
        with self._lock:
            for position, key in enumerate(keys):
                if key in self._slots:
                    answer.present.append(position)
                elif key in self._writing:
                    answer.busy.append(position)
                else:
                    self._writing.add(key)
                    wanted.append(position)
            given = [
                slot
                for start, count in self._extents.take(len(wanted), below=below)
                for slot in range(start, start + count)
            ]
            answer.places = [Place(slot, position) for slot, position in zip(given, wanted, strict=False)]
            answer.full = wanted[len(given) :]
            self._writing.difference_update(keys[position] for position in answer.full)
        answer.places.sort()
        return answer

    def commit(self, places: Iterable[Place], keys: Sequence[Key]) -> None:
        """Make written places live: from here on they are found."""
        with self._lock:
            for slot, position, checksum in places:
                self._checksums[slot] = checksum
                self._slots[keys[position]] = slot
                self._writing.discard(keys[position])

    def abandon(self, places: Collection[Place], keys: Sequence[Key]) -> list[int]:
        """Give up on writing these; returns their slots, to be freed like forgotten ones."""
        with self._lock:
            self._writing.difference_update(keys[place.position] for place in places)
        return [place.slot for place in places]

    def forget(self, keys: Iterable[Key], *, only: int | None = None) -> list[int]:
        """Let keys be found no more; returns their slots, to be freed once their rows are gone.

        only: leave a key alone that is in another slot by now.
        """
        with self._lock:
            slots = []
            for key in keys:
                slot = self._slots.get(key)
                if slot is not None and (only is None or slot == only):
                    slots.append(self._slots.pop(key))
            return slots

    def free(self, slots: Collection[int]) -> None:
        """Give back forgotten slots whose rows are gone; the last reader of a slot does it where there is one."""
        with self._lock:
            read = {slot for slot in slots if slot in self._readers}
            self._leaving |= read
            self._extents.free_all(slot for slot in slots if slot not in read)

    def within(self, first: int, end: int) -> list[Key]:
        """Keys in the slots from `first` to `end`."""
        snapshot = list(self._slots.items())  # one step of the interpreter: no lock for a walk over all
        return [key for key, slot in snapshot if first <= slot < end]

    def used(self) -> list[tuple[float, int]]:
        """When live slots were last read, where they were since the start: (seconds since the epoch, slot)."""
        with self._lock:
            return [(self._used[slot], slot) for slot in self._slots.values() if self._used[slot]]
