"""Packs at servers: S3 and what speaks like it, and plain HTTP, through obstore's blocking calls.

The only file that knows obstore, which is an extra (`object`): it is imported where it is used. Its retries and its own
concurrency are enough; no thread is made here. What must not live here: what is moved where (shipping.py).
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urlsplit

from tierkv.errors import PackAway, PackError
from tierkv.packs.archive import MAX_MEMBERS, is_plain
from tierkv.packs.files import PackFiles, RemoteOptions, ZipFiles, check_name, past_end
from tierkv.values import hide_password

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, HTTPStore, S3Store

TAIL_BYTES: Final = 128 << 10
"""What is asked of the end of a zip at once: the directory of most packs lies within."""
COALESCE_BYTES: Final = 256 << 10
"""Ranges less than this apart are asked for as one: at 100 MB/s, less time than a request takes."""
DIGEST: Final = "tierkv-sha256"
"""Under this name an object's own metadata has the SHA-256 of its bytes, given with them in one request."""
PIECE_BYTES: Final = 8 << 20
MAX_PIECES: Final = 9_000  # of the 10,000 an upload may have
UPLOADING: Final = 4


@dataclass(frozen=True, slots=True)
class Found:
    """What a server says about an object. tag: changes with the content, where there is any. digest: SHA-256, if known."""

    size: int
    tag: str | None
    digest: str | None = None


def is_archive(place: str) -> bool:
    """Whether a place is one zip file by its name: a server is not asked for it."""
    return (place.partition("?")[0] if "://" in place else place).lower().endswith(".zip")


def show_place(url: str) -> str:
    """A URL as a person may see it: no password, and no query, which is the secret of a signed URL."""
    head, query, _ = url.partition("?")
    return hide_password(head) + ("?***" if query else "")


def open_remote(url: str, *, options: RemoteOptions | None = None) -> PackFiles:
    """Open a pack at s3://, http:// or https://. Of a folder nothing is read yet; of a zip, its directory."""
    if is_archive(url):
        return ZipFiles(RemoteFile(Objects.of_object(url, options=options)))
    return RemoteFiles(Objects(url, options=options))


