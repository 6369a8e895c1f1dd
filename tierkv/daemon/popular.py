"""Which prefixes are asked for most: counted by their first block, for a bounded number of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tierkv.keys import KEY_BYTES, Key

if TYPE_CHECKING:
    from tierkv.daemon.pool import Pool

MAX_PREFIXES: Final = 512


@dataclass(slots=True)
class Prefix:
    """Requests that begin with one block. blocks: the most of one of them that was held, up to the key `last`; uses: how many
    there were.
    """

    pool: "Pool"
    root: Key
    key: bytes
    last: bytes = b""
    blocks: int = 0
    uses: int = 0
    used: float = 0.0

    @property
    def bytes(self) -> int:
        """What these blocks take."""
        return self.blocks * self.pool.layout.block_bytes

    @property
    def tokens(self) -> int:
        """Their tokens."""
        return self.blocks * self.pool.layout.block_tokens


class Popular:
    """The prefixes seen most. When there are too many, the least used one goes, and its successor takes over its count
    (Space-Saving; Metwally et al., ICDT 2005): counts are too high by at most that, and nothing popular is missed.
    """

    def __init__(self) -> None:
        self._prefixes: dict[bytes, Prefix] = {}

    def note(self, pool: "Pool", root: Key, keys: bytes, found: int, depth: int, *, now: float) -> None:
        """A request asked for `keys`, of which the `found` leading ones are held, after `depth` blocks that it had."""
        if depth or not keys:  # the rest of a prefix that its client knows: its beginning was counted there
            return
        key = keys[:KEY_BYTES]
        prefix = self._prefixes.get(key)
        if prefix is None:
            prefix = Prefix(pool, root, key)
            if len(self._prefixes) == MAX_PREFIXES:
                least = min(self._prefixes.values(), key=lambda one: one.uses)
                del self._prefixes[least.key]
                prefix.uses = least.uses
            self._prefixes[key] = prefix
        prefix.uses += 1
        prefix.used = now
        if found >= prefix.blocks:
            prefix.blocks, prefix.last = found, keys[max(found - 1, 0) * KEY_BYTES : found * KEY_BYTES]

    def top(self, count: int) -> Iterable[Prefix]:
        """Those that take the most memory, weighed by their use."""
        return sorted(self._prefixes.values(), key=lambda one: (one.bytes * one.uses, one.uses), reverse=True)[:count]
