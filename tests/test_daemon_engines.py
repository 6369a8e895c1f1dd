"""Engines in processes of their own over a daemon in another: they share what they compute, and all die at known points."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_parts import DaemonProcess, until
from tierkv.daemon.client import DaemonClient

pytestmark = pytest.mark.model
ROOT = Path(__file__).parents[1]
BLOCK_BYTES = 737_280
"""Of SmolLM2 in float32, 16 tokens."""
PATIENCE_S = 120.0
NUM_TOKENS = 6

ENGINES = """
# Loads the model once; each line on stdin is an engine, forked with the weights in place. They answer on a socket.
import json, os, signal, socket, sys, threading
import torch
from tierkv.assembly import open_store
from tierkv.config import Config, DaemonConfig, DeviceConfig, HostConfig, TransferConfig
from tierkv.connectors.engine import EngineConnector
from tierkv.daemon.link import Link
from tierkv.daemon.protocol import Op
from tierkv.engine import Engine, EngineConfig, SamplingParams, loading
from tierkv.errors import ConfigError

torch.set_num_threads(1)
model, tokenizer = loading.load("smollm2", EngineConfig(dtype="float32"))
text = tokenizer(open(sys.argv[1]).read()).input_ids
signal.signal(signal.SIGCHLD, signal.SIG_IGN)

def stop_before(op, say):
    send = Link.send
    def stopping(self, given, *rest, **options):
        if given is op:
            say(stops=True)
            os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()  # the signal may take a moment to reach this thread
        return send(self, given, *rest, **options)
    Link.send = stopping

def be_engine(order):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(order["socket"])
    lines, lock = sock.makefile("r"), threading.Lock()
    def say(**what):
        with lock:
            sock.sendall(json.dumps(what).encode() + b"\\n")
    stores = []
    def connect(layout, device, identity):
        config = Config(
            device=DeviceConfig(kind="cpu", capacity=60 * layout.block_bytes),
            host=HostConfig(capacity=60 * layout.block_bytes),
            daemon=DaemonConfig(url=order["url"], name=order["name"]),
            transfer=TransferConfig(down_s=0.2),
        )
        stores.append(open_store(config, layout=layout, model=identity))
        return EngineConnector(stores[0])
    try:
        engine = Engine(model, tokenizer, EngineConfig(dtype="float32"), connector=connect)
    except ConfigError as error:
        return say(refused=str(error))
    (store,) = stores
    say(ready=True, block_bytes=store.layout.block_bytes)
    if order["stop_before"]:
        stop_before(Op[order["stop_before"]], say)
    for line in lines:
        ask = json.loads(line)
        if ask["do"] == "generate":
            lo, hi = ask["prompt"]
            pieces, params = [], SamplingParams(max_tokens=ask["num_tokens"], ignore_eos=True)
            for piece in engine.stream(text[lo:hi], params):
                if not pieces:
                    say(begun=True)
                pieces.append(piece)
            store.flush()
            tokens = [token for piece in pieces for token in piece.token_ids]
            say(tokens=tokens, sources=dict(pieces[-1].stats.sources))
        elif ask["do"] == "is_up":
            (below,) = store.below
            try:
                below.tier.contains([store.root])
                say(up=not below.breaker.open)
            except Exception as error:
                say(up=False, why=str(error))
        elif ask["do"] == "metrics":
            say(reused=store.metrics.bytes_read.value("daemon"), written=store.metrics.bytes_written.value("daemon"))
    engine.close()
    store.close()

