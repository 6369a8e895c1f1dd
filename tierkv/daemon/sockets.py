"""Addresses as sockets, on both sides: unix:///path, tcp://host:port, tls://host:port."""

import ipaddress
import os
import socket
import ssl
import stat
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from tierkv.config import TlsFiles
from tierkv.errors import ConfigError, TierBusy, TierError

BACKLOG: Final = 512
BUFFER_BYTES: Final = 1 << 18
"""Asked of the kernel for each direction. More than fits a core's cache is slower: reads came at 0.7 GB/s with 1 or 4 MiB, at 1.1
to 2.0 with 256 KiB, in turn on a busy 2-core AMD EPYC VM, 2026-11-30."""


def listen(url: str, *, mode: int = 0o600) -> socket.socket:
    """A listening socket. A unix socket that a dead daemon left is replaced, a live one is refused (TierBusy).

    mode: permissions of a unix socket. Raises TierError when the address cannot be had.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return _listen_unix(Path(unquote(parts.path)), mode)
    assert parts.hostname and parts.port is not None
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            parts.hostname, parts.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, number)
    except OSError as error:
        raise TierError(f"{url}: {error.strerror or error}; give an address of this machine") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise TierBusy(f"{url}: {error.strerror}; stop who has it, or listen elsewhere") from None
    return sock


def _listen_unix(path: Path, mode: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_foreign(path.parent)
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise TierError(f"unix://{path}: there is a file that is no socket; give another path")
        _replace_dead(path)
        mask = os.umask(0o777 & ~mode)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise TierError(f"unix://{path}: {error.strerror or error}; give a path in a folder of yours") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _replace_dead(path: Path) -> None:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        path.unlink(missing_ok=True)
        return
    raise TierBusy(f"unix://{path}: a daemon listens there already; stop it, or give --listen another path")


def _refuse_foreign(folder: Path) -> None:
    """In a folder that others can write to, another's socket might be taken for ours."""
    found = folder.stat()
    sticky = found.st_mode & stat.S_ISVTX
    if found.st_uid not in (0, os.geteuid()) or (found.st_mode & 0o022 and not sticky):
        raise TierError(f"{folder}: others can write there; give --listen a socket in a folder of yours")


def _refuse_squatter(folder: Path) -> None:
    """Where anybody may make a folder, as in /tmp, one of another user's may wait there for our token and our blocks."""
    try:
        found, above = folder.stat(), folder.parent.stat()
    except FileNotFoundError:
        return  # nobody listens: what connects will say so
    if above.st_mode & stat.S_IWOTH and found.st_uid not in (0, os.geteuid()):
        raise PermissionError(
            f"{folder} is another user's, in a folder where anybody makes what he likes: give another socket"
        )


def connect(url: str, *, tls: TlsFiles, timeout_s: float) -> socket.socket:
    """A connected socket. Raises OSError while nobody listens, ConfigError for TLS files that cannot be used."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        _refuse_squatter(Path(unquote(parts.path)).parent)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect(unquote(parts.path))
        except BaseException:
            sock.close()
            raise
        return sock
    assert parts.hostname and parts.port is not None
    context = client_context(tls) if parts.scheme == "tls" else None
    sock = socket.create_connection((parts.hostname, parts.port), timeout=timeout_s)
    tune(sock)
    return context.wrap_socket(sock, server_hostname=parts.hostname) if context else sock


def tune(sock: socket.socket) -> None:
    """Small messages at once, large ones through buffers that stay in a cache."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For tls:// listeners; with a CA, clients must show a certificate that it signed."""
    if not files.certificate or not files.key:
        raise ConfigError("a tls:// listener needs server.tls_certificate and server.tls_key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load(context, files, "server")
    if files.ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For tls:// URLs: the daemon's certificate is checked against the CA, or the system's list, and its name."""
    context = ssl.create_default_context() if files.ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load(context, files, "daemon")
    return context


def _load(context: ssl.SSLContext, files: TlsFiles, section: str) -> None:
    try:
        if files.certificate:
            context.load_cert_chain(files.certificate, files.key)
        if files.ca:
            context.load_verify_locations(files.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{section}.tls_*: {error}; give PEM files that can be read and belong together") from None


def is_loopback(url: str) -> bool:
    """Whether only this machine can connect."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False
