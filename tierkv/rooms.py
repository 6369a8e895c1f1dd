"""What a tier can hold, and who has it: the accounts of its places. Not thread-safe: index.py locks."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tierkv.policies.base import Policy
from tierkv.wants import Parked

FREE, TAKEN, FILLED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class TierSpec:
    """A tier as the index knows it.

    placed: blocks sit in numbered places [0, capacity_blocks) that the index gives out (slabs); otherwise they are only
    counted. policy: an instance of its own.
    """

    name: str
    capacity_blocks: int
    placed: bool
    policy: Policy


@dataclass(frozen=True, slots=True)
class TierStats:
    """Blocks of one tier. used: held and reserved.  available: at least this many could be reserved now.

    evicted: forgotten for room since the start; lost: those of them that no other tier held.
    """

    name: str
    capacity: int
    used: int
    held: int
    available: int
    evicted: int
    lost: int


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Size of the index; num_blocks includes those that no tier holds, num_past those that are history."""

    tiers: tuple[TierStats, ...]
    num_strands: int
    num_blocks: int
    num_leases: int
    num_past: int


class Room:
    """The places of one tier and who has them: free, taken (reserved, pending) or filled (held)."""

    def __init__(self, spec: TierSpec) -> None:
        self.name = spec.name
        self.capacity = spec.capacity_blocks
        self.policy = spec.policy
        self.placed = spec.placed
        self.held = 0
        self.taken = 0
        self.pinned = 0  # sum over leases of the blocks each may keep here: an upper bound of what is protected
        self.evicted = 0
        self.lost = 0
        self.parked = Parked()
        self._free = array("i", range(self.capacity - 1, -1, -1) if spec.placed else ())
        self._owner = bytearray(self.capacity if spec.placed else 0)

    @property
    def num_free(self) -> int:
        """Blocks that may be taken now."""
        return self.capacity - self.held - self.taken

    def stats(self) -> TierStats:
        """Count what is here."""
        return TierStats(
            name=self.name,
            capacity=self.capacity,
            used=self.held + self.taken,
            held=self.held,
            available=self.num_free + max(self.held - self.pinned, 0),
            evicted=self.evicted,
            lost=self.lost,
        )

    def take(self, count: int) -> list[int]:
        """Take `count` of the free places, adjacent ones where possible."""
        self.taken += count
        if not self.placed or not count:
            return []
        places = self._free[: -count - 1 : -1].tolist()
        del self._free[-count:]
        places.sort()  # neighbours are moved in one copy
        owner = self._owner
        for place in places:
            owner[place] = TAKEN
        return places

    def give_back(self, places: Sequence[int], count: int) -> None:
        """Make taken places free."""
        if self.placed:
            self._set(places, TAKEN, FREE)
            self._free.extend(reversed(places))
        elif count > self.taken:
            raise ValueError(f"{count} blocks given back to tier {self.name}: only {self.taken} are taken")
        self.taken -= count

    def fill(self, places: Sequence[int], count: int) -> None:
        """Blocks are in the taken places now."""
        if self.placed:
            self._set(places, TAKEN, FILLED)
        elif count > self.taken:
            raise ValueError(f"{count} blocks put into tier {self.name}: only {self.taken} are reserved")
        self.taken -= count
        self.held += count

    def empty(self, places: Sequence[int], count: int) -> None:
        """Blocks left; the places are taken, not free yet."""
        if self.placed:
            self._set(places, FILLED, TAKEN)
        self.held -= count
        self.taken += count

    def clear(self, places: Sequence[int], count: int) -> None:
        """Blocks left, and their places are free."""
        if self.placed:
            self._set(places, FILLED, FREE)
            self._free.extend(reversed(places))
        self.held -= count

    def _set(self, places: Sequence[int], old: int, new: int) -> None:
        """Change the owner of places; of none, if that is not right."""
        owner, at, place = self._owner, 0, min(places, default=0)
        try:
            if place >= 0:
                for at, place in enumerate(places):  # noqa: B007 -- the last ones are told below
                    if owner[place] != old:
                        break
                    owner[place] = new
                else:
                    return
        except IndexError:
            pass
        for done in places[:at]:
            owner[done] = old
        raise ValueError(f"place {place} of tier {self.name} is not {('free', 'reserved', 'in use')[old]}")

    def check(self, filled: list[int]) -> None:
        """Verify the accounts; filled: the places of all blocks held."""
        assert min(self.held, self.taken, self.num_free) >= 0, self.name
        if self.placed:
            assert len(set(filled)) == len(filled) == self.held == self._owner.count(FILLED), self.name
            assert all(self._owner[place] == FILLED for place in filled), self.name
            assert len(self._free) == len(set(self._free)) == self.num_free == self._owner.count(FREE), self.name
            assert all(self._owner[place] == FREE for place in self._free), self.name
