"""Where the last request of each session ended, so that what becomes known later can be told of that path."""

from collections import OrderedDict
from typing import Final

from tierkv.policies.base import Use

SESSION_BYTES: Final = 64 << 20
"""Token ids that are remembered for all sessions: 128 sessions of 128k tokens, 4,096 of 4k."""


class Sessions:
    """The sessions used last, as many as fit. One thread."""

    def __init__(self, *, max_bytes: int = SESSION_BYTES) -> None:
        self._max_bytes = max_bytes
        self._last: OrderedDict[str, tuple[bytes, Use]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._last)

    def remember(self, session: str, tokens: bytes, use: Use) -> None:
        """The session's last request covered these tokens."""
        self.forget(session)
        self._last[session] = (tokens, use)
        self._bytes += len(tokens)
        while self._bytes > self._max_bytes:
            _, (gone, _) = self._last.popitem(last=False)
            self._bytes -= len(gone)

    def last(self, session: str) -> tuple[bytes, Use] | None:
        """Tokens and use of its last request; None for one that is not remembered (any more)."""
        return self._last.get(session)

    def forget(self, session: str) -> None:
        """Nothing more will be asked of it."""
        known = self._last.pop(session, None)
        if known:
            self._bytes -= len(known[0])
