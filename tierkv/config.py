"""Every option of tierkv: its default, its meaning, what it accepts, and where its value came from.

    defaults < a TOML file (--config, $TIERKV_CONFIG, ./tierkv.toml) < $TIERKV_<SECTION>_<KEY> < --set section.key=value

A configuration that cannot work ends here, at start, in one line. This is the only file that reads the environment.
Standard library only.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Final, cast, get_type_hints

from tierkv.errors import ConfigError
from tierkv.layout import Layout
from tierkv.values import (
    DAEMON_URL,
    DAEMON_URLS,
    FRACTION,
    HOST_PORT,
    MODE,
    NAME,
    PACKS,
    PATH,
    POWER_OF_TWO,
    PREFIX,
    RANK,
    REDIS_URL,
    SECONDS,
    SIGNERS,
    SIZE,
    TEXT,
    Kind,
    Text,
    choice,
    hide_password,
    hide_secrets,
    integer,
    optional,
    show_size,
)

DEFAULT_FILE: Final = "tierkv.toml"
TIERS: Final = "tiers"
TIER_KINDS: Final = ("device", "host", "disk", "redis", "daemon", "pack")
POLICIES: Final = ("adaptive", "cost", "lru", "lfu", "fifo", "slru", "arc", "gdsf")
OBJECTIVES: Final = ("hits", "seconds")
COPY_DOWNS: Final = ("save", "second_use", "spill")
CODECS: Final = ("raw", "lz4")
DTYPES: Final = ("float32", "bfloat16", "float16")

CPU_PAGES: Final = 512 * 1024**2
"""Bytes of pages on a CPU when device.capacity is off."""

Bytes = int
Seconds = float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    def __post_init__(self) -> None:
        # Built in Python or by `load`: the same checks, and HostConfig(capacity="2GiB") works.
        section = type(self).__name__.removesuffix("Config").lower()
        for option in fields(self):
            given = getattr(self, option.name)
            known = OPTIONS[f"{section}.{option.name}"]
            try:
                object.__setattr__(self, option.name, known.kind(given))
            except ValueError:
                raise ConfigError(f"{known.name} = {given!r}: expected {known.kind.expected}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig(_Section):
    """What all tiers share."""

    block_tokens: Annotated[int, POWER_OF_TWO, "tokens per block; part of every key"] = 16
    tenant: Annotated[str, TEXT, "only equal tenants share KV"] = ""
    secret_file: Annotated[Path | None, optional(PATH), "file whose bytes make keys unguessable to other stores"] = None
    objective: Annotated[
        str, choice(*OBJECTIVES), "what adaptive keeps most of: block hits, or seconds of prefill saved"
    ] = "hits"
    history_blocks: Annotated[
        int | None,
        optional(integer(0)),
        "forgotten blocks that are remembered by name; off: 262,144, or twice what all tiers hold if that is more",
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig(_Section):
    """Pages that the engine attends to."""

    kind: Annotated[str, choice("auto", "cpu", "cuda"), "where pages live; auto is cuda when there is one"] = "auto"
    capacity: Annotated[
        Bytes | None, optional(SIZE), "bytes of pages; off: 512MiB on a CPU, what the model leaves on a GPU"
    ] = None
    gpu_memory_utilization: Annotated[
        float, FRACTION, "part of a GPU's memory that all on it may use, when capacity is off"
    ] = 0.9
    policy: Annotated[str, choice(*POLICIES), "what to forget first"] = "adaptive"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig(_Section):
    """The slab of host memory that every transfer goes through."""

    capacity: Annotated[Bytes, SIZE, "bytes of the slab"] = 1024**3
    policy: Annotated[str, choice(*POLICIES), "what to forget first"] = "adaptive"
    copy_down: Annotated[str, choice(*COPY_DOWNS), "when blocks come here from the device"] = "save"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConfig(_Section):
    """A folder on a local disk; survives restarts, one process at a time."""

    path: Annotated[Path | None, optional(PATH), "folder of the store; off: no disk tier"] = None
    capacity: Annotated[Bytes, SIZE, "bytes of the folder at most, all files"] = 10 * 1024**3
    policy: Annotated[str, choice(*POLICIES), "what to forget first"] = "adaptive"
    copy_down: Annotated[str, choice(*COPY_DOWNS), "when blocks come here from the host"] = "save"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisConfig(_Section):
    """A Redis or Valkey server or cluster that many processes share."""

    url: Annotated[str | None, optional(REDIS_URL), "server or cluster; off: no Redis tier"] = None
    codec: Annotated[str, choice(*CODECS), "how blocks are packed; lz4 splits byte planes first"] = "raw"
    ttl_s: Annotated[Seconds | None, optional(SECONDS), "seconds until the server forgets a block; off: never"] = None
    prefix: Annotated[str, PREFIX, "first part of every Redis key"] = "tierkv"
    deadline_s: Annotated[Seconds, SECONDS, "seconds for one batch; what is late is a miss"] = 2.0
    copy_down: Annotated[str, choice(*COPY_DOWNS), "when blocks come here from the host"] = "save"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files in PEM form: one's own certificate and its key, and whom one trusts to sign the other side's."""

    certificate: Path | None
    key: Path | None
    ca: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig(_Section):
    """A cache daemon that engines of this machine share (`tierkv daemon`), as a tier of this store."""

    url: Annotated[str | None, optional(DAEMON_URL), "where it listens; off: no daemon"] = None
    name: Annotated[str, TEXT, "what this client is called there; empty: the program's name"] = ""
    token_file: Annotated[Path | None, optional(PATH), "file with the token that the daemon wants"] = None
    tls_ca: Annotated[Path | None, optional(PATH), "who signs the daemon's certificate; off: the system's list"] = None
    tls_certificate: Annotated[Path | None, optional(PATH), "certificate to show to the daemon"] = None
    tls_key: Annotated[Path | None, optional(PATH), "its private key"] = None
    connect_s: Annotated[Seconds, SECONDS, "seconds to connect"] = 1.0
    deadline_s: Annotated[Seconds, SECONDS, "seconds for one batch; what is late is a miss"] = 5.0
    copy_down: Annotated[str, choice(*COPY_DOWNS), "when blocks come here from the host"] = "save"

    def tls(self) -> TlsFiles:
        """The files of a tls:// URL."""
        return TlsFiles(self.tls_certificate, self.tls_key, self.tls_ca)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackConfig(_Section):
    """Packs that are mounted: KV that was computed beforehand, read where it lies (`tierkv pack`)."""

    paths: Annotated[tuple[Path | str, ...] | None, optional(PACKS), "packs to read from; off: none"] = None
    signers: Annotated[
        tuple[Path | str, ...] | None,
        optional(SIGNERS),
        "keys of which one must have signed each pack; off: a pack need not be signed",
    ] = None
    shard: Annotated[str, RANK, "which tensor-parallel rank's KV heads to take"] = "0/1"
    endpoint: Annotated[str | None, optional(NAME), "URL of an S3-compatible server; off: AWS, or AWS_ENDPOINT_URL"] = (
        None
    )
    region: Annotated[str | None, optional(NAME), "its region; off: AWS_REGION"] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(_Section):
    """`tierkv daemon` itself. It owns the [host], [disk] and [redis] of its configuration."""

    listen: Annotated[
        tuple[str, ...] | None, optional(DAEMON_URLS), "where clients connect; off: a socket of this user"
    ] = None
    http: Annotated[str | None, optional(HOST_PORT), "metrics, health and the dashboard; off: none"] = "127.0.0.1:9419"
    socket_mode: Annotated[str, MODE, "permissions of a unix socket"] = "0600"
    token_file: Annotated[
        Path | None, optional(PATH), "file of tokens, one a line: token, read:token or admin:token; off: none needed"
    ] = None
    tls_certificate: Annotated[Path | None, optional(PATH), "certificate of tls:// listeners"] = None
    tls_key: Annotated[Path | None, optional(PATH), "its private key"] = None
    tls_ca: Annotated[Path | None, optional(PATH), "who signs clients' certificates; off: clients show none"] = None
    layouts: Annotated[
        int, integer(1, 64), "block layouts (models of another shape or dtype) that share host and disk"
    ] = 1
    lease_s: Annotated[
        Seconds, SECONDS, "seconds a client may take to read what was lent to it, or to fill a place"
    ] = 60.0
    lease_share: Annotated[float, FRACTION, "part of the host that one client may have on lease"] = 0.5
    drain_s: Annotated[Seconds, SECONDS, "seconds to write everything down at the end"] = 30.0
    events: Annotated[str | None, optional(NAME), "ZMQ endpoint for KV events, such as tcp://127.0.0.1:5557"] = None
    events_replay: Annotated[str | None, optional(NAME), "ZMQ endpoint where missed events are asked for"] = None
    events_hashes: Annotated[
        str,
        choice("ints", "keys"),
        "what names a block in KV events: 8 bytes of its key as a number, as routers read, or all",
    ] = "ints"
    events_topic: Annotated[str, TEXT, "topic of KV events"] = "kv-events"

    def tls(self) -> TlsFiles:
        """The files of tls:// listeners."""
        return TlsFiles(self.tls_certificate, self.tls_key, self.tls_ca)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig(_Section):
    """A log of what was asked for, for `tierkv simulate`: salted digests of blocks, no tokens."""

    path: Annotated[Path | None, optional(PATH), "file to append to; off: nothing is recorded"] = None
    max_bytes: Annotated[Bytes, SIZE, "bytes of the file at most; then recording ends"] = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig(_Section):
    """How blocks move between tiers."""

    load_deadline_s: Annotated[Seconds, SECONDS, "seconds for a load; what is late is computed again"] = 10.0
    save_queue_blocks: Annotated[int, integer(1), "blocks that may wait to be saved; more are dropped and counted"] = (
        4096
    )
    load_threads: Annotated[int, integer(1, 64), "threads that read"] = 2
    save_threads: Annotated[int, integer(1, 64), "threads that write"] = 1
    spill_watermark: Annotated[float, FRACTION, 'free part of a tier under which copy_down "spill" copies ahead'] = 0.1
    spill_share: Annotated[
        float, FRACTION, "part of the time that spills may use the link while the engine decodes"
    ] = 0.5
    ahead_share: Annotated[float, FRACTION, "part of the host that may be filled ahead for requests that wait"] = 0.25
    pin_share: Annotated[float, FRACTION, "part of the host that may be pinned for a time"] = 0.5
    layer_groups: Annotated[int, integer(1), "parts of a load that arrive one by one, first layers first"] = 1
    down_after: Annotated[int, integer(1), "failures in a row that take a tier out of use for a while"] = 3
    down_s: Annotated[Seconds, SECONDS, "seconds a tier that failed is left alone"] = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(_Section):
    """The bundled paged-attention engine."""

    model: Annotated[str | None, optional(NAME), "folder, GGUF file, or smollm2, if not given otherwise"] = None
    dtype: Annotated[str, choice("auto", *DTYPES), "of weights and KV; auto: the model's"] = "auto"
    max_batch_tokens: Annotated[int, integer(1), "tokens computed in one step"] = 512
    chunk_tokens: Annotated[
        int | None,
        optional(integer(1)),
        "prompts are computed in chunks that end at multiples of this, so that what else runs does not change their KV; "
        "off: as much as fits",
    ] = None
    max_sequences: Annotated[int, integer(1), "sequences in one step"] = 32
    max_context: Annotated[int | None, optional(integer(2)), "tokens of prompt and answer; off: the model's own"] = None
    num_threads: Annotated[int | None, optional(integer(1)), "CPU threads of the model; off: torch's choice"] = None
    cuda_graphs: Annotated[str, choice("auto", "off"), "replay decode steps as CUDA graphs, where the model allows"] = (
        "auto"
    )
    seed: Annotated[int, integer(0), "of requests that bring none"] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All options. Sizes are bytes, durations seconds. Raises ConfigError when options contradict each other."""

    store: StoreConfig = field(default_factory=StoreConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    host: HostConfig = field(default_factory=HostConfig)
    disk: DiskConfig = field(default_factory=DiskConfig)
    redis: RedisConfig = field(default_factory=RedisConfig)
    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        sequences, tokens = self.engine.max_sequences, self.engine.max_batch_tokens
        if sequences > tokens:
            raise ConfigError(
                f"engine.max_sequences = {sequences} is more than engine.max_batch_tokens = {tokens}: "
                "every sequence of a step needs a token of it; raise max_batch_tokens or lower max_sequences"
            )

    def check_layout(self, layout: Layout) -> None:
        """Raise ConfigError when a tier that is on cannot hold one block of `layout`."""
        tiers = {"host": self.host.capacity}
        if self.device.capacity is not None:
            tiers["device"] = self.device.capacity
        if self.disk.path is not None:
            tiers["disk"] = self.disk.capacity
        for name, capacity in tiers.items():
            if capacity < layout.block_bytes:
                raise ConfigError(
                    f"{name}.capacity = {show_size(capacity)} is smaller than one block of this model "
                    f"({layout.block_bytes} bytes for {layout.block_tokens} tokens); give room for many blocks"
                )

    def secret(self) -> bytes:
        """Bytes of store.secret_file, b"" without one. Raises ConfigError when it cannot be read or is empty."""
        return _secret("store.secret_file", self.store.secret_file)

    def daemon_token(self) -> str:
        """What daemon.token_file holds, "" without one. Raises ConfigError as `secret` does."""
        try:
            return _secret("daemon.token_file", self.daemon.token_file).decode()
        except UnicodeDecodeError:
            raise ConfigError("daemon.token_file: not UTF-8 text; give one line of text") from None


def _secret(name: str, path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{name} = {str(path)!r}: {error.strerror}; give a readable file") from None
    if not secret:
        raise ConfigError(f"{name} = {str(path)!r} is empty; write a secret of 16 random bytes or more into it")
    return secret


@dataclass(frozen=True, slots=True)
class Option:
    """One option: `name` is `section.key`; `default` as in the dataclasses."""

    name: str
    default: object
    kind: Kind
    help: str

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return "TIERKV_" + self.name.replace(".", "_").upper()


_SECTIONS: Final[Mapping[str, type[_Section]]] = get_type_hints(Config)
OPTIONS: Final = {
    f"{section}.{option.name}": Option(f"{section}.{option.name}", option.default, *hints[option.name].__metadata__)
    for section, of in _SECTIONS.items()
    for hints in [get_type_hints(of, include_extras=True)]
    for option in fields(of)
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and, for every option, where its value came from."""

    config: Config
    origins: Mapping[str, str]

    def show(self, name: str) -> str | int | float | None:
        """The value of `section.key`, as a person may see it: sizes with units, no password."""
        section, key = name.split(".")
        value = getattr(getattr(self.config, section), key)
        if key in ("capacity", "max_bytes") and value is not None:
            return show_size(value)
        if isinstance(value, tuple):
            return hide_secrets(", ".join(map(str, value)))
        if isinstance(value, str | Path):
            return hide_secrets(str(value)) if key in ("url", "endpoint") else str(value)
        return cast(int | float | None, value)


