"""Why blocks of a prompt are missing: what is known of each stretch of it, as reasons to count and as lines to read. Pure.

Knowledge comes from two places: a live store's index (`from_index`), or what lies at rest (`from_stocks`), where keys are
compared under every namespace that ever wrote there, so that a prompt somebody else's configuration computed is told apart from
one that nobody ever sent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby
from typing import Any, Final

from tierkv.fates import Known
from tierkv.keys import Key, chain
from tierkv.layout import TOKEN_BYTES
from tierkv.tiers.base import Miss

Fields = Mapping[str, Any]  # Any: text and numbers, of `Namespace.fields`


class Reason(StrEnum):
    """Why blocks had to be computed: the label of a counter. Those of `Miss` say why something held did not come."""

    NEVER_SEEN = "never_seen"
    EVICTED = "evicted"
    NOT_KEPT = "not_kept"
    """Computed before, and never taken in: no room, or the save was dropped."""
    FORGOTTEN = "forgotten"
    """Somebody asked for it: a tenant's or a model's blocks, or what was not used for long."""
    KEY_DIFFERS = "key_differs"
    """The same tokens are there, under another model, tenant, adapter or layout."""
    PARTIAL_TAIL = "partial_tail"
    """Tokens after the last whole block."""
    UNREACHABLE = "unreachable"
    """Held, behind blocks that are missing."""
    ABSENT = Miss.ABSENT.value
    CORRUPT = Miss.CORRUPT.value
    LAYOUT = Miss.LAYOUT.value
    LATE = Miss.LATE.value
    FAILED = Miss.FAILED.value
    DOWN = Miss.DOWN.value
    BUSY = Miss.BUSY.value


@dataclass(frozen=True, slots=True)
class Stretch:
    """Blocks [lo, hi) of a prompt, of which the same is to be said.

    tiers: that hold them, the fastest first.  reason: why they cannot be had; None: they can.  tier, at_s, policy: where they
    left, when (on the clock of whoever knew) and by whose choice.  differs: fields of the key, here and there.
    """

    lo: int
    hi: int
    tiers: tuple[str, ...] = ()
    reason: Reason | None = None
    tier: str | None = None
    at_s: float | None = None
    policy: str | None = None
    differs: tuple[tuple[str, Any, Any], ...] = ()  # Any: as in Fields

    def part(self, lo: int, hi: int) -> "Stretch":
        """The same of some of these blocks."""
        return replace(self, lo=lo, hi=hi)

    def because(self, reason: Reason, *, tier: str | None = None) -> "Stretch":
        """The same blocks, for another reason."""
        return replace(self, reason=reason, tier=tier or self.tier)

    def say(self, *, block_tokens: int, now_s: float | None = None) -> str:
        """One line. now_s: on the clock of `at_s`, to tell how long ago that was."""
        where = f"blocks {self.lo}-{self.hi - 1}" if self.hi - self.lo > 1 else f"block {self.lo}"
        where += f" (tokens {self.lo * block_tokens}-{self.hi * block_tokens - 1})"
        return f"{where}: {self.why(now_s=now_s)}"

    def why(self, *, now_s: float | None = None) -> str:
        """What is to be said of them."""
        held = f"in {', '.join(self.tiers)}"
        if self.reason is None:
            return held
        if self.reason is Reason.UNREACHABLE:
            return f"{held}, but not to be reached: blocks before are missing"
        if self.reason is Reason.KEY_DIFFERS:
            fields = ", ".join(
                f"{name} ({_shown(here)} here, {_shown(there)} there)" for name, here, there in self.differs
            )
            return f"{held} for others: the key differs in {fields}"
        text = _SAID[self.reason].format(tier=self.tier or "a tier")
        if self.policy:
            text += f" by {self.policy}"
        if self.at_s is not None and now_s is not None:
            text += f", {ago(now_s - self.at_s)} ago"
        return text


_SAID: Final = {
    Reason.NEVER_SEEN: "never seen",
    Reason.EVICTED: "evicted from {tier}",
    Reason.NOT_KEPT: "computed before, but not kept: no room, or the save was dropped",
    Reason.FORGOTTEN: "forgotten by {tier} on request",
    Reason.PARTIAL_TAIL: "part of a block, which no tier keeps",
    Reason.ABSENT: "{tier} did not have it any more",
    Reason.CORRUPT: "found corrupt in {tier}, and removed",
    Reason.LAYOUT: "{tier} has it in another layout",
    Reason.LATE: "did not come in time from {tier}",
    Reason.FAILED: "{tier} failed",
    Reason.DOWN: "{tier} is out of use",
    Reason.BUSY: "there was no room in the queue of loads",
}


# -- from a live index ----------------------------------------------------------------------------------------------------


def from_index(known: Sequence[Known], tier_names: Sequence[str]) -> list[Stretch]:
    """What an index knows of a prompt, in its order, from the first block to the last."""
    found = []
    broken = False
    for part in known:
        lo, hi = part.lo, part.hi
        if part.tiers:
            tiers = tuple(tier_names[tier] for tier in part.tiers)
            found.append(Stretch(lo, hi, tiers, Reason.UNREACHABLE if broken else None))
            continue
        broken = True
        if not part.known:
            found.append(Stretch(lo, hi, (), Reason.NEVER_SEEN))
        elif not part.fates:
            found.append(Stretch(lo, hi, (), Reason.NOT_KEPT))
        else:
            fate = part.fates[0]
            reason, policy = (Reason(fate.why), None) if fate.why in _REASONS else (Reason.EVICTED, fate.why)
            found.append(Stretch(lo, hi, (), reason, tier_names[fate.tier], fate.at_s, policy))
    return _joined(found)


_REASONS: Final = frozenset(reason.value for reason in Reason)


# -- from what lies at rest -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stock:
    """A tier at rest as it can be asked from outside: which keys it has, and what it knows of those that left.

    departed: key -> time (seconds since the epoch) and reason.  down: why it cannot be asked at all.
    """

    name: str
    contains: Callable[[Sequence[Key]], Sequence[bool]] = lambda keys: [False] * len(keys)
    departed: Callable[[Key], tuple[float, str] | None] = lambda key: None
    policy: str | None = None
    namespaces: Mapping[Key, Fields] = field(default_factory=dict)
    down: str | None = None


def from_stocks(tokens: bytes, *, root: Key, fields: Fields, stocks: Sequence[Stock]) -> list[Stretch]:
    """What tiers at rest hold of a prompt under one namespace, and why they hold no more.

    tokens: int32-LE.  fields: of the namespace whose root is given.
    """
    step = int(fields["block_tokens"])
    keys = chain(root, tokens, block_tokens=step)
    held = [[name for name, has in zip(_names(stocks), row, strict=True) if has] for row in _presence(keys, stocks)]
    others = _others(tokens, root, fields, stocks)
    down = next((stock.name for stock in stocks if stock.down), None)
    found, broken = [], False
    for at, key in enumerate(keys):
        stretch = Stretch(at, at + 1, tuple(held[at]))
        if held[at]:
            found.append(replace(stretch, reason=Reason.UNREACHABLE if broken else None))
            continue
        broken = True
        left = [(*gone, stock) for stock in stocks if (gone := stock.departed(key))]
        elsewhere = [other for other in others if other.num_tokens >= (at + 1) * step]
        if left:
            at_s, why, stock = max(left, key=lambda entry: entry[0])
            cause = Reason(why) if why in _REASONS else Reason.EVICTED
            policy = stock.policy if cause is Reason.EVICTED else None
            found.append(replace(stretch, reason=cause, tier=stock.name, at_s=at_s, policy=policy))
        elif elsewhere:
            nearest = min(elsewhere, key=lambda other: len(other.differs))
            found.append(replace(stretch, tiers=nearest.tiers, reason=Reason.KEY_DIFFERS, differs=nearest.differs))
        elif down:
            found.append(replace(stretch, reason=Reason.DOWN, tier=down))
        else:
            found.append(replace(stretch, reason=Reason.NEVER_SEEN))
    return _joined(found)


@dataclass(frozen=True, slots=True)
class _Other:
    """Leading tokens of the prompt that are held under another namespace."""

    num_tokens: int
    tiers: tuple[str, ...]
    differs: tuple[tuple[str, Any, Any], ...]  # Any: as in Fields


def _others(tokens: bytes, root: Key, fields: Fields, stocks: Sequence[Stock]) -> list[_Other]:
    found = []
    known = {of: theirs for stock in stocks for of, theirs in stock.namespaces.items() if of != root}
    for of, theirs in known.items():
        step = theirs.get("block_tokens")
        if not isinstance(step, int) or step < 1:
            continue
        rows = _presence(chain(of, tokens, block_tokens=step), stocks)
        blocks = next((at for at, row in enumerate(rows) if not any(row)), len(rows))
        if blocks:
            tiers = tuple(name for name, has in zip(_names(stocks), rows[0], strict=True) if has)
            found.append(_Other(blocks * step, tiers, differences(fields, theirs)))
    return found


def differences(ours: Fields, theirs: Fields) -> tuple[tuple[str, Any, Any], ...]:  # Any: as in Fields
    """Fields that differ, with both values; of equal fields with other roots, the secret."""
    differ = tuple((name, ours[name], theirs.get(name)) for name in ours if ours[name] != theirs.get(name))
    return differ or (("secret", "one", "another"),)


def _names(stocks: Sequence[Stock]) -> list[str]:
    return [stock.name for stock in stocks]


def _presence(keys: Sequence[Key], stocks: Sequence[Stock]) -> list[tuple[bool, ...]]:
    return list(zip(*(stock.contains(keys) for stock in stocks), strict=True)) if stocks else [()] * len(keys)


def partial_tail(tokens: bytes, *, block_tokens: int) -> int:
    """Tokens after the last whole block."""
    return len(tokens) // TOKEN_BYTES % block_tokens


def _joined(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Adjacent stretches of which the same is to be said, as one; those that left are told by the time of the last."""

    joined = []
    for _, group in groupby(stretches, key=lambda one: (one.tiers, one.reason, one.tier, one.policy, one.differs)):
        first, *others = group
        if others:
            times = [one.at_s for one in (first, *others) if one.at_s is not None]
            first = replace(first, hi=others[-1].hi, at_s=max(times, default=None))
        joined.append(first)
    return joined


def _shown(value: object) -> str:
    return (
        repr(value)
        if isinstance(value, str) and len(value) <= 24
        else f"{str(value)[:20]}…"
        if isinstance(value, str)
        else str(value)
    )


def ago(seconds: float) -> str:
    """A time span for reading."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
