"""A connector with a memory: small, real, and able to be slow, forgetful and undecided on demand."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from tierkv.connectors.base import Hit, PagedConnector, Progress
from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints
from tierkv.layout import TOKEN_BYTES, Layout


@dataclass
class Manners:
    """How a MemoryConnector behaves. asks: chance that `match` has no answer yet.  late: chance that a transfer takes
    some polls.  short: chance that a load brings less than was promised.  refuses: chance that a save is not taken.
    """

    asks: float = 0.0
    late: float = 0.0
    short: float = 0.0
    refuses: float = 0.0
    seed: int = 0


@dataclass
class Known:
    """What a request holds: the prefixes pinned on the device, and what `load` is to fill."""

    pinned: list[bytes] = field(default_factory=list)
    sealed: int = 0
    wanted: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # source block and tokens of it, per None
    fallback: list[int] = field(default_factory=list)  # usable tokens if the i-th of them does not come
    num_tokens: int = 0


class MemoryConnector(PagedConnector):
    """Blocks by all tokens up to their end: on device pages while there is room, in host copies for ever."""

    def __init__(self, layout: Layout, device: torch.device, *, num_pages: int, manners: Manners | None = None) -> None:
        self.pool = torch.full(
            (num_pages, *layout.shape), float("nan"), dtype=getattr(torch, layout.dtype), device=device
        )
        self.host: dict[bytes, torch.Tensor] = {}
        self.device: dict[bytes, int] = {}
        self.pins: dict[bytes, int] = {}
        self.tails: dict[str, tuple[int, torch.Tensor]] = {}
        self.log: list[str] = []
        self.expected: dict[str, bytes] = {}
        self.hints: dict[str, Hints] = {}
        self.endings: dict[str, Ending] = {}
        self.followed: list[tuple[str, Ending]] = []
        self._bytes = layout.block_tokens * TOKEN_BYTES
        self._free = list(range(num_pages))
        self._known: dict[str, Known] = {}
        self._late: list[tuple[int, Callable[[], None]]] = []
        self._manners, self._random = manners or Manners(), Random((manners or Manners()).seed)
        self._polls = 0

    # -- what tests look at

    @property
    def num_private(self) -> int:
        """Pages neither free nor the store's: held by an engine."""
        return self.pool.shape[0] - len(self._free) - len(self.device)

    @property
    def num_pinned(self) -> int:
        return sum(self.pins.values())

    def flush(self) -> None:
        """Forget unpinned device pages; the host copies stay."""
        for key in [key for key in self.device if not self.pins.get(key)]:
            self._free.append(self.device.pop(key))

    # -- PagedConnector

    def expect(self, request: str, tokens: bytes) -> None:
        self._unpin(request)
        self._known.pop(request, None)
        self.expected[request] = tokens

    def match(self, request: str, tokens: bytes, *, hints: Hints = NO_HINTS) -> Hit | None:
        assert self.hints.setdefault(request, hints) == hints, "hints of a request do not change"
        if self._random.random() < self._manners.asks:
            return None
        self._unpin(request)
        known = self._known[request] = Known()
        self.expected.pop(request, None)
        pages: list[int | None] = []
        sources: dict[str, int] = {}
        step, count = self._bytes, 0
        while (key := tokens[: (count + 1) * step]) in self.host and len(key) == (count + 1) * step:
            page = self.device.get(key)
            if page is not None and all(known is not None for known in pages):
                self.pins[key] = self.pins.get(key, 0) + 1
                known.pinned.append(key)
                pages.append(page)
            else:
                known.wanted.append((self.host[key], step // TOKEN_BYTES))
                known.fallback.append(count * step // TOKEN_BYTES)
                pages.append(None)
            count += 1
        num_tokens = count * step // TOKEN_BYTES
        source, agreed = self._partial(request, tokens, count)
        if source is not None:
            known.wanted.append((source, agreed))
            known.fallback.append(num_tokens)
            pages.append(None)
            num_tokens += agreed
        on_device = len(known.pinned) * step // TOKEN_BYTES
        sources = {"device": on_device, "host": num_tokens - on_device}
        known.num_tokens, known.sealed = num_tokens, len(known.pinned)
        return Hit(num_tokens, tuple(pages), {tier: n for tier, n in sources.items() if n})

    def _partial(self, request: str, tokens: bytes, count: int) -> tuple[torch.Tensor | None, int]:
        """The tail of a suspended request, or the block that agrees longest with what comes next."""
        begin = count * self._bytes
        best: tuple[torch.Tensor | None, int] = (None, 0)
        if request in self.tails and self.tails[request][0] // (self._bytes // TOKEN_BYTES) == count:
            num_tokens, tail = self.tails[request]
            best = (tail, num_tokens - begin // TOKEN_BYTES)
        for key, block in self.host.items():
            if len(key) == begin + self._bytes and key[:begin] == tokens[:begin]:
                rest, agreed = tokens[begin:], 0
                while key[begin + agreed * 4 : begin + agreed * 4 + 4] == rest[agreed * 4 : agreed * 4 + 4] != b"":
                    agreed += 1
                if agreed > best[1]:
                    best = (block, agreed)
        return best if best[1] > 0 else (None, 0)

    def load(self, request: str, pages: Sequence[int]) -> "Future[int]":
        known = self._known[request]
        assert len(pages) == len(known.wanted)
        usable = known.num_tokens
        count = len(pages)
        if self._random.random() < self._manners.short and pages:
            count = self._random.randrange(len(pages))
            usable = known.fallback[count]
        elif self._random.random() < self._manners.short and known.pinned:
            count, usable = 0, (len(known.pinned) - 1) * self._bytes // TOKEN_BYTES
            self._unpin_keys([known.pinned.pop()])
            known.sealed -= 1
        future: Future[int] = Future()

        def fill() -> None:
            for page, (source, num_tokens) in zip(pages[:count], known.wanted, strict=False):
                self.pool[page][..., :num_tokens, :] = source[..., :num_tokens, :]
            self.tails.pop(request, None)
            self.log.append(f"load {count}")
            future.set_result(usable)

        self._run(fill)
        return future

    def save(self, request: str, tokens: bytes, pages: Sequence[int]) -> list[bool]:
        known, taken = self._known[request], []
        for number in range(known.sealed, len(pages)):
            key = tokens[: (number + 1) * self._bytes]
            if self._random.random() < self._manners.refuses:
                taken.append(False)
                continue
            self.host.setdefault(key, self.pool[pages[number]].clone())
            if key in self.device:
                taken.append(False)
            else:
                self.device[key] = pages[number]
                self.pins[key] = self.pins.get(key, 0) + 1
                known.pinned.append(key)
                taken.append(True)
        known.sealed = len(pages)
        return taken

    def poll(self) -> Progress:
        self._polls += 1
        due = [run for at, run in self._late if at <= self._polls]
        self._late = [(at, run) for at, run in self._late if at > self._polls]
        for run in due:
            run()
        return Progress(loaded=len(due))

    def release(self, request: str, *, ending: Ending = NO_ENDING) -> None:
        self._unpin(request)
        self._known.pop(request, None)
        self.expected.pop(request, None)
        self.endings[request] = ending
        self.tails.pop(request, None)

    def follow(self, session: str, ending: Ending) -> None:
        self.followed.append((session, ending))

    def allocate(self, num_pages: int) -> list[int] | None:
        for key in [key for key in self.device if not self.pins.get(key)]:
            if len(self._free) >= num_pages:
                break
            self._free.append(self.device.pop(key))
        if len(self._free) < num_pages:
            return None
        taken, self._free = self._free[:num_pages], self._free[num_pages:]
        return taken

    def free(self, pages: Sequence[int]) -> None:
        assert not set(pages) & set(self._free), "freed twice"
        assert not set(pages) & set(self.device.values()), "not the engine's to free"
        self.pool[list(pages)] = float("nan")  # whoever still reads it shall notice
        self._free.extend(pages)

    def fork(self, request: str, child: str) -> None:
        known = self._known[request]
        for key in known.pinned:
            self.pins[key] += 1
        self._known[child] = Known(pinned=list(known.pinned), sealed=known.sealed)

    def suspend(self, request: str, *, tail: int | None, num_tokens: int) -> "Future[None]":
        future: Future[None] = Future()

        def keep() -> None:
            if tail is not None:
                self.tails[request] = (num_tokens, self.pool[tail].clone())
            self.log.append("suspend")
            future.set_result(None)

        self._unpin(request)  # at once, as a store may: blocks have host copies already
        self._run(keep)
        return future

    # -- inside

    def _run(self, do: Callable[[], None]) -> None:
        if self._random.random() < self._manners.late:
            self._late.append((self._polls + self._random.randrange(1, 5), do))
        else:
            do()

    def _unpin(self, request: str) -> None:
        known = self._known.get(request)
        if known is not None:
            self._unpin_keys(known.pinned)
            known.pinned = []

    def _unpin_keys(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.pins[key] -= 1
            if not self.pins[key]:
                del self.pins[key]


def connect(made: list[Any], *, num_pages: int, manners: Manners | None = None) -> Any:
    """A connector factory for `Engine` that leaves what it made in `made`."""

    def make(layout: Layout, device: torch.device, identity: str) -> MemoryConnector:
        made.append(MemoryConnector(layout, device, num_pages=num_pages, manners=manners))
        return made[-1]

    return make
