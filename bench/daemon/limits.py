"""Limits: what the machine gives to anybody who moves blocks between two processes. None of them is a cache.

memcpy            one thread, one process: each byte is read and written once
shm in place      the user copies out of, or into, memory that the owner shares; one byte each way per batch
shm both copies   the owner's memory is private: one side copies into shared memory, the other out of it, in turns of a block
bare unix, TCP    sendall from memory, recv_into one preallocated area, a message per block; nothing else is said
"""

import mmap
import os
import socket
import struct
from collections.abc import Sequence
from typing import ClassVar, Final

import numpy as np

from bench.daemon.party import (
    AREA_BYTES,
    KEY_BYTES,
    NUM_PROBED,
    SIZES,
    Batch,
    Bytes,
    Owner,
    Party,
    Refused,
    private,
    slots,
)

_REQUEST: Final = struct.Struct("<BBHI")
"""Operation, number of the size, number of blocks, number of the first: eight bytes, so that a ping is no special case."""
_READ, _WRITE, _CONTAINS, _PING = range(4)
_BLOCK_BYTES: Final = tuple(SIZES.values())
_NUM_STAGED: Final = 4
"""Blocks in the staging area: few enough to stay in the cache; other numbers were not tried. An area for the whole batch, 32 of
2 MiB, moved 5.9 GB/s where this one moved 11.8 (two rounds alone each, 2-core AMD EPYC VM, 2026-11-30)."""
_STAGING_BYTES: Final = _NUM_STAGED * max(_BLOCK_BYTES)


class Memcpy(Party):
    """numpy.copyto, the same sizes and batches."""

    does: ClassVar[tuple[str, ...]] = ("write", "read")

    def write(self, batch: Batch) -> None:
        for block, out in zip(batch.blocks, batch.outs, strict=True):
            np.copyto(out, block)

    read = write

    def close(self) -> None:
        pass


class ShmInPlace(Party):
    """One copy: the owner's memory is in the user's address space."""

    does: ClassVar[tuple[str, ...]] = ("write", "read")

    def __init__(self) -> None:
        self._owner = Owner(_echo)
        fd = _shared(len(SIZES) * AREA_BYTES)
        socket.send_fds(self._owner.sock, [b"\0"], [fd])
        area = _mapped(fd, len(SIZES) * AREA_BYTES)
        self._slots = {block_bytes: slots(area, block_bytes) for block_bytes in _BLOCK_BYTES}
        self._signal()

    def _signal(self) -> None:
        self._owner.sock.send(b"\0")
        _exactly(self._owner.sock, 1)

    def write(self, batch: Batch) -> None:
        rows = self._slots[batch.block_bytes]
        for number, block in zip(batch.numbers, batch.blocks, strict=True):
            np.copyto(rows[number], block)
        self._signal()

    def read(self, batch: Batch) -> None:
        self._signal()
        rows = self._slots[batch.block_bytes]
        for number, out in zip(batch.numbers, batch.outs, strict=True):
            np.copyto(out, rows[number])

    def close(self) -> None:
        self._owner.close()


class ShmBothCopies(Party):
    """Two copies by two processes: while one takes a block out, the other puts the next one in."""

    does: ClassVar[tuple[str, ...]] = ("write", "read")

    def __init__(self) -> None:
        self._owner = Owner(_stage)
        fd = _shared(_STAGING_BYTES)
        socket.send_fds(self._owner.sock, [b"\0"], [fd])
        self._staging = _mapped(fd, _STAGING_BYTES)
        _exactly(self._owner.sock, 1)

    def write(self, batch: Batch) -> None:
        self._owner.sock.send(_request(_WRITE, batch))
        _put_in(self._owner.sock, _rows(self._staging, batch.block_bytes), batch.blocks)

    def read(self, batch: Batch) -> None:
        self._owner.sock.send(_request(_READ, batch))
        _take_out(self._owner.sock, _rows(self._staging, batch.block_bytes), batch.outs)

    def close(self) -> None:
        self._owner.close()


class _BareSocket(Party):
    """A socket that carries the bytes; `contains` carries the keys one way and a byte for each the other."""

    def __init__(self, owner: Owner, sock: socket.socket) -> None:
        self._owner, self._sock = owner, sock
        self._answer = bytearray(NUM_PROBED)
        self._pong = bytearray(_REQUEST.size)
        self._probed: tuple[Sequence[bytes], bytes] = ((), b"")

    def write(self, batch: Batch) -> None:
        self._sock.sendall(_request(_WRITE, batch))
        for block in batch.block_views:
            self._sock.sendall(block)
        _exactly(self._sock, 1)

    def read(self, batch: Batch) -> None:
        self._sock.sendall(_request(_READ, batch))
        for out in batch.out_views:
            _fill(self._sock, out)

    def hold(self, keys: Sequence[bytes]) -> None:
        self._probed = keys, b"".join(keys)

    def contains(self, keys: Sequence[bytes]) -> Sequence[object]:
        held, joined = self._probed
        if keys is not held:
            raise Refused("a bare socket looks nothing up: ask for the keys that were held")
        self._sock.sendall(_REQUEST.pack(_CONTAINS, 0, 0, 0))
        self._sock.sendall(joined)
        _fill(self._sock, memoryview(self._answer))
        return self._answer

    def ping(self) -> None:
        self._sock.sendall(_REQUEST.pack(_PING, 0, 0, 0))
        _fill(self._sock, memoryview(self._pong))

    def close(self) -> None:
        self._sock.close()
        self._owner.close()


