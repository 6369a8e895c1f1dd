"""Connections of the Redis tier: what a URL says, and redis-py connections that keep a deadline.

redis-py makes connections, authenticates, does TLS and learns the topology. It bounds each receive, not the whole: here a
thread's deadline bounds everything it does with these connections (`until`), so a server that drips its greeting, or a
topology refresh over many dead masters, ends in time too.
"""

import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import AuthenticationError, AuthorizationError, InvalidResponse, NoPermissionError, ResponseError
from redis.retry import Retry

from tierkv.errors import ConfigError, TierError

SCHEMES: Final = ("redis", "rediss", "redis+cluster", "rediss+cluster", "unix")
CONNECT_S: Final = 1.0
"""For one connection, its greeting included, where the deadline of the batch leaves that much."""
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_ca_path")
_TLS_OPTIONS: Final[dict[str, Callable[[str], object]]] = {
    **dict.fromkeys(_FILES, str),
    "ssl_ca_data": str,
    "ssl_cert_reqs": str,
    "ssl_check_hostname": lambda text: text.lower() not in ("0", "false", "no", "off"),
    "ssl_ciphers": str,
    "ssl_password": str,
}
_OPTIONS: Final[dict[str, Callable[[str], object]]] = {
    "client_name": str,
    "db": int,
    "password": str,
    "socket_connect_timeout": float,
    "username": str,
}

_thread = threading.local()


class until:
    """Bound what this thread does with the connections below, to a time of `time.monotonic`; the nearest bound counts."""

    __slots__ = ("_before", "_deadline")

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def __enter__(self) -> None:
        self._before = getattr(_thread, "deadline", math.inf)
        _thread.deadline = min(self._deadline, self._before)

    def __exit__(self, *raised: object) -> None:
        _thread.deadline = self._before


def _seconds_left() -> float:
    left: float = getattr(_thread, "deadline", math.inf) - time.monotonic()
    if left <= 0:
        raise TimeoutError("past the deadline of the batch")
    return left


@contextmanager
def _limited(sock: socket.socket) -> Iterator[None]:
    usual = sock.gettimeout()
    left = _seconds_left()
    if usual is not None and usual <= left:
        yield
        return
    sock.settimeout(None if left == math.inf else left)
    try:
        yield
    finally:
        sock.settimeout(usual)


class _Limited:
    """Over a socket class: every call of the library is within the thread's deadline."""

    __slots__ = ()

    def recv(self: Any, *arguments: Any) -> Any:  # Any: passed on as given
        with _limited(self):
            return super().recv(*arguments)  # type: ignore[misc]  # the other base has it

    def recv_into(self: Any, *arguments: Any) -> Any:  # Any: as above
        with _limited(self):
            return super().recv_into(*arguments)  # type: ignore[misc]  # as above

    def sendall(self: Any, *arguments: Any) -> Any:  # Any: as above
        with _limited(self):
            return super().sendall(*arguments)  # type: ignore[misc]  # as above


class _PlainSocket(_Limited, socket.socket):
    __slots__ = ()


class _TLSSocket(_Limited, ssl.SSLSocket):
    pass


class _Bounded:
    """Over a connection class of redis-py: connect and greet within the thread's deadline, with options of our own."""

    _OURS: ClassVar[dict[str, Any]]  # Any: what redis-py's connections take; set by `_connection_class`

    def __init__(self, **given: Any) -> None:  # Any: as above
        super().__init__(**(given | self._OURS))
        self._usual_s: float = self._OURS["socket_timeout"]

    def _connect(self: Any) -> socket.socket:  # Any: attributes of the other base
        # Half of what is left: a host name may have two addresses, a topology refresh several nodes to ask.
        try:
            self.socket_connect_timeout = self.socket_timeout = min(self._usual_s, _seconds_left() / 2)
            sock = super()._connect()  # type: ignore[misc]  # the other base has it
        except TimeoutError as error:
            # redis-py 8.1 turns this into AttributeError on a unix socket: it looks for the port to log.
            raise redis.exceptions.TimeoutError(f"{self._host_error()} did not accept in time") from error
        finally:
            self.socket_timeout = self._usual_s
        if isinstance(sock, ssl.SSLSocket):
            sock.__class__ = _TLSSocket  # made deep inside a context; a Python class without state of its own
            bounded: socket.socket = sock
        else:
            bounded = _PlainSocket(fileno=sock.detach())
        bounded.settimeout(self._usual_s)
        return bounded


def _connection_class(kind: type[Any], ours: dict[str, Any]) -> type[Any]:
    # A class, not arguments: RedisCluster drops arguments that it does not know, but passes this on.
    return type(f"Bounded{kind.__name__}", (_Bounded, kind), {"_OURS": ours})


