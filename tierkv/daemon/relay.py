"""What the index of a pool tells, on its way to the log of events."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident

from tierkv.keys import KEY_BYTES, Key, Namespace
from tierkv.names import Listener


class Relay:
    """A listener of the index that passes on what it hears, and notes what goes while somebody wants to know.

    namespaces: by root, as they become known. Another root stands for a block that nobody knows: a depth below it is too small.
    """

    def __init__(self, to: Listener, namespaces: Mapping[Key, Namespace]) -> None:
        self._to, self._namespaces = to, namespaces
        self._gone: set[Key] | None = None
        self._thread = 0

    def stored(self, tier: int, parent: Key, depth: int, keys: bytes, tokens: bytes) -> None:
        """A tier holds these blocks."""
        self._to.stored(tier, parent, depth or int(parent not in self._namespaces), keys, tokens)

    def removed(self, tier: int, keys: bytes) -> None:
        """A tier holds them no more."""
        self._to.removed(tier, keys)
        if self._gone is not None and get_ident() == self._thread:
            self._gone.update(split(keys))

    @contextmanager
    def capture(self) -> Iterator[set[Key]]:
        """Note the keys that this thread lets go meanwhile; others may evict at the same time."""
        gone = set[Key]()
        self._gone, self._thread = gone, get_ident()
        try:
            yield gone
        finally:
            self._gone = None


def split(keys: bytes) -> list[Key]:
    """Keys that came one after another."""
    return [Key(keys[at : at + KEY_BYTES]) for at in range(0, len(keys), KEY_BYTES)]
