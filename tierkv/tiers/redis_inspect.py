"""What a Redis server or cluster holds under a prefix, for people. Looks at headers only, in batches, and changes nothing."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, cast

import redis

from tierkv.codecs.header import HEADER_BYTES, Header, unpack
from tierkv.errors import CodecError, ConfigError, TierError
from tierkv.keys import KEY_BYTES, Key
from tierkv.tiers.redis_client import parse_url, refusal, until
from tierkv.tiers.redis_nodes import FAILURES, Cluster, Health, Server, introduce
from tierkv.tiers.redis_objects import layout_name, namespace_name

_BATCH: Final = 512
_BATCH_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block at rest. header: None where it is damaged.  ttl_s, idle_s: None where it never expires, or nobody knows."""

    key: Key
    header: Header | None
    ttl_s: float | None
    idle_s: int | None


@dataclass(frozen=True, slots=True)
class RedisReport:
    """A server at about one moment.

    servers: primaries asked.  runs: unbranched stretches of blocks.  tokens: None where no writer left its layout there.
    payload_bytes: of the blocks.  stored_bytes: as packed, headers included.  codecs: blocks by codec.  layouts: the fields
    of each, by fingerprint.  used: last use of any block, in seconds since the epoch.  idle_s: of the block unused for longest.
    soonest_expiry_s: None where none expires.  damaged: values under our names that are no blocks.
    """

    url: str
    prefix: str
    servers: int
    runs: int
    blocks: int
    tokens: int | None
    payload_bytes: int
    stored_bytes: int
    codecs: dict[str, int]
    layouts: dict[str, dict[str, Any]]  # Any: text and numbers
    used: float | None
    idle_s: int | None
    soonest_expiry_s: float | None
    damaged: int


def inspect_server(url: str, *, prefix: str = "tierkv") -> RedisReport:
    """Look at everything under `prefix`; takes some 200 bytes of memory per block.

    Raises ConfigError or TierError when the server cannot be asked.
    """
    name, servers = _open(url)
    try:
        blocks = [block for batch in _blocks(servers, prefix) for block in batch]
        fingerprints = {block.header.fingerprint for block in blocks if block.header}
        layouts = {of.hex(): layout for of in sorted(fingerprints) if (layout := _layout(servers, prefix, of))}
        return _report(name, prefix, len(servers.nodes()), blocks, layouts)
    except FAILURES as error:
        raise refusal(error, name) or TierError(f"{name} went away while it was asked: {error}") from None
    finally:
        servers.close()


def inspect_blocks(url: str, *, prefix: str = "tierkv") -> Iterator[list[StoredBlock]]:
    """Every block under `prefix`, in batches; one that comes or goes meanwhile may be missed or seen twice.

    Raises ConfigError or TierError when the server cannot be asked.
    """
    name, servers = _open(url)
    try:
        yield from _blocks(servers, prefix)
    except FAILURES as error:
        raise refusal(error, name) or TierError(f"{name} went away while it was asked: {error}") from None
    finally:
        servers.close()


class Onlooker:
    """Asks a server which keys it has, without using them. Raises TierError when it goes away."""

    def __init__(self, name: str, servers: Server | Cluster, prefix: str) -> None:
        self._name, self._servers, self._prefix = name, servers, prefix

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """Which keys are there now."""
        start = self._prefix.encode() + b":"
        return [bool(self._send("EXISTS", start + key)) for key in keys]

    def namespaces(self) -> dict[Key, dict[str, Any]]:  # Any: text and numbers, of `Namespace.fields`
        """What roots stand for, as far as their writers said."""
        found = {}
        pattern = namespace_name(_quoted(self._prefix.encode()).decode(), "*")
        for _, client in self._servers.nodes():
            try:
                names = list(cast(Any, client).scan_iter(match=pattern, count=_BATCH))  # Any: typed for async, too
            except FAILURES as error:
                raise TierError(f"{self._name} went away while it was asked: {error}") from None
            for name in names:
                root = name.rpartition(b":")[2].decode(errors="replace")
                said = self._send("GET", name)
                with suppress(ValueError):
                    fields = json.loads(said if isinstance(said, bytes) else b"")
                    if isinstance(fields, dict) and len(root) == 2 * KEY_BYTES:
                        found[Key(bytes.fromhex(root))] = fields
        return found

    def _send(self, *arguments: bytes | str) -> object:
        try:
            with until(time.monotonic() + _BATCH_S):
                return self._servers.send(*arguments)
        except FAILURES as error:
            raise TierError(f"{self._name} went away while it was asked: {error}") from None


