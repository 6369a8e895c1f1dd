"""From tokens to text, piece by piece: no half characters, and never a part of a stop string."""

from collections.abc import Sequence
from typing import Any

Tokenizer = Any  # a transformers tokenizer, or what behaves like one; transformers is untyped here

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one sample as far as it may be shown.

    A piece is held back while its last character may be incomplete, or while its end may be the start of a stop string.
    All pieces together are what decoding all tokens at once gives, up to the stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], *, skip_special_tokens: bool) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._skip_special_tokens = skip_special_tokens
        # Text of tokens[:_read] is out; decoding starts at _anchor, one piece earlier, because what a token looks like
        # may depend on the token before it (spaces, joined characters).
        self._tokens: list[int] = []
        self._anchor = self._read = 0
        self._held = ""
        self._shown: list[str] = []
        self._taken = 0
        self.stopped_by: str | None = None

    @property
    def text(self) -> str:
        """All that may be shown so far."""
        return "".join(self._shown)

    def feed(self, token: int) -> bool:
        """Add a token; True once a stop string is complete, after which there is no more text."""
        if self._tokenizer is None:
            return False
        self._tokens.append(token)
        known = self._decode(self._tokens[self._anchor : self._read])
        both = self._decode(self._tokens[self._anchor :])
        if len(both) <= len(known) or both.endswith(_INCOMPLETE):
            return False
        self._anchor, self._read = self._read, len(self._tokens)
        return self._show(both[len(known) :])

    def flush(self) -> bool:
        """The sample is over: let out what was held back; True if that completed a stop string."""
        if self._tokenizer is None or self.stopped_by is not None:
            return self.stopped_by is not None
        known = self._decode(self._tokens[self._anchor : self._read])
        rest = self._decode(self._tokens[self._anchor :])[len(known) :]
        self._anchor = self._read = len(self._tokens)
        if self._show(rest):
            return True
        self._shown.append(self._held)
        self._held = ""
        return False

    def take(self) -> str:
        """What has become showable since the last call."""
        piece = "".join(self._shown[self._taken :])
        self._taken = len(self._shown)
        return piece

    def copy(self) -> "TextStream":
        """Continue the same text independently; what was shown here is not taken there again."""
        twin = TextStream(self._tokenizer, self._stop, skip_special_tokens=self._skip_special_tokens)
        twin._tokens, twin._anchor, twin._read = list(self._tokens), self._anchor, self._read
        twin._held, twin._shown, twin._taken = self._held, list(self._shown), len(self._shown)
        twin.stopped_by = self.stopped_by
        return twin

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None or not tokens:
            return ""
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _show(self, piece: str) -> bool:
        held = self._held + piece
        found = [(at, stop) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self._held, shown = "", held[:at]
        else:
            keep = max((_overlap(held, stop) for stop in self._stop), default=0)
            self._held, shown = held[len(held) - keep :], held[: len(held) - keep]
        if shown:
            self._shown.append(shown)
        return bool(found)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins; `stop` is not in `text`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
