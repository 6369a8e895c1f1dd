"""Who holds which key: one server, or the primaries of a cluster; connections lent from each, and whether it is worth asking."""

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.exceptions import RedisClusterException, ResponseError
from redis.retry import Retry

from tierkv.errors import ConfigError
from tierkv.tiers.redis_bulk import LibraryWire, SocketWire, Wire
from tierkv.tiers.redis_client import Address, refusal, until

REFRESH_S: Final = 0.25
FAILURES: Final = (redis.RedisError, RedisClusterException, OSError)
"""What a server, a network or the library may raise in a batch."""
_STRANGE: Final = (ValueError, TypeError, LookupError, AttributeError)
"""What the library raises over answers that make no sense."""

log = logging.getLogger("tierkv")


class Health:
    """Whether a node is worth asking. After `failures` in a row it is down for a pause that doubles up to a minute.

    Then one call may try while the others still stay away. Thread-safe; the clock is passed in.
    """

    def __init__(
        self,
        name: str,
        *,
        failures: int,
        first_s: float,
        clock: Callable[[], float],
        on_down: Callable[[], None],
        quiet: bool = False,
    ) -> None:
        self._name, self._allowed, self._first_s, self._clock, self._on_down = name, failures, first_s, clock, on_down
        self._level = logging.DEBUG if quiet else logging.WARNING
        self._most_s = max(60.0, first_s)
        self._failed, self._pause_s, self._until = 0, first_s, -math.inf
        self._down = False
        self._lock = threading.Lock()

    @property
    def down(self) -> bool:
        """Is it left alone?"""
        return self._down

    def admit(self) -> bool:
        """May this call go ahead? Its end must be told by `passed` or `failed`."""
        with self._lock:
            if not self._down:
                return True
            now = self._clock()
            if now < self._until:
                return False
            self._until = now + self._pause_s
            return True

    def passed(self) -> None:
        """It answered."""
        if not self._down and not self._failed:  # the usual case takes no lock
            return
        with self._lock:
            back, self._down, self._failed, self._pause_s = self._down, False, 0, self._first_s
        if back:
            log.info("redis %s is back", self._name)

    def failed(self, why: object, *, at_once: bool = False) -> None:
        """It did not answer, or not as a Redis server does."""
        with self._lock:
            self._failed += 1
            if not self._down and self._failed < self._allowed and not at_once:
                return
            news, self._down, pause_s = not self._down, True, self._pause_s
            self._until = self._clock() + pause_s
            self._pause_s = min(self._most_s, 2 * pause_s)
        if news:
            self._on_down()
            log.log(self._level, "redis %s is left alone for %g s: %s", self._name, pause_s, why)


@dataclass(frozen=True, slots=True)
class Node:
    """A server, its connections and its health."""

    name: str
    pool: ConnectionPool
    health: Health


def lent_socket(connection: object) -> socket.socket | None:
    """The socket of a connection, if redis-py still shows it."""
    sock = getattr(connection, "_sock", None)
    return sock if isinstance(sock, socket.socket) else None


class Loan:
    """Lends a connection for one batch. Whatever is raised inside closes it: its stream may be out of step.

    Raises one of FAILURES.
    """

    def __init__(self, node: Node, deadline: float) -> None:
        self._pool = node.pool
        self._deadline = deadline

    def __enter__(self) -> Wire:
        with until(self._deadline):
            self._connection = cast(Any, self._pool).get_connection()  # Any: untyped in the library
        self._sock = lent_socket(self._connection)
        if self._sock is not None:
            self._wire: Wire = SocketWire(self._sock, deadline=self._deadline, clock=time.monotonic)
        else:  # a redis-py that keeps its socket elsewhere, or wraps the connection
            self._wire = LibraryWire(self._connection)
        return self._wire

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        try:
            if kind is None:
                self._wire.finish()
                if self._sock is not None:
                    self._sock.settimeout(self._connection.socket_timeout)
            else:
                self._connection.disconnect()
        except BaseException:
            self._connection.disconnect()
            raise
        finally:
            self._pool.release(self._connection)


class Server:
    """One server: one node."""

    def __init__(self, address: Address, *, new_health: Callable[[str], Health]) -> None:
        pool = ConnectionPool(connection_class=address.connection_class, max_connections=2**16, **address.where)
        self._client = redis.Redis(connection_pool=pool)  # a pool that is collected closes what it lent
        self.health = new_health(address.name)
        self.node = Node(address.name, pool, self.health)

    def group(self, names: Sequence[bytes]) -> list[tuple[Node, Sequence[int]]]:
        """Positions of `names` by the node that holds them."""
        return [(self.node, range(len(names)))]

    def nodes(self) -> list[tuple[Node, redis.Redis]]:
        """Every node that holds keys, and a library client for it."""
        return [(self.node, self._client)]

    def send(self, *arguments: bytes | str) -> object:
        """Send one command through the library. Raises one of FAILURES."""
        return cast(Any, self._client).execute_command(*arguments)  # Any: untyped in the library

    def suspect(self) -> None:
        """The topology may have changed."""

    def close(self) -> None:
        """Close all connections."""
        cast(Any, self.node.pool).disconnect()  # Any: untyped in the library


