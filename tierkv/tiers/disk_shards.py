"""The shard files of a disk folder, used in place: slabs of slots that any zarr reader opens.

A file is made once, whole and under a temporary name, and from then on a slot is one pwrite or preadv (`zarr_shards`).
zarr-python's own path for bytes takes 3 to 10 times as long (2-core AMD EPYC VM, 2026-11).
What must not live here: which slot holds what.
"""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tierkv.layout import Layout
from tierkv.tiers.disk_array import SHARD_SLOTS
from tierkv.tiers.disk_files import Files, advance, sync_folder, write_all
from tierkv.zarr_shards import ALIGNMENT, shard_index, stride_of

_MAX_OPEN: Final = 256
_PADDING: Final = memoryview(bytearray(ALIGNMENT))
"""Goes between blocks whose size is no multiple of ALIGNMENT; whoever reads into it does not look at it."""
_Call = Callable[[int, Sequence[memoryview], int], int]

log = logging.getLogger("tierkv")


class ShardLost(OSError):
    """A shard file was removed, replaced or cut behind our back: what it held is gone. Never leaves the disk tier."""


class Shards:
    """The shard files of the array. Thread-safe; who may use which slot is the tier's business.

    Raises OSError, and ShardLost for a file that is not the one we made.
    """

    def __init__(self, folder: Path, layout: Layout, *, num_slots: int, files: Files, direct: bool) -> None:
        self._folder, self._layout, self._files = folder / "blocks", layout, files
        self.num_slots, self.stride = num_slots, stride_of(layout.block_bytes)
        self.direct = direct
        self._lock = threading.Lock()
        self._creating = threading.Lock()
        self._inodes: dict[int, int] = {}
        self._open: dict[int, _Descriptor] = {}

    @property
    def num_shards(self) -> int:
        """Shard files when all are made."""
        return -(-self.num_slots // SHARD_SLOTS)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self._folder / f"c.{shard}.0.0.0.0.0"

    def _size(self, shard: int) -> int:
        return self._slots(shard) * self.stride

    def _slots(self, shard: int) -> int:
        return min(SHARD_SLOTS, self.num_slots - shard * SHARD_SLOTS)

    def adopt(self) -> dict[int, int]:
        """Take over what an earlier process left: whole shards as they are, others cut, grown and indexed anew.

        Returns, for each shard, how many of its slots may hold data. Files past the end of the array are removed.
        """
        usable = {}
        for path in sorted(self._folder.iterdir()):
            if path.name == "zarr.json":
                continue
            number = path.name.removeprefix("c.").removesuffix(".0.0.0.0.0")
            shard = int(number) if number.isdecimal() else self.num_shards
            if shard >= self.num_shards or path != self.path(shard) or not path.is_file():
                log.info("removing %s: not part of the array", path)
                self._files.unlink(path)
                continue
            usable[shard] = self._adopt(shard)
        return usable

    def _adopt(self, shard: int) -> int:
        size, index = self._size(shard), shard_index(self._slots(shard), SHARD_SLOTS, self._layout.block_bytes)
        fd = self._files.open(self.path(shard), os.O_RDWR)
        try:
            stat = self._files.stat(fd)
            if stat.st_size != size + len(index) or os.pread(fd, len(index), size) != index:
                self._files.truncate(fd, min(stat.st_size, size))
                self._files.allocate(fd, size + len(index))
                write_all(self._files, fd, [memoryview(index)], size)
                self._files.sync(fd)
            self._inodes[shard] = stat.st_ino
            return min(self._slots(shard), stat.st_size // self.stride)
        finally:
            self._files.close(fd)

    def make(self, shard: int) -> None:
        """Create a shard file, whole, if it is not there."""
        if shard in self._inodes:
            return
        with self._creating:
            if shard in self._inodes:
                return
            size, index = self._size(shard), shard_index(self._slots(shard), SHARD_SLOTS, self._layout.block_bytes)
            path = self.path(shard)
            temporary = path.with_name(path.name + ".tmp")
            self._files.unlink(path)  # one that is not ours: two at once could pass the folder's cap
            try:
                fd = self._files.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                try:
                    self._files.allocate(fd, size + len(index))
                    write_all(self._files, fd, [memoryview(index)], size)
                    self._files.sync(fd)
                    inode = self._files.stat(fd).st_ino
                finally:
                    self._files.close(fd)
                self._files.rename(temporary, path)
            except OSError:
                with contextlib.suppress(OSError):
                    self._files.unlink(temporary)
                raise
            sync_folder(self._files, self._folder)
            self._inodes[shard] = inode

    def read(self, slot: int, outs: Sequence[memoryview]) -> int:
        """Fill `outs` with consecutive slots of one shard; returns how many came whole.

        While `direct`, buffers are aligned and a multiple of ALIGNMENT long.
        """
        return self._transfer(self._files.preadv, slot, outs) // self.stride

    def write(self, slot: int, blocks: Sequence[memoryview]) -> None:
        """Overwrite consecutive slots of one shard. Buffers as in `read`."""
        if self._transfer(self._files.pwritev, slot, blocks) < len(blocks) * self.stride:
            raise OSError(errno.EIO, "short write")

    def sync(self, shard: int) -> None:
        """Return when the slots of a shard are on the device, and still in the file that readers will open."""
        with self._descriptor(shard) as descriptor:
            self._files.sync(descriptor.fd)

    def lose(self, shard: int) -> None:
        """Forget a file that was lost; it is made anew when a slot of it is written."""
        with self._lock:
            self._inodes.pop(shard, None)
            self._retire(self._open.pop(shard, None))

    def close(self) -> None:
        """Close every file. No call is under way."""
        with self._lock:
            while self._open:
                self._retire(self._open.popitem()[1])

    def _transfer(self, call: _Call, slot: int, views: Sequence[memoryview]) -> int:
        shard, place = divmod(slot, SHARD_SLOTS)
        pad = self.stride - views[0].nbytes
        if pad:
            views = [part for view in views for part in (view, _PADDING[:pad])]
        with self._descriptor(shard) as descriptor:
            try:
                return self._whole(call, descriptor, views, place * self.stride)
            except OSError as error:
                if error.errno != errno.EINVAL or not descriptor.direct:
                    raise
        self._stop_direct()
        with self._descriptor(shard) as descriptor:
            return self._whole(call, descriptor, views, place * self.stride)

    def _whole(self, call: _Call, descriptor: "_Descriptor", views: Sequence[memoryview], offset: int) -> int:
        total = sum(view.nbytes for view in views)
        done = 0
        while done < total:
            step = call(descriptor.fd, views, offset + done)
            done += step
            if step <= 0 or (descriptor.direct and step % ALIGNMENT):  # the end of the file
                break
            views = advance(views, step)
        return done

    def _stop_direct(self) -> None:
        with self._lock:
            if self.direct:
                log.warning("%s: the file system refuses O_DIRECT, going on through the page cache", self._folder)
            self.direct = False
            for shard in list(self._open):
                self._retire(self._open.pop(shard))

    @contextlib.contextmanager
    def _descriptor(self, shard: int) -> Iterator["_Descriptor"]:
        """Open file of a shard, proved to be ours: same inode, and still with a name."""
        with self._lock:
            descriptor = self._open.get(shard)
            if descriptor is not None:
                descriptor.users += 1
        if descriptor is None:
            descriptor = self._opened(shard)
        try:
            stat = self._files.stat(descriptor.fd)
            if stat.st_nlink == 0 or stat.st_ino != self._inodes.get(shard):
                raise ShardLost(errno.ESTALE, f"{self.path(shard)} was removed or replaced")
            yield descriptor
        finally:
            with self._lock:
                descriptor.users -= 1
                self._retire(descriptor if descriptor.retired else None)

    def _opened(self, shard: int) -> "_Descriptor":
        direct = self.direct
        try:
            fd = self._files.open(self.path(shard), os.O_RDWR | (os.O_DIRECT if direct else 0))
        except FileNotFoundError:
            raise ShardLost(errno.ESTALE, f"{self.path(shard)} was removed") from None
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            self._stop_direct()
            return self._opened(shard)
        descriptor = _Descriptor(fd, direct)
        with self._lock:
            if shard in self._open or direct != self.direct:  # another thread was first: use this one once
                descriptor.retired = True
                return descriptor
            self._open[shard] = descriptor
            idle = next((other for other, one in self._open.items() if not one.users), None)
            if len(self._open) > _MAX_OPEN and idle is not None:
                self._retire(self._open.pop(idle))
        return descriptor

    def _retire(self, descriptor: "_Descriptor | None") -> None:
        # A number that is closed under a user may be another file's by then: the last user closes.
        if descriptor is not None:
            descriptor.retired = True
            if not descriptor.users:
                self._files.close(descriptor.fd)


class _Descriptor:
    __slots__ = ("direct", "fd", "retired", "users")

    def __init__(self, fd: int, direct: bool) -> None:
        self.fd, self.direct, self.users, self.retired = fd, direct, 1, False
