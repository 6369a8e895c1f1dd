"""The access log of a store: what was asked for and when, for `tierkv simulate`. No tokens, and no names that tell them.

    {"tierkv_log": 1, "block_tokens": 16, "block_bytes": 49152, "started": 1795900000.0, "salt": "5be1…"}
    {"t": 12.043127, "b": "<base64>", "in": 812, "out": 128, "session": "09c4…", "next": "tool"}

One JSON object per line: a header each time a store opens the log, then a line per request, when the request has ended.
t: seconds from the first header's `started` to its arrival, so lines are not in order of t.  b: 8-byte digests of the prompt's
whole blocks, each of the block and all before it.  in, out: tokens; the latter and all that follows only where known.

Digests are keyed by a salt that stays with the store: it comes from its secret, or lies beside the log in a file that its
owner alone may read. Who has the log without the salt learns which prompts begin alike, and nothing else.
"""

import errno
import fcntl
import hmac
import json
import logging
import os
import secrets
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from tierkv.errors import ConfigError
from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints, Next
from tierkv.keys import Key, chain
from tierkv.layout import Layout
from tierkv.metrics import Metrics

LOG_VERSION: Final = 1
DIGEST_BYTES: Final = 8
SALT_BYTES: Final = 32
_TAIL_BYTES: Final = 1 << 16

log = logging.getLogger("tierkv")


@dataclass(frozen=True, slots=True)
class Access:
    """One request that is over. at_s: its arrival, in seconds since the epoch.  digests: of `Recorder.digests`."""

    at_s: float
    digests: bytes
    input_tokens: int
    hints: Hints = NO_HINTS
    ending: Ending = NO_ENDING


class Recorder:
    """Appends to one file, up to `max_bytes`. One thread at a time; blocks on the disk, so never the engine's.

    Whatever goes wrong later than at the opening ends the recording, with one warning, and every request from then on is
    counted as dropped; what was written stays whole lines.
    now: seconds since the epoch.  write: as os.write.
    Raises ConfigError for a file that cannot be written to, or is another log: of other blocks, of another program, in use.
    """

    def __init__(
        self,
        path: Path,
        *,
        root: Key,
        layout: Layout,
        max_bytes: int,
        metrics: Metrics,
        secret: bytes = b"",
        now: Callable[[], float],
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        self._path, self._max_bytes, self._metrics, self._write = path, max_bytes, metrics, write
        self._block_tokens = layout.block_tokens
        self._stopped: str | None = None
        try:
            self._salt = hmac.digest(secret, b"tierkv access log", "sha256") if secret else _salt(path)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"record.path = {str(path)!r}: {error.strerror}; give a file that can be written"
            ) from None
        self._root = Key(hmac.digest(self._salt, root, "sha256"))
        try:
            first = self._check(layout)
            self._started = now() if first is None else float(first["started"])
            self._size = self._whole_lines()
        except BaseException:
            os.close(self._fd)
            raise
        header = {"tierkv_log": LOG_VERSION, "block_tokens": layout.block_tokens, "block_bytes": layout.block_bytes}
        self._append(header | {"started": self._started, "salt": sha256(self._salt).hexdigest()[:16]})
        metrics.record_bytes.read_from(lambda: float(self._size))

    def digests(self, tokens: bytes) -> bytes:
        """DIGEST_BYTES per whole block of `tokens` (int32-LE). May be called from any thread."""
        keys = chain(self._root, tokens, block_tokens=self._block_tokens)
        return b"".join(key[:DIGEST_BYTES] for key in keys)

    def write(self, access: Access) -> None:
        """Add a line."""
        hints, ending = access.hints, access.ending
        row: dict[str, Any] = {  # Any: as JSON takes it
            "t": round(max(0.0, access.at_s - self._started), 6),
            "b": b64encode(access.digests).decode(),
            "in": access.input_tokens,
        }
        if ending.output_tokens is not None:
            row["out"] = ending.output_tokens
        if hints.session is not None:
            row["session"] = hmac.digest(self._salt, b"session " + hints.session.encode(), "sha256")[:8].hex()
        if hints.priority:
            row["priority"] = hints.priority
        if ending.next is not Next.UNKNOWN:
            row["next"] = ending.next.value
        if ending.within_s is not None:
            row["within_s"] = ending.within_s
        if self._append(row):
            self._metrics.requests_recorded.add(1)
        else:
            self._metrics.records_dropped.add(1, self._stopped or "failed")

    def close(self) -> None:
        """Let go of the file. Idempotent; what is written later is dropped."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self._stopped = -1, self._stopped or "closed"

    # -- the file ---------------------------------------------------------------------------------------------------

    def _check(self, layout: Layout) -> dict[str, Any] | None:  # Any: as above
        """The first header of a log that is gone on with; None for a new one."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"record.path = {str(self._path)!r}: another store writes this log; give each its own"
            ) from None
        start = os.pread(self._fd, _TAIL_BYTES, 0)
        if not start:
            return None
        try:
            header = json.loads(start.partition(b"\n")[0])
            known = header["tierkv_log"] == LOG_VERSION and float(header["started"]) >= 0
            size = header["block_tokens"]
        except (ValueError, KeyError, TypeError):
            known, size = False, None
        if not known:
            raise ConfigError(
                f"record.path = {str(self._path)!r}: the file is there and no access log of this version of tierkv; "
                "give a new file"
            )
        if size != layout.block_tokens:
            raise ConfigError(
                f"record.path = {str(self._path)!r}: a log of {size}-token blocks, and store.block_tokens is "
                f"{layout.block_tokens}; give a new file"
            )
        return dict(header)

    def _whole_lines(self) -> int:
        """Cut off a line that a crash left unfinished; returns the size."""
        size = end = os.fstat(self._fd).st_size
        while end:
            start = max(0, end - _TAIL_BYTES)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < size:
            os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)
        return end

    def _append(self, row: dict[str, Any]) -> bool:  # Any: as above
        if self._stopped is not None:
            return False
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        if self._size + len(line) > self._max_bytes:
            self._stop("full", f"it has reached record.max_bytes = {self._max_bytes}")
            return False
        try:
            done = 0
            while done < len(line):
                done += self._write(self._fd, line[done:])
        except OSError as error:
            self._stop("full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "failed", str(error))
            return False
        self._size += len(line)
        return True

    def _stop(self, reason: str, why: str) -> None:
        self._stopped = reason
        log.warning("access log %s ends here: %s; nothing else is affected", self._path, why)
        try:
            os.ftruncate(self._fd, self._size)  # the part of a line that did fit
        except OSError as error:
            log.warning("access log %s may end in an unfinished line: %s", self._path, error)


def read_header(path: Path) -> dict[str, Any]:  # Any: as JSON gives it
    """The first header of a log. Raises ConfigError for what is none."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline(_TAIL_BYTES))
        if header["tierkv_log"] == LOG_VERSION and header["block_bytes"] >= 1:
            return dict(header)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give an access log (record.path of a store)") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path}: no access log of this version of tierkv; give one (record.path of a store)")


def _salt(path: Path) -> bytes:
    """The salt beside a log; made when there is none. Raises OSError, and ConfigError when it is none."""
    beside = path.with_name(path.name + ".salt")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        salt = beside.read_bytes()
        if len(salt) != SALT_BYTES:
            raise ConfigError(
                f"{beside}: {len(salt)} bytes and not {SALT_BYTES}, so no salt of an access log; "
                "delete it: digests from then on are not those from before"
            ) from None
        return salt
    try:
        salt = secrets.token_bytes(SALT_BYTES)
        os.write(fd, salt)
    finally:
        os.close(fd)
    return salt