class BareUnix(_BareSocket):
    """Over a pair of unix sockets."""

    def __init__(self) -> None:
        owner = Owner(_serve)
        super().__init__(owner, owner.sock)


class BareTcp(_BareSocket):
    """Over loopback."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            owner = Owner(_serve_tcp, listener.getsockname()[1])
            sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().__init__(owner, sock)


def _request(operation: int, batch: Batch) -> bytes:
    return _REQUEST.pack(operation, _BLOCK_BYTES.index(batch.block_bytes), len(batch.numbers), batch.numbers.start)


def _shared(num_bytes: int) -> int:
    fd = os.memfd_create("bench-daemon")
    os.ftruncate(fd, num_bytes)
    return fd


def _mapped(fd: int, num_bytes: int) -> Bytes:
    area = mmap.mmap(fd, num_bytes)
    area.madvise(mmap.MADV_HUGEPAGE)
    os.close(fd)
    rows = np.frombuffer(area, np.uint8)
    rows[::4096] = 0  # every page in, on this side too
    return rows


def _rows(area: Bytes, block_bytes: int) -> Bytes:
    return area[: _NUM_STAGED * block_bytes].reshape(_NUM_STAGED, block_bytes)


def _put_in(sock: socket.socket, rows: Bytes, blocks: Sequence[Bytes] | Bytes) -> None:
    """Copy blocks into the staging rows in turn, never into one that has not been emptied; return when all are empty."""
    for number, block in enumerate(blocks):
        if number >= _NUM_STAGED:
            _exactly(sock, 1)
        np.copyto(rows[number % _NUM_STAGED], block)
        sock.send(b"\0")
    _exactly(sock, min(_NUM_STAGED, len(blocks)))


def _take_out(sock: socket.socket, rows: Bytes, outs: Sequence[Bytes] | Bytes) -> None:
    """Copy out of the staging rows what the other side puts in, saying so for each."""
    for number, out in enumerate(outs):
        _exactly(sock, 1)
        np.copyto(out, rows[number % _NUM_STAGED])
        sock.send(b"\0")


def _fill(sock: socket.socket, out: memoryview) -> None:
    while out:
        count = sock.recv_into(out, 0, socket.MSG_WAITALL)
        if not count:
            raise EOFError("the other process has gone")
        out = out[count:]


def _exactly(sock: socket.socket, count: int) -> bytes:
    got = bytearray(count)
    _fill(sock, memoryview(got))
    return bytes(got)


def _echo(sock: socket.socket) -> None:
    """Own shared memory that the user works in: answer each byte with one."""
    _, fds, _, _ = socket.recv_fds(sock, 1, 1)
    area = _mapped(fds[0], len(SIZES) * AREA_BYTES)
    sock.send(b"\0")
    _exactly(sock, 1)  # the user's first signal: answered above
    while byte := sock.recv(1):
        sock.send(byte)
    del area


def _stage(sock: socket.socket) -> None:
    """Own private memory, and copy between it and a shared staging area."""
    _, fds, _, _ = socket.recv_fds(sock, 1, 1)
    staging, area = _mapped(fds[0], _STAGING_BYTES), private(len(SIZES) * AREA_BYTES)
    kept = {block_bytes: slots(area, block_bytes) for block_bytes in _BLOCK_BYTES}
    sock.send(b"\0")
    while request := sock.recv(_REQUEST.size, socket.MSG_WAITALL):
        operation, size, count, first = _REQUEST.unpack(request)
        block_bytes = _BLOCK_BYTES[size]
        blocks = kept[block_bytes][first : first + count]
        (_take_out if operation == _WRITE else _put_in)(sock, _rows(staging, block_bytes), blocks)


def _serve_tcp(_: socket.socket, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _serve(sock)


def _serve(sock: socket.socket) -> None:
    """Own private memory, and send it or receive into it."""
    area = private(len(SIZES) * AREA_BYTES)
    kept = {block_bytes: slots(area, block_bytes) for block_bytes in _BLOCK_BYTES}
    keys, answer = memoryview(bytearray(NUM_PROBED * KEY_BYTES)), bytes([1]) * NUM_PROBED
    while request := sock.recv(_REQUEST.size, socket.MSG_WAITALL):
        operation, size, count, first = _REQUEST.unpack(request)
        blocks = kept[_BLOCK_BYTES[size]][first : first + count]
        if operation == _PING:
            sock.sendall(request)
        elif operation == _CONTAINS:
            _fill(sock, keys)
            sock.sendall(answer)
        elif operation == _READ:
            for block in blocks:
                sock.sendall(memoryview(block))
        else:
            for block in blocks:
                _fill(sock, memoryview(block))
            sock.sendall(b"\0")
