"""`tierkv daemon` as whoever runs it sees it: signals, disks that are full, damaged or taken, and starts that cannot be."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.daemon_parts import NAMESPACE, PATIENCE_S, ROOT, DaemonProcess, process, raw, running, until
from tierkv.assembly import open_store
from tierkv.config import Config, DaemonConfig, DeviceConfig, DiskConfig, HostConfig
from tierkv.daemon import upkeep
from tierkv.daemon.blocks import Blocks
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.protocol import Op, State
from tierkv.errors import ConfigError, RefusedError, TierError
from tierkv.keys import Namespace
from tierkv.testing import SMALL, FakeClock, block_of, make_run
from tierkv.testing.tiers import blocks_of
from tierkv.tiers.base import Run

BLOCK = SMALL.block_bytes


class User:
    """A client of a daemon process."""

    def __init__(self, url: str, *, token: str = "") -> None:
        self.client = DaemonClient(url, connect_s=PATIENCE_S, token=token)
        self.blocks = Blocks(self.client, namespace=NAMESPACE, root=ROOT)

    def __enter__(self) -> "User":
        return self

    def __exit__(self, *raised: object) -> None:
        self.blocks.close()
        self.client.close()

    def write(self, run: Run) -> list[State]:
        return self.blocks.write(run, blocks_of(run), deadline_s=PATIENCE_S)

    def read(self, run: Run) -> list[bool]:
        """Which blocks came; each that did is compared."""
        outs = [bytearray(BLOCK) for _ in run.keys]
        states = self.blocks.read(run.keys, [memoryview(out) for out in outs], deadline_s=PATIENCE_S)
        for key, out, state in zip(run.keys, outs, states, strict=True):
            assert state is not State.HERE or bytes(out) == block_of(key), "other bytes than were written"
        return [state is State.HERE for state in states]

    def on_disk(self) -> int:
        return next(int(tier["blocks"]) for tier in self.client.stats()["tiers"] if tier["tier"] == "disk")


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "tierkv.cli", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def refused(*words: str, folder: Path, code: int) -> str:
    """A start that cannot be: the one line that says why."""
    done = command("daemon", "--listen", f"unix://{folder}/other.sock", *words, folder=folder)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert not (folder / "other.sock").exists()
    return done.stderr


# -- signals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_down", ["save", "spill"])
def test_sigterm_writes_everything_down_branches_and_all(copy_down: str, tmp_path: Path) -> None:
    trunk = make_run(20, seed=1)
    runs = [trunk, *(make_run(7, seed=seed, after=trunk) for seed in (2, 3)), make_run(9, seed=4)]
    settings = {"disk.path": tmp_path / "disk", "disk.capacity": "64MiB", "disk.copy_down": copy_down}
    with process(tmp_path, **settings) as daemon:
        with User(daemon.urls[0]) as user:
            for run in runs:
                assert set(user.write(run)) == {State.HERE}
            assert user.client.verify()["host"] == {"checked": 43, "bad": 0}
        daemon.signal(signal.SIGTERM)
        said, _ = daemon.process.communicate(timeout=PATIENCE_S)
        assert daemon.process.returncode == 0
        assert "more blocks written down" in said and "not all" not in said
        assert not (tmp_path / "d.sock").exists()
    with process(tmp_path, **settings) as daemon, User(daemon.urls[0]) as user:
        assert [all(user.read(run)) for run in runs] == [True] * len(runs)


def test_sigterm_does_not_wait_for_who_reads_or_writes(tmp_path: Path) -> None:
    run, more = make_run(10, seed=1), make_run(5, seed=2)
    with process(tmp_path) as daemon, User(daemon.urls[0]) as user, raw(daemon.urls[0]) as writer:
        user.write(run)
        path = {"pool": writer.attach(memory=0), "root": ROOT, "parent": ROOT, "depth": 0}
        assert writer.ask(Op.RESERVE, path, more.tokens).fields["lease"]
        with pytest.raises(TierError), user.blocks.borrow(run.keys, deadline_s=PATIENCE_S) as loan:
            assert loan
            daemon.signal(signal.SIGTERM)
            assert daemon.process.wait(PATIENCE_S) == 0
            for key, place in zip(run.keys, loan.places, strict=True):
                assert place is not None and bytes(loan.rows[place, :BLOCK]) == block_of(key), "memory outlives it"
            assert loan.intact()
            intact = True  # what is raised is that it cannot be given back
        assert intact


def test_sigint_ends_it_as_sigterm_does(tmp_path: Path) -> None:
    with process(tmp_path) as daemon:
        daemon.signal(signal.SIGINT)
        assert daemon.process.wait(PATIENCE_S) == 0
        assert not (tmp_path / "d.sock").exists()


def test_sighup_reads_tokens_anew_and_keeps_who_still_has_one(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("the first token of all\n")
    options = {"listen": ["tcp://127.0.0.1:0"], "server.token_file": tokens}
    with process(tmp_path, **options) as daemon, User(daemon.urls[0], token="the first token of all") as user:
        user.client.ping()
        tokens.write_text("quite another token\n")
        daemon.signal(signal.SIGHUP)
        assert daemon.process.stdout
        assert any("reloaded: tokens" in line for line in iter(daemon.process.stdout.readline, ""))
        with pytest.raises(RefusedError, match="token"):
            user.client.ping()
        with User(daemon.urls[0], token="quite another token") as other:
            other.client.ping()
            daemon.signal(signal.SIGHUP)
            assert any("reloaded: tokens" in line for line in iter(daemon.process.stdout.readline, ""))
            other.client.ping()
            hellos = next(row for row in other.client.stats()["requests"] if row["op"] == "hello")
            assert hellos["count"] == 3  # its first connection is still the one it has


def test_sighup_with_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("the first token of all\n")
    options = {"listen": ["tcp://127.0.0.1:0"], "server.token_file": tokens}
    with process(tmp_path, **options) as daemon:
        tokens.write_text("short\n")
        daemon.signal(signal.SIGHUP)
        assert daemon.process.stderr
        assert "everything stays as it was" in daemon.process.stderr.readline()
        with User(daemon.urls[0], token="the first token of all") as user:
            user.client.ping()


_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execvp(sys.argv[2], sys.argv[2:])
"""