@contextmanager
def onlooker(url: str, *, prefix: str = "tierkv") -> Iterator[Onlooker]:
    """Look at a server for as long as the context lasts. Raises ConfigError or TierError when it cannot be asked."""
    name, servers = _open(url)
    try:
        yield Onlooker(name, servers, prefix)
    finally:
        servers.close()


def _quoted(text: bytes) -> bytes:
    """Text as a pattern that matches only itself."""
    return b"".join(b"\\" + bytes([byte]) if byte in b"*?[]^-\\" else bytes([byte]) for byte in text)


def _open(url: str) -> tuple[str, Server | Cluster]:
    address = parse_url(url)

    def new_health(of: str) -> Health:
        return Health(of, failures=1, first_s=60.0, clock=time.monotonic, on_down=lambda: None, quiet=True)

    servers = (Cluster if address.cluster else Server)(address, new_health=new_health)
    introduce(address, servers.health)
    if servers.health.down:
        raise TierError(f"{address.shown} does not answer: start the server, or correct host and port")
    return address.shown, servers


def _blocks(servers: Server | Cluster, prefix: str) -> Iterator[list[StoredBlock]]:
    if not prefix:
        raise ConfigError("--prefix is empty: give the one that the tier writes under, such as tierkv")
    start = prefix.encode() + b":"
    pattern = _quoted(start) + b"*"
    for _, client in servers.nodes():
        # One connection that does not count as use: looking must not keep blocks alive.
        with cast(Any, client).client() as single:  # Any: typed for async, too
            with suppress(redis.ResponseError):  # before Redis 7.2 there was no such thing
                single.execute_command("CLIENT", "NO-TOUCH", "ON")
            cursor: int | None = None
            while cursor != 0:
                with until(time.monotonic() + _BATCH_S):
                    cursor, names = single.scan(cursor or 0, match=pattern, count=_BATCH)
                    ours = [name for name in names if len(name) == len(start) + KEY_BYTES]
                    batch = _looked_at(single, ours) if ours else []
                if batch:
                    yield batch


def _looked_at(client: Any, names: Sequence[bytes]) -> list[StoredBlock]:  # Any: as above
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.execute_command("OBJECT", "IDLETIME", name)
            pipe.pttl(name)
            pipe.getrange(name, 0, HEADER_BYTES - 1)
        answers = pipe.execute(raise_on_error=False)
    found = []
    for name, idle_s, ttl_ms, head in zip(names, answers[0::3], answers[1::3], answers[2::3], strict=True):
        if isinstance(ttl_ms, int) and ttl_ms == -2:  # gone since the scan
            continue
        key = Key(name[-KEY_BYTES:])
        try:
            header = unpack(head, key=key) if isinstance(head, bytes) else None
        except CodecError:
            header = None
        ttl_s = ttl_ms / 1000 if isinstance(ttl_ms, int) and ttl_ms >= 0 else None
        found.append(StoredBlock(key, header, ttl_s, idle_s if isinstance(idle_s, int) else None))
    return found


def _layout(servers: Server | Cluster, prefix: str, fingerprint: bytes) -> dict[str, Any] | None:  # Any: as above
    said = servers.send("GET", layout_name(prefix, fingerprint))
    try:
        layout = json.loads(said) if isinstance(said, bytes) else None
    except ValueError:
        return None
    return layout if isinstance(layout, dict) and isinstance(layout.get("block_tokens"), int) else None


def _report(
    url: str,
    prefix: str,
    num_servers: int,
    found: Sequence[StoredBlock],
    layouts: dict[str, dict[str, Any]],  # Any: as above
) -> RedisReport:
    idle = [block.idle_s for block in found if block.idle_s is not None]
    headers = {block.key: block.header for block in found if block.header}
    children = Counter(header.parent for header in headers.values())
    tokens: int | None = 0
    for header in headers.values():
        layout = layouts.get(header.fingerprint.hex())
        tokens = None if layout is None or tokens is None else tokens + layout["block_tokens"]
    return RedisReport(
        url=url,
        prefix=prefix,
        servers=num_servers,
        runs=sum(header.parent not in headers or children[header.parent] > 1 for header in headers.values()),
        blocks=len(headers),
        tokens=tokens,
        payload_bytes=sum(header.raw_bytes for header in headers.values()),
        stored_bytes=sum(HEADER_BYTES + header.stored_bytes for header in headers.values()),
        codecs=dict(sorted(Counter(header.codec for header in headers.values()).items())),
        layouts=layouts,
        used=time.time() - min(idle) if idle else None,
        idle_s=max(idle, default=None),
        soonest_expiry_s=min((block.ttl_s for block in found if block.ttl_s is not None), default=None),
        damaged=sum(block.header is None for block in found),
    )
