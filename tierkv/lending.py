"""Memory that tiers lend blocks from, as the device copies from it: on a GPU each mapping is pinned once, in the background.

mapped ──first load──▶ pinned piece by piece, and in use ──another takes its place, or the end──▶ unpinned
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from tierkv.mover import Mover
from tierkv.tiers.base import Staging
from tierkv.tiers.host import HostSlab

if TYPE_CHECKING:
    from tierkv.transfers import Places


@dataclass(slots=True, eq=False)
class _Mapping:
    """rows: as in `Lending`.  users: copies that may be under way.  stale: the tier lends from other memory now."""

    rows: Any
    slab: HostSlab
    users: int = 0
    stale: bool = False


class LentMemory:
    """The mappings that the tiers of one store lend from, one for each tier at a time. Thread-safe."""

    def __init__(self, places: "Places", mover: Mover) -> None:
        self._places, self._mover = places, mover
        self._lock = Lock()
        self._current: dict[str, _Mapping] = {}

    @contextmanager
    def staging(self, tier: str, rows: Any) -> Iterator[Staging]:
        """The rows of a `Lending` of this tier, to copy from until the end of the block."""
        with self._lock:
            mapping, old = self._current.get(tier), None
            if mapping is None or mapping.rows is not rows:
                mapping, old = self._map(rows), mapping
                self._current[tier] = mapping
            mapping.users += 1
        try:
            if old:
                self._retire(old)
            yield mapping.slab
        finally:
            with self._lock:
                mapping.users -= 1
                unused = mapping.stale and not mapping.users
            if unused:
                mapping.slab.close()

    def _map(self, rows: Any) -> _Mapping:
        buffer = rows.reshape(-1).data
        slab = HostSlab(num_places=len(rows), block_bytes=self._places.device.block_bytes, buffer=buffer)
        cuda = getattr(self._places.device, "cuda", None)  # of a CudaPagePool
        steps = slab.pin(cuda.host_register, cuda.host_unregister) if cuda else slab.touch()
        self._mover.background("pin-lent", steps)
        return _Mapping(rows, slab)

    def _retire(self, mapping: _Mapping) -> None:
        """Let it go, now or after the last copy."""
        with self._lock:
            mapping.stale = True
            unused = not mapping.users
        if unused:
            mapping.slab.close()

    def close(self) -> None:
        """Unpin and let go of all of it; no copy may be under way."""
        with self._lock:
            mappings, self._current = list(self._current.values()), {}
        for mapping in mappings:
            self._retire(mapping)
