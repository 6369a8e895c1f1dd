"""Options: where they come from, which source wins, and what every mistake is answered with."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tierkv.config import (
    OPTIONS,
    Config,
    DeviceConfig,
    EngineConfig,
    HostConfig,
    Loaded,
    RedisConfig,
    StoreConfig,
    cache_folder,
    load,
)
from tierkv.errors import ConfigError
from tierkv.layout import Layout
from tierkv.values import hide_password, parse_size, show_size


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(toml: str = "", overrides: tuple[str, ...] = (), **environ: str) -> Loaded:
    Path("tierkv.toml").write_text(toml)
    return load(environ=environ, overrides=overrides)


def refusal(toml: str = "", overrides: tuple[str, ...] = (), **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(toml, overrides, **environ)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_valid_and_keep_everything_local() -> None:
    config = load(environ={}).config
    assert config == Config()
    assert config.disk.path is None
    assert config.redis.url is None
    assert config.store.block_tokens == 16


def test_flag_beats_variable_beats_file_beats_default() -> None:
    toml = '[host]\ncapacity = "1MiB"\n'
    assert loaded().config.host.capacity == 1024**3
    assert loaded(toml).config.host.capacity == 1024**2
    assert loaded(toml, TIERKV_HOST_CAPACITY="2MiB").config.host.capacity == 2 * 1024**2
    strongest = loaded(toml, ("host.capacity=3MiB",), TIERKV_HOST_CAPACITY="2MiB")
    assert strongest.config.host.capacity == 3 * 1024**2


def test_origin_of_every_option_is_known() -> None:
    got = loaded(
        '[host]\n# comment\ncapacity = "1MiB"\n\n[disk]\npath = "kv"\n', ("engine.seed=4",), TIERKV_REDIS_TTL_S="60"
    )
    assert set(got.origins) == set(OPTIONS)
    assert got.origins["host.capacity"] == "tierkv.toml:3"
    assert got.origins["disk.path"] == "tierkv.toml:6"
    assert got.origins["redis.ttl_s"] == "$TIERKV_REDIS_TTL_S"
    assert got.origins["engine.seed"] == "--set engine.seed"
    assert got.origins["host.policy"] == "default"


@pytest.mark.parametrize(
    "toml",
    ["host.capacity = '1MiB'", "host = { capacity = '1MiB' }", "[ host ]\n  capacity='1MiB'", '"host".capacity="1MiB"'],
)
def test_every_way_to_write_toml_is_read(toml: str) -> None:
    got = loaded(toml)
    assert got.config.host.capacity == 1024**2
    assert got.origins["host.capacity"].startswith("tierkv.toml")


def test_configuration_file_is_found_in_order(tmp_path: Path) -> None:
    for name, seed in (("tierkv.toml", 1), ("variable.toml", 2), ("flag.toml", 3)):
        Path(name).write_text(f"[engine]\nseed = {seed}\n")
    environ = {"TIERKV_CONFIG": "variable.toml"}
    assert load(environ={}).config.engine.seed == 1
    assert load(environ=environ).config.engine.seed == 2
    assert load("flag.toml", environ).config.engine.seed == 3
    assert load(tmp_path / "flag.toml", environ).config.engine.seed == 3


def test_tiers_may_be_listed_and_packs_add_up() -> None:
    got = loaded(
        '[pack]\npaths = ["a.zip"]\n[[tiers]]\nkind = "disk"\npath = "kv"\ncapacity = "1GiB"\n'
        '[[tiers]]\nkind = "pack"\npath = "b"\nsigners = "' + "ab" * 32 + '"\n'
        '[[tiers]]\nkind = "pack"\npath = "s3://bucket/c"\n'
    ).config
    assert (got.disk.path, got.disk.capacity) == (Path("kv"), 1 << 30)
    assert got.pack.paths == (Path("a.zip"), Path("b"), "s3://bucket/c")
    assert got.pack.signers == ("ab" * 32,)


def test_packs_that_are_off_and_listed_are_those_listed() -> None:
    listed = '[[tiers]]\nkind = "pack"\npath = "b"\n'
    assert loaded('[pack]\npaths = "off"\n' + listed).config.pack.paths == (Path("b"),)
    assert loaded('[pack]\npaths = "a,c"\n' + listed).config.pack.paths == (Path("a"), Path("c"), Path("b"))


def test_a_signed_url_and_a_password_are_not_shown() -> None:
    got = loaded('[pack]\npaths = "http://me:pass@host/p.zip?sig=secret"\n')
    assert got.show("pack.paths") == "http://me:***@host/p.zip?***"


def test_keys_of_signers_are_relative_to_the_file() -> None:
    Path("etc").mkdir()
    Path("etc/my.toml").write_text('[pack]\nsigners = ["release.pub"]\n')
    assert load("etc/my.toml", {}).config.pack.signers == (Path("etc/release.pub"),)


def test_a_pack_of_a_file_is_relative_to_that_file() -> None:
    Path("etc").mkdir()
    Path("etc/my.toml").write_text('[[tiers]]\nkind = "pack"\npath = "hand.zip"\n')
    assert load("etc/my.toml", {}).config.pack.paths == (Path("etc/hand.zip"),)


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ('[[tiers]]\npath = "a"\n', "expected one of device, host, disk, redis, daemon, pack"),
        ('[[tiers]]\nkind = "tape"\n', '"tape": expected one of'),
        ('[[tiers]]\nkind = "pack"\n', "a pack without a path"),
        ('[[tiers]]\nkind = "disk"\npaht = "kv"\n', "did you mean disk.path"),
        ('[disk]\npath = "a"\n[[tiers]]\nkind = "disk"\npath = "b"\n', "disk.path is given twice"),
        ('[tiers]\nkind = "pack"\n', "write [[tiers]]"),
        ("tiers = 3\n", "write [[tiers]]"),
        ('pack = 3\n[[tiers]]\nkind = "pack"\npath = "a"\n', "pack is not a section"),
        ("[[tiers]]\nkind = 2020-01-01\n", "expected one of device"),
        ('[[tiers]]\nkind = "pack"\npath = "a"\n[[tiers]]\nkind = "pack"\n', "[[tiers]] 2: a pack without a path"),
        ('[[tiers]]\nkind = "disk"\npath = "a"\n[[tiers]]\nkind = "disk"\npath = "b"\n', "disk.path is given twice"),
        ('[[tiers]]\nkind = "pack"\npath = 3\n', "pack.paths = [3]: expected folders or zip files"),
        ('[[tiers]]\nkind = "pack"\npath = "ftp://host/p"\n', "expected folders or zip files"),
        ('[pack]\nshard = "2/2"\n', "rank/size, such as 0/2"),
    ],
)
def test_a_wrong_list_of_tiers_is_told(toml: str, told: str) -> None:
    with pytest.raises(ConfigError, match=r"tierkv\.toml") as error:
        loaded(toml)
    assert told in str(error.value)


def test_relative_path_in_a_file_is_relative_to_that_file(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    Path("etc/my.toml").write_text('[disk]\npath = "kv"\n')
    assert load("etc/my.toml", {}).config.disk.path == Path("etc/kv")
    assert load("etc/my.toml", {}, ["disk.path=kv"]).config.disk.path == Path("kv")


def test_off_switches_an_option_off_from_every_source() -> None:
    toml = '[redis]\nurl = "redis://localhost"\n'
    assert loaded(toml).config.redis.url == "redis://localhost"
    assert loaded(toml, ("redis.url=off",)).config.redis.url is None
    assert loaded(toml, TIERKV_REDIS_URL="none").config.redis.url is None
    assert loaded(toml, TIERKV_REDIS_URL="").config.redis.url == "redis://localhost"  # empty: not set
    assert loaded('[redis]\nurl = "off"\n').config.redis.url is None


def test_every_option_can_be_set_by_file_variable_and_flag() -> None:
    for option in OPTIONS.values():
        default: Any = option.default if option.default is not None else EXAMPLES[option.name]
        text = str(default) or "x"
        section, key = option.name.split(".")
        flagged = loaded(overrides=(f"{option.name}={text}",))
        in_file = loaded(f"[{section}]\n{key} = {json.dumps(default if default != '' else text, default=str)}\n")
        from_variable = loaded(**{option.variable: text})
        assert flagged.config == in_file.config == from_variable.config
        assert flagged.origins[option.name] != from_variable.origins[option.name] != in_file.origins[option.name]


EXAMPLES = {
    "store.secret_file": "/s",
    "store.history_blocks": 1 << 20,
    "record.path": "/log.jsonl",
    "device.capacity": 1 << 30,
    "disk.path": "/kv",
    "redis.url": "redis://h",
    "redis.ttl_s": 1.5,
    "pack.paths": "/packs/handbook.zip",
    "pack.signers": "ab" * 32,
    "pack.endpoint": "http://127.0.0.1:8333",
    "pack.region": "local",
    "engine.chunk_tokens": 256,
    "daemon.url": "unix:///run/tierkv/daemon.sock",
    "daemon.token_file": "/t",
    "daemon.tls_ca": "/ca.pem",
    "daemon.tls_certificate": "/c.pem",
    "daemon.tls_key": "/k.pem",
    "server.listen": "unix:///run/tierkv/daemon.sock,tcp://127.0.0.1:7411",
    "server.token_file": "/t",
    "server.tls_ca": "/ca.pem",
    "server.tls_certificate": "/c.pem",
    "server.tls_key": "/k.pem",
    "server.events": "tcp://127.0.0.1:5557",
    "server.events_replay": "tcp://127.0.0.1:5558",
    "engine.model": "smollm2",
    "engine.max_context": 100,
    "engine.num_threads": 1,
}


@pytest.mark.parametrize(
    ("given", "size"),
    [(1, 1), ("1", 1), ("512MiB", 2**29), ("2GB", 2 * 10**9), ("1.5 gib", 3 * 2**29), ("1_000kB", 10**6), ("7B", 7)],
)
def test_sizes_are_read_exactly(given: object, size: int) -> None:
    assert parse_size(given) == size


@pytest.mark.parametrize("size", [1, 1000, 1024, 1536 * 1024, 2**29, 2 * 10**9, 10**6 + 1, 9_007_199_254_740_993])
def test_shown_size_reads_back_exactly(size: int) -> None:
    assert parse_size(show_size(size)) == size


@pytest.mark.parametrize(
    "given",
    [
        0,
        -1,
        "0",
        "-1",
        "-1MiB",
        "",
        "2G",
        "2 Gb/s",
        "MiB",
        "1e9",
        "nan",
        "1.2.3MB",
        1.5,
        True,
        None,
        [],
        "9" * 5000 + "TiB",
    ],
)
def test_what_is_no_size_is_refused(given: object) -> None:
    with pytest.raises(ValueError):
        parse_size(given)


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("[host]\ncapacty = 1", ["tierkv.toml:2", "host.capacty", "did you mean host.capacity?"]),
        ("[hosts]\ncapacity = 1", ["tierkv.toml:1", "hosts", "did you mean host?", "sections are store, device"]),
        ("capacity = 1", ["tierkv.toml:1", "did you mean", "capacity?"]),
        ("host = 3", ["tierkv.toml:1", "write [host] on a line of its own"]),
        ("[[host]]\ncapacity = 1", ["host is not a section"]),
        ("[host]\n\ncapacity = true", ["tierkv.toml:3", "host.capacity = true", '"512MiB"']),
        ("[host]\ncapacity = 0", ["host.capacity = 0", "at least one byte"]),
        ("[host]\ncapacity = -5", ["host.capacity = -5"]),
        ("[host]\ncapacity = 1979-05-27", ["1979-05-27"]),
        ('[host]\ncapacity = "2 Gigs"', ['"2 Gigs"', '"2GB"']),
        ('[host]\npolicy = "mru"', ['"mru"', "one of adaptive, cost, lru"]),
        ('[disk]\ncopy_down = "never"', ["one of save, second_use, spill"]),
        ('[redis]\ncodec = "zstd"', ["one of raw, lz4"]),
        ('[device]\nkind = "rocm"', ["one of auto, cpu, cuda"]),
        ('[redis]\nurl = "http://x"', ["redis://", "rediss://", '"off"']),
        ('[redis]\nurl = "redis://[::1"', ["redis.url"]),
        ('[redis]\nttl_s = "60"', ["positive number of seconds"]),
        ("[redis]\nttl_s = inf", ["positive number of seconds"]),
        ("[redis]\ndeadline_s = 0", ["positive number of seconds"]),
        ('[redis]\nprefix = "a b"', ["letters, digits"]),
        ("[store]\nblock_tokens = 24", ["power of two"]),
        ("[store]\ntenant = 3", ["a string"]),
        ("[transfer]\nspill_watermark = 1", ["between 0 and 1"]),
        ("[transfer]\nload_threads = 1000", ["from 1 to 64"]),
        ('[disk]\npath = ""', ["a path"]),
        ("[disk.path]\nx = 1", ["disk.path"]),
        ("[engine]\nmax_sequences = 600", ["max_batch_tokens", "engine.max_sequences: tierkv.toml:2"]),
        ("[host\n", ["tierkv.toml", "not valid TOML", "line 1"]),
        ("[host]\ncapacity = 1\ncapacity = 2", ["not valid TOML"]),
    ],
)
def test_mistake_in_a_file_is_one_line_with_place_and_remedy(toml: str, told: list[str]) -> None:
    message = refusal(toml)
    assert all(part in message for part in told), message


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("TIERKV_HOST_CAPACTIY", "did you mean TIERKV_HOST_CAPACITY?"),
        ("TIERKV_CONFG", "did you mean TIERKV_CONFIG?"),
        ("TIERKV_X", "$TIERKV_X: there is no such option"),
    ],
)
def test_unknown_variable_is_refused(name: str, told: str) -> None:
    assert told in refusal(**{name: "1"})


def test_variables_of_a_kubernetes_service_are_not_options() -> None:
    assert (
        loaded(TIERKV_SERVICE_HOST="10.0.0.1", TIERKV_PORT="tcp://10.0.0.1:80", TIERKV_PORT_80_TCP="x").config
        == Config()
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("host.capcity=2GiB", "did you mean host.capacity?"),
        ("capacity=2GiB", "did you mean"),
        ("host.capacity", "expected section.key=value"),
        ("host.capacity=", "--set host.capacity"),
        ("engine.seed=1.5", "integer of at least 0"),
        ("engine.max_context=1", "at least 2"),
    ],
)
def test_wrong_flag_is_refused(override: str, told: str) -> None:
    assert told in refusal(overrides=(override,))


def test_wrong_variable_names_the_variable() -> None:
    assert refusal(TIERKV_ENGINE_MAX_SEQUENCES="many").startswith("$TIERKV_ENGINE_MAX_SEQUENCES: engine.max_sequences")


def test_contradiction_names_both_places() -> None:
    message = refusal("[engine]\nmax_sequences = 64\n", TIERKV_ENGINE_MAX_BATCH_TOKENS="32")
    assert "engine.max_sequences: tierkv.toml:2" in message
    assert "engine.max_batch_tokens: $TIERKV_ENGINE_MAX_BATCH_TOKENS" in message


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'[store]\ntenant = "caf\xe9"\n')
    for path, told in (("absent.toml", "No such file"), (tmp_path, "Is a directory"), ("latin.toml", "UTF-8")):
        with pytest.raises(ConfigError, match=told):
            load(path, {})
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load(environ={"TIERKV_CONFIG": "absent.toml"})


def test_sections_built_in_python_are_checked_alike() -> None:
    assert HostConfig(capacity="2GiB").capacity == 2**31  # type: ignore[arg-type]  # text is welcome at run time
    with pytest.raises(ConfigError, match=r"host\.capacity = 0: expected a size"):
        HostConfig(capacity=0)
    with pytest.raises(ConfigError, match="more than"):
        Config(engine=EngineConfig(max_sequences=9, max_batch_tokens=8))


def test_password_of_a_server_is_never_shown() -> None:
    got = loaded(overrides=("redis.url=redis://user:s3cr:t@host:1/0",))
    assert got.show("redis.url") == "redis://user:***@host:1/0"
    assert "s3cret" not in refusal(overrides=("redis.url=http://user:s3cret@host",))
    assert hide_password("unix:///run/v.sock?db=1&password=s3cret") == "unix:///run/v.sock?db=1&password=***"
    assert hide_password("redis://host:6379/0") == "redis://host:6379/0"


def test_shown_values_are_readable() -> None:
    got = loaded(overrides=("disk.path=/kv", "host.capacity=1536MiB"))
    assert got.show("disk.path") == "/kv"
    assert got.show("host.capacity") == "1536MiB"
    assert got.show("redis.ttl_s") is None
    assert got.show("device.capacity") is None
    assert loaded(overrides=("device.capacity=1GiB",)).show("device.capacity") == "1GiB"
    assert got.show("transfer.spill_watermark") == 0.1


def test_capacity_below_one_block_is_refused_when_the_layout_is_known() -> None:
    layout = Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="float32")
    Config().check_layout(layout)
    Config(host=HostConfig(capacity=layout.block_bytes)).check_layout(layout)
    with pytest.raises(ConfigError, match=r"device\.capacity = 700KB .*737280 bytes"):
        Config(device=DeviceConfig(capacity=700_000)).check_layout(layout)
    with pytest.raises(ConfigError, match=r"host\.capacity = 700KB .*737280 bytes for 16 tokens") as caught:
        Config(host=HostConfig(capacity=700_000)).check_layout(layout)
    assert "\n" not in str(caught.value)


def test_secret_is_read_from_its_file_or_refused(tmp_path: Path) -> None:
    secret, empty = tmp_path / "secret", tmp_path / "empty"
    secret.write_bytes(b"0123456789abcdef\n")
    empty.write_bytes(b"\n")
    assert Config().secret() == b""
    assert Config(store=StoreConfig(secret_file=secret)).secret() == b"0123456789abcdef"
    for path, told in ((tmp_path / "absent", "No such file"), (empty, "is empty")):
        with pytest.raises(ConfigError, match=told):
            Config(store=StoreConfig(secret_file=path)).secret()


def test_every_option_has_help_and_a_variable_of_its_own() -> None:
    assert len({option.variable for option in OPTIONS.values()}) == len(OPTIONS)
    for option in OPTIONS.values():
        assert option.help
        assert option.kind.expected
        assert re.fullmatch(r"TIERKV_[A-Z_]+", option.variable)


def test_redis_urls_of_all_kinds_are_taken() -> None:
    for url in ("redis://h:1/0", "rediss://:p@h", "redis+cluster://a:1", "rediss+cluster://a", "unix:///run/v.sock"):
        assert RedisConfig(url=url).url == url


def test_measurements_go_to_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder({"XDG_CACHE_HOME": "/fast"}) == Path("/fast/tierkv")
    for ignored in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert cache_folder(ignored) == Path("/home/somebody/.cache/tierkv")
