"""How the Redis tier reaches its server: URLs, passwords, TLS, and wires other than the usual one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis._parsers import _RESP2Parser

from tests.redis_servers import Scripted, Tls, certificate
from tests.test_redis import RedisContract
from tierkv.errors import ConfigError, LayoutError, TierError, TierKVError
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, block_of, blocks_of, make_run, read_blocks
from tierkv.tiers import redis_bulk, redis_client, redis_nodes
from tierkv.tiers.redis import RedisTier
from tierkv.tiers.redis_client import parse_url, show_url
from tierkv.valkey import EmbeddedValkey

pytestmark = pytest.mark.redis

PASSWORD = "s3cret/?@: \\"


class TestWithoutASocketToBorrow(RedisContract):
    """A redis-py that hides its socket: the library's calls do the same."""

    @pytest.fixture(autouse=True)
    def _hide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis_nodes, "lent_socket", lambda connection: None)


class TestWhereTheKernelDoesNotWait(RedisContract):
    """Systems other than Linux."""

    @pytest.fixture(autouse=True)
    def _elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis_bulk, "_KERNEL_WAITS", False)


class TestWithThePythonParser(RedisContract):
    """redis-py without hiredis."""

    @pytest.fixture(autouse=True)
    def _no_hiredis(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bounded = redis_client._connection_class
        own = {"parser_class": _RESP2Parser}
        monkeypatch.setattr(redis_client, "_connection_class", lambda kind, ours: bounded(kind, ours | own))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("tls"), "localhost")


@pytest.fixture(scope="module")
def secure(valkey: EmbeddedValkey, authority: tuple[Path, Path]) -> Iterator[Tls]:
    with Tls(valkey.socket_path, *authority) as server:
        yield server


class TestOverTls(RedisContract):
    @pytest.fixture(autouse=True)
    def _secure(self, secure: Tls, authority: tuple[Path, Path]) -> None:
        self.tls_url = f"{secure.url}?ssl_ca_certs={authority[0]}"

    def url(self) -> str:
        return self.tls_url


def open_tier(url: str, **options: object) -> RedisTier:
    return RedisTier(url, **({"layout": SMALL, "metrics": Metrics()} | options))  # type: ignore[arg-type]


def test_large_blocks_cross_tls_whole(secure: Tls, authority: tuple[Path, Path]) -> None:
    layout = Layout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    tier = open_tier(f"{secure.url}?ssl_ca_certs={authority[0]}", layout=layout, prefix="tls", deadline_s=30.0)
    run = make_run(10, seed=1, layout=layout)
    assert all(tier.write(run, blocks_of(run, layout)))
    assert read_blocks(tier, run.keys, layout) == [block_of(key, layout) for key in run.keys]
    tier.delete(run.keys)
    tier.close()


def test_untrusted_certificate_is_an_error_with_its_remedy(secure: Tls) -> None:
    with pytest.raises(TierError, match=r"certificate is not trusted.*ssl_ca_certs=FILE"):
        open_tier(secure.url)
    open_tier(f"{secure.url}?ssl_cert_reqs=none").close()


def test_certificate_of_another_host_is_an_error(secure: Tls, authority: tuple[Path, Path]) -> None:
    url = f"rediss://127.0.0.1:{secure.port}?ssl_ca_certs={authority[0]}"
    with pytest.raises(TierError, match=r"not trusted.*127\.0\.0\.1"):
        open_tier(url)
    open_tier(f"{url}&ssl_check_hostname=false").close()


def test_tls_to_what_speaks_something_else_is_an_error() -> None:
    mail = Scripted(lambda command, send: None, greeting=b"220 mail ready\r\n")
    with mail, pytest.raises(TierError, match=r"no TLS there"):
        open_tier(mail.url.replace("redis://", "rediss://"))


def test_tls_to_a_server_that_waits_for_more_is_down(valkey: EmbeddedValkey) -> None:
    metrics = Metrics()
    open_tier(f"rediss://127.0.0.1:{valkey.port}?socket_connect_timeout=0.2", metrics=metrics).close()
    assert metrics.tier_down.value("redis") == 1


@pytest.fixture(scope="module")
def guarded() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(port=0, password=PASSWORD) as server:
        yield server


@pytest.mark.parametrize("link", ["url", "tcp_url"])
def test_password_in_the_url_opens_the_door(guarded: EmbeddedValkey, link: str) -> None:
    tier = open_tier(getattr(guarded, link), prefix=link)
    run = make_run(2, seed=1)
    assert all(tier.write(run, blocks_of(run)))
    assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
    tier.close()


@pytest.mark.parametrize("login", ["", ":wrong@", "nobody:wrong@"])
def test_missing_or_wrong_password_is_an_error_that_shows_none(guarded: EmbeddedValkey, login: str) -> None:
    with pytest.raises(TierError, match=r"user or password refused") as raised:
        open_tier(f"redis://{login}127.0.0.1:{guarded.port}")
    assert "wrong" not in str(raised.value) and "\n" not in str(raised.value)


