"""Tiers at rest as `tierkv explain` asks them: beside whoever owns them, changing nothing."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from tierkv.config import Config
from tierkv.errors import ConfigError, TierError
from tierkv.explain import Fields, Stock
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.values import hide_password


@contextmanager
def open_stocks(config: Config) -> Iterator[list[Stock]]:
    """The tiers at rest that are configured, nearest first; one that cannot be asked says so in `down`.

    Raises ConfigError when there is none, or a folder is none of ours.
    """
    with ExitStack() as opened:
        stocks = []
        if config.disk.path is not None:
            stocks.append(disk_stock(config.disk.path, policy=config.disk.policy))
        if config.redis.url is not None:
            stocks.append(_redis_stock(config.redis.url, config.redis.prefix, opened))
        if config.pack.paths is not None:
            stocks.append(_pack_stock(config))
        if not stocks:
            raise ConfigError(
                "there is no tier at rest to look into: set disk.path, redis.url or pack.paths, as the store that you ask about "
                "has them"
            )
        yield stocks


def disk_stock(path: Path, *, policy: str | None) -> Stock:
    """A disk folder at this moment. Raises ConfigError when it is none, TierError when it cannot be read."""
    from tierkv.tiers.disk_array import read_about
    from tierkv.tiers.disk_history import PREFIX_BYTES, read_history
    from tierkv.tiers.disk_manifest import NAME, read_keys

    read_about(path)
    if not (path / NAME).exists():
        return Stock("disk", policy=policy)
    try:
        held = read_keys(path)
    except sqlite3.Error as error:
        raise TierError(f"manifest of {path} cannot be read ({error}): the next start sets it aside") from None
    history = read_history(path / NAME)

    def contains(keys: Sequence[Key]) -> list[bool]:
        return [key in held for key in keys]

    def departed(key: Key) -> tuple[float, str] | None:
        return history.departed.get(key[:PREFIX_BYTES])

    return Stock("disk", contains, departed, policy, history.namespaces)


def _pack_stock(config: Config) -> Stock:
    """Mounted packs, under the names that their blocks have for the configured tenant."""
    from tierkv.building import each_pack

    held: set[Key] = set()
    namespaces: dict[Key, Fields] = {}
    for pack in each_pack(config):
        with pack:
            manifest = pack.manifest
            namespace = Namespace(manifest.facts.identity, manifest.layout, manifest.adapter, config.store.tenant)
            root = namespace.root(config.secret())
            held.update(pack.keys_under(root))
            namespaces[root] = namespace.fields()
    return Stock("pack", lambda keys: [key in held for key in keys], namespaces=namespaces)


def _redis_stock(url: str, prefix: str, opened: ExitStack) -> Stock:
    from tierkv.tiers.redis_inspect import onlooker

    stock = Stock("redis")
    try:
        asked = opened.enter_context(onlooker(url, prefix=prefix))
        return replace(stock, contains=asked.contains, namespaces=asked.namespaces())
    except TierError as error:
        return replace(stock, down=f"{hide_password(url)}: {error}")


def namespace_of(
    config: Config, stocks: Sequence[Stock], *, model: str | None = None, loaded: str | None = None
) -> tuple[Key, Fields]:
    """The namespace that the configured store would ask in: its root and fields.

    model: identity of the weights, which the stocks must know.  loaded: that of a model at hand, which may be new to them.
    None of both: that of the store that was opened last. What the configuration leaves open (the layout, the model) is as in
    the stocks. Raises ConfigError when they do not tell.
    """
    known = [fields for stock in stocks for fields in stock.namespaces.values()]
    known = [fields for fields in known if _is_complete(fields) and model in (None, fields["model"])]
    if not known:
        named = f" by a model of identity {model}" if model else ""
        raise ConfigError(
            f"nothing in {', '.join(stock.name for stock in stocks)} tells what was stored there{named}: "
            "open a store of this version on it once, and ask again"
        )
    last = next((fields for fields in reversed(known) if fields["model"] == loaded), known[-1])
    dtype = last["dtype"] if config.engine.dtype == "auto" else config.engine.dtype
    layout = Layout(
        num_layers=last["num_layers"],
        num_kv_heads=last["num_kv_heads"],
        head_dim=last["head_dim"],
        dtype=dtype,
        block_tokens=config.store.block_tokens,
        parts=last["parts"],
    )
    ours = Namespace(model or loaded or last["model"], layout, adapter=last["adapter"], tenant=config.store.tenant)
    return ours.root(config.secret()), ours.fields()


def _is_complete(fields: Fields) -> bool:
    texts, numbers = (
        ("model", "adapter", "tenant", "dtype"),
        ("num_layers", "num_kv_heads", "head_dim", "block_tokens", "parts"),
    )
    return all(isinstance(fields.get(name), str) for name in texts) and all(
        isinstance(fields.get(name), int) for name in numbers
    )
