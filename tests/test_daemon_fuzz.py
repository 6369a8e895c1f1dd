"""Rubbish, by the minute: against the parser alone, and against a daemon that goes on serving others meanwhile.

The suite gives it seconds. By hand: python tests/test_daemon_fuzz.py --minutes 10
"""

import argparse
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest

from tests.daemon_parts import HELLO, NAMESPACE, ROOT, DaemonProcess, connected, process
from tests.test_daemon_protocol import feed, golden
from tierkv.daemon.blocks import Blocks
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.protocol import FIELDS, Incoming, Limits, Message, Op, encode
from tierkv.errors import ProtocolError
from tierkv.testing import SMALL, block_of, blocks_of, make_run

MAX_GROWTH_BYTES = 96 << 20
"""Of the daemon's memory, over what it has after the first turns: caches of sockets, known paths, the allocator's slack."""
QUIET_S = 0.02
"""Silence after which no more answers are waited for."""
RUNS = [make_run(8, seed=seed) for seed in range(20)]


# -- the parser -------------------------------------------------------------------------------------------------------------


def damaged(dice: random.Random, stream: bytes) -> bytes:
    """A stream with a few things done to it."""
    out = bytearray(stream)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(out) + 1)
        match dice.randrange(7):
            case 0:
                out[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                out[at:at] = dice.randbytes(dice.randint(1, 9))
            case 2:
                del out[at : at + dice.randint(1, 9)]
            case 3:
                del out[at:]
            case 4:
                out[at : at + 4] = dice.choice((0, 1, 0xFF, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF)).to_bytes(
                    4, "little"
                )
            case 5:
                out[at:at] = dice.choice(
                    (b"\xdd\xff\xff\xff\xff", b"\xdf\x00\xff\xff\xff", b"\xc7\xff\x01", b"\x91" * 300, b"\xc1")
                )
            case _:
                other = golden(dice.choice(list(Op)))
                out[at:at] = other[dice.randrange(len(other)) :]
        if not out:
            out += b"T"
    return bytes(out)


def fuzz_parser(seconds: float, *, seed: int) -> Counter[str]:
    """Streams that were valid once; whatever comes of one but messages and ProtocolError is raised."""
    dice = random.Random(seed)
    told: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(100):
            stream = damaged(dice, b"".join(golden(dice.choice(list(Op))) for _ in range(dice.randint(1, 4))))
            cuts = [dice.randint(1, 200) for _ in range(dice.randint(0, 8))]
            limits = Limits(payload=1 << 16, filled=1 << 16)
            try:
                come = feed(Incoming(limits, sink=dice.choice((None, _scattered))), stream, cuts)
            except ProtocolError:
                told["refused"] += 1
                continue
            told["streams"] += 1
            told["messages"] += len(come)
            for message in come:
                assert all(check(message.fields[name]) for name, check in FIELDS[message.op].items())
    return told


def _scattered(message: Message, size: int) -> list[memoryview] | None:
    if message.op is not Op.FILL:
        return None
    cut = size // 3
    return [memoryview(bytearray(part)) for part in (cut, 0, size - cut)]


# -- a live daemon ----------------------------------------------------------------------------------------------------------


def value_of(dice: random.Random, op: Op, name: str) -> object:
    """Something that the protocol allows for a field, likely to mean something."""
    run = dice.choice(RUNS)
    numbers = (0, 1, 1, 1, 2, dice.randrange(40), dice.randrange(1 << 31), (1 << 63) - 1)
    match name:
        case "pool":
            return dice.choice((1, 1, 1, 1, 1, 0, 2, dice.choice(numbers)))
        case "root":
            return dice.choice((ROOT, ROOT, ROOT, dice.choice(run.keys), dice.randbytes(32)))
        case "parent":
            return dice.choice((ROOT, ROOT, dice.choice(run.keys), dice.choice(run.keys), dice.randbytes(32)))
        case "depth":
            return dice.choice((0, 0, 0, 1, 8, dice.randrange(1 << 31)))
        case "deadline_s" | "ttl_s":
            return dice.choice((0, 0.0, 0.01, 1, 60.0, float((1 << 31) - 1)))
        case "checksums":
            return dice.randbytes(8 * dice.choice((0, 1, 2, 8, 8, 500)) + dice.choice((0, 0, 0, 3)))
        case "older_s":
            return dice.choice((None, 0, 0.0, 3600.0, 1e9))
        case "model" | "tenant":
            return dice.choice((None, "", "test", "ü" * dice.randrange(400)))
        case "prefix" | "pin":
            return dice.choice(("", "pin-1", run.keys[0].hex()[: dice.randrange(64)], "ü"))
        case "layout":
            layout: dict[str, Any] = asdict(SMALL)
            layout[dice.choice((*layout, "more"))] = dice.choice(
                (0, -1, 1, 1 << 62, "x", None, 2.5, [], {}, b"x", True)
            )
            return dice.choice((asdict(SMALL), layout, {}))
        case "namespace":
            return dice.choice(
                ({"model": "test", "adapter": "", "tenant": ""}, {}, {"model": {}, "adapter": [], "tenant": 5})
            )
        case "client":
            return dice.randbytes(32)
        case "ended":
            return [dice.choice(numbers) for _ in range(dice.randrange(5))]
        case "wants":
            return dice.choice(([], ["memory"], ["memory", "x"]))
        case "name" | "token":
            return "rubbish"
        case "pid":
            return dice.choice((None, 1, dice.choice(numbers)))
        case "connection":
            return dice.choice((1, dice.randrange(1000), dice.choice(numbers)))
    return dice.choice(numbers)


def payload_of(dice: random.Random, op: Op) -> bytes:
    run = dice.choice(RUNS)
    count = dice.randint(1, 8)
    keys, tokens = b"".join(run.keys[:count]), run.tokens[: 64 * count]
    match op:
        case Op.SEEK:
            good = keys + tokens
        case Op.RESERVE:
            good = dice.choice((tokens, dice.randbytes(64 * count)))
        case Op.FILL:
            good = b"".join(block_of(key) for key in run.keys[:count])
        case Op.CONTAINS | Op.AWAIT | Op.READ | Op.LEND | Op.REPORT | Op.PIN | Op.DELETE:
            good = dice.choice((keys, dice.randbytes(32 * count), keys + keys[::-1]))
        case _:
            good = b""
    return dice.choice(
        (good, good, good, good, good[: dice.randrange(len(good) + 1)], dice.randbytes(dice.randrange(20_000)), b"")
    )


def request_of(dice: random.Random, id: int, ops: list[Op]) -> bytes:
    op = dice.choice(ops)
    fields: dict[str, object] = {name: value_of(dice, op, name) for name in FIELDS[op]}
    if not dice.randrange(25):
        fields[dice.choice((*fields, "x"))] = dice.choice((None, -1, 1.5, "x", b"x", [], {}, [[[]]]))
    if not dice.randrange(40):
        fields.pop(dice.choice((*fields, "x")), None)
    payload = payload_of(dice, op)
    return encode(op, id, fields, payload_bytes=len(payload)) + payload


@dataclass
class Attack:
    """Connections that do what none should. admin: they may do everything but let the daemon stop."""

    daemon: DaemonProcess
    dice: random.Random
    told: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        url = self.dice.choice(self.daemon.urls)
        kinds = [self.rubbish, self.cut, self.requests, self.requests, self.requests, self.silent]
        if url.startswith("tcp"):  # by unix socket it is root's, and might tell the daemon to stop taking blocks
            kinds.append(self.mutated)
        kind = self.dice.choice(kinds)
        with connected(url) as sock:
            self.told[kind.__name__] += 1
            try:
                kind(sock, url)
            except (BrokenPipeError, ConnectionResetError):
                self.told["reset"] += 1

    def hello(self) -> bytes:
        fields = {**HELLO, "client": self.dice.randbytes(32), "name": "rubbish"}
        return encode(Op.HELLO, 1, fields)

    def attach(self) -> bytes:
        names = {"model": NAMESPACE.model, "adapter": "", "tenant": ""}
        fields = {
            "layout": asdict(SMALL),
            "namespace": names,
            "root": ROOT,
            "device_bytes": 0,
            "memory": self.dice.randrange(2),
        }
        return encode(Op.ATTACH, 2, fields)

    def ops(self, url: str) -> list[Op]:
        last = {Op.DRAIN} if url.startswith("unix") else set()  # where it is root's, it would be done
        return [op for op in Op if op not in last and (op < Op.REPLY or not self.dice.randrange(20))]

    def rubbish(self, sock: socket.socket, url: str) -> None:
        sent = self.dice.randbytes(self.dice.choice((16, 100, 5000)))
        sock.sendall(sent)
        messages = self.read(sock, until_end=True)
        assert (
            [m.op for m in messages] == [Op.REFUSED]
            and messages[0].id == 0
            and messages[0].fields["kind"] == "protocol"
        )
        self.told["refused with a reason"] += 1

    def cut(self, sock: socket.socket, url: str) -> None:
        requests = b"".join(request_of(self.dice, 3 + at, self.ops(url)) for at in range(self.dice.randrange(6)))
        whole = self.hello() + self.attach() + requests
        sock.sendall(whole[: self.dice.randrange(len(whole))])

    def requests(self, sock: socket.socket, url: str) -> None:
        sock.sendall(self.hello() + self.attach())
        reads = self.dice.randrange(4) > 0
        if reads:
            self.read(sock, at_least=2)  # the others are too early for whatever needs a pool
        for at in range(self.dice.randint(1, 30)):
            sock.sendall(request_of(self.dice, 3 + at, self.ops(url)))
            if reads and not self.dice.randrange(3):
                self.read(sock)
        if reads:
            self.read(sock)

    def mutated(self, sock: socket.socket, url: str) -> None:
        sock.sendall(self.hello())
        sock.sendall(
            damaged(self.dice, self.attach() + b"".join(golden(self.dice.choice(list(FIELDS))) for _ in range(4)))
        )
        self.read(sock)

    def silent(self, sock: socket.socket, url: str) -> None:
        sock.sendall(self.hello() + self.attach())
        for at in range(200):
            id = encode(Op.READ, 3 + at, {"pool": 1, "deadline_s": 0}, payload_bytes=256)
            sock.sendall(id + b"".join(self.dice.choice(RUNS).keys))

    def read(self, sock: socket.socket, *, until_end: bool = False, at_least: int = 0) -> list[Message]:
        """What it answers, until it is silent; all of that is the protocol's, and the last of it a reason if that is the end."""
        incoming, messages = Incoming(), list[Message]()
        while True:
            sock.settimeout(20.0 if until_end or len(messages) < at_least else QUIET_S)
            try:
                with incoming.target() as target:
                    count = sock.recv_into(target)
            except TimeoutError:
                assert not until_end and len(messages) >= at_least, "it neither answered nor ended"
                break
            except ConnectionResetError:
                self.told["reset"] += 1
                break
            if not count:
                assert not until_end or messages
                break
            messages += incoming.advance(count)
        sock.settimeout(20.0)
        for message in messages:
            self.told[message.op.name] += 1
            assert message.op in (Op.REPLY, Op.REFUSED, Op.EVENT)
            assert message.fields.get("kind") != "defect", message.fields
        return messages


@dataclass
class Bystander:
    """A client as it should be, which must not notice."""

    url: str
    told: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.client = DaemonClient(self.url, name="bystander", connect_s=20.0)
        self.blocks = Blocks(self.client, namespace=NAMESPACE, root=ROOT)
        self.blocks.attach()
        self._seed = 1000

    def turn(self) -> None:
        start = time.monotonic()
        self._seed += 1
        run = make_run(4, seed=self._seed % 50 + 1000)
        self.told["kept"] += sum(state.name in ("HERE", "PRESENT") for state in self.blocks.write(run, blocks_of(run)))
        outs = [memoryview(bytearray(SMALL.block_bytes)) for _ in run.keys]
        for key, out, state in zip(run.keys, outs, self.blocks.read(run.keys, outs, deadline_s=20.0), strict=True):
            self.told[state.name] += 1
            assert state.name != "HERE" or bytes(out) == block_of(key)
            assert state.name != "CORRUPT"
        self.told["turns"] += 1
        self.told["slowest_ms"] = max(self.told["slowest_ms"], int(1000 * (time.monotonic() - start)))

    def close(self) -> None:
        self.blocks.close()
        self.client.close()


def fuzz_daemon(daemon: DaemonProcess, seconds: float, *, seed: int) -> dict[str, Any]:
    """Attack a daemon for a time; what happened. Raises when it ends, grows, fails, or serves a bystander wrong."""
    attack = Attack(daemon, random.Random(seed))
    bystanders = [Bystander(url) for url in daemon.urls]
    end, turns, first_bytes, most_bytes = time.monotonic() + seconds, 0, 0, 0
    while time.monotonic() < end:
        attack.run()
        turns += 1
        if turns % 5 == 0:
            for bystander in bystanders:
                bystander.turn()
            assert daemon.process.poll() is None
            rss = daemon.rss_bytes()
            first_bytes = rss if turns <= 100 else first_bytes
            most_bytes = max(most_bytes, rss)
            assert rss < first_bytes + MAX_GROWTH_BYTES, (
                f"it grew from {first_bytes >> 20} to {rss >> 20} MiB in {turns} turns"
            )
    stats = bystanders[0].client.stats()
    for bystander in bystanders:
        assert bystander.told["HERE"] > bystander.told["turns"], bystander.told  # of four blocks a turn
        bystander.close()
    return {
        "attacks": turns,
        "first_mib": first_bytes >> 20,
        "most_mib": most_bytes >> 20,
        "attack": dict(attack.told),
        "bystanders": [dict(bystander.told) for bystander in bystanders],
        "fds": daemon.num_fds(),
        "clients": len(stats["clients"]),
        "leases": stats["leases"],
        "quarantined": stats["quarantined_blocks"],
    }


def attacked(folder: Path, seconds: float, *, seed: int) -> dict[str, Any]:
    urls = (f"unix://{folder}/d.sock", "tcp://127.0.0.1:0")
    settings = {
        "host__capacity": "4MiB",
        "disk__path": folder / "disk",
        "disk__capacity": "16MiB",
        "server__lease_s": "5",
    }
    with process(folder, listen=urls, **settings) as daemon:
        told = fuzz_daemon(daemon, seconds, seed=seed)
        errors = daemon.end()
        assert daemon.process.returncode == 0, errors
        assert "Traceback" not in errors, errors
    return told


# -- in the suite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_parser_takes_rubbish_for_a_while(seed: int) -> None:
    told = fuzz_parser(1.0, seed=seed)
    assert told["refused"] > 100 and told["messages"] > 100


def test_a_daemon_under_rubbish_serves_others_right(tmp_path: Path) -> None:
    told = attacked(tmp_path, 6.0, seed=1)
    assert told["attacks"] > 20 and told["attack"]["REFUSED"] > 10


def main(seconds: float, seed: int) -> None:
    print(f"seed {seed}: parser {dict(fuzz_parser(seconds, seed=seed))}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print(f"seed {seed}: daemon {attacked(Path(folder), seconds, seed=seed)}", flush=True)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=1.0, help="for each of the two parts")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    main(60 * options.minutes, options.seed)
