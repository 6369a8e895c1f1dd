"""Who may write into a page: the engine's private pages, counted, and a connector with nothing behind it."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from tierkv.connectors.base import Hit, PagedConnector, Progress
from tierkv.errors import ConfigError
from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints
from tierkv.layout import Layout

T = TypeVar("T")


class PrivatePages(PagedConnector):
    """A pool and its free pages; remembers no KV of anybody. What an engine runs on when there is no store.

    Raises ConfigError when the pool cannot be allocated.
    """

    def __init__(self, layout: Layout, device: torch.device, *, num_pages: int) -> None:
        dtype: torch.dtype = getattr(torch, layout.dtype)
        try:
            self.pool = torch.empty((num_pages, *layout.shape), dtype=dtype, device=device)
        except RuntimeError as error:
            size = num_pages * layout.block_bytes
            raise ConfigError(f"page pool of {size:,} bytes: {str(error).splitlines()[0]}; give fewer pages") from error
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def expect(self, request: str, tokens: bytes) -> None:
        """Nothing is known of anybody."""

    def match(self, request: str, tokens: bytes, *, hints: Hints = NO_HINTS) -> Hit | None:
        """Nothing is ever found."""
        return Hit()

    def load(self, request: str, pages: Sequence[int]) -> "Future[int]":
        """Nothing to load."""
        return _resolved(0)

    def save(self, request: str, tokens: bytes, pages: Sequence[int]) -> list[bool]:
        """Nothing is kept: pages stay the engine's."""
        return []

    def poll(self) -> Progress:
        """Nothing moves."""
        return Progress()

    def release(self, request: str, *, ending: Ending = NO_ENDING) -> None:
        """Nothing is pinned."""

    def allocate(self, num_pages: int) -> list[int] | None:
        """The most recently freed pages first: they are the likeliest to be in a cache."""
        if num_pages > len(self._free):
            return None
        cut = len(self._free) - num_pages
        taken, self._free[cut:] = self._free[cut:][::-1], []
        return taken

    def free(self, pages: Sequence[int]) -> None:
        """Give private pages back."""
        self._free.extend(pages)

    def fork(self, request: str, child: str) -> None:
        """Nothing is pinned."""

    def suspend(self, request: str, *, tail: int | None, num_tokens: int) -> "Future[None]":
        """The KV is forgotten: the request recomputes it."""
        return _resolved(None)


class PageLedger:
    """The engine's private pages and how many sequences hold each. A page that is not in it belongs to the store.

    A page may be written by a sequence that is its only holder; all others copy it first.
    """

    def __init__(self, connector: PagedConnector) -> None:
        self._connector = connector
        self._holders: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def __contains__(self, page: int) -> bool:
        return page in self._holders

    def allocate(self, num_pages: int) -> list[int] | None:
        """Pages with one holder each, or None when that many cannot be had now."""
        if num_pages == 0:
            return []
        pages = self._connector.allocate(num_pages)
        if pages is not None:
            self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def is_writable(self, page: int) -> bool:
        """Tell whether its one holder may write it in place."""
        return self._holders.get(page) == 1

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each private page among `pages`."""
        for page in pages:
            if page in self._holders:
                self._holders[page] += 1

    def give(self, page: int) -> None:
        """The store took the page over."""
        assert self._holders.get(page, 1) == 1, "only its writer offers a page, and a writer is alone"
        self._holders.pop(page, None)

    def drop(self, pages: Iterable[int]) -> None:
        """One holder less for each private page among `pages`; those without any go back."""
        idle = []
        for page in pages:
            holders = self._holders.get(page)
            if holders == 1:
                del self._holders[page]
                idle.append(page)
            elif holders is not None:
                self._holders[page] = holders - 1
        if idle:
            self._connector.free(idle)


def _resolved(value: T) -> "Future[T]":
    future: Future[T] = Future()
    future.set_result(value)
    return future
