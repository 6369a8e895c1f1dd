"""What long commands show on stderr while they work: a bar on a terminal, a line now and then elsewhere; how they are stopped."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S: Final = 10.0


class Meter:
    """Counts what is done of `total`, in `unit`. `skip`: what needed no work, and says nothing of the speed."""

    def __init__(self, what: str, total: int, *, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._began, self._told = time.monotonic(), time.monotonic()
        self._done = self._skipped = 0
        self._bars: Progress | None = None
        self._stopped = False
        if sys.stderr.isatty():
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True, highlight=False),
            )
            self._task = self._bars.add_task(what, total=total, shown="")

    def expect(self, total: int) -> None:
        """Say how much it is, once that is known."""
        self._total, self._began = total, time.monotonic()
        if self._bars is not None:
            self._bars.update(self._task, total=total)

    def skip(self, amount: int) -> None:
        """Count what is there already."""
        self._skipped += amount
        self._show()

    def add(self, amount: int) -> None:
        """Count what was done. Raises KeyboardInterrupt when it is to stop: in between two steps, where nothing is half done."""
        self._done += amount
        self._show()
        if self._stopped:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Let the next `add` raise."""
        self._stopped = True

    @property
    def per_s(self) -> float:
        """Of what was done."""
        return self._done / max(1e-9, time.monotonic() - self._began)

    def _show(self) -> None:
        reached = min(self._total, self._done + self._skipped)
        shown = f"{reached:,} of {self._total:,} {self._unit}, {self.per_s:,.0f}/s"
        if self._bars is not None:
            self._bars.update(self._task, completed=reached, shown=shown)
        elif time.monotonic() - self._told >= LINE_EVERY_S:
            self._told = time.monotonic()
            left = (self._total - reached) / self.per_s if self._done else 0.0
            sys.stderr.write(f"{self._what}: {shown}, {left:,.0f} s left\n")

    def __enter__(self) -> "Meter":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bars is not None:
            self._bars.stop()


@contextmanager
def stopping(meter: Meter) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the work at its next step; the second time at once."""

    def first(number: int, frame: FrameType | None) -> None:
        meter.stop()
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.default_int_handler)
        sys.stderr.write("stopping: what was computed is being written down (once more: at once)\n")

    before = {one: signal.signal(one, first) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