# -- disks ------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_what_does_not_fit_and_nothing_else(tmp_path: Path) -> None:
    # No file may be written beyond this, nor shared memory made: the system says no in mid-write, as it does of a full disk.
    limit = (sys.executable, "-c", _LIMITED, str(80 * BLOCK))
    room = {"disk.path": tmp_path / "disk", "disk.capacity": "64MiB", "host.capacity": 40 * BLOCK}
    old, new = make_run(20, seed=1), [make_run(20, seed=seed) for seed in range(2, 22)]
    with process(tmp_path, **room) as daemon, User(daemon.urls[0]) as user:
        user.write(old)
    with process(tmp_path, before=limit, **room) as daemon, User(daemon.urls[0]) as user:
        assert all(user.read(old))
        for run in new:
            user.write(run)
            assert user.client.flush(deadline_s=PATIENCE_S)["complete"]
            assert all(user.read(run)), "memory goes on"
        assert 20 <= user.on_disk() < 420
        assert sum(user.client.stats()["saves_dropped"].values()) > 0, "what did not fit is counted"
        assert all(user.read(old))
        for run in new:
            user.read(run)
    with process(tmp_path, **room) as daemon, User(daemon.urls[0]) as user:
        assert all(user.read(old)), "and there is room again"
        assert set(user.write(make_run(20, seed=99))) == {State.HERE}