class Objects:
    """Objects beneath one URL. Thread-safe. Raises PackError, for all that may go wrong."""

    def __init__(self, url: str, *, options: RemoteOptions | None = None) -> None:
        self.place = show_place(url).rstrip("/")
        self.single: str | None = None
        options = options or RemoteOptions()
        parts = _split(url)
        client: ClientConfig = {"timeout": f"{max(1, round(options.timeout_s * 1000))}ms"}
        with _asking(self.place):
            self._store = _s3(parts, options, client) if parts.scheme == "s3" else _http(url, options, client)
        self.lists = parts.scheme == "s3"

    @classmethod
    def of_object(cls, url: str, *, options: RemoteOptions | None = None) -> "Objects":
        """Make the objects of a URL that names one: `single` is its name."""
        parts = _split(url)
        folder, _, name = parts.path.rpartition("/")
        if parts.scheme == "s3":
            made = cls(parts._replace(path=folder).geturl(), options=options)
            made.single = name
        else:
            made = cls(url, options=options)  # the URL as it was given: what is quoted in it stays so
            made.single = ""
        made.place = show_place(url)
        return made

    def where(self, name: str) -> str:
        """One of the objects, for people."""
        return self.place if self.single is not None else f"{self.place}/{name}"

    def look(self, name: str) -> Found | None:
        """Ask about an object; None when it is not there."""
        import obstore

        with _asking(self.where(name)):
            try:
                got = obstore.get(self._store, name, options={"head": True})
            except FileNotFoundError:
                return None
            return Found(got.meta["size"], got.meta["e_tag"], got.attributes.get(DIGEST))

    def read(self, name: str, *, most: int) -> bytes:
        """Return a whole object, by a request without a range: some servers answer no other."""
        import obstore

        with _asking(self.where(name)):
            got = obstore.get(self._store, name)
            size = got.meta["size"]
            data = got.bytes().to_bytes() if size <= most else b""
        if size > most:
            raise PackError(f"{self.where(name)} has {size} bytes; at most {most} are read of it")
        if len(data) != size:
            raise past_end(self.where(name), 0, size)
        return data

    def read_tail(self, name: str, length: int) -> tuple[Found, bytes]:
        """Return what an object is, and its last bytes."""
        import obstore

        with _asking(self.where(name)):
            got = obstore.get(self._store, name, options={"range": {"suffix": length}})
            changed = got.meta["last_modified"]
            tag = got.meta["e_tag"] or (changed.isoformat() if changed.timestamp() else None)  # 1970: it did not say
            return Found(got.meta["size"], tag), got.bytes().to_bytes()

    def read_range(self, name: str, start: int, length: int, *, tag: str | None = None) -> memoryview:
        """Return the bytes from `start` on: fewer only at the end. With a tag: of that content only."""
        import obstore

        options: GetOptions = {"range": (start, start + length)}
        if tag is not None and tag.startswith('"'):  # a weak one, or a date, never matches
            options["if_match"] = tag
        with _asking(self.where(name)):
            return memoryview(obstore.get(self._store, name, options=options).bytes())

    def read_many(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return several ranges of (start, length): near ones as one request, requests side by side."""
        import obstore

        starts, lengths = [start for start, _ in ranges], [length for _, length in ranges]
        with _asking(self.where(name)):
            got = obstore.get_ranges(self._store, name, starts=starts, lengths=lengths, coalesce=COALESCE_BYTES)
            return [memoryview(each) for each in got]

    def write(self, name: str, size: int, pieces: Iterable[bytes], *, digest: str) -> None:
        """Write an object, all or nothing; large ones as several requests. `digest` stays with it.

        The pieces are read by another thread of obstore's. What they raise comes out, and then nothing is written.
        """
        import obstore

        with _asking(self.where(name)):
            if size <= PIECE_BYTES:
                whole = b"".join(pieces)
                obstore.put(self._store, name, whole, attributes={DIGEST: digest}, use_multipart=False)
            else:
                piece = max(PIECE_BYTES, -(-size // MAX_PIECES))
                obstore.put(
                    self._store, name, iter(pieces),
                    attributes={DIGEST: digest}, chunk_size=piece, max_concurrency=UPLOADING, use_multipart=True,
                )  # fmt: skip

    def sizes(self) -> dict[str, int] | None:
        """Return bytes of every object with a plain name; None where they cannot be listed."""
        import obstore

        if not self.lists:
            return None
        found: dict[str, int] = {}
        with _asking(self.place):
            for batch in obstore.list(self._store):
                found |= {each["path"]: each["size"] for each in batch if is_plain(each["path"])}
                if len(found) > MAX_MEMBERS:
                    break
        if len(found) > MAX_MEMBERS:
            raise PackError(f"{self.place} has more than {MAX_MEMBERS} objects: that is no pack")
        return found


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise PackError(f"{show_place(url)}: no URL ({error})") from None


def _s3(parts: SplitResult, options: RemoteOptions, client: "ClientConfig") -> "S3Store":
    from obstore.store import S3Store

    if not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc:
        raise PackError(f"{show_place(parts.geturl())}: expected s3://bucket/prefix")
    # Without one it is the environment's or Amazon's, and which of them was meant to be asked in the clear is said there.
    client["allow_http"] = options.endpoint is None or options.endpoint.startswith("http://")
    given: dict[str, Any] = {}  # Any: keywords of S3Config, each of its own type
    if options.endpoint is not None:
        if not _is_url(options.endpoint):
            raise PackError(f"endpoint {show_place(options.endpoint)}: expected http://host:port or https://host")
        given["endpoint"] = options.endpoint.rstrip("/")
    if options.region is not None:
        given["region"] = options.region
    if options.anonymous:
        given["skip_signature"] = True
    prefix = parts.path.strip("/") or None
    return S3Store(
        parts.netloc, prefix=prefix, client_options=client, retry_config={"max_retries": options.retries}, **given
    )


def _http(url: str, options: RemoteOptions, client: "ClientConfig") -> "HTTPStore":
    from obstore.store import HTTPStore

    if not _is_url(url):
        raise PackError(f"{show_place(url)}: expected http://host/path or https://host/path")
    client["allow_http"] = urlsplit(url).scheme == "http"
    return HTTPStore(url, client_options=client, retry_config={"max_retries": options.retries})


def _is_url(given: str) -> bool:
    """Whether a server can be asked there: obstore panics on some texts that are none."""
    try:
        parts = urlsplit(given)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and given.isprintable()
    except ValueError:
        return False


@contextlib.contextmanager
def _asking(place: str) -> Iterator[None]:
    """Turn what obstore raises into a PackError that a person can act on."""
    from obstore.exceptions import (
        BaseError,
        NotSupportedError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )

    try:
        yield
    except FileNotFoundError:
        raise PackError(f"{place} is not there") from None
    except PreconditionError:
        raise PackError(f"{place} was changed while it was read: begin again") from None
    except NotSupportedError as error:
        if "ange" not in str(error):
            raise PackError(f"{place}: {_brief(error)}") from None
        raise PackError(
            f"{place}: this server answers no ranges, and what is asked is too large to be read whole: "
            "use one that does (nginx, S3), or fetch the files by another program"
        ) from None
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PackError(
            f"{place} was refused ({_brief(error)}): check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), "
            "or AWS_SKIP_SIGNATURE=true"
        ) from None
    except (BaseError, OSError, ValueError) as error:
        said = _brief(error)
        if (
            "169.254.169.254" in said or "Missing AccessKeyId" in said
        ):  # the last place where credentials are looked for
            said = "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true"
        away = (
            "onnect" in said or "imed out" in said or "imeout" in said or " 50" in said
        )  # the server, not what it has
        raise (PackAway if away else PackError)(f"{place}: {said}") from None


def _brief(error: Exception) -> str:
    """What obstore says, without its own source, the page of the server, and what is secret in a URL."""
    front, _, back = str(error).partition("Debug source")
    said, _, page = front.partition("<")
    text = hide_password(re.sub(r"\?[^\s\"]*", "?***", " ".join(said.split())))[:300].rstrip(": -")
    reason = re.search(r"<Code>(\w{1,60})</Code>", page) or re.search(r'message: "([^"]{1,80})"', back)
    return f"{text}: {reason[1]}" if reason else text


class RemoteFile:
    """One object that is read by ranges: its end was read first, and tells its size."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._name = objects.single or ""
        self.place = objects.place
        found, self._tail = objects.read_tail(self._name, TAIL_BYTES)
        self.size = found.size
        self.tag = found.tag

    def read_into(self, offset: int, views: Sequence[memoryview]) -> int:
        """Ask for one range, of the content that was opened."""
        length = max(0, min(sum(view.nbytes for view in views), self.size - offset))
        if not length:
            return 0
        if offset >= (tail_at := self.size - len(self._tail)):
            return _fill(views, memoryview(self._tail)[offset - tail_at :][:length])
        came = _fill(views, self._objects.read_range(self._name, offset, length, tag=self.tag))
        if came != length:
            raise past_end(self.place, offset, length)
        return came

    def read_ranges(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Ask for all at once; obstore has no condition here, so a changed object shows by the checksums of its blocks."""
        tail_at = self.size - len(self._tail)
        within = [each for each in ranges if each[0] >= tail_at]
        for offset, view in within:
            if self.read_into(offset, [view]) != view.nbytes:
                raise past_end(self.place, offset, view.nbytes)
        if asked := [each for each in ranges if each[0] < tail_at]:
            _read_many(self._objects, self._name, asked)

    def close(self) -> None:
        """Nothing is held: connections are obstore's."""


class RemoteFiles(PackFiles):
    """A pack as objects beneath one prefix."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.place = objects.place

    def sizes(self) -> Mapping[str, int] | None:
        """As the server lists them; plain HTTP does not."""
        return self._objects.sizes()

    def read(self, name: str, *, most: int) -> bytes:
        """Ask for the whole object."""
        check_name(name, self.place)
        return self._objects.read(name, most=most)

    def read_into(self, name: str, offset: int, views: Sequence[memoryview]) -> int:
        """Ask for one range."""
        check_name(name, self.place)
        length = sum(view.nbytes for view in views)
        return _fill(views, self._objects.read_range(name, offset, length)) if length else 0

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Ask for all at once."""
        check_name(name, self.place)
        _read_many(self._objects, name, ranges)

    def close(self) -> None:
        """Nothing is held: connections are obstore's."""


def _read_many(objects: Objects, name: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
    wanted = [(offset, view) for offset, view in ranges if view.nbytes]
    if not wanted:
        return
    came = objects.read_many(name, [(offset, view.nbytes) for offset, view in wanted])
    for (offset, view), data in zip(wanted, came, strict=True):
        if _fill([view], data) != view.nbytes:
            raise past_end(objects.where(name), offset, view.nbytes)


def _fill(views: Sequence[memoryview], data: memoryview) -> int:
    """Copy data into views; return how many bytes that were."""
    at = 0
    for view in views:
        piece = data[at : at + view.nbytes]
        view[: piece.nbytes] = piece
        at += piece.nbytes
    return at
