"""Real servers that packs are shipped to and from: SeaweedFS for S3, and the standard library's HTTP server with its faults."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

WEED = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
BUCKET = "packs"  # one for all: SeaweedFS makes several volumes for each
KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"


@dataclass
class Behaviour:
    """What a server does that a good one does not.

    ranges: answers Range. cut: bodies end so many bytes early. steps: bodies that may be sent before all wait for `go`.
    """

    ranges: bool = True
    cut: int = 0
    steps: int | None = None
    tags: bool = True
    go: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)


class HttpFolder:
    """Serves the files of a folder on loopback; `asked` has path, first and last byte of every body that was sent."""

    def __init__(self, folder: Path, behaviour: Behaviour | None = None) -> None:
        self.folder = folder
        self.behaviour = behaviour or Behaviour()
        self.asked: list[tuple[str, int, int]] = []
        self.queries: list[str] = []
        self._lock = threading.Lock()
        serving = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                serving._answer(self, body=True)

            def do_HEAD(self) -> None:
                serving._answer(self, body=False)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def sent(self, name: str | None = None) -> int:
        return sum(end - start for path, start, end in self.asked if name is None or path == name)

    def _answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        name, _, query = handler.path.lstrip("/").partition("?")
        path = self.folder / name
        if not path.is_file():
            handler.send_error(404)
            return
        data = path.read_bytes()
        start, end, status = 0, len(data), 200
        if (wanted := handler.headers.get("Range")) and self.behaviour.ranges:
            given = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
            assert given is not None
            if given[1]:
                start, end = int(given[1]), min(len(data), int(given[2]) + 1 if given[2] else len(data))
            else:
                start = max(0, len(data) - int(given[2]))
            status = 206
            if start >= len(data):
                handler.send_error(416)
                return
        tag = f'"{path.stat().st_mtime_ns:x}-{len(data):x}"'
        if self.behaviour.tags and handler.headers.get("If-Match", tag) != tag:
            handler.send_error(412)
            return
        if body and not self._let(data[start:end]):
            handler.close_connection = True
            return
        handler.send_response(status)
        handler.send_header("Content-Length", str(end - start))
        if self.behaviour.tags:
            handler.send_header("ETag", tag)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        handler.end_headers()
        if not body:
            return
        with self._lock:
            self.asked.append((name, start, end))
            self.queries.append(query)
        if self.behaviour.cut:
            handler.close_connection = True
        handler.wfile.write(data[start : end - self.behaviour.cut])

    def _let(self, body: bytes) -> bool:
        """Take one of the steps, or wait until all may go on. False: the server is closing."""
        with self._lock:
            if self.behaviour.steps is None:
                return True
            if self.behaviour.steps > 0:
                self.behaviour.steps -= 1
                return True
        self.behaviour.waiting.set()
        self.behaviour.go.wait()
        return not self._closing

    _closing = False

    def close(self) -> None:
        self._closing = True
        self.behaviour.go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class SeaweedS3:
    """One SeaweedFS process: master, volume, filer and S3 on loopback ports of its own, with one identity."""

    def __init__(self, folder: Path) -> None:
        assert WEED is not None
        taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(8)]
        ports = [each.getsockname()[1] for each in taken]
        for each in taken:
            each.close()
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
        names += ("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc")
        identity = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        words = [WEED, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
        words += [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
        words += [f"-s3.config={folder / 's3.json'}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        words += [f"-s3.localSocket={folder / 's3.sock'}", f"-filer.localSocket={folder / 'filer.sock'}"]
        words += [
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=8",
            "-volume.preStopSeconds=0",
        ]
        self.endpoint = f"http://127.0.0.1:{ports[6]}"
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(words, cwd=folder, stdout=self._log, stderr=subprocess.STDOUT)
        self._wait(folder / "log")

    def _wait(self, log: Path) -> None:
        """Until an object can be written: the first write makes the bucket, and fails while parts of the server begin."""
        import obstore
        from obstore.exceptions import BaseError

        store = self.store()
        limit = time.monotonic() + 60
        while True:
            try:
                obstore.put(store, "ready", b"1")
                return
            except (BaseError, OSError):
                if self._process.poll() is not None or time.monotonic() > limit:
                    raise RuntimeError(log.read_text(errors="replace")[-2000:]) from None
                select_nothing(0.1)

    def store(self) -> "object":
        from obstore.store import S3Store

        return S3Store(
            BUCKET, endpoint=self.endpoint, access_key_id=KEY, secret_access_key=SECRET, region="us-east-1",
            client_options={"allow_http": True}, retry_config={"max_retries": 0},
        )  # fmt: skip

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def select_nothing(seconds: float) -> None:
    """The server tells nobody when it is ready: ask again after a while."""
    threading.Event().wait(seconds)