def show_url(url: str) -> str:
    """A URL as people may see it: without user and password, wherever they stand."""
    hidden = re.sub(r"//.*@", "//***@", url)  # to the last @: a password with @ or / in it must not show either
    return re.sub(r"([?&](?:ssl_)?password=)[^&]*", r"\1***", hidden)


@dataclass(frozen=True, slots=True)
class Address:
    """A URL, understood.  where: host and port, or the path of a socket."""

    shown: str
    cluster: bool
    where: dict[str, Any]  # Any: what redis-py's connections take
    connection_class: type[Any]
    connect_s: float

    @property
    def name(self) -> str:
        """The server, for logs."""
        return str(self.where.get("path") or f"{self.where['host']}:{self.where['port']}")


def parse_url(url: str) -> Address:
    """Understand a URL. Raises ConfigError."""
    shown = show_url(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        username, password = parts.username, parts.password
    except ValueError:  # its message may show a password
        raise ConfigError(
            f"redis.url {shown}: not a URL; expected redis://host:port, percent-encoded passwords"
        ) from None
    if parts.scheme not in SCHEMES:
        raise ConfigError(f"redis.url {shown}: must begin with {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    scheme, cluster = parts.scheme.removesuffix("+cluster"), parts.scheme.endswith("+cluster")
    options = _options(parts.query, shown, tls=scheme == "rediss")
    for name, value in (("username", username), ("password", password)):
        if value:
            options[name] = unquote(value)
    if scheme == "unix":
        where: dict[str, Any] = {"path": unquote((parts.netloc.rpartition("@")[2]) + parts.path)}
        if not where["path"].startswith("/"):
            raise ConfigError(f"redis.url {shown}: expected unix:///path/to/socket, with three slashes")
    else:
        where = {"host": host or "localhost", "port": port or 6379}
        if parts.path.strip("/"):
            if not parts.path[1:].isdigit():
                raise ConfigError(f"redis.url {shown}: after the port only a database number may follow, such as /0")
            options.setdefault("db", int(parts.path[1:]))
    if cluster and options.pop("db", 0):
        raise ConfigError(f"redis.url {shown}: a cluster has database 0 only; drop the number")
    connect_s = options.pop("socket_connect_timeout", CONNECT_S)
    options |= {
        "socket_timeout": connect_s,
        "socket_connect_timeout": connect_s,
        "retry": Retry(NoBackoff(), 0),  # the default waits a minute on a server that hangs
        "protocol": 2,  # in 3, pushes may come between replies
    }
    kind = {"redis": Connection, "rediss": SSLConnection, "unix": UnixDomainSocketConnection}[scheme]
    return Address(shown, cluster, where, _connection_class(kind, options), connect_s)


def _options(query: str, shown: str, *, tls: bool) -> dict[str, Any]:
    known = _OPTIONS | (_TLS_OPTIONS if tls else {})
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            hint = "; TLS options need rediss://" if name in _TLS_OPTIONS else ""
            raise ConfigError(f"redis.url {shown}: unknown option {name}{hint}; known: {', '.join(known)}")
        try:
            options[name] = known[name](value)
        except ValueError:
            raise ConfigError(f"redis.url {shown}: option {name} must be a number") from None
        if name in _FILES and not Path(value).exists():
            raise ConfigError(f"redis.url {shown}: {name}={value} does not exist; give a PEM file that does")
    if options.get("ssl_cert_reqs", "required") not in ("required", "optional", "none"):
        raise ConfigError(f"redis.url {shown}: ssl_cert_reqs must be required, optional or none")
    if not 0 < options.get("socket_connect_timeout", CONNECT_S) < math.inf:
        raise ConfigError(f"redis.url {shown}: socket_connect_timeout must be a positive number of seconds")
    return options


def refusal(error: BaseException, shown: str) -> TierError | None:
    """What to tell someone whose URL cannot work; None when the server is just not there now."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ssl.SSLCertVerificationError):
            reason = link.verify_message
            return TierError(
                f"redis.url {shown}: its certificate is not trusted ({reason}); give ?ssl_ca_certs=FILE with its authority"
            )
        if isinstance(link, ssl.SSLError):
            return TierError(f"redis.url {shown}: no TLS there ({link.reason}); use redis:// or check port and keys")
        if isinstance(link, AuthenticationError | AuthorizationError):
            return TierError(f"redis.url {shown}: user or password refused; correct them in the URL")
        if isinstance(link, NoPermissionError):
            return TierError(f"redis.url {shown}: {link}; grant this user the commands and keys of tierkv")
        if isinstance(link, InvalidResponse):
            return TierError(f"redis.url {shown}: what answers there is no Redis server; check host, port, rediss://")
        if isinstance(link, ResponseError):
            return TierError(f"redis.url {shown}: the server refuses: {link}")
        link = link.__cause__ or link.__context__
    return None
