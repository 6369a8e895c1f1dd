"""Layers of a load on their way: the first can be attended to while the last are still being copied. Standard library only."""

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Event

from tierkv.errors import TierError


def layer_bounds(num_layers: int, num_groups: int) -> list[int]:
    """First layer of each group, as equal as can be, and the number of layers at the end."""
    return [group * num_layers // num_groups for group in range(num_groups + 1)]


class Arrival:
    """Groups of layers of one load, in order; whoever loads sets them, whoever computes waits for them.

    bounds: as `layer_bounds` makes them.  finished: resolves when all have come, or the rest has failed: until then the pages
    belong to the load, and nobody may be shown them.
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self._bounds = bounds
        self._came = [Event() for _ in bounds[:-1]]
        self._error: BaseException | None = None
        self.finished: Future[None] = Future()

    def wait(self, layer: int) -> None:
        """Return once a layer is there. Raises TierError when some never will be: tokens of this step would be wrong."""
        came = self._came[bisect_right(self._bounds, layer) - 1]
        if not came.is_set():
            came.wait()
        if self._error is not None:
            raise TierError(f"a load lost layers on their way to the device: {self._error}") from self._error

    def settle(self) -> bool:
        """Wait for the end; False when some layers never came, so that the pages hold what nobody may see."""
        self.finished.result()
        return self._error is None

    @property
    def is_whole(self) -> bool:
        """All is there?"""
        return self.finished.done() and self._error is None

    def arrive(self, group: int) -> None:
        """A group is there."""
        self._came[group].set()

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more comes: all is there, or `error` says why it is not. Whoever waits goes on or fails."""
        self._error = error
        for came in self._came:
            came.set()
        self.finished.set_result(None)
