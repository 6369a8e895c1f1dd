"""The host tier of a pool: places in memory that clients write to and read from themselves."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tierkv.daemon.memory import Region, create, digest, reader_of
from tierkv.errors import ConfigError
from tierkv.keys import Key
from tierkv.tiers.host import HostSlab
from tierkv.tiers.host_memory import available_memory


class SharedSlab(HostSlab):
    """`num_places` places that other processes map. The checksum of each place is the daemon's own, out of their reach.

    name: of the memory, for people who look at a process.  on_bad: told keys of places that do not hold their blocks.
    fd, reader_fd: descriptors for clients that may write, and for those that may not.
    """

    def __init__(
        self, name: str, *, num_places: int, block_bytes: int, on_bad: Callable[[Sequence[Key]], None]
    ) -> None:
        size = Region.size_of(num_places, block_bytes)
        available, source = available_memory()
        if size > available:
            raise ConfigError(
                f"host.capacity: {size / 2**30:.2f} GiB of shared memory asked for, {available / 2**30:.2f} GiB of memory are "
                f"free ({source}); lower it"
            )
        self.fd = create(name, size)
        self.reader_fd = reader_of(self.fd)
        self.region = Region(self.fd, num_places=num_places, block_bytes=block_bytes, writable=True)
        super().__init__(num_places=num_places, block_bytes=block_bytes, buffer=self.region.places)
        self.checksums: npt.NDArray[np.uint64] = np.zeros(num_places, np.uint64)
        self._on_bad = on_bad

    def renew(self, places: Sequence[int]) -> None:
        """These places are about to hold other blocks: whoever still reads the old ones can see it."""
        self.region.generations[list(places)] += np.uint64(1)

    def seal(self, keys: Sequence[Key], places: Sequence[int]) -> None:
        """The daemon itself has filled these places: note what is in them."""
        for key, place in zip(keys, places, strict=True):
            self.checksums[place] = digest(self.view(place), key)

    def sound(self, keys: Sequence[Key], places: Sequence[int]) -> list[bool]:
        """Compare places with their checksums."""
        sound = [
            digest(self.view(place), key) == int(self.checksums[place]) for key, place in zip(keys, places, strict=True)
        ]
        if not all(sound):
            self._on_bad([key for key, ok in zip(keys, sound, strict=True) if not ok])
        return sound

    def close(self) -> None:
        """Let go of it; clients that still map it keep the memory alive until they let go, too."""
        super().close()
        self.region.close()
        for fd in (self.fd, self.reader_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.reader_fd = -1