def test_password_that_changes_later_is_a_failure_not_an_exception(tmp_path: Path) -> None:
    with EmbeddedValkey(port=0) as server:
        metrics = Metrics()
        tier = open_tier(server.tcp_url, metrics=metrics)
        run = make_run(2, seed=1)
        tier.write(run, blocks_of(run))
        with redis.Redis.from_url(server.url) as admin:
            admin.config_set("requirepass", "new")
            admin.client_kill_filter(_type="normal", skipme=True)
            assert read_blocks(tier, run.keys) == [None] * 2
            assert metrics.misses.value("redis", "failed") == 2
        tier.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://host", "must begin with redis://"),
        ("host:6379", "must begin with redis://"),
        ("redis://host:port", "not a URL"),
        ("redis://user:hidden/word@host", "not a URL"),
        ("redis://[::1", "not a URL"),
        ("redis://host/zero", "only a database number"),
        ("redis+cluster://host/3", "a cluster has database 0 only"),
        ("redis://host?db=x", "db must be a number"),
        ("redis://host?decode_responses=1", "unknown option decode_responses"),
        ("redis://host?ssl_ca_certs=/etc/passwd", "TLS options need rediss://"),
        ("rediss://host?ssl_ca_certs=/does/not/exist", "does not exist"),
        ("rediss://host?ssl_cert_reqs=maybe", "required, optional or none"),
        ("redis://host?socket_connect_timeout=-1", "positive number"),
        ("unix://relative/path.sock", "three slashes"),
    ],
)
def test_url_that_cannot_work_is_a_one_line_error(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        parse_url(url)
    assert "\n" not in str(raised.value) and "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:hidden@host:1/0",
        "redis://:hid@den@host",
        "redis://:hid/den@host?x=1",
        "unix:///path.sock?password=hidden&db=1",
        "rediss://host?db=1&ssl_password=hidden",
    ],
)
def test_no_password_is_ever_shown(url: str) -> None:
    assert "hid" not in show_url(url) and "den" not in show_url(url) and "***" in show_url(url)


def test_urls_mean_what_they_say() -> None:
    assert parse_url("redis://").where == {"host": "localhost", "port": 6379}
    assert parse_url("redis://[::1]:7").where == {"host": "::1", "port": 7}
    assert parse_url("unix:///a%20b.sock").where == {"path": "/a b.sock"}
    assert parse_url("redis+cluster://h:1").cluster and parse_url("rediss+cluster://h:1").cluster
    made = parse_url("redis://me:p%40ss@h:1/2?client_name=x").connection_class(host="h", port=1)
    assert (made.username, made.password, made.db, made.client_name) == ("me", "p@ss", 2, "x")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"codec": "zip"}, "must be one of raw, lz4"),
        ({"ttl_s": 0}, "positive number"),
        ({"ttl_s": float("nan")}, "positive number"),
        ({"touch": True}, "needs ttl_s"),
        ({"prefix": ""}, "must not be empty"),
    ],
)
def test_option_that_cannot_work_is_an_error_at_start(
    options: dict[str, object], says: str, valkey: EmbeddedValkey
) -> None:
    with pytest.raises(ConfigError, match=says):
        open_tier(valkey.url, **options)


def test_database_that_does_not_exist_is_an_error(valkey: EmbeddedValkey) -> None:
    with pytest.raises(TierKVError, match="DB index is out of range"):
        open_tier(f"{valkey.tcp_url}/999")


def test_single_server_named_as_a_cluster_is_an_error(valkey: EmbeddedValkey) -> None:
    with pytest.raises(ConfigError, match="the server is no cluster; write redis://"):
        open_tier(valkey.tcp_url.replace("redis://", "redis+cluster://"))


def test_buffer_of_another_size_is_an_error_and_harms_nothing(valkey: EmbeddedValkey) -> None:
    tier = open_tier(valkey.url, prefix="size")
    run = make_run(1, seed=1)
    assert all(tier.write(run, blocks_of(run)))
    with pytest.raises(LayoutError, match="a block has 5120"):
        tier.read(run.keys, [memoryview(bytearray(100))])
    with pytest.raises(LayoutError, match="a block has 5120"):
        tier.write(run, [memoryview(bytes(6000))])
    assert read_blocks(tier, run.keys) == [block_of(run.keys[0])]
    tier.delete(run.keys)
    tier.close()


def test_user_without_rights_gets_misses_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedValkey(port=0) as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.acl_setuser(
                "reader", enabled=True, passwords=["+pw"], keys=["*"], commands=["+get", "+ping", "+exists"]
            )
        tier = open_tier(f"redis://reader:pw@127.0.0.1:{server.port}")
        run = make_run(3, seed=1)
        assert tier.write(run, blocks_of(run)) == [False] * 3
        assert read_blocks(tier, run.keys) == [None] * 3
        assert [record.message for record in caplog.records if "NOPERM" in record.message].__len__() == 1
        tier.close()
