"""Memory near the device: which nodes the machine has, and a preference for one of them. Never an error, never a must."""

import ctypes
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Final

MBIND: Final = {"x86_64": 237, "aarch64": 235}
"""The system call's number; neither libc nor Python has a function for it, and libnuma is often missing."""
_PREFERRED = 1  # mbind(2): other nodes where this one is full; MPOL_BIND would call the OOM killer instead
_BITS = ctypes.sizeof(ctypes.c_ulong) * 8
_SYSTEM = Path("/sys/devices/system/node")

log = logging.getLogger("tierkv")


def parse_list(text: str) -> list[int]:
    """Numbers in the kernel's list format: "0-3,8" is 0, 1, 2, 3, 8."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def memory_nodes(system: Path = _SYSTEM) -> list[int]:
    """Numbers of the nodes that have memory; empty where the kernel knows no nodes."""
    try:
        return parse_list((system / "has_memory").read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        log.debug("no NUMA nodes: %s", error)
        return []


def prefer_node(address: int, size: int, *, node: int, nodes: Sequence[int]) -> bool:
    """Let pages of this range that are not present yet come from `node`, as long as it has any.

    False, with a line in the debug log, where that makes no difference or is not possible.
    """
    if len(nodes) < 2 or node not in nodes:
        log.debug("host memory: no preference for node %d of %s", node, list(nodes))
        return False
    number = MBIND.get(platform.machine())
    if number is None:
        log.debug("host memory: mbind is not known on %s", platform.machine())
        return False
    words = node // _BITS + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // _BITS] = 1 << node % _BITS
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel takes one bit less than it is told (get_nodes in mm/mempolicy.c), hence the 1.
    limit = ctypes.c_ulong(words * _BITS + 1)
    if libc.syscall(
        ctypes.c_long(number), ctypes.c_void_p(address), ctypes.c_ulong(size), ctypes.c_long(_PREFERRED), mask, limit, 0
    ):
        log.debug("host memory: mbind to node %d: %s", node, os.strerror(ctypes.get_errno()))
        return False
    return True
