"""How an engine talks to a store. The calls come in this order, per request:

    (expect ->) match -> load -> (save, as blocks fill) … -> release

All are cheap, never block on I/O and are made from the engine's one scheduling thread. What an engine tells of the future
(`expect`, hints, endings, `follow`) changes what a store forgets first and what it has at hand, never what it answers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tierkv.arrival import Arrival
from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints


@dataclass(frozen=True, slots=True)
class Hit:
    """What a store holds of a prompt; pinned until `release`.

    num_tokens: leading tokens whose KV can be had; need not be a multiple of the block.
    pages: one entry per block that these tokens touch, in order: the device page to attend to in place (pinned, shared,
    never written by the engine), or None where `load` fills a page of the engine's own.
    sources: tokens by the tier they come from; the sum is `num_tokens`.
    """

    num_tokens: int = 0
    pages: tuple[int | None, ...] = ()
    sources: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """Transfers since the last `poll`, in blocks."""

    loaded: int = 0
    saved: int = 0
    failed: int = 0


class Connector(ABC):
    """An engine's view of a store. Tokens are int32-LE bytes (`tierkv.keys.token_bytes`), converted once per request."""

    @abstractmethod
    def expect(self, request: str, tokens: bytes) -> None:
        """Say that a request waits in the engine's queue, and will be matched with these tokens. May come any number of times.

        What is held of it is forgotten last meanwhile, and brought nearer where there is time; nothing is pinned. After a
        `match` it says that the request waits again: what was pinned is let go, as far as no load or suspend is at it.
        """

    @abstractmethod
    def match(self, request: str, tokens: bytes, *, hints: Hints = NO_HINTS) -> Hit | None:
        """Find and pin the longest known prefix of `tokens`. None: being looked for, ask again soon.

        At least one token must be computed to sample the next one: pass the tokens that may be reused, not all.
        hints: of the request, the same each time it is asked for.
        """

    @abstractmethod
    def load(self, request: str, pages: Sequence[int]) -> "Future[int]":
        """Fill `pages`, one per None in the hit, in order. Resolves to the leading tokens that are usable.

        Always resolves (no exception): a tier that fails or is late shortens the hit. Blocks past it are not pinned any more;
        the fresh pages past it are the engine's to compute into, shared pages past it must not be used.
        """

    @abstractmethod
    def save(self, request: str, tokens: bytes, pages: Sequence[int]) -> list[bool]:
        """Offer full blocks: `tokens` are all tokens whose KV is written, `pages` the page of every full block so far.

        Only blocks new since the last call are taken. One bool per new block: True, the page is the store's now (shared and
        read-only, pinned until `release`); False, it stays the engine's.
        """

    @abstractmethod
    def poll(self) -> Progress:
        """What has been moved since the last call."""

    @abstractmethod
    def release(self, request: str, *, ending: Ending = NO_ENDING) -> None:
        """The request is over: unpin. Unknown requests are fine (aborts come twice)."""

    def await_prefix(self, request: str, tokens: bytes, *, deadline_s: float) -> None:  # noqa: B027 -- not every store waits
        """Say that another engine is computing these tokens: `match` has no answer until they are here, or the time is up.

        For a request that is queued and was not matched yet.
        """

    def follow(self, session: str, ending: Ending) -> None:  # noqa: B027 -- not every store listens
        """Say what comes after a session's last request, where that is known only after its `release`."""


class PagedConnector(Connector):
    """A connector whose store owns the device pages that the engine attends to: a device hit is a pin, not a copy.

    pool: tensor `[num_pages, *block]` on the engine's device.
    """

    pool: Any  # torch.Tensor; this module imports no torch

    @abstractmethod
    def allocate(self, num_pages: int) -> list[int] | None:
        """Private pages to write into, or None when that many cannot be had now: wait, or preempt."""

    @abstractmethod
    def free(self, pages: Sequence[int]) -> None:
        """Give private pages back."""

    def arrival(self, request: str) -> Arrival | None:
        """Layers of the request's last load that are still on their way, or were lost on it; None: all are there.

        Before a layer attends to the pages that were loaded, the engine waits for it. Until the arrival is finished the pages
        are not saved, suspended or freed.
        """
        return None

    @abstractmethod
    def fork(self, request: str, child: str) -> None:
        """`child` continues from what `request` has pinned so far (n > 1 samples, beams)."""

    @abstractmethod
    def suspend(self, request: str, *, tail: int | None, num_tokens: int) -> "Future[None]":
        """Move a pre-empted request's KV to the host: its saved blocks, and `tail`, the private page of its last part.

        num_tokens: tokens of the request whose KV is written. Once resolved the request is unpinned, its private pages
        may be freed, and a later `match` of the same request and tokens finds all of it, the tail included.
        """

    def computed(self, *, num_tokens: int, context_tokens: int, seconds: float) -> None:
        """Say that prefill of `num_tokens`, after `context_tokens` others, took `seconds`; for stores that weigh costs."""