def test_a_small_disk_forgets_and_never_lies(tmp_path: Path) -> None:
    room = {"disk.path": tmp_path / "disk", "disk.capacity": "2MiB", "host.capacity": 50 * BLOCK}
    with process(tmp_path, **room) as daemon, User(daemon.urls[0]) as user:
        runs = [make_run(20, seed=seed) for seed in range(40)]
        for run in runs:
            user.write(run)
            user.read(run)
        assert user.client.flush(deadline_s=PATIENCE_S)["complete"]
        found = [sum(user.read(run)) for run in runs]
        assert 0 < sum(found) < 800
        assert user.client.verify()["disk"]["bad"] == 0


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100::1000] = bytes(byte ^ 255 for byte in data[100::1000])
    with path.open("r+b") as file:
        file.write(data)


def _truncate(path: Path) -> None:
    os.truncate(path, 5000)


@pytest.mark.parametrize("harm", [_flip, _truncate, Path.unlink])
@pytest.mark.parametrize("running_on", [False, True], ids=["before start", "while it runs"])
def test_a_damaged_disk_is_a_miss_that_is_counted(
    harm: Callable[[Path], None], running_on: bool, tmp_path: Path
) -> None:
    room = {"disk.path": tmp_path / "disk", "disk.capacity": "64MiB", "host.capacity": 60 * BLOCK}
    old, new = [make_run(20, seed=seed) for seed in range(8)], [make_run(20, seed=seed) for seed in range(90, 93)]

    def damage() -> None:
        shards = list((tmp_path / "disk").rglob("blocks/c.*"))
        assert shards, "the damage must hit something"
        for path in shards:
            harm(path)

    with process(tmp_path, **room) as daemon, User(daemon.urls[0]) as user:
        for run in old:
            user.write(run)
            assert user.client.flush(deadline_s=PATIENCE_S)["complete"]
        if running_on:
            damage()
            found = [sum(user.read(run)) for run in old]
            assert sum(found) < 160
            assert user.client.stats()["corrupt_blocks"] > 0 or harm is not _flip
    if not running_on:
        damage()
    with process(tmp_path, **room) as daemon, User(daemon.urls[0]) as user:
        assert sum(sum(user.read(run)) for run in old) < 160
        for run in new:
            assert set(user.write(run)) == {State.HERE}
            assert user.client.flush(deadline_s=PATIENCE_S)["complete"]
        assert all(all(user.read(run)) for run in new)


def test_a_folder_of_another_daemon_is_one_line_at_the_start(tmp_path: Path) -> None:
    disk = {"disk.path": tmp_path / "disk", "disk.capacity": "8MiB"}
    words = ("--http", "off", "--set", f"disk.path={tmp_path}/disk", "--set", "disk.capacity=8MiB")
    with process(tmp_path, **disk) as daemon, User(daemon.urls[0]) as user:
        user.write(make_run(3, seed=1))
        line = refused(*words, folder=tmp_path, code=1)
        assert f"in use by process {daemon.pid}" in line
        assert all(user.read(make_run(3, seed=1)))


def test_a_folder_of_an_engine_is_refused_as_is_one_that_cannot_be_made(tmp_path: Path) -> None:
    words = ("--http", "off", "--set", f"disk.path={tmp_path}/disk", "--set", "disk.capacity=8MiB")
    config = Config(host=HostConfig(capacity=20 * BLOCK), disk=DiskConfig(path=tmp_path / "disk", capacity=8 << 20))
    store = open_store(config, layout=SMALL, model="m")
    try:
        assert f"in use by process {os.getpid()}" in refused(*words, folder=tmp_path, code=1)
    finally:
        store.close()
    line = refused("--http", "off", "--set", "disk.path=/proc/here", folder=tmp_path, code=1)
    assert "give a folder that can be written to" in line


# -- engines that cannot be served ------------------------------------------------------------------------------------------


def _config(url: str, *, pages: int) -> Config:
    return Config(
        device=DeviceConfig(kind="cpu", capacity=pages * BLOCK),
        host=HostConfig(capacity=pages * BLOCK),
        daemon=DaemonConfig(url=url),
    )


