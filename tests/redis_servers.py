"""Servers for the tests of the Redis tier that do what real ones do only when something is wrong."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

Send = Callable[[bytes], None]
Answer = Callable[[list[bytes], Send], None]


class Listener:
    """Accepts on loopback; every connection is served by a thread of its own until `close`."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.accepted = 0
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.accepted += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve_quietly, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve_quietly(self, connection: socket.socket) -> None:
        try:
            self.serve(connection)
        except OSError:
            return  # the peer, or `close`, ended it: expected in every test
        finally:
            connection.close()

    def serve(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join()
        for connection in self._open:
            shut(connection)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already


class Scripted(Listener):
    """Greets as a server does; `answer(command, send)` says what it replies to the rest."""

    def __init__(self, answer: Answer, *, greet: bool = True, greeting: bytes = b"") -> None:
        self._answer, self._greet, self._greeting = answer, greet, greeting
        self.commands: list[list[bytes]] = []
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        if self._greeting:
            connection.sendall(self._greeting)
        with connection.makefile("rb") as stream:
            for command in commands_of(stream.readline, stream.read):
                self.commands.append(command)
                greeting = {b"CLIENT": b"+OK\r\n", b"PING": b"+PONG\r\n", b"INFO": b"$-1\r\n"}.get(command[0])
                if self._greet and greeting:
                    connection.sendall(greeting)
                else:
                    self._answer(command, connection.sendall)


def commands_of(line: Callable[[], bytes], read: Callable[[int], bytes]) -> Iterator[list[bytes]]:
    while (head := line())[:1] == b"*":
        words = []
        for _ in range(int(head[1:])):
            words.append(read(int(line()[1:])))
            read(2)
        yield words


class Between(Listener):
    """Passes bytes between a client and a real server; `spoil(connection number, piece)` may change what comes back.

    It returns the bytes to pass on, and whether the connection stays open then.
    """

    def __init__(self, socket_path: Path, spoil: Callable[[int, bytes], tuple[bytes, bool]]) -> None:
        self._path, self._spoil = socket_path, spoil
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        number = self.accepted
        with socket.socket(socket.AF_UNIX) as upstream:
            upstream.connect(str(self._path))
            self._open.append(upstream)
            sender = threading.Thread(target=self._pass, args=(connection, upstream))
            sender.start()
            open_still = True
            try:
                while open_still and (piece := upstream.recv(1 << 16)):
                    spoilt, open_still = self._spoil(number, piece)
                    connection.sendall(spoilt)
            finally:
                shut(connection)
                shut(upstream)
                sender.join()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while piece := source.recv(1 << 16):
                target.sendall(piece)
        except OSError:
            return  # the other direction ended it
        finally:
            shut(target)


class Tls(Listener):
    """Ends TLS in front of a real server's unix socket: the server of the wheel is built without it."""

    def __init__(self, socket_path: Path, certificate: Path, key: Path) -> None:
        self._path = socket_path
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        super().__init__()
        self.url = f"rediss://localhost:{self.port}"

    def serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with (
            self._context.wrap_socket(connection, server_side=True) as secure,
            socket.socket(socket.AF_UNIX) as upstream,
        ):
            self._open.append(upstream)
            upstream.connect(str(self._path))
            secure.setblocking(False)
            upstream.setblocking(False)
            pump(secure, upstream)


def pump(secure: ssl.SSLSocket, plain: socket.socket) -> None:
    """Pass bytes both ways on one thread: an SSL object must not be read and written at once."""
    import select

    to_plain, to_secure = bytearray(), bytearray()
    while True:
        for source, into in ((secure, to_plain), (plain, to_secure)):
            try:
                while len(into) < 1 << 20:
                    piece = source.recv(1 << 16)
                    if not piece:
                        return
                    into += piece
            except (ssl.SSLWantReadError, BlockingIOError):
                pass
        for target, outgoing in ((plain, to_plain), (secure, to_secure)):
            try:
                while outgoing:
                    del outgoing[: target.send(outgoing[: 1 << 16])]
            except (ssl.SSLWantWriteError, BlockingIOError):
                pass
        writers = [target for target, outgoing in ((plain, to_plain), (secure, to_secure)) if outgoing]
        readers = [source for source, into in ((secure, to_plain), (plain, to_secure)) if len(into) < 1 << 20]
        select.select(readers, writers, [])


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for a host name, by the openssl program."""
    key, made = folder / f"{name}.key", folder / f"{name}.crt"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    words += ["-keyout", str(key), "-out", str(made), "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    return made, key
