"""What warming would take: blocks and bytes per tier, whether they fit, and time from a measured piece of it. Changes nothing."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tierkv.config import Config
from tierkv.errors import TierError
from tierkv.keys import Key, Namespace
from tierkv.layout import TOKEN_BYTES, Layout
from tierkv.values import hide_password
from tierkv.warm.plan import Plan

if TYPE_CHECKING:
    from tierkv.assembly import LoadedModel

MEASURED_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class Need:
    """What one tier would get. held: blocks of the plan that it has.  capacity: blocks in all; None where nobody knows."""

    tier: str
    place: str
    held: int
    lacking: int
    capacity: int | None
    block_bytes: int

    @property
    def fits(self) -> bool | None:
        """Whether it can have all of the plan at once; None where that is not known."""
        return None if self.capacity is None else self.held + self.lacking <= self.capacity


def measure_prefill(loaded: "LoadedModel", plan: Plan) -> float:
    """Tokens per second of a piece of the plan, computed just now and kept nowhere."""
    from tierkv.engine import Engine, SamplingParams
    from tierkv.warm.run import tokens_of

    path = max(plan.paths, key=len)[: MEASURED_TOKENS * TOKEN_BYTES]
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    with Engine(loaded.weights, loaded.tokenizer, loaded.config) as engine:
        engine.generate([tokens_of(path[: 16 * TOKEN_BYTES])], one)  # the first step finds caches empty
        began = time.perf_counter()
        engine.generate([tokens_of(path)], one)
        return len(path) / TOKEN_BYTES / (time.perf_counter() - began)


def needs(config: Config, layout: Layout, namespace: Namespace, plan: Plan, tiers: Sequence[str]) -> list[Need]:
    """What each of these tiers has of a plan, and lacks. Raises TierError for one that cannot be asked."""
    root = namespace.root(config.secret())
    keys = [key for of_piece in plan.keys(root) for key in of_piece]
    found = []
    with ExitStack() as opened:
        for name in tiers:
            place, contains, capacity = _ASKED[name](config, layout, namespace, root, opened)
            held = sum(contains(keys))
            found.append(Need(name, place, held, len(keys) - held, capacity, layout.block_bytes))
    return found


Asked = tuple[str, Callable[[Sequence[Key]], list[bool]], int | None]


def _disk(config: Config, layout: Layout, namespace: Namespace, root: Key, opened: ExitStack) -> Asked:
    from tierkv.stocks import disk_stock
    from tierkv.tiers.disk_array import num_slots_for

    path = config.disk.path
    assert path is not None, "asked for only where it is set"
    capacity = num_slots_for(config.disk.capacity, layout)
    if not (path / "zarr.json").exists():
        return str(path), lambda keys: [False] * len(keys), capacity
    stock = disk_stock(path, policy=None)
    return str(path), lambda keys: list(stock.contains(keys)), capacity


def _redis(config: Config, layout: Layout, namespace: Namespace, root: Key, opened: ExitStack) -> Asked:
    from tierkv.tiers.redis_inspect import onlooker

    url = config.redis.url
    assert url is not None, "asked for only where it is set"
    asked = opened.enter_context(onlooker(url, prefix=config.redis.prefix))
    return hide_password(url), asked.contains, None


def _daemon(config: Config, layout: Layout, namespace: Namespace, root: Key, opened: ExitStack) -> Asked:
    from tierkv.building import open_daemon
    from tierkv.metrics import Metrics

    tier = open_daemon(config, Metrics(), time.monotonic, namespace, root, device_bytes=0)
    assert tier is not None, "asked for only where it is set"
    opened.callback(tier.close)
    return tier.url, tier.contains, daemon_room(tier.stats(), layout)


def daemon_room(stats: dict[str, Any], layout: Layout) -> int | None:  # Any: JSON of the daemon
    """Blocks of the largest tier of a daemon."""
    try:
        return max(int(row["capacity_bytes"] or 0) for row in stats["tiers"]) // layout.block_bytes or None
    except (KeyError, TypeError, ValueError):
        raise TierError("the daemon tells no capacity of its tiers: is it of another version?") from None


_ASKED: Final = {"disk": _disk, "redis": _redis, "daemon": _daemon}
