"""Mooncake Store as a rival, in its three ways of being used on one machine. Runs under `.venv-mooncake`.

    mooncake          a client per user that talks TCP to the process with the segment: what its users run without RDMA
    mooncake local    a "dummy client": the user shares memory with `mooncake_client`, which holds the segment and copies.
                      The user's own memory is not in that pool, so each block is copied once more, by the user
    mooncake pool     the same, for a user whose blocks already lie in Mooncake's shared pool: not private, one copy only

A master beside each. All calls go to loopback, though its transfer engine listens on all addresses. 0.3.13.post1
refuses a batch of 8,192 puts from a second process; 128 at once work.
"""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from ctypes import c_uint8
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.daemon.parties import MOONCAKE_INSTALL
from bench.daemon.party import (
    AREA_BYTES,
    DEADLINE_S,
    PROBED_BYTES,
    SIZES,
    Batch,
    Bytes,
    NotInstalled,
    Owner,
    Party,
    Refused,
)

_SEGMENT_BYTES: Final = 1 << 30
_NUM_STAGED: Final = 16
"""Blocks that pass through the pool at once. 2 to 32 were tried, in runs of 5 rounds one after the other, with others at work
(2-core AMD EPYC VM, 2026-11-30): 2 and 4 are slower for 360 KiB; 8, 16 and 32 cannot be told apart for 2 MiB."""
_LOCAL_BYTES: Final = 16 << 20
_HOLD_BATCH: Final = 128
_METADATA: Final = "P2PHANDSHAKE"
_WATCH: Final = '"$@" & read line; kill -9 $!'
"""The shell ends what it started once the pipe it reads from is closed, kill -9 of this process included."""


