"""Who gets in, and how far: tokens and roles, users, TLS, and the handshake that comes before everything."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.daemon_parts import (
    NAMESPACE,
    PATIENCE_S,
    ROOT,
    Raw,
    RunningDaemon,
    config_of,
    connected,
    raw,
    running,
)
from tests.test_daemon_protocol import golden
from tierkv.config import TlsFiles
from tierkv.daemon.access import NEEDS, Peer, Role, Tokens
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.protocol import STRANGER_BYTES, Op, encode
from tierkv.daemon.server import Server
from tierkv.errors import ConfigError, RefusedError, TierBusy, TierError
from tierkv.metrics import Metrics
from tierkv.testing import block_of, blocks_of, make_run, read_blocks
from tierkv.tiers.daemon import DaemonTier

READ, WRITE, ADMIN = "r" * 16, "w" * 20, "a" * 32
NO_FILES = TlsFiles(None, None, None)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may\nread:{READ}\n{WRITE}  # engines\n\nadmin:{ADMIN}\n")
    return path


# -- tokens -----------------------------------------------------------------------------------------------------------------


def test_tokens_have_the_roles_of_their_file(token_file: Path) -> None:
    tokens = Tokens(token_file)
    stranger = Peer("10.0.0.1:5")
    assert [tokens.role(token, stranger) for token in (READ, WRITE, ADMIN)] == [Role.READ, Role.WRITE, Role.ADMIN]
    for wrong in ("", READ[:-1], READ + "r", f"read:{READ}", WRITE.upper(), "ü" * 16):
        assert tokens.role(wrong, stranger) is None


def test_without_tokens_whoever_comes_writes_and_who_owns_the_daemon_administers() -> None:
    tokens = Tokens(None)
    assert tokens.role("", Peer("10.0.0.1:5")) is Role.WRITE
    assert tokens.role("", Peer("unix", pid=5, uid=12345)) is Role.WRITE
    assert tokens.role("", Peer("unix", pid=5, uid=os.geteuid())) is Role.ADMIN
    assert tokens.role("", Peer("unix", pid=5, uid=0)) is Role.ADMIN


def test_a_token_never_lowers_who_owns_the_daemon_nor_raises_another_user(token_file: Path) -> None:
    tokens = Tokens(token_file)
    assert tokens.role("nonsense", Peer("unix", pid=5, uid=os.geteuid())) is Role.ADMIN
    assert tokens.role("nonsense", Peer("unix", pid=5, uid=12345)) is None
    assert tokens.role(READ, Peer("unix", pid=5, uid=12345)) is Role.READ


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "short\n", "owner:" + "x" * 20, "read:short\n", "read:\n", f"{WRITE}\nx\n"]
)
def test_a_file_that_is_no_list_of_tokens_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match="token"):
        Tokens(path)


def test_a_token_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff" * 20)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens(tmp_path / "bytes")


def test_every_operation_needs_a_role() -> None:
    assert set(NEEDS) == set(Op)
    admin = {Op.FORGET, Op.FLUSH, Op.DRAIN, Op.VERIFY, Op.SUBSCRIBE}
    assert {op for op, role in NEEDS.items() if role is Role.ADMIN} == admin


@pytest.mark.parametrize("token", ["", "x" * 16, READ[:-1]])
def test_a_wrong_token_is_refused_and_the_connection_ends(tmp_path: Path, token_file: Path, token: str) -> None:
    with running(tmp_path, token_file=token_file) as daemon:
        with pytest.raises(RefusedError, match="token") as caught, daemon.blocks(daemon.urls[1], token=token) as blocks:
            blocks.attach()
        assert caught.value.kind == "token"
        client = Raw(connected(daemon.urls[1]))
        answer = client.hello(token=token)
        assert answer.op is Op.REFUSED and client.receive() is None
        client.close()
        tried = daemon.client(daemon.urls[1], token=token)
        with pytest.raises(ConfigError, match="token"):
            DaemonTier(tried, namespace=NAMESPACE, root=ROOT, metrics=Metrics())
        assert not daemon.service.clients


def test_each_role_does_what_it_may_and_no_more(tmp_path: Path, token_file: Path) -> None:
    run = make_run(3, seed=1)
    with running(tmp_path, token_file=token_file) as daemon:
        url = daemon.urls[1]
        with daemon.blocks(url, token=WRITE) as blocks:
            assert {state.name for state in blocks.write(run, blocks_of(run))} == {"HERE"}
            for call in (blocks.client.flush, blocks.client.drain, blocks.client.verify, blocks.client.forget):
                with pytest.raises(RefusedError, match="needs the role admin"):
                    call()
            assert blocks.client.unpin(blocks.pin(run.keys, ttl_s=60.0)[0]) == 1
        reader = DaemonTier(daemon.client(url, token=READ), namespace=NAMESPACE, root=ROOT, metrics=Metrics())
        assert read_blocks(reader, run.keys) == [block_of(key) for key in run.keys]
        assert reader.seek(run) == 3 and reader.blocks.client.stats()["clients"]
        more = make_run(2, seed=2)
        for refused in (
            lambda: reader.write(more, blocks_of(more)),
            lambda: reader.delete(run.keys),
        ):
            with pytest.raises(TierError, match="needs the role write"):
                refused()
        with pytest.raises(RefusedError, match="needs the role write"):
            reader.blocks.pin(run.keys, ttl_s=5.0)
        assert read_blocks(reader, run.keys) == [
            block_of(key) for key in run.keys
        ]  # the connection is as good as before
        reader.close()
        with daemon.blocks(url, token=ADMIN) as blocks:
            assert blocks.client.flush()["complete"]
            assert blocks.client.forget(model="test") == {"host": 3}


def test_an_operation_above_the_role_is_refused_even_by_hand(tmp_path: Path, token_file: Path) -> None:
    with running(tmp_path, token_file=token_file) as daemon, raw(daemon.urls[1], token=READ) as client:
        client.send(Op.FILL, {"lease": 1, "checksums": bytes(8)}, bytes(1 << 20))
        message = client.receive()
        assert message and message.op is Op.REFUSED and message.fields["kind"] == "refused"
        assert client.ask(Op.PING, {}).op is Op.REPLY


def test_who_may_only_read_has_no_pool_made(tmp_path: Path, token_file: Path) -> None:
    with running(tmp_path, token_file=token_file) as daemon:
        with daemon.blocks(daemon.urls[1], token=READ) as reader:
            with pytest.raises(RefusedError, match="may only read"):
                reader.attach()
            assert not daemon.service.pools
            with daemon.blocks(daemon.urls[1], token=WRITE) as writer:
                writer.attach()
            reader.attach()
        assert list(daemon.service.pools) == [1]


# -- users ------------------------------------------------------------------------------------------------------------------

ANOTHER_USER = """
import json, os, sys
from tests.daemon_parts import NAMESPACE, ROOT
from tierkv.daemon.blocks import Blocks
from tierkv.daemon.client import DaemonClient
from tierkv.errors import TierKVError
from tierkv.testing import block_of, blocks_of, make_run
import encodings.idna
url, token = sys.argv[1:]
os.setgroups([]), os.setgid(65534), os.setuid(65534)
told = {}
client = DaemonClient(url, token=token, connect_s=20.0)
blocks = Blocks(client, namespace=NAMESPACE, root=ROOT)
held, more = make_run(2, seed=1), make_run(2, seed=2)
def tried(name, call):
    try:
        told[name] = call()
    except TierKVError as error:
        told[name] = f"{type(error).__name__}: {error}"
