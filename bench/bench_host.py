"""What it costs to copy a block into the host slab before its memory is present, and how fast that becomes so in the background.

    python bench/bench_host.py [--gib 1]

A copy of 2 MiB into every place in turn: present, never touched, never touched and without huge pages. Then one pass of `touch`,
with the longest time that another thread of the interpreter stood still meanwhile. The first pass over memory that the machine
itself was never given (a VM that gets it on demand) is slower; so everything is done twice and the second pass is printed.
"""

import argparse
import mmap
import time
from threading import Thread

import numpy as np

from tierkv.tiers.host import HostSlab

BLOCK_BYTES = 2 << 20


def copies(slab: HostSlab) -> float:
    """Milliseconds per copy of a block, median over all places."""
    block, times = np.ones(BLOCK_BYTES, np.uint8), []
    for row in slab.rows:
        start = time.perf_counter()
        np.copyto(row, block)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


class Watch(Thread):
    """Sleeps half a millisecond at a time and keeps the longest that it took."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest_s, self.done = 0.0, False

    def run(self) -> None:
        last = time.perf_counter()
        while not self.done:
            time.sleep(0.0005)
            now = time.perf_counter()
            self.longest_s, last = max(self.longest_s, now - last), now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=int, default=1)
    num_places = (parser.parse_args().gib << 30) // BLOCK_BYTES
    for repeat in range(2):
        lines = []
        for name in ("present", "never touched", "never touched, without huge pages"):
            memory = mmap.mmap(-1, num_places * BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_NOHUGEPAGE if "without" in name else mmap.MADV_HUGEPAGE)
            slab = HostSlab(num_places=num_places, block_bytes=BLOCK_BYTES, buffer=memory)
            if name == "present":
                watch, start = Watch(), time.perf_counter()
                watch.start()
                list(slab.touch())
                seconds, watch.done = time.perf_counter() - start, True
                watch.join()
                lines.append(
                    f"touch: {slab.rows.nbytes / seconds / 1e9:.1f} GB/s, others stood still {watch.longest_s:.3f} s"
                )
            lines.append(f"{name}: {copies(slab):.2f} ms")
            slab.close()
            memory.close()
        if repeat:
            print(*lines, sep="\n")


if __name__ == "__main__":
    main()
