"""What an engine may tell a store of a request that its tokens do not show.

All of it is optional and none of it is trusted: a hint changes what is forgotten first, never what is answered.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

PRIORITIES: Final = range(-4, 5)
"""Priorities that are told apart; those beyond count as the nearest."""


class Next(Enum):
    """What is expected of a conversation after one of its requests."""

    UNKNOWN = "unknown"
    ENDED = "ended"
    """Nothing: the session is over."""
    TOOL = "tool"
    """A tool was called: its result comes back as soon as the tool has run, without a person in between."""
    TURN = "turn"
    """A person reads the answer, and may go on."""


@dataclass(frozen=True, slots=True)
class Hints:
    """Of a request, as it arrives.

    session: what requests of one conversation or agent have in common, within one store.  priority: 0 is usual; blocks of
    higher priority are kept longer.
    """

    session: str | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Ending:
    """Of a request, as it ends.

    within_s: seconds until its continuation is expected, where the engine knows.  output_tokens: length of the answer.
    """

    next: Next = Next.UNKNOWN
    within_s: float | None = None
    output_tokens: int | None = None


NO_HINTS: Final = Hints()
NO_ENDING: Final = Ending()