def load(
    path: Path | str | None = None, environ: Mapping[str, str] = os.environ, overrides: Sequence[str] = ()
) -> Loaded:
    """Read the configuration. `overrides` are `section.key=value`, the strongest source.

    Raises ConfigError: one line with the place, what was given, what was expected, what to do.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(OPTIONS, "default")

    def take(place: str, name: str, given: object, base: Path | None = None) -> None:
        option = OPTIONS[name]
        try:
            value = option.kind(given)
        except ValueError:
            shown = hide_password(json.dumps(given, default=str, ensure_ascii=False)[:80])
            raise ConfigError(f"{place}: {name} = {shown}: expected {option.kind.expected}") from None
        values[name] = value if base is None else _under(base, value)
        origins[name] = place

    file = _find(path, environ)
    if file is not None:
        for place, name, given in _read(file):
            take(place, name, given, file.parent)
    for option in OPTIONS.values():
        if environ.get(option.variable):  # an empty variable is one that is not set
            take(f"${option.variable}", option.name, Text(environ[option.variable]))
    _refuse_unknown(environ)
    for text in overrides:
        name, equals, given = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected section.key=value, such as host.capacity=2GiB")
        if name not in OPTIONS:
            raise ConfigError(f"--set {text}: there is no option {name}{_near(name)}")
        take(f"--set {name}", name, Text(given))
    built: dict[str, Any] = {}
    for section, of in _SECTIONS.items():
        given = {name.removeprefix(f"{section}."): values[name] for name in values if name.startswith(f"{section}.")}
        built[section] = of(**given)
    try:
        return Loaded(Config(**built), origins)
    except ConfigError as error:
        places = [f"{name}: {origins[name]}" for name in OPTIONS if name in str(error)]
        raise ConfigError(f"{error} ({', '.join(places)})") from None


def default_socket(environ: Mapping[str, str] = os.environ) -> str:
    """Where a daemon listens, and its clients look for it, when nothing else is said: a socket of this user alone."""
    given = Path(environ.get("XDG_RUNTIME_DIR", ""))
    folder = given / "tierkv" if given.is_absolute() and given.is_dir() else Path(f"/tmp/tierkv-{os.getuid()}")
    return f"unix://{folder / 'daemon.sock'}"


def notify_socket(environ: Mapping[str, str] = os.environ) -> str | None:
    """Where systemd wants to hear how a service does (sd_notify(3)); None when it did not start this process."""
    return environ.get("NOTIFY_SOCKET") or None


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where measurements of this machine are kept (XDG base directories); None for a user without a home."""
    given = Path(environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "tierkv"
    except RuntimeError:
        return None


def _under(base: Path, value: object) -> object:
    """A relative path in a file is relative to the file, as with other tools' project files."""
    if isinstance(value, tuple):
        return tuple(_under(base, part) for part in value)
    return base / value if isinstance(value, Path) else value


def _find(path: Path | str | None, environ: Mapping[str, str]) -> Path | None:
    if path is not None:
        return Path(path)
    if environ.get("TIERKV_CONFIG"):
        return Path(environ["TIERKV_CONFIG"])
    return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).exists() else None