def test_device_pools_are_summed_over_all_engines_and_force_serves_them(tmp_path: Path) -> None:
    with running(tmp_path, capacity=str(100 * BLOCK)) as daemon:
        first = open_store(_config(daemon.urls[0], pages=60), layout=SMALL, model="m")
        try:
            with pytest.raises(ConfigError, match=r"would be .* \+ .* MiB, its host tier is .* --force"):
                open_store(_config(daemon.urls[0], pages=60), layout=SMALL, model="m")
            open_store(_config(daemon.urls[0], pages=40), layout=SMALL, model="m").close()
        finally:
            first.close()
        daemon.until(lambda: not daemon.service.clients, "the engines to leave")
        open_store(_config(daemon.urls[0], pages=60), layout=SMALL, model="m").close()
    with process(tmp_path, **{"host.capacity": 100 * BLOCK}, flags=["--force"]) as forced:
        open_store(_config(forced.urls[0], pages=200), layout=SMALL, model="m").close()


def test_a_second_layout_is_refused_with_the_remedy_and_taken_where_there_is_room(tmp_path: Path) -> None:
    other = SMALL.__class__(num_layers=3, num_kv_heads=1, head_dim=32, dtype="float32")
    with process(tmp_path) as daemon:
        open_store(_config(daemon.urls[0], pages=10), layout=SMALL, model="m").close()
        with pytest.raises(ConfigError, match=r"set server\.layouts higher"):
            open_store(_config(daemon.urls[0], pages=10), layout=other, model="n")
    with process(tmp_path, **{"server.layouts": 2}) as daemon:
        for layout in (SMALL, other):
            client = DaemonClient(daemon.urls[0], connect_s=PATIENCE_S)
            namespace = Namespace("m", layout)
            blocks = Blocks(client, namespace=namespace, root=namespace.root())
            run = make_run(4, seed=1, layout=layout)
            run = Run(namespace.root(), namespace.root(), 0, run.keys, run.tokens)
            assert len(blocks.presence(run.keys)) == 4
            blocks.close()
            client.close()


# -- starts that cannot be --------------------------------------------------------------------------------------------------


def test_a_second_daemon_on_the_same_socket_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with process(tmp_path) as daemon, User(daemon.urls[0]) as user:
        done = command("daemon", "--listen", daemon.urls[0], "--http", "off", folder=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "a daemon listens there already" in done.stderr
        user.write(make_run(2, seed=1))
        with User(daemon.urls[0]) as another:
            assert all(another.read(make_run(2, seed=1)))


def test_the_socket_of_a_killed_daemon_is_taken_over(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon.kill()
    daemon.end()
    assert (tmp_path / "d.sock").exists()
    with process(tmp_path) as again, User(again.urls[0]) as user:
        user.client.ping()


def test_a_taken_http_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused("--http", f"127.0.0.1:{port}", folder=tmp_path, code=1)


def test_a_taken_tcp_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("--listen", f"tcp://127.0.0.1:{port}", "--http", "off", folder=tmp_path, code=1)
        assert f"tcp://127.0.0.1:{port}" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--set", "host.capacity=much"), "host.capacity"),
        (("--set", "server.lease_share=2"), "server.lease_share"),
        (("--set", "server.layouts=0"), "server.layouts"),
        (("--set", "server.colour=red"), "server.colour"),
        (("--set", "host.capacity=900TiB"), "host.capacity"),
        (("--http", "here"), "server.http"),
        (("--listen", "carrier://pigeon"), "server.listen"),
        (("--listen", "tcp://0.0.0.0:0"), "--insecure"),
        (("--listen", "tls://127.0.0.1:0"), "server.tls_certificate"),
        (("--set", "server.token_file=absent"), "server.token_file"),
        (("--config", "absent.toml"), "absent.toml"),
    ],
)
def test_a_configuration_that_cannot_work_is_one_line(words: Sequence[str], says: str, tmp_path: Path) -> None:
    plain = () if "--http" in words else ("--http", "off")
    assert says in refused(*plain, *words, folder=tmp_path, code=2)


