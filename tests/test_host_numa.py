"""Memory near the device: the kernel's lists are read right, and a preference is no more than that."""

import logging
import mmap
from pathlib import Path

import numpy as np
import pytest

from tierkv.tiers import host as host_module
from tierkv.tiers import host_numa
from tierkv.tiers.host import HostSlab
from tierkv.tiers.host_numa import memory_nodes, parse_list, prefer_node

MACHINES = {
    "0\n": [0],
    "0-1\n": [0, 1],
    "0-7\n": [0, 1, 2, 3, 4, 5, 6, 7],
    "0-3,8-10,16\n": [0, 1, 2, 3, 8, 9, 10, 16],
    "0,2\n": [0, 2],
    "\n": [],
}


@pytest.fixture
def mapping() -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, np.frombuffer(memory, np.uint8).ctypes.data


def policy(address: int) -> str:
    """What the kernel says of the mapping at an address: "default", "prefer:0"."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return next(line.split()[1] for line in lines if int(line.split()[0], 16) == address)


@pytest.mark.parametrize("text", MACHINES)
def test_lists_of_nodes_are_read_as_the_kernel_writes_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "has_memory").write_text(text)
    assert parse_list(text) == memory_nodes(tmp_path) == MACHINES[text]


@pytest.mark.parametrize("text", [None, "none\n"])
def test_a_machine_that_says_nothing_of_nodes_has_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "has_memory").write_text(text)
    assert memory_nodes(tmp_path) == []


@pytest.mark.parametrize("nodes", [[], [0], [1, 2]])
def test_there_is_no_preference_where_there_is_no_choice(nodes: list[int], mapping: tuple[mmap.mmap, int]) -> None:
    before = policy(mapping[1])
    assert not prefer_node(mapping[1], 1 << 21, node=0, nodes=nodes)
    assert policy(mapping[1]) == before


needs_mbind = pytest.mark.skipif(
    not Path("/proc/self/numa_maps").exists(), reason="a kernel without NUMA has no mbind to look at"
)


@needs_mbind
def test_the_kernel_takes_the_preference(mapping: tuple[mmap.mmap, int]) -> None:
    node = memory_nodes()[0]
    if not prefer_node(mapping[1], 1 << 21, node=node, nodes=[node, node + 1]):
        pytest.skip("mbind is forbidden here (containers often do)")
    assert policy(mapping[1]) == f"prefer:{node}"


@needs_mbind
@pytest.mark.parametrize("node", [63, 64, 1000])
def test_a_node_that_the_kernel_refuses_is_a_line_in_the_debug_log(
    node: int, mapping: tuple[mmap.mmap, int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "tierkv"):
        assert not prefer_node(mapping[1], 1 << 21, node=node, nodes=[0, node])
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    assert f"mbind to node {node}" in caplog.text


def test_another_processor_is_a_line_in_the_debug_log(
    mapping: tuple[mmap.mmap, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_numa.platform, "machine", lambda: "riscv64")
    with caplog.at_level(logging.DEBUG, "tierkv"):
        assert not prefer_node(mapping[1], 1 << 21, node=0, nodes=[0, 1])
    assert "not known on riscv64" in caplog.text


@needs_mbind
def test_a_slab_asks_for_its_node_before_it_is_touched(
    mapping: tuple[mmap.mmap, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = memory_nodes()[0]
    if not prefer_node(mapping[1], 1 << 21, node=node, nodes=[node, node + 1]):
        pytest.skip("mbind is forbidden here (containers often do)")
    monkeypatch.setattr(host_module, "memory_nodes", lambda: [node, node + 1])
    slab = HostSlab(num_places=4, block_bytes=1 << 20, node=node)
    list(slab.touch())
    assert policy(slab.rows.ctypes.data) == f"prefer:{node}"
    slab.close()