def _read(file: Path) -> Iterator[tuple[str, str, object]]:
    """Place, name and value of every option in a file."""
    try:
        text = file.read_text(encoding="utf-8")
        sections = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give --config or $TIERKV_CONFIG a readable TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f'{file}: not valid TOML: {error}; expected lines such as capacity = "2GiB" under [host]'
        ) from None
    lines = _lines(text)
    known = [*_SECTIONS, TIERS]
    yield from _tiers(file, sections)
    for section, body in sections.items():
        place = f"{file}:{lines[section]}" if section in lines else str(file)
        if section not in known:
            near = _near(section, [*known, *OPTIONS])
            raise ConfigError(f"{place}: there is no section {section}{near}; sections are {', '.join(known)}")
        if not isinstance(body, dict):
            raise ConfigError(
                f"{place}: {section} is not a section: write [{section}] on a line of its own and its options below"
            )
        for key, given in body.items():
            name = f"{section}.{key}"
            place = f"{file}:{lines[name]}" if name in lines else str(file)
            if name not in OPTIONS:
                raise ConfigError(f"{place}: there is no option {name}{_near(name)}")
            yield place, name, given


def _tiers(file: Path, sections: dict[str, Any]) -> Iterator[tuple[str, str, object]]:
    """Options of [[tiers]]: each is a section by its `kind`, and those of kind "pack" have one `path` each."""
    listed = sections.pop(TIERS, [])
    if not isinstance(listed, list) or not all(isinstance(tier, dict) for tier in listed):
        raise ConfigError(f'{file}: {TIERS} is no list of tables: write [[{TIERS}]] and kind = "pack" below it')
    packs: list[object] = []
    given_at = {f"{name}.{key}": f"[{name}]" for name, of in sections.items() if isinstance(of, dict) for key in of}
    for number, tier in enumerate(listed, 1):
        place, kind = f"{file}: [[{TIERS}]] {number}", tier.pop("kind", None)
        if kind not in TIER_KINDS:
            shown = json.dumps(kind, default=str)
            raise ConfigError(f"{place}: kind = {shown}: expected one of {', '.join(TIER_KINDS)}")
        if kind == "pack" and "path" not in tier:
            raise ConfigError(f'{place}: a pack without a path: add path = "handbook.zip"')
        for key, given in tier.items():
            name = f"{kind}.{key}"
            if name == "pack.path":
                packs.append(given)
                continue
            if name not in OPTIONS:
                raise ConfigError(f"{place}: there is no option {name}{_near(name)}")
            if name in given_at:
                raise ConfigError(f"{place}: {name} is given twice, here and at {given_at[name]}: keep one")
            given_at[name] = f"[[{TIERS}]] {number}"
            yield place, name, given
    if packs:
        section = sections.get("pack")
        own = section.pop("paths", []) if isinstance(section, dict) else []
        if isinstance(own, str):
            own = [] if own.lower() in ("off", "none") else own.split(",")
        yield f"{file}: [[{TIERS}]]", "pack.paths", [*(own if isinstance(own, list) else [own]), *packs]


def _lines(text: str) -> dict[str, int]:
    """Line of each section and option; tomllib does not tell. Only errors and `tierkv config` depend on it."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            section = f"{header[1]}."
            found.setdefault(header[1], number)
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            found.setdefault(section + key[1], number)
    return found


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = {option.variable for option in OPTIONS.values()} | {"TIERKV_CONFIG"}
    # Kubernetes puts TIERKV_SERVICE_* and TIERKV_PORT* into every pod beside a service of the name tierkv.
    ours = (name for name in environ if re.match(r"TIERKV_(?!SERVICE_|PORT(_|$))", name))
    for name in sorted(set(ours) - known):
        raise ConfigError(f"${name}: there is no such option{_near(name, sorted(known))}; correct or unset it")


def _near(name: str, known: Sequence[str] = tuple(OPTIONS)) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # the right key of another section, or of none
        near = [option for option in known if option.split(".")[-1] == name.split(".")[-1]][:1]
    return f"; did you mean {near[0]}?" if near else "; see `tierkv config` for all options"