print("loaded", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        be_engine(order)
        os._exit(0)
    print(child, flush=True)
"""


class EngineProcess:
    """One engine, by its socket."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self._sock, self._lines = sock, sock.makefile("rw")
        self.first = self.hear()

    def say(self, **what: Any) -> None:
        print(json.dumps(what), file=self._lines, flush=True)

    def hear(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "the engine has ended"
        return dict(json.loads(line))

    def start(self, prompt: tuple[int, int], *, num_tokens: int = NUM_TOKENS) -> None:
        self.say(do="generate", prompt=prompt, num_tokens=num_tokens)

    def finish(self) -> tuple[list[int], dict[str, int]]:
        """Tokens, and prompt tokens by source, once the first token is there (`begun`) and then all."""
        answer = self.hear()
        if "begun" in answer:
            answer = self.hear()
        return answer["tokens"], answer["sources"]

    def generate(self, prompt: tuple[int, int], *, num_tokens: int = NUM_TOKENS) -> tuple[list[int], dict[str, int]]:
        self.start(prompt, num_tokens=num_tokens)
        return self.finish()

    def stops(self) -> None:
        """Wait until it has stopped itself."""
        while not self.hear().get("stops"):
            continue  # it may have begun to answer
        until(lambda: self.state == "T", "an engine to stop")

    def ask(self, what: str) -> dict[str, Any]:
        self.say(do=what)
        return self.hear()

    @property
    def state(self) -> str:
        """A letter, as in ps; "" when it is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        until(lambda: self.state in ("", "Z"), "the end of a killed engine")
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


class Engines:
    """Where engines are forked from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENGINES, str(ROOT / "LICENSE")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == "loaded\n"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(PATIENCE_S)
        self._listener.bind(str(folder / "engines.sock"))
        self._listener.listen()
        self._made: list[EngineProcess] = []

    def start(self, name: str, url: str | None, *, stop_before: str | None = None) -> EngineProcess:
        assert self._process.stdin and self._process.stdout
        order = {"socket": str(self._folder / "engines.sock"), "url": url, "name": name, "stop_before": stop_before}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        pid = int(self._process.stdout.readline())
        sock, _ = self._listener.accept()
        sock.settimeout(PATIENCE_S)
        self._made.append(EngineProcess(pid, sock))
        return self._made[-1]

    def close(self) -> None:
        for engine in self._made:
            if engine.state not in ("", "Z"):
                os.kill(engine.pid, signal.SIGKILL)
            engine.close()
        self._listener.close()
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[Engines]:
    made = Engines(folder)
    yield made
    made.close()


PROMPTS = {"shared": (0, 273), "killed": (300, 460), "other": (500, 660), "served": (700, 860), "last": (900, 1060)}
LONG = 40


@pytest.fixture(scope="module")
def cold(engines: Engines) -> dict[str, list[int]]:
    """What an engine without a daemon says."""
    alone = engines.start("cold", None)
    found = {name: alone.generate(prompt, num_tokens=LONG)[0] for name, prompt in PROMPTS.items()}
    alone.kill()
    return found


@contextmanager
def daemon_of(folder: Path, **settings: Any) -> Iterator[tuple[DaemonProcess, DaemonClient]]:
    plain: dict[str, Any] = {
        "host.capacity": 400 * BLOCK_BYTES,
        "disk.path": folder / "disk",
        "disk.capacity": "512MiB",
    }
    daemon = DaemonProcess(folder, **(plain | settings))
    client = DaemonClient(daemon.urls[0], connect_s=PATIENCE_S)
    try:
        yield daemon, client
    finally:
        client.close()
        daemon.end()


def at_rest(client: DaemonClient) -> bool:
    stats = client.stats()
    return not (stats["leases"] or stats["leased_bytes"] or stats["quarantined_blocks"])


def unaccounted(daemon: DaemonProcess, client: DaemonClient) -> tuple[int, int]:
    """Sockets and process descriptors of the daemon that are not those of a client it knows."""
    clients = client.stats()["clients"]
    open_now = []
    for path in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            open_now.append(str(path.readlink()))
    sockets = sum(name.startswith("socket:") for name in open_now)
    return sockets - sum(one["connections"] for one in clients), sum("pidfd" in name for name in open_now) - len(
        clients
    )


def test_engines_share_die_and_outlive_the_daemon(engines: Engines, cold: dict[str, list[int]], tmp_path: Path) -> None:
    def computes(answer: tuple[list[int], dict[str, int]], name: str) -> int:
        """Tokens of the prompt that were not found: what an engine has never had comes from the daemon, or by way of its host."""
        tokens, sources = answer
        assert tokens == cold[name][: len(tokens)], name
        return sources["computed"]

    with daemon_of(tmp_path) as (daemon, client):
        url = daemon.urls[0]
        writer, reader = engines.start("a", url), engines.start("b", url)
        assert writer.first["block_bytes"] == BLOCK_BYTES

        # What one has computed, the other reads.
        assert computes(writer.generate(PROMPTS["shared"]), "shared") == 273
        assert computes(reader.generate(PROMPTS["shared"]), "shared") == 1
        assert reader.ask("metrics")["reused"] >= 17 * BLOCK_BYTES
        until(lambda: at_rest(client), "leases given back")
        idle, memory = unaccounted(daemon, client), daemon.rss_bytes()

        # Killed between reserving and committing, and while it reads what it was lent: nobody else notices.
        in_write = engines.start("dies writing", url, stop_before="COMMIT")
        in_read = engines.start("dies reading", url, stop_before="RELEASE")
        in_write.start(PROMPTS["killed"])
        in_read.start(PROMPTS["shared"])
        in_write.stops()
        in_read.stops()
        stats = client.stats()
        assert stats["leases"] >= 2 and stats["leased_bytes"] >= BLOCK_BYTES
        assert sum(one["writes_open"] for one in stats["clients"]) == 1
        assert computes(reader.generate(PROMPTS["other"]), "other") == 160
        assert computes(writer.generate(PROMPTS["other"]), "other") == 16
        in_write.kill()
        in_read.kill()
        until(lambda: at_rest(client), "what the dead held to be free again")
        names = {one["name"] for one in client.stats()["clients"]}
        assert {"a", "b"} <= names and not names & {"dies writing", "dies reading"}
        until(lambda: unaccounted(daemon, client) == idle, "the descriptors of the dead to be closed")
        assert daemon.rss_bytes() < memory + (8 << 20)
        assert computes(reader.generate(PROMPTS["killed"]), "killed") == 160, "what was not committed is not there"

        # The daemon is killed while both are served: they go on, and find it again by themselves when it is back.
        until(lambda: client.flush()["complete"], "everything on disk")
        for engine, name in ((writer, "served"), (reader, "last")):
            engine.start(PROMPTS[name], num_tokens=LONG)
        assert writer.hear() == reader.hear() == {"begun": True}
        daemon.kill()
        assert computes(writer.finish(), "served") == 160
        assert computes(reader.finish(), "last") == 160

    with daemon_of(tmp_path) as (daemon, client):
        for engine in (writer, reader):
            until(lambda engine=engine: engine.ask("is_up")["up"], "an engine to reconnect")  # type: ignore[misc]  # bound
        assert {one["name"] for one in client.stats()["clients"]} >= {"a", "b"}
        # Of the kept: the writer never had this one.
        assert computes(writer.generate(PROMPTS["killed"]), "killed") == 16, "what the disk kept is served"
        late = engines.start("c", daemon.urls[0])
        assert computes(late.generate(PROMPTS["shared"]), "shared") == 1
        assert client.stats()["corrupt_blocks"] == 0


def test_device_pools_larger_than_the_host_are_refused_with_the_arithmetic(engines: Engines, tmp_path: Path) -> None:
    small = {"host.capacity": 50 * BLOCK_BYTES}
    with daemon_of(tmp_path, **small) as (daemon, _):
        refused = engines.start("large", daemon.urls[0]).first["refused"]
        assert "42 = 42 MiB, its host tier is 35 MiB" in refused and "--force" in refused
