"""Who may do what: tokens, roles, and whose process is at the other end of a unix socket."""

import hmac
import os
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from tierkv.daemon.protocol import Op
from tierkv.errors import ConfigError

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: struct ucred of unix(7)
_SHORTEST: Final = 16


class Role(IntEnum):
    """What a client may do; each may do what those before it may."""

    READ = 1
    WRITE = 2
    ADMIN = 3


NEEDS: Final = dict.fromkeys(Op, Role.READ) | {
    Op.RESERVE: Role.WRITE,
    Op.FILL: Role.WRITE,
    Op.COMMIT: Role.WRITE,
    Op.ABORT: Role.WRITE,
    Op.DELETE: Role.WRITE,
    Op.PIN: Role.WRITE,
    Op.UNPIN: Role.WRITE,
    Op.SUBSCRIBE: Role.ADMIN,  # it hears the tokens of every tenant
    Op.FORGET: Role.ADMIN,
    Op.FLUSH: Role.ADMIN,
    Op.DRAIN: Role.ADMIN,
    Op.VERIFY: Role.ADMIN,
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end. pid, uid: as the kernel tells of a unix socket; None for TCP.  address: for people."""

    address: str
    pid: int | None = None
    uid: int | None = None


def peer_of(sock: socket.socket) -> Peer:
    """Ask the kernel."""
    if sock.family == socket.AF_UNIX:
        pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return Peer("unix", pid or None, uid)  # 0: of a process in a namespace that is not ours
    host, port = sock.getpeername()[:2]
    return Peer(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


class Tokens:
    """The tokens of a file; without one, whoever gets to the socket may write, and who owns it may administer."""

    def __init__(self, path: Path | None) -> None:
        self._roles = _read(path) if path else {}

    def __bool__(self) -> bool:
        return bool(self._roles)

    def role(self, token: str, peer: Peer) -> Role | None:
        """The role of somebody who shows `token`; None: nobody we know."""
        for known, role in self._roles.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                return role
        if peer.uid is not None and peer.uid in (0, os.geteuid()):
            return Role.ADMIN  # who could read our memory anyway
        return None if self._roles else Role.WRITE


def _read(path: Path) -> dict[str, Role]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.token_file = {str(path)!r} cannot be read ({error}); give a text file") from None
    roles: dict[str, Role] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        role, _, token = text.rpartition(":")
        if role not in ("", "read", "write", "admin") or len(token) < _SHORTEST:
            raise ConfigError(
                f"{path}:{number}: a line is a token of {_SHORTEST} characters or more, with read: or admin: before it"
                " if it is not to write"
            )
        roles[token] = Role[role.upper()] if role else Role.WRITE
    if not roles:
        raise ConfigError(f"server.token_file = {str(path)!r} has no token; write one, or leave the option off")
    return roles