class Cluster:
    """A cluster: a node per primary, its map refreshed at most every REFRESH_S. Connected when first used."""

    def __init__(self, address: Address, *, new_health: Callable[[str], Health]) -> None:
        self._address, self._new_health = address, new_health
        self.health = new_health(f"cluster at {address.name}")
        self._client: redis.RedisCluster | None = None
        self._nodes: dict[str, Node] = {}
        self._suspected, self._refreshed = True, -math.inf
        self._lock = threading.Lock()

    def _connected(self) -> redis.RedisCluster:
        """The client, its map refreshed where that is due. Raises one of FAILURES when there never was one."""
        with self._lock:
            client, now = self._client, time.monotonic()
            due = self._suspected and now - self._refreshed >= REFRESH_S and self.health.admit()
            if due:
                self._suspected, self._refreshed = False, now
        if due:
            try:
                # Twice: the first node asked may be one that hangs.
                with until(now + 2 * self._address.connect_s):
                    client = self._refresh(client)
            except (*FAILURES, *_STRANGE) as error:
                self.suspect()
                self.health.failed(error)
                if client is None:
                    raise redis.ConnectionError(f"no cluster at {self._address.name}: {error}") from error
            else:
                self.health.passed()
        if client is None:
            raise redis.ConnectionError(f"no node of the cluster at {self._address.name} answers")
        return client

    def _refresh(self, client: redis.RedisCluster | None) -> redis.RedisCluster:
        if client is not None:
            cast(Any, client.nodes_manager).initialize()  # Any: untyped in the library
            return client
        host = self._address.where["host"]
        client = redis.RedisCluster(
            url=f"redis://{f'[{host}]' if ':' in host else host}:{self._address.where['port']}",
            connection_class=self._address.connection_class,
            protocol=2,
            retry=Retry(NoBackoff(), 1),
            require_full_coverage=False,  # what slots there are may serve: the rest are misses
        )
        with self._lock:
            self._client = client
        return client

    def _node(self, of: Any) -> Node:  # Any: redis-py's ClusterNode
        pool = of.redis_connection.connection_pool
        with self._lock:
            node = self._nodes.get(of.name)
            if node is None or node.pool is not pool:
                node = Node(of.name, pool, node.health if node else self._new_health(of.name))
                self._nodes[of.name] = node
            return node

    def group(self, names: Sequence[bytes]) -> list[tuple[Node, Sequence[int]]]:
        """Positions of `names` by the node that holds them; names of slots that nobody serves are left out."""
        client = self._connected()
        slots = client.nodes_manager.slots_cache
        keyslot = cast(Any, client).keyslot  # Any: untyped in the library
        groups: dict[str, tuple[Any, list[int]]] = {}
        for at, name in enumerate(names):
            holders = slots.get(keyslot(name))
            if holders:
                groups.setdefault(holders[0].name, (holders[0], []))[1].append(at)
            else:
                self.suspect()
        return [(self._node(of), places) for of, places in groups.values()]

    def nodes(self) -> list[tuple[Node, redis.Redis]]:
        """Every primary, and a library client for it."""
        primaries = cast(Any, self._connected()).get_primaries()  # Any: untyped in the library
        return [(self._node(of), of.redis_connection) for of in primaries]

    def send(self, *arguments: bytes | str) -> object:
        """Send one command through the library, which follows MOVED and ASK and repairs its map."""
        return cast(Any, self._connected()).execute_command(*arguments)  # Any: as above

    def suspect(self) -> None:
        """The map may be wrong: look before the next batch."""
        with self._lock:
            self._suspected = True

    def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            cast(Any, self._client).close()  # Any: as above
        for node in self._nodes.values():
            cast(Any, node.pool).disconnect()  # Any: as above


def introduce(address: Address, health: Health) -> None:
    """Meet the server a URL names. Raises TierError or ConfigError when it can never work; else it is down when not there."""
    pool = ConnectionPool(connection_class=address.connection_class, **address.where)
    client = redis.Redis(connection_pool=pool)
    clustered: object = None
    try:
        with until(time.monotonic() + 2 * address.connect_s):
            client.ping()
            try:
                clustered = cast(Any, client).info("cluster").get("cluster_enabled")  # Any: typed for async, too
            except (ResponseError, *_STRANGE) as error:  # forbidden, or a proxy's own idea of it
                log.debug("redis %s does not tell its kind: %s", address.name, error)
    except FAILURES as error:
        if wrong := refusal(error, address.shown):
            raise wrong from None
        health.failed(error, at_once=True)
    finally:
        cast(Any, pool).disconnect()  # Any: untyped in the library
    if clustered == 0 and address.cluster:
        raise ConfigError(f"redis.url {address.shown}: the server is no cluster; write redis:// or rediss://")
    if clustered == 1 and not address.cluster:
        raise ConfigError(f"redis.url {address.shown}: the server is part of a cluster; write redis+cluster://")
