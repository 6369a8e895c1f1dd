"""How long the model takes: on a CPU by the host's clock, on a GPU by events that are read when they have passed."""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

Told = Callable[[float], None]


class Stopwatch(Protocol):
    """Times one thing after the other."""

    def start(self) -> None:
        """Begin."""

    def stop(self, told: Told) -> None:
        """End; `told` gets the seconds, in this call or in a later one of `tell`."""

    def tell(self) -> None:
        """Pass on what has become known; waits for nothing."""


class HostStopwatch:
    """For work that is done when its call returns. clock: seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._started_s = clock, 0.0

    def start(self) -> None:
        """Begin."""
        self._started_s = self._clock()

    def stop(self, told: Told) -> None:
        """Tell at once."""
        told(self._clock() - self._started_s)

    def tell(self) -> None:
        """Nothing is left to tell."""


class CudaStopwatch:
    """For work that is queued on torch's current stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._event()
        self._waiting: deque[tuple[torch.cuda.Event, torch.cuda.Event, Told]] = deque()

    def start(self) -> None:
        """Begin."""
        self._started = self._event()

    def stop(self, told: Told) -> None:
        """Tell once the work is done."""
        self._waiting.append((self._started, self._event(), told))

    def tell(self) -> None:
        """Tell what is done, in order."""
        while self._waiting and self._waiting[0][1].query():  # type: ignore[no-untyped-call]  # torch's
            started, stopped, told = self._waiting.popleft()
            told(started.elapsed_time(stopped) / 1000)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        event.record(torch.cuda.current_stream(self._device))
        return event