def test_a_killed_daemon_leaves_whole_blocks_on_disk(tmp_path: Path) -> None:
    room = {"disk.path": tmp_path / "disk", "disk.capacity": "64MiB"}
    kept = make_run(30, seed=1)
    with process(tmp_path, **room) as daemon, User(daemon.urls[0]) as user:
        user.write(kept)
        assert user.client.flush(deadline_s=PATIENCE_S)["complete"]
        for seed in range(2, 30):
            user.write(make_run(20, seed=seed))
        daemon.kill()
    with process(tmp_path, **room) as daemon, User(daemon.urls[0]) as user:
        assert all(user.read(kept))
        for seed in range(2, 30):
            user.read(make_run(20, seed=seed))
        until(lambda: user.client.stats()["leases"] == 0, "leases given back")


def test_who_asks_for_blocks_and_does_not_read_them_loses_them_with_its_connection(tmp_path: Path) -> None:
    clock = FakeClock(1000.0)
    run = make_run(1000, seed=1)
    with running(tmp_path, clock=clock, capacity=str(13_000 * BLOCK)) as daemon, daemon.blocks() as blocks:
        assert set(blocks.write(run, blocks_of(run))) == {State.HERE}
        with raw(daemon.urls[1]) as slow:
            fields = {"pool": slow.attach(), "deadline_s": 5.0}
            for _ in range(6):  # more than the system keeps for a socket
                slow.send(Op.READ, fields, b"".join(run.keys))
            daemon.until(lambda: daemon.service.leased_bytes() > 0, "blocks on lease")
            clock.advance(daemon.service.config.server.lease_s - 1)
            blocks.client.ping()
            assert not daemon.do(daemon.at_rest)

            def at_rest_later() -> bool:
                clock.advance(1)
                return daemon.at_rest()

            daemon.until(at_rest_later, "its leases to be over")
        outs = [memoryview(bytearray(BLOCK)) for _ in run.keys]
        assert set(blocks.read(run.keys, outs, deadline_s=PATIENCE_S)) == {State.HERE}


@pytest.mark.parametrize("history", [0, 1000])
def test_what_is_deleted_is_gone_where_it_is_known_by_two_paths_too(history: int, tmp_path: Path) -> None:
    whole, step = make_run(10, seed=1), 4 * SMALL.block_tokens
    tail = Run(whole.root, whole.keys[4], 5, whole.keys[5:], whole.tokens[5 * step :])
    disk = {"disk.path": tmp_path / "disk", "disk.capacity": "8MiB"}
    with process(tmp_path, **disk, **{"store.history_blocks": history}) as daemon, User(daemon.urls[0]) as user:
        user.write(tail)  # its parent is not known yet
        user.write(whole)
        assert user.client.flush(deadline_s=PATIENCE_S)["complete"]
        user.blocks.delete(tail.keys)
        assert user.blocks.presence(whole.keys) == bytes([2] * 5 + [0] * 5)
        assert [tier["blocks"] for tier in user.client.stats()["tiers"]] == [5, 5]
        assert user.client.verify() == {tier: {"checked": 5, "bad": 0} for tier in ("host", "disk")}


def test_a_daemon_that_is_to_end_does_not_wait_for_a_verification(tmp_path: Path) -> None:
    run = make_run(300, seed=1)
    with running(tmp_path, disk="8MiB") as daemon, daemon.blocks() as blocks:
        blocks.write(run, blocks_of(run))
        seen: list[object] = []
        found = upkeep.verify(daemon.pool, seen.append, lambda: bool(seen))
        assert found["host"] == {"checked": upkeep.VERIFY_BLOCKS, "bad": 0} and len(seen) == 1
        assert blocks.client.verify()["host"] == {"checked": 300, "bad": 0}
        daemon.service.ending = True
        assert blocks.client.verify()["host"]["checked"] == 0


def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    words = (sys.executable, "-m", "bench.daemon.soak", "--minutes", "0.05", "--clients", "4")
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong blocks 0" in done.stdout
