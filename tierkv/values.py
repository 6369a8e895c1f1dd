"""Kinds of configuration values: what a TOML file, a variable or a flag may give, and what becomes of it.

Standard library only; knows no option.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

_UNITS: Final = (
    {"B": 1}
    | {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}
    | {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}
)
_UNIT_OF: Final = {unit.lower(): factor for unit, factor in _UNITS.items()}
_OFF: Final = ("off", "none")
DAEMON_SCHEMES: Final = ("unix", "tcp", "tls")
PACK_SCHEMES: Final = ("s3", "http", "https", "file")
REDIS_SCHEMES: Final = ("redis", "rediss", "redis+cluster", "rediss+cluster", "unix")


@dataclass(frozen=True, slots=True)
class Kind:
    """What an option accepts. Calling it gives the value, or raises ValueError."""

    expected: str
    parse: Callable[[object], Any]
    optional: bool = False

    def __call__(self, given: object) -> Any:
        """The value of what a source gives."""
        if self.optional and (given is None or (isinstance(given, str) and given.lower() in _OFF)):
            return None
        return self.parse(given)


def optional(kind: Kind) -> Kind:
    """The same, or absent: TOML has no null, so "off" says it in every source."""
    return Kind(f'{kind.expected}, or "off"', kind.parse, optional=True)


def _number(given: object, read: Callable[[str], Any], accepts: type | tuple[type, ...]) -> Any:
    if isinstance(given, Text):
        return read(given)
    if isinstance(given, bool) or not isinstance(given, accepts):
        raise ValueError
    return given


class Text(str):
    """A value from a variable or a flag, where numbers arrive as text."""

    __slots__ = ()


def integer(low: int, high: int | None = None) -> Kind:
    """An integer in [low, high]."""

    def parse(given: object) -> int:
        value = int(_number(given, int, int))
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    return Kind(f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}", parse)


def _block_tokens(given: object) -> int:
    value = int(_number(given, int, int))
    if not 1 <= value <= 1024 or value & (value - 1):  # attention kernels tile a block by powers of two
        raise ValueError
    return value


def _seconds(given: object) -> float:
    value = float(_number(given, float, (int, float)))
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _fraction(given: object) -> float:
    value = float(_number(given, float, (int, float)))
    if not 0 < value < 1:
        raise ValueError
    return value


def parse_size(given: object) -> int:
    """Bytes of `2147483648`, `"2GiB"`, `"1.5 GB"`; case of the unit does not matter. Raises ValueError."""
    if isinstance(given, str):
        match = re.fullmatch(r"(\d+(?:_\d+)*(?:\.\d+)?)\s*([a-z]*)", given.strip().lower())
        if not match or (match[2] or "b") not in _UNIT_OF:
            raise ValueError
        size = Decimal(match[1]) * _UNIT_OF[match[2] or "b"]
        if size > 2**63:  # more than any machine addresses, and a guard for the conversion
            raise ValueError
        given = int(size)
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError
    return given


def show_size(size: int) -> str:
    """The shortest exact form of a size: `2GiB`, `1536KiB`, `1000001B`."""
    return min((f"{size // f}{unit}" for unit, f in _UNITS.items() if size % f == 0), key=len)


def _text(given: object) -> str:
    if not isinstance(given, str):
        raise ValueError
    return str(given)


def _named(given: object) -> str:
    if not isinstance(given, str) or not given.strip():
        raise ValueError
    return str(given)


def _prefix(given: object) -> str:
    if not isinstance(given, str) or not re.fullmatch(r"[A-Za-z0-9._:-]+", given):
        raise ValueError
    return str(given)


def _path(given: object) -> Path:
    if isinstance(given, Path):
        return given
    if "\0" in (text := _named(given)):
        raise ValueError
    return Path(text).expanduser()


def _redis_url(given: object) -> str:
    url = _named(given)
    parts = urlsplit(url)  # ValueError on brackets that do not match
    if parts.scheme not in REDIS_SCHEMES or not (parts.netloc or parts.path):
        raise ValueError
    return url


def _daemon_url(given: object) -> str:
    url = _named(given)
    parts = urlsplit(url)
    local = parts.path and not parts.netloc
    good = local if parts.scheme == "unix" else parts.hostname and parts.port is not None and not parts.path
    if parts.scheme not in DAEMON_SCHEMES or not good or parts.query or parts.username:
        raise ValueError
    return url


def _several(one: Callable[[object], Any]) -> Callable[[object], tuple[Any, ...]]:
    """A list of them, or text with commas."""

    def parse(given: object) -> tuple[Any, ...]:
        if isinstance(given, str):
            given = [part.strip() for part in given.split(",")]
        if not isinstance(given, list | tuple) or not given:
            raise ValueError
        return tuple(map(one, given))

    return parse


def _pack_place(given: object) -> Path | str:
    if isinstance(given, str) and "://" in given:
        parts = urlsplit(_named(given))
        if parts.scheme not in PACK_SCHEMES or not (parts.netloc or parts.scheme == "file"):
            raise ValueError
        return str(given)
    return _path(given)


def _signer(given: object) -> Path | str:
    if isinstance(given, str) and re.fullmatch(r"[0-9a-fA-F]{64}", given.strip()):
        return given.strip().lower()
    return _path(given)


def _rank(given: object) -> str:
    text = _named(given)
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError
    return text


def _host_port(given: object) -> str:
    text = _named(given)
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.port is None or parts.path or parts.username:
        raise ValueError
    return text


def _mode(given: object) -> str:
    text = _named(given)
    if not re.fullmatch("0?[0-7]{3}", text):
        raise ValueError
    return text


def hide_password(text: str) -> str:
    """A URL as a person may see it."""
    # To the last @, as greedy as it looks: a password with @ or / in it must not show either.
    text = re.sub(r"(://[^/:@\s]*:)[^\s\"]*@", r"\1***@", text)
    return re.sub(r"([?&](?:ssl_)?password=)[^&\s\"]*", r"\1***", text)


def hide_secrets(text: str) -> str:
    """URLs as a person may see them: neither passwords nor what a signed URL has after its ?."""
    return re.sub(r"(://[^\s,?]*)\?[^\s,]*", r"\1?***", hide_password(text))


def choice(*names: str) -> Kind:
    """One of `names`."""

    def parse(given: object) -> str:
        if given not in names:
            raise ValueError
        return str(given)

    return Kind(f"one of {', '.join(names)}", parse)


SIZE = Kind('a size of at least one byte, such as 536870912, "512MiB" or "2GB"', parse_size)
SECONDS = Kind("a positive number of seconds", _seconds)
FRACTION = Kind("a fraction between 0 and 1", _fraction)
POWER_OF_TWO = Kind("a power of two from 1 to 1024", _block_tokens)
TEXT = Kind("a string", _text)
NAME = Kind("a string that is not empty", _named)
PREFIX = Kind("letters, digits and . _ : -", _prefix)
PATH = Kind("a path", _path)
REDIS_URL = Kind(f"a URL that begins with {', '.join(f'{s}://' for s in REDIS_SCHEMES)}", _redis_url)
DAEMON_URL: Final = Kind("unix:///path, tcp://host:port or tls://host:port", _daemon_url)
DAEMON_URLS: Final = Kind(f"{DAEMON_URL.expected}; several of them as a list, or with commas", _several(_daemon_url))
HOST_PORT: Final = Kind("host:port, such as 127.0.0.1:9419", _host_port)
PACKS: Final = Kind(
    "folders or zip files of packs, or URLs of them (s3://, http://, https://); several as a list, or with commas",
    _several(_pack_place),
)
SIGNERS: Final = Kind(
    "public keys of 64 hex digits, or files of keys; several as a list, or with commas", _several(_signer)
)
RANK: Final = Kind("rank/size, such as 0/2 for the first of two tensor-parallel ranks", _rank)
MODE: Final = Kind('permissions in octal, such as "0600"', _mode)
