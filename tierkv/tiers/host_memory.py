"""What the machine gives: memory that this process may still have, pages made present before they are needed."""

import ctypes
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_POPULATE_WRITE = 23  # madvise(2), Linux 5.14: as if every page were written to, without changing what is in it

log = logging.getLogger("tierkv")


def available_memory(proc: Path = Path("/proc")) -> tuple[int, str]:
    """Bytes that this process may still have, and who says so: the machine, or a control group that it is in.

    proc: another one in tests. A process past the limit of its group is killed, not refused: so it must be known before.
    """
    return min([_machine(proc), *_groups(proc)])


def _machine(proc: Path) -> tuple[int, str]:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024, "MemAvailable"
    log.debug("%s/meminfo does not say what is available; asking sysconf", proc)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "all memory"


def _groups(proc: Path) -> Iterator[tuple[int, str]]:
    """What each memory-limited group of this process has left, itself and all above it that are visible here."""
    groups = {}  # of cgroups(7): "" in version 2, else the controllers of a hierarchy
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        groups[controllers] = path
    for line in _lines(proc / "self" / "mountinfo"):
        mount, _, kind = line.partition(" - ")
        fstype, _, options = kind.split(" ", 2)
        if fstype == "cgroup2" and "" in groups:
            path, limit, used, reclaimable = groups[""], "memory.max", "memory.current", "inactive_file"
        elif fstype == "cgroup" and "memory" in options.split(","):
            path = next((of for names, of in groups.items() if "memory" in names.split(",")), "/")
            limit, used, reclaimable = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        _, _, _, root, top = mount.split(" ")[:5]
        # In a container the mount often begins at the container's own group, while its path is told from the host's root.
        below = Path(path).relative_to(root).parts if Path(path).is_relative_to(root) and ".." not in path else ()
        for depth in range(len(below), -1, -1):
            left = _left(Path(top, *below[:depth]), limit, used, reclaimable)
            if left is not None:
                yield left, str(Path(top, *below[:depth], limit))


def _left(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """Limit less use, not counting cached files that give way; None without a limit."""
    try:
        allowed, now = int(next(_lines(group / limit))), int(next(_lines(group / used)))
    except (StopIteration, ValueError):  # no such file; "max"
        return None
    cached = next((line for line in _lines(group / "memory.stat") if line.startswith(f"{reclaimable} ")), "0")
    return max(0, allowed - now + int(cached.split()[-1]))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file; none where it cannot be read."""
    try:
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        log.debug("%s: %s", path, error)


def populate(address: int, size: int) -> bool:
    """Make pages present, also while others read and write them; False where the kernel is too old or has none left.

    Through ctypes, which drops the interpreter lock: `mmap.madvise` keeps it, and an engine that decodes would stand still
    for as long as it takes: 3 to 4 s for 1 GiB of a VM that gets its memory on demand (2-core Intel Xeon, 2026-11-22).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_WRITE):
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            log.debug("host memory is not touched ahead of use: %s", os.strerror(code))
            return False
    return True