class _Program:
    """A program of Mooncake's that is over when this process is."""

    def __init__(self, name: str, port: int, *flags: str) -> None:
        path = Path(sys.executable).parent / name
        command = ["/bin/sh", "-c", _WATCH, "sh", str(path), *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr.fileno())
        deadline = time.monotonic() + DEADLINE_S
        while not _answers(port):
            if time.monotonic() > deadline:
                self.close()
                raise Refused(f"{name} did not listen on port {port} within {DEADLINE_S:g} s")
            time.sleep(0.02)  # it tells nobody that it is ready

    def close(self) -> None:
        """End it."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(DEADLINE_S)


class _Mooncake(Party):
    """What all ways have in common: the master, and calls by name and address."""

    def __init__(self) -> None:
        self._store = _new_store()
        rpc, metrics = _free_ports(2)
        self.master = f"127.0.0.1:{rpc}"
        self._programs = [
            _Program(
                "mooncake_master",
                rpc,
                "-rpc_address=127.0.0.1",
                f"-rpc_port={rpc}",
                "-metrics_host=127.0.0.1",
                f"-metrics_port={metrics}",
            )
        ]
        self._probe_at, self._one = 0, ""
        self._names: dict[int, list[str]] = {}

    def write(self, batch: Batch) -> None:
        self._put(batch.names, batch.block_at, batch.block_bytes)

    def read(self, batch: Batch) -> None:
        self._get(batch.names, batch.out_at, batch.block_bytes)

    def _put(self, names: list[str], at: list[int], block_bytes: int) -> None:
        if len(names) == 1:
            codes = [self._store.put_from(names[0], at[0], block_bytes)]
        else:
            codes = self._store.batch_put_from(names, at, [block_bytes] * len(names))
        _check(codes, 0, "put")

    def _get(self, names: list[str], at: list[int], block_bytes: int) -> None:
        if len(names) == 1:
            codes = [self._store.get_into(names[0], at[0], block_bytes)]
        else:
            codes = self._store.batch_get_into(names, at, [block_bytes] * len(names))
        _check(codes, block_bytes, "got")

    def forget(self, batch: Batch) -> None:
        self._store.batch_remove(batch.names, force=True)  # in spite of the lease that a get takes

    def hold(self, keys: Sequence[bytes]) -> None:
        names = self._names[id(keys)] = [key.hex() for key in keys]
        for start in range(0, len(names), _HOLD_BATCH):
            part = names[start : start + _HOLD_BATCH]
            self._put(part, [self._probe_at] * len(part), PROBED_BYTES)
        self._one = names[0]

    def contains(self, keys: Sequence[bytes]) -> Sequence[object]:
        return [code == 1 for code in self._store.batch_is_exist(self._names[id(keys)])]

    def ping(self) -> None:
        self._store.is_exist(self._one)

    def close(self) -> None:
        self._store.close()
        while self._programs:
            self._programs.pop().close()


class MooncakeTcp(_Mooncake):
    """Registered private memory, over loopback."""

    def __init__(self) -> None:
        super().__init__()
        self._owner = Owner(_hold_segment, self.master)
        if self._owner.sock.recv(1) != b"\0":
            raise Refused("Mooncake's owner could not set its segment up: see its log above")
        _check([_set_up(self._store, 0, self.master)], 0, "set up")

    def prepare(self, blocks: Bytes, outs: Bytes) -> None:
        for area in (blocks, outs):
            _check([self._store.register_buffer(area.ctypes.data, area.nbytes)], 0, "registered")
        self._probe_at = blocks.ctypes.data

    def close(self) -> None:
        self._owner.close()
        super().close()


class MooncakePool(_Mooncake):
    """The user's memory is Mooncake's shared pool."""

    def __init__(self) -> None:
        super().__init__()
        (port,) = _free_ports(1)
        self._programs.append(
            _Program(
                "mooncake_client",
                port,
                "-host=127.0.0.1",
                f"-port={port}",
                f"-master_server_address={self.master}",
                f"-metadata_server={_METADATA}",
                "-protocol=tcp",
                f"-global_segment_size={_SEGMENT_BYTES}",
            )
        )
        _check([self._store.setup_dummy(2 * AREA_BYTES, _LOCAL_BYTES, f"127.0.0.1:{port}")], 0, "set up")

    def allocate(self, num_bytes: int) -> Bytes:
        area = np.ctypeslib.as_array((c_uint8 * num_bytes).from_address(self._store.alloc_from_mem_pool(num_bytes)))
        area.fill(1)
        _check([self._store.register_buffer(area.ctypes.data, num_bytes)], 0, "registered")
        return area

    def prepare(self, blocks: Bytes, outs: Bytes) -> None:
        self._probe_at = blocks.ctypes.data


class MooncakeLocal(MooncakePool):
    """The user's memory is private: blocks pass through a small part of the pool, some at a time."""

    def allocate(self, num_bytes: int) -> Bytes:
        return Party.allocate(self, num_bytes)

    def prepare(self, blocks: Bytes, outs: Bytes) -> None:
        pool = MooncakePool.allocate(self, _NUM_STAGED * max(SIZES.values()))
        self._probe_at = pool.ctypes.data
        self._rows = {size: list(pool[: _NUM_STAGED * size].reshape(_NUM_STAGED, size)) for size in SIZES.values()}
        self._row_at = {size: [row.ctypes.data for row in rows] for size, rows in self._rows.items()}

    def write(self, batch: Batch) -> None:
        for start, names in self._turns(batch):
            for row, block in zip(
                self._rows[batch.block_bytes], batch.blocks[start : start + len(names)], strict=False
            ):
                np.copyto(row, block)
            self._put(names, self._row_at[batch.block_bytes][: len(names)], batch.block_bytes)

    def read(self, batch: Batch) -> None:
        for start, names in self._turns(batch):
            self._get(names, self._row_at[batch.block_bytes][: len(names)], batch.block_bytes)
            for row, out in zip(self._rows[batch.block_bytes], batch.outs[start : start + len(names)], strict=False):
                np.copyto(out, row)

    def _turns(self, batch: Batch) -> Iterator[tuple[int, list[str]]]:
        for start in range(0, len(batch.names), _NUM_STAGED):
            yield start, batch.names[start : start + _NUM_STAGED]


def _new_store() -> Any:  # Any: it has no types
    if not shutil.which("mooncake_master", path=str(Path(sys.executable).parent)):
        raise NotInstalled(MOONCAKE_INSTALL)
    try:
        from mooncake.store import MooncakeDistributedStore  # its libraries may be missing
    except ImportError as error:
        raise NotInstalled(f"{MOONCAKE_INSTALL} ({error})") from None
    return MooncakeDistributedStore()


def _set_up(store: Any, segment_bytes: int, master: str) -> int:  # Any: it has no types
    return int(store.setup("127.0.0.1", _METADATA, segment_bytes, _LOCAL_BYTES, "tcp", "", master))


def _hold_segment(sock: socket.socket, master: str) -> None:
    """Own the memory that blocks are put into."""
    store = _new_store()
    sock.send(b"\0" if _set_up(store, _SEGMENT_BYTES, master) == 0 else b"\1")
    sock.recv(1)
    store.close()


def _check(codes: Sequence[int], expected: int, what: str) -> None:
    wrong = [code for code in codes if code != expected]
    if wrong:
        raise Refused(f"{len(wrong)} of {len(codes)} were not {what}: code {wrong[0]}")


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