def read():
    outs = [memoryview(bytearray(5120)) for _ in held.keys]
    blocks.read(held.keys, outs, deadline_s=20.0)
    return [bytes(out) for out in outs] == [block_of(key) for key in held.keys]
tried("attach", blocks.attach)
tried("read", read)
tried("write", lambda: [state.name for state in blocks.write(more, blocks_of(more))])
tried("flush", client.flush)
region = blocks._attached and blocks._attached.region
told["memory"] = region is not None and ("writable" if region.rows.flags.writeable else "read-only")
print(json.dumps(told))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_another_user(url: str, token: str = "") -> dict[str, object]:
    root = str(Path(__file__).parents[1])
    told = subprocess.run(
        [sys.executable, "-c", ANOTHER_USER, url, token],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return dict(json.loads(told.stdout))


@needs_root
@pytest.mark.parametrize("token", ["", READ, WRITE])
def test_another_user_has_the_role_of_its_token_alone(open_folder: Path, token: str) -> None:
    token_file = open_folder / "tokens"
    token_file.write_text(f"read:{READ}\n{WRITE}\n")
    held = make_run(2, seed=1)
    with running(open_folder, token_file=token_file, socket_mode="0666") as daemon, daemon.blocks() as blocks:
        blocks.write(held, blocks_of(held))
        told = as_another_user(daemon.urls[0], token)
    if not token:
        assert str(told["attach"]).startswith("RefusedError") and told["memory"] is False
        return
    assert told["attach"] is None and told["read"] is True
    assert "needs the role admin" in str(told["flush"])
    if token == READ:
        assert told["memory"] == "read-only" and "needs the role write" in str(told["write"])
    else:
        assert told["memory"] == "writable" and told["write"] == ["HERE", "HERE"]


@needs_root
def test_another_user_does_not_reach_a_socket_that_is_not_open_to_it(open_folder: Path) -> None:
    with running(open_folder) as daemon:
        told = as_another_user(daemon.urls[0])
    assert "Permission denied" in str(told["attach"])


# -- addresses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:7411"])
def test_listening_beyond_this_machine_needs_tokens(tmp_path: Path, token_file: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.token_file"):
        Server(config_of(tmp_path, listen=[url]))
    Server(config_of(tmp_path, listen=[url], token_file=token_file)).service.close()
    Server(config_of(tmp_path, listen=[url]), insecure=True).service.close()


@pytest.mark.parametrize("option", ["events", "events_replay"])
@pytest.mark.parametrize("endpoint", ["tcp://*:5557", "tcp://0.0.0.0:5557", "tcp://[::]:5557"])
def test_events_are_not_told_beyond_this_machine_unasked(
    tmp_path: Path, token_file: Path, option: str, endpoint: str
) -> None:
    with pytest.raises(ConfigError, match="tokens of all prompts"):
        Server(config_of(tmp_path, token_file=token_file, **{option: endpoint}))
    Server(config_of(tmp_path, **{option: endpoint}), insecure=True).service.close()
    for near in ("tcp://127.0.0.1:5557", "tcp://[::1]:*", "ipc:///tmp/e.sock", ">tcp://router.example:5557"):
        Server(config_of(tmp_path, **{option: near})).service.close()


def test_a_reload_does_not_open_what_a_start_would_refuse(tmp_path: Path, token_file: Path) -> None:
    config = config_of(tmp_path, listen=["tcp://0.0.0.0:0"], token_file=token_file)
    bare = replace(config, server=replace(config.server, token_file=None))
    daemon = RunningDaemon(config, reload=lambda: bare)
    try:
        daemon.do(daemon._server._reloaded)
        stranger = daemon.client(daemon.urls[0].replace("0.0.0.0", "127.0.0.1"))
        with pytest.raises(RefusedError, match="token"):
            stranger.ping()
        assert not any("reloaded" in line for line in daemon.told)
        stranger.close()
    finally:
        daemon.stop()


def test_a_reload_takes_leases_and_leaves_what_needs_a_restart(tmp_path: Path) -> None:
    config = config_of(tmp_path, lease_s=60.0)
    other = replace(config_of(tmp_path, lease_s=5.0, layouts=3, capacity="32MiB", disk="16MiB"), store=config.store)
    daemon = RunningDaemon(config, reload=lambda: other)
    try:
        daemon.do(daemon._server._reloaded)
        taken = daemon.service.config
        assert (taken.server.lease_s, taken.server.layouts) == (5.0, 1)
        assert (taken.host, taken.disk) == (config.host, config.disk)
        assert daemon.told[-1].endswith("; host, disk, server.layouts need a restart")
    finally:
        daemon.stop()


@pytest.mark.parametrize(
    "url", ["nonsense", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "http://127.0.0.1:80", "unix://"]
)
def test_what_is_no_address_is_a_mistake_of_the_configuration(url: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        DaemonClient(url)


def test_an_address_that_is_taken_or_not_ours_is_refused(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        for url in daemon.urls:
            with pytest.raises(TierBusy):
                RunningDaemon(config_of(tmp_path, listen=[url]))
        client = daemon.client()
        assert client.ping() > 0
        client.close()
    with pytest.raises(TierError, match=r"192\.0\.2\.1"):
        RunningDaemon(config_of(tmp_path, listen=["tcp://192.0.2.1:0"]), insecure=True)


def test_a_socket_that_a_dead_daemon_left_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "d.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    with running(tmp_path) as daemon:
        client = daemon.client()
        assert client.ping() > 0
        client.close()
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(TierError, match="no socket"):
        RunningDaemon(config_of(tmp_path))
    assert path.read_text() == "mine"


def test_a_folder_in_which_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(TierError, match="others can write there"):
        RunningDaemon(config_of(tmp_path, listen=[f"unix://{tmp_path}/open/d.sock"]))
    with pytest.raises(TierError):
        RunningDaemon(config_of(tmp_path, listen=[f"unix://{tmp_path}/{'x' * 120}.sock"]))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_socket_in_another_users_folder_under_tmp_is_not_connected_to(tmp_path: Path) -> None:
    anybodys = tmp_path / "anybodys"
    anybodys.mkdir()
    anybodys.chmod(0o1777)
    theirs = anybodys / "tierkv"
    theirs.mkdir()
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as squatter:
        squatter.bind(str(theirs / "d.sock"))
        squatter.listen()
        os.chown(theirs, 65534, 65534)
        with pytest.raises(TierError, match="another user's"):
            DaemonClient(f"unix://{theirs}/d.sock", token="secret").ping()
        squatter.settimeout(0)
        with pytest.raises(BlockingIOError):
            squatter.accept()


def test_the_socket_has_the_permissions_it_was_given(tmp_path: Path) -> None:
    with running(tmp_path, socket_mode="0640"):
        assert (tmp_path / "d.sock").stat().st_mode & 0o777 == 0o640


# -- TLS --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ours: a CA with `daemon` and `client`; theirs: another CA with a `client` of its own."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    for ca in ("ours", "theirs"):
        openssl("req", "-x509", *curve, "-keyout", f"{ca}.key", "-out", f"{ca}.crt", "-subj", f"/CN={ca}")
        for name in ("daemon", "client"):
            made = f"{ca}-{name}"
            openssl(
                "req", *curve[:-2], "-keyout", f"{made}.key", "-out", f"{made}.csr", "-subj", f"/CN={name}",
                "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
            )  # fmt: skip
            openssl(
                "x509", "-req", "-in", f"{made}.csr", "-CA", f"{ca}.crt", "-CAkey", f"{ca}.key", "-CAcreateserial",
                "-days", "2", "-copy_extensions", "copy", "-out", f"{made}.crt",
            )  # fmt: skip
    return folder


def files_of(folder: Path, *, ca: str = "ours", own: str | None = "ours") -> TlsFiles:
    """Of a client that trusts `ca` and was signed by `own`."""
    made = (folder / f"{own}-client.crt", folder / f"{own}-client.key") if own else (None, None)
    return TlsFiles(*made, folder / f"{ca}.crt")


@pytest.fixture
def secure(tmp_path: Path, certificates: Path) -> Iterator[RunningDaemon]:
    """A daemon that wants certificates of its clients."""
    options = {
        "tls_certificate": certificates / "ours-daemon.crt",
        "tls_key": certificates / "ours-daemon.key",
        "tls_ca": certificates / "ours.crt",
    }
    with running(tmp_path, listen=["tls://127.0.0.1:0", f"unix://{tmp_path}/d.sock"], **options) as daemon:
        yield daemon


def test_blocks_travel_over_tls_with_certificates_of_both_sides(secure: RunningDaemon, certificates: Path) -> None:
    run = make_run(60, seed=1)
    with secure.blocks(tls=files_of(certificates)) as blocks:
        assert {state.name for state in blocks.write(run, blocks_of(run))} == {"HERE"}
        outs = [memoryview(bytearray(5120)) for _ in run.keys]
        assert {state.name for state in blocks.read(run.keys, outs, deadline_s=PATIENCE_S)} == {"HERE"}
        assert [bytes(out) for out in outs] == [block_of(key) for key in run.keys]
        assert not blocks.shares_memory
        for _ in range(3):
            blocks.client.ping()
        assert len(secure.service.clients) == 1 and len(secure.service._sessions()) == 1  # it is used again


@pytest.mark.parametrize(("ca", "own"), [("theirs", "ours"), ("ours", "theirs"), ("ours", None)])
def test_a_certificate_that_is_not_trusted_ends_it(
    secure: RunningDaemon, certificates: Path, ca: str, own: str | None
) -> None:
    client = secure.client(tls=files_of(certificates, ca=ca, own=own))
    with pytest.raises(TierError):
        client.ping()
    assert not secure.service.clients
    client.close()
    good = secure.client(tls=files_of(certificates))
    assert good.ping() > 0
    good.close()


def test_a_certificate_of_another_name_is_not_trusted(secure: RunningDaemon, certificates: Path) -> None:
    client = secure.client(secure.urls[0].replace("127.0.0.1", "127.0.0.2"), tls=files_of(certificates))
    with pytest.raises(TierError):
        client.ping()
    client.close()


def test_a_plain_client_of_a_tls_port_and_a_tls_client_of_a_plain_port_get_nothing(
    secure: RunningDaemon, certificates: Path, tmp_path: Path
) -> None:
    plain = secure.client(secure.urls[0].replace("tls:", "tcp:"))
    with pytest.raises(TierError):
        plain.ping()
    plain.close()
    (tmp_path / "other").mkdir()
    with running(tmp_path / "other") as open_daemon:
        client = open_daemon.client(open_daemon.urls[1].replace("tcp:", "tls:"), tls=files_of(certificates))
        with pytest.raises(TierError):
            client.ping()
        client.close()


def test_tls_files_that_cannot_be_used_are_configuration_errors(tmp_path: Path, certificates: Path) -> None:
    wrong = {
        "tls_certificate": certificates / "ours-daemon.crt",
        "tls_key": certificates / "theirs-daemon.key",
    }
    with pytest.raises(ConfigError, match="tls_"):
        Server(config_of(tmp_path, listen=["tls://127.0.0.1:0"], **wrong))
    with pytest.raises(ConfigError, match="tls_"):
        Server(config_of(tmp_path, listen=["tls://127.0.0.1:0"]))
    client = DaemonClient("tls://127.0.0.1:1", tls=TlsFiles(None, None, tmp_path / "none.crt"))
    with pytest.raises(ConfigError, match="tls_"):
        DaemonTier(client, namespace=NAMESPACE, root=ROOT, metrics=Metrics())


# -- the handshake ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1], ids=["unix", "tcp"])
@pytest.mark.parametrize("op", [op for op in Op if op is not Op.HELLO], ids=lambda op: op.name)
def test_nothing_is_done_before_hello(shared_daemon: RunningDaemon, op: Op, number: int) -> None:
    client = Raw(connected(shared_daemon.urls[number]))
    client.sock.sendall(golden(op))
    refused(client)


def refused(client: Raw, *, reason: str = "") -> None:
    """The connection ends, and its client is told why."""
    message = client.receive()
    assert message is not None and message.op is Op.REFUSED and message.id == 0, message
    assert message.fields["kind"] == "protocol" and reason in message.fields["reason"]
    assert client.receive() is None
    client.close()


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running(tmp_path_factory.mktemp("shared")) as daemon:
        yield daemon


def test_hello_twice_ends_the_connection(shared_daemon: RunningDaemon) -> None:
    client = Raw(connected(shared_daemon.urls[0]))
    assert client.hello().op is Op.REPLY
    client.send(Op.HELLO, {**HELLO_AGAIN})
    refused(client, reason="twice")


HELLO_AGAIN = {
    "client": bytes(32), "name": "", "pid": None, "connection": 2, "ended": [], "token": "", "wants": [],
}  # fmt: skip


@pytest.mark.parametrize(("connection", "ended"), [(1, [1]), (5, [2, 7]), (0, [0])])
def test_connections_cannot_have_ended_before_they_began(
    shared_daemon: RunningDaemon, connection: int, ended: list[int]
) -> None:
    client = Raw(connected(shared_daemon.urls[0]))
    client.send(Op.HELLO, {**HELLO_AGAIN, "connection": connection, "ended": ended})
    refused(client, reason="before they began")


def test_two_connections_of_a_client_cannot_have_one_number(shared_daemon: RunningDaemon) -> None:
    with raw(shared_daemon.urls[0], connection=4):
        client = Raw(connected(shared_daemon.urls[0]))
        client.send(Op.HELLO, {**HELLO_AGAIN, "client": bytes(range(32)), "connection": 4})
        refused(client, reason="number each anew")


@pytest.mark.parametrize("op", [Op.REPLY, Op.REFUSED, Op.EVENT], ids=lambda op: op.name)
def test_a_client_does_not_answer(shared_daemon: RunningDaemon, op: Op) -> None:
    client = Raw(connected(shared_daemon.urls[1]))
    assert client.hello().op is Op.REPLY
    client.sock.sendall(golden(op))
    refused(client, reason="from a client")


@pytest.mark.parametrize(
    "stream", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(100), b"\n" * 5000], ids=["http", "tls", "lines"]
)
def test_another_protocol_is_told_so(shared_daemon: RunningDaemon, stream: bytes) -> None:
    client = Raw(connected(shared_daemon.urls[1]))
    client.sock.sendall(stream)
    refused(client, reason="speaks tierkv's protocol only")


def test_a_stranger_cannot_make_it_hold_much(shared_daemon: RunningDaemon) -> None:
    large = {**HELLO_AGAIN, "ended": [1 << 40] * (STRANGER_BYTES // 9), "connection": 1 << 50}
    client = Raw(connected(shared_daemon.urls[1]))
    client.send(Op.HELLO, large)
    refused(client, reason="at most are taken now")
    client = Raw(connected(shared_daemon.urls[1]))
    client.sock.sendall(encode(Op.HELLO, 1, HELLO_AGAIN, payload_bytes=1 << 20))
    refused(client, reason="at most are taken now")


def test_who_does_not_say_hello_is_shown_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.daemon.session.HELLO_S", 0.05)
    with running(tmp_path) as daemon:
        silent = [Raw(connected(url)) for url in daemon.urls]
        silent[1].sock.sendall(golden(Op.HELLO)[:30])
        with raw(daemon.urls[0]) as client:
            for one in silent:
                assert one.receive() is None
                one.close()
            assert client.ask(Op.PING, {}).op is Op.REPLY  # who did, stays


def test_the_tls_handshake_is_part_of_that_time(secure: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.daemon.session.HELLO_S", 0.05)
    silent = Raw(connected(secure.urls[0].replace("tls:", "tcp:")))
    assert silent.receive() is None
    silent.close()
