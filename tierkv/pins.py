"""Blocks that are kept for a time because somebody says so: a system prompt, a session whose tool is running.

A pin keeps them in host memory, not on the device: an engine that needs pages is never refused them for a pin, and what the
device forgets meanwhile comes back with one copy. Only a part of the host tier can be pinned, and every pin has an end.
"""

import math
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from tierkv.errors import PinError
from tierkv.index import Lease
from tierkv.keys import Key
from tierkv.mover import AHEAD_LANE, Mover
from tierkv.transfers import DEVICE, HOST, Below, Places, copy_to_host, copy_up


@dataclass(slots=True, eq=False)
class Pin:
    """Leading blocks of some tokens, kept until `expires_s` on the store's clock, or until they are unpinned.

    num_blocks: it falls while they are copied to the host, if that has no room for all.
    """

    num_blocks: int
    expires_s: float
    kept: "Future[Lease]"


class Pins:
    """The pins of one store. One thread makes the calls.

    share: part of the host tier that all of them together may keep; blocks that two of them keep count twice.
    """

    def __init__(
        self,
        *,
        root: Key,
        places: Places,
        below: dict[int, Below],
        mover: Mover,
        share: float,
        piece: int,
        deadline_s: float,
    ) -> None:
        self._root, self._places, self._below, self._mover = root, places, below, mover
        self._limit = int(share * places.index.room(HOST)[1])
        self._piece, self._deadline_s = piece, deadline_s
        self._pins: dict[Pin, None] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks that pins keep."""
        return sum(pin.num_blocks for pin in list(self._pins))

    def pin(self, tokens: bytes, *, ttl_s: float) -> Pin:
        """Keep what is held of these tokens, and copy to the host what it lacks. Raises PinError."""
        if not (math.isfinite(ttl_s) and ttl_s > 0):
            raise PinError(f"pin for ttl_s={ttl_s}: give a number of seconds above 0; unpin ends it sooner")
        lease = self._places.index.keep(self._root, tokens)
        num_blocks, pinned = lease.num_blocks, self.num_blocks
        if pinned + num_blocks > self._limit:
            lease.release()
            raise PinError(
                f"pin of {num_blocks} blocks: pins may keep {self._limit} blocks of the host tier and keep {pinned} already; "
                "unpin some, pin fewer tokens, or raise host.capacity"
            )
        pin = Pin(num_blocks, self._places.clock() + ttl_s, Future())
        job = partial(self._run, pin, lease, self._places.device.mark())
        if self._mover.submit(AHEAD_LANE, job, blocks=num_blocks) is None:
            lease.release()
            raise PinError(
                f"pin of {num_blocks} blocks: too many transfers wait already; try again when some have ended"
            )
        self._pins[pin] = None
        return pin

    def unpin(self, pin: Pin) -> None:
        """Keep them no longer. Idempotent, also after the pin has expired."""
        if pin in self._pins:
            del self._pins[pin]
            pin.kept.add_done_callback(_let_go)

    def expire(self, now_s: float) -> None:
        """End the pins whose time is over."""
        for pin in [pin for pin in self._pins if pin.expires_s <= now_s]:
            self.unpin(pin)

    def close(self) -> None:
        """End all."""
        for pin in list(self._pins):
            self.unpin(pin)

    def _run(self, pin: Pin, lease: Lease, mark: object) -> None:
        """Bring the blocks to the host; keep those leading ones that it holds then."""
        try:
            for tier, lo, hi in lease.sources():
                if tier == DEVICE:
                    copy_to_host(self._places, lease, lo, hi, mark=mark, worth=math.inf)
                elif tier > HOST:
                    self._lift(self._below[tier], lease, lo, hi)
        finally:
            with lease:
                own = _kept_in_host(lease)
            pin.num_blocks = own.num_blocks
            pin.kept.set_result(own)

    def _lift(self, below: Below, lease: Lease, lo: int, hi: int) -> None:
        deadline = self._places.clock() + self._deadline_s
        for at in range(lo, hi, self._piece):
            end = min(hi, at + self._piece)
            if below.breaker.open or copy_up(self._places, below, lease, at, end, deadline=deadline) < end - at:
                return


def _kept_in_host(lease: Lease) -> Lease:
    """A lease on the leading blocks that the host holds, pinned there and nowhere else."""
    while True:
        held = lease.held(HOST, 0, lease.num_blocks)
        num_blocks = held[0][1] if held and held[0][0] == 0 else 0
        own = lease.share(0, num_blocks, HOST)
        own.shorten_pins(HOST)
        if not num_blocks or own.held(HOST, 0, num_blocks) == [(0, num_blocks)]:
            return own
        own.release()  # something went between the two looks


def _let_go(kept: "Future[Lease]") -> None:
    kept.result().release()
