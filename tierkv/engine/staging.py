"""Arrays of a step in one piece of memory: written on the host, and on the device by one copy that nobody waits for."""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Field = tuple[str, tuple[int, ...]]
"""Type, as numpy and torch call it, and shape of one array."""

_ALIGNED: Final = 16  # bytes; Triton compiles a kernel again for a pointer that is not
_LEAST: Final = 1 << 16
_RING: Final = 3  # steps whose arrays the host may have written before the device has read the first of them
_MOST_VIEWS: Final = 32
log = logging.getLogger("tierkv")


class Laid(NamedTuple):
    """The same arrays twice: where the host writes, and where the device reads after `send`. On a CPU they are one."""

    host: tuple[Array, ...]
    device: tuple[torch.Tensor, ...]


class Passed(Protocol):
    """A point in the order of a link's copies, recorded again and again."""

    def record(self) -> None:
        """Take the point after all that was queued so far."""

    def wait(self) -> None:
        """Block the calling thread until the point that was taken last has passed; at once where none was."""


class Link(Protocol):
    """The way from memory of the host to memory of a device. What is queued runs in the order of torch's current stream."""

    def on_host(self, num_bytes: int) -> torch.Tensor:
        """Memory that copies read while the host goes on; uint8."""

    def on_device(self, num_bytes: int) -> torch.Tensor:
        """Memory of the device; uint8."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy, to the device or within it. Nobody waits."""

    def passed(self) -> Passed:
        """A point to wait for."""


class CudaLink:
    """The link of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def on_host(self, num_bytes: int) -> torch.Tensor:
        """Pinned; where that is refused pageable, which CUDA copies out of before it returns."""
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("no pinned memory for the inputs of steps (%s): each step waits for its copy", reason)
            return torch.empty(num_bytes, dtype=torch.uint8)

    def on_device(self, num_bytes: int) -> torch.Tensor:
        """Of torch's allocator."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """By torch."""
        target.copy_(source, non_blocking=True)

    def passed(self) -> "_CudaPassed":
        """An event that a waiting thread sleeps on."""
        return _CudaPassed(self._device)


class _CudaPassed:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's

    def record(self) -> None:
        """On torch's current stream."""
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """As the interface says."""
        self._event.synchronize()


class Staging:
    """Memory for one step after the other. One thread.

    The device has one piece: a copy into it waits, in its stream, for the step before. The host has a ring of pinned pieces,
    and takes one again once the copy out of it has been made. That is so without a wait after a step whose sampled tokens
    were read; a row of prefill chunks, of which nothing is read, ends up waiting for the chunk three before.

    link: to the device's memory; None: CUDA's for a CUDA device, and for a CPU none, whose memory is the host's.
    """

    def __init__(self, device: torch.device, *, num_bytes: int = _LEAST, link: Link | None = None) -> None:
        self._link = CudaLink(device) if link is None and device.type == "cuda" else link
        self._grow(num_bytes)

    def lay(self, fields: Sequence[Field]) -> Laid:
        """Arrays for the next step, in order, holding whatever they hold; earlier ones are not to be written any more.

        The offset of a field follows from the fields before it: where those are the same, so is its address on the device.
        """
        num_bytes = self.num_bytes(fields)
        if num_bytes > len(self._target):
            self._grow(1 << (num_bytes - 1).bit_length())
        piece = self._piece = next(self._ring)
        piece.wait()
        piece.used = num_bytes
        key = tuple(fields)
        laid = piece.views.get(key)
        if laid is None:
            if len(piece.views) == _MOST_VIEWS:
                piece.views.clear()
            laid = piece.views[key] = Laid(
                tuple(view.numpy() for view in _views(piece.bytes, fields)), tuple(_views(self._target, fields))
            )
        return laid

    @staticmethod
    def num_bytes(fields: Sequence[Field]) -> int:
        """Memory that these take."""
        return sum(aligned(_size(field)) for field in fields)

    def send(self) -> None:
        """Copy what was laid last to the device."""
        piece = self._piece
        if self._link is not None and piece.copied is not None:
            self._link.copy(self._target[: piece.used], piece.bytes[: piece.used])
            piece.copied.record()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy within the device's memory, after what was sent."""
        if self._link is None:
            target.copy_(source)
        else:
            self._link.copy(target, source)

    def _grow(self, num_bytes: int) -> None:
        if self._link is None:
            self._target = torch.empty(num_bytes, dtype=torch.uint8)
            pieces = [_Piece(self._target, None)]
        else:
            self._target = self._link.on_device(num_bytes)
            pieces = [_Piece(self._link.on_host(num_bytes), self._link.passed()) for _ in range(_RING)]
        self._ring = cycle(pieces)


def aligned(num_bytes: int) -> int:
    """Bytes up to where the next array may begin."""
    return -(-num_bytes // _ALIGNED) * _ALIGNED


def _size(field: Field) -> int:
    return math.prod(field[1]) * np.dtype(field[0]).itemsize


def _views(memory: torch.Tensor, fields: Sequence[Field]) -> Iterator[torch.Tensor]:
    at = 0
    for kind, shape in fields:
        size = _size((kind, shape))
        yield memory[at : at + size].view(getattr(torch, kind)).view(shape)
        at += aligned(size)


class _Piece:
    """Memory of the host; `copied` is the end of the copy out of it, None where the device reads it in place."""

    def __init__(self, memory: torch.Tensor, copied: Passed | None) -> None:
        self.bytes, self.copied = memory, copied
        self.views: dict[tuple[Field, ...], Laid] = {}
        self.used = 0

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.wait()
