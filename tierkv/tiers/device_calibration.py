"""Which way scattered pages are copied on this device: one call each, or many in one. Measured once, then remembered in a file.

Both ways are copies by the DMA engines. A kernel that gathers pages is not among the choices: it takes multiprocessors and HBM
bandwidth from the step that runs meanwhile, and pages of all layers are large enough for DMA (platform notes, peers: an engine
lost 6 % to the wrong choice).
"""

import json
import logging
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tierkv.errors import TierError
from tierkv.tiers.device_cuda import Copy, Cuda

_FORMAT: Final = 1
_PAGES: Final = 16
_ROUNDS: Final = 3
log = logging.getLogger("tierkv")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds for the same scattered pages to the host and back."""

    one_by_one_s: float
    batched_s: float

    @property
    def batch(self) -> bool:
        """Is it faster to hand many copies over at once?"""
        return self.batched_s < self.one_by_one_s


def choose_batches(
    cuda: Cuda, *, pool: int, num_pages: int, block_bytes: int, clock: Callable[[], float], path: Path | None
) -> bool:
    """Say whether scattered copies go in batches: from the file at `path`, or by measuring and writing it there.

    pool: address of the pages, which nobody uses yet; their bytes stay as they are.
    A file that is absent, broken or of another device is measured again; one that cannot be written is none.
    """
    if not cuda.batches or num_pages < 4:
        return False
    key = f"{cuda.name}, blocks of {block_bytes} bytes"
    timings = _read(path)
    timing = timings.get(key)
    if timing is None:
        try:
            timing = measure(cuda, pool=pool, num_pages=num_pages, block_bytes=block_bytes, clock=clock)
        except TierError as error:
            log.warning("copies to and from the device are not batched: %s", error)
            return False
        _write(path, timings | {key: timing})
    return timing.batch


def measure(cuda: Cuda, *, pool: int, num_pages: int, block_bytes: int, clock: Callable[[], float]) -> Timing:
    """Time both ways, best of three, on every other page and pinned memory of its own. Raises TierError."""
    count = min(_PAGES, num_pages // 2)
    with mmap.mmap(-1, count * block_bytes) as memory:
        host = int(np.frombuffer(memory, np.uint8).ctypes.data)  # the view is gone before the mapping is
        cuda.host_register(host, count * block_bytes)
        try:
            at_device = [pool + 2 * number * block_bytes for number in range(count)]
            at_host = [host + (count - 1 - number) * block_bytes for number in range(count)]
            out = [Copy(there, here, block_bytes) for there, here in zip(at_host, at_device, strict=True)]
            back = [Copy(copy.source, copy.target, block_bytes) for copy in out]
            stream = cuda.new_stream()
            cuda.wait(stream, cuda.mark())  # what torch does to the new pages comes first

            def seconds(copy: Callable[[Any, Sequence[Copy]], None]) -> float:
                start = clock()
                for copies in (out, back):
                    copy(stream, copies)
                    cuda.record(stream).wait()
                return clock() - start

            ways = (cuda.copy, cuda.copy_batch)
            rounds = [[seconds(way) for way in ways] for _ in range(_ROUNDS + 1)][1:]  # the first warms up
        finally:
            cuda.host_unregister(host)
    return Timing(*(min(times) for times in zip(*rounds, strict=True)))


def _read(path: Path | None) -> dict[str, Timing]:
    try:
        file = json.loads(path.read_text(encoding="utf-8")) if path else {}
        if file.get("format") != _FORMAT:
            return {}
        timings = {str(key): Timing(**fields) for key, fields in file["timings"].items()}
        sound = [time for timing in timings.values() for time in (timing.one_by_one_s, timing.batched_s)]
        return timings if all(math.isfinite(time) and time > 0 for time in sound) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.debug("no calibration in %s: %s", path, error)
        return {}


def _write(path: Path | None, timings: dict[str, Timing]) -> None:
    """Replace the file at once: a reader sees the old one or the new one, whole."""
    if path is None:
        return
    content = {"format": _FORMAT, "timings": {key: asdict(timing) for key, timing in timings.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        log.debug("the calibration cannot be kept in %s: %s", path, error)
