"""Where a pack lies: folders, zips and their damage, and the same files through every place."""

import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zarr
import zarr.storage

from tests.object_servers import Behaviour, HttpFolder
from tierkv.errors import PackError
from tierkv.packs.archive import Member, in_order, is_plain, read_directory, replace, write_zip
from tierkv.packs.files import OPEN_FILES, FolderFiles, PackFiles, RemoteOptions, ZipFiles, open_files

SHARD = "blocks/c.0.0.0.0.0.0"
FILES = {
    "blocks/zarr.json": b"{}",
    SHARD: random.Random(1).randbytes(70_000),
    "blocks/c.1.0.0.0.0.0": random.Random(2).randbytes(5_000),
    "tokens/c.0.0": b"",
    "zarr.json": b'{"zarr_format": 3, "node_type": "group"}',
}


def make_folder(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_zip(path: Path, files: dict[str, bytes] = FILES, *, limit: int = 0xFFFF_FFFF) -> Path:
    write_zip(path, [(name, len(data), [data]) for name, data in files.items()], limit=limit)
    return path


def directory_of(data: bytes) -> dict[str, Member]:
    return dict(read_directory(lambda at, length: data[at : at + length], len(data)))


def refused(data: bytes, match: str) -> None:
    with pytest.raises(PackError, match=match):
        directory_of(data)


@pytest.fixture(params=["folder", "zip", "http folder", "http zip", "file url"])
def files(request: pytest.FixtureRequest, tmp_path: Path):  # type: ignore[no-untyped-def]
    make_folder(tmp_path / "pack")
    make_zip(tmp_path / "pack.zip")
    with HttpFolder(tmp_path) as server:
        place = {
            "folder": str(tmp_path / "pack"), "zip": str(tmp_path / "pack.zip"), "http folder": f"{server.url}/pack",
            "http zip": f"{server.url}/pack.zip", "file url": f"file://{tmp_path}/pack",
        }[request.param]  # fmt: skip
        with open_files(place) as opened:
            yield opened


def test_every_place_gives_the_same_files(files: PackFiles) -> None:
    assert files.sizes() in (None, {name: len(data) for name, data in FILES.items()})
    for name, data in FILES.items():
        assert files.read(name, most=len(data)) == data
    first, second = bytearray(1000), bytearray(24)
    assert files.read_into(SHARD, 4096, [memoryview(first), memoryview(second)]) == 1024
    assert first + second == FILES[SHARD][4096:5120]
    spots = [(0, bytearray(10)), (69_990, bytearray(10)), (30_000, bytearray(5000))]
    files.read_ranges(SHARD, [(at, memoryview(view)) for at, view in spots])
    assert all(view == FILES[SHARD][at : at + len(view)] for at, view in spots)


def test_every_place_says_what_it_lacks(files: PackFiles) -> None:
    view = bytearray(100)
    assert files.read_into(SHARD, 69_950, [memoryview(view)]) == 50
    with pytest.raises(PackError, match="70000 bytes"):
        files.read(SHARD, most=69_999)
    with pytest.raises(PackError):
        files.read("keys/c.0.0", most=10)
    with pytest.raises(PackError):
        files.read_into("keys/c.0.0", 0, [memoryview(view)])
    with pytest.raises(PackError):
        files.read_ranges(SHARD, [(69_950, memoryview(view))])
    for name in ("../pack.zip", "/etc/passwd", "blocks/../zarr.json", "Blocks/zarr.json", "a/b/c/d", "", "blocks/"):
        with pytest.raises(PackError, match="cannot be a file of a pack"):
            files.read(name, most=1000)


def test_a_place_that_is_no_pack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no zip at all, whatever it is called")
    os.mkfifo(tmp_path / "pipe.zip")
    for place, match in [
        (tmp_path / "absent", "no pack at"),
        (tmp_path / "text", "not a pack in zip form"),
        (tmp_path / "pipe.zip", "no regular file"),
        ("gopher://there/pack", "no place of packs"),
        ("s3:///prefix", "expected s3://bucket/prefix"),
        ("http:///prefix", "expected http://host/path"),
        ("https://[host/prefix", "no URL"),
    ]:
        with pytest.raises(PackError, match=match):
            open_files(place)
    with pytest.raises(PackError, match="endpoint elsewhere: expected http"):
        open_files("s3://bucket/prefix", options=RemoteOptions(endpoint="elsewhere"))


def test_no_link_and_no_pipe_in_a_folder_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "outside"
    make_folder(secret, {"secret": b"secret"})
    pack = make_folder(tmp_path / "pack")
    (pack / "link").symlink_to(secret / "secret")
    (pack / "keys").symlink_to(secret)
    os.mkfifo(pack / "pipe")
    with FolderFiles(pack) as files:
        assert set(files.sizes()) == set(FILES)
        for name in ("link", "keys/secret", "pipe"):
            with pytest.raises(PackError):
                files.read(name, most=100)


def test_many_files_keep_few_descriptors_open(tmp_path: Path) -> None:
    names = {f"blocks/c.{n}": b"%d" % n for n in range(3 * OPEN_FILES)}
    before = len(list(Path("/proc/self/fd").iterdir()))
    with FolderFiles(make_folder(tmp_path / "pack", names)) as files:
        for name, data in names.items():
            assert files.read(name, most=9) == data
        assert len(list(Path("/proc/self/fd").iterdir())) - before <= OPEN_FILES + 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(PackError, match="is closed"):
        files.read("blocks/c.0", most=9)


def test_more_views_than_one_call_takes_are_filled(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(3 * 2500)
    with FolderFiles(make_folder(tmp_path / "pack", {"a": data})) as files:
        views = [bytearray(3) for _ in range(2500)]
        assert files.read_into("a", 0, [memoryview(view) for view in views]) == len(data)
        assert b"".join(views) == data


def test_what_may_be_secret_in_a_url_is_never_shown(tmp_path: Path) -> None:
    make_zip(tmp_path / "pack.zip")
    with HttpFolder(tmp_path) as server:
        url = f"{server.url}/pack.zip?signature=hidden".replace("://", "://me:hidden@")
        with open_files(url) as files:
            assert files.read("blocks/zarr.json", most=9) == b"{}"
            assert "hidden" not in files.place
            with pytest.raises(PackError) as raised:
                files.read("absent", most=9)
        assert "hidden" not in str(raised.value)
        assert set(server.queries) == {"signature=hidden"}
        with pytest.raises(PackError) as raised:
            open_files(url.replace("pack.zip", "absent.zip"))
        assert "hidden" not in str(raised.value)
    with pytest.raises(PackError) as raised:
        open_files(url, options=RemoteOptions(retries=0))
    assert "hidden" not in str(raised.value)
    assert str(raised.value).startswith("http://me:***@127.0.0.1")


def test_a_zip_at_a_server_is_read_by_ranges(tmp_path: Path) -> None:
    big = {"blocks/c.0": random.Random(4).randbytes(3 << 20), "zarr.json": b"{}"}
    make_zip(tmp_path / "pack.zip", big)
    with HttpFolder(tmp_path) as server, open_files(f"{server.url}/pack.zip") as files:
        assert files.read("zarr.json", most=9) == b"{}"
        view = bytearray(1000)
        files.read_into("blocks/c.0", 1 << 20, [memoryview(view)])
        assert view == big["blocks/c.0"][1 << 20 :][:1000]
        assert server.sent() < 300_000


def test_an_object_that_changes_under_a_reader_is_refused(tmp_path: Path) -> None:
    big = {"blocks/c.0": random.Random(4).randbytes(3 << 20), "zarr.json": b"{}"}
    make_zip(tmp_path / "pack.zip", big)
    with HttpFolder(tmp_path) as server, open_files(f"{server.url}/pack.zip") as files:
        make_zip(tmp_path / "pack.zip", big | {"zarr.json": b"[]"})
        with pytest.raises(PackError, match="changed while it was read"):
            files.read_into("blocks/c.0", 0, [memoryview(bytearray(10))])


def test_a_server_without_ranges_is_told_from_one_with(tmp_path: Path) -> None:
    make_folder(tmp_path / "pack")
    make_zip(tmp_path / "pack.zip")
    with HttpFolder(tmp_path, Behaviour(ranges=False)) as server:
        with open_files(f"{server.url}/pack") as files:
            assert files.read("zarr.json", most=99) == FILES["zarr.json"]
            with pytest.raises(PackError, match="answers no ranges"):
                files.read_into(SHARD, 0, [memoryview(bytearray(10))])
        with pytest.raises(PackError, match="answers no ranges"):
            open_files(f"{server.url}/pack.zip")


def test_the_same_members_are_the_same_bytes(tmp_path: Path) -> None:
    one, two = make_zip(tmp_path / "one.zip"), make_zip(tmp_path / "two.zip")
    assert one.read_bytes() == two.read_bytes()
    assert zlib.crc32(one.read_bytes()) == 3_586_179_073, (
        "the form of the archive changed: packs made before are other bytes now"
    )
    assert in_order(FILES)[-1] == "zarr.json"
    assert in_order(reversed(FILES)) == in_order(FILES)


@pytest.mark.parametrize("limit", [0xFFFF_FFFF, 3])
def test_shards_lie_at_whole_pages(tmp_path: Path, limit: int) -> None:
    with open_files(make_zip(tmp_path / "pack.zip", limit=limit)) as files:
        assert isinstance(files, ZipFiles)
        assert list(files.members) == list(FILES)
        assert [m.offset % 4096 for name, m in files.members.items() if name.startswith("blocks/c.")] == [0, 0]
        assert all(files.read(name, most=1 << 20) == data for name, data in FILES.items())


@pytest.mark.parametrize("limit", [0xFFFF_FFFF, 3])
def test_other_readers_open_what_is_written(tmp_path: Path, limit: int) -> None:
    path = make_zip(tmp_path / "pack.zip", limit=limit)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == FILES


def test_zarr_opens_a_store_that_is_written_as_a_zip(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "store", mode="w")
    group.create_array("keys", shape=(5, 32), chunks=(5, 32), dtype="uint8")[:] = 7
    files = {p.relative_to(tmp_path / "store").as_posix(): p.read_bytes() for p in (tmp_path / "store").rglob("*.*")}
    files |= {"keys/c.0.0": b"\7" * 160}
    write_zip(tmp_path / "store.zip", [(n, len(files[n]), [files[n]]) for n in in_order(files) if is_plain(n)])
    opened = zarr.open_group(zarr.storage.ZipStore(tmp_path / "store.zip", mode="r"), mode="r")
    assert opened["keys"].shape == (5, 32)


def test_an_archive_of_more_than_four_gigabytes_is_read(tmp_path: Path) -> None:
    class Sparse:
        """Writes zeros as a hole, so that the test costs neither time nor room."""

        def __init__(self, path: Path) -> None:
            self.file = path.open("w+b")
            self.seek, self.tell = self.file.seek, self.file.tell

        def write(self, data: bytes | memoryview) -> int:
            if len(data) == len(ZEROS):
                return self.file.seek(len(data), os.SEEK_CUR)
            return self.file.write(data)

    ZEROS = memoryview(bytes(64 << 20))
    sparse = Sparse(tmp_path / "big.zip")
    pieces = (ZEROS for _ in range(65))
    write_zip(sparse, [("blocks/c.0", 65 * len(ZEROS), pieces), ("zarr.json", 2, [b"{}"])])  # type: ignore[arg-type]
    sparse.file.close()
    with open_files(tmp_path / "big.zip") as files:
        assert files.sizes() == {"blocks/c.0": 65 << 26, "zarr.json": 2}
        assert files.read("zarr.json", most=2) == b"{}"
    with zipfile.ZipFile(tmp_path / "big.zip") as archive:
        assert archive.read("zarr.json") == b"{}"
        assert archive.getinfo("blocks/c.0").file_size == 65 << 26


def test_a_file_of_another_size_than_promised_leaves_no_archive(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="3 bytes where 4 were promised"):
        write_zip(tmp_path / "pack.zip", [("a", 4, [b"abc"])])
    with pytest.raises(PackError, match="there twice"):
        write_zip(tmp_path / "pack.zip", [("a", 1, [b"a"]), ("a", 1, [b"a"])])
    with pytest.raises(PackError, match="cannot be a file of a pack"):
        write_zip(tmp_path / "pack.zip", [("../a", 1, [b"a"])])
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_file_has_all_of_the_new_or_all_of_the_old(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replace(tmp_path / "a") as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_bytes() == b"old"
    with replace(tmp_path / "a") as file:
        file.write(b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


def archive(tmp_path: Path, add: Callable[[zipfile.ZipFile], None], comment: bytes = b"") -> bytes:
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as made:
        add(made)
        made.comment = comment
    return (tmp_path / "made.zip").read_bytes()


def test_stored_archives_of_other_programs_are_read(tmp_path: Path) -> None:
    def add(made: zipfile.ZipFile) -> None:
        made.writestr("a", b"12345")
        with made.open(zipfile.ZipInfo("blocks/c.0"), "w", force_zip64=True) as member:
            member.write(b"678")

    data = archive(tmp_path, add, comment=b"made by hand")
    found = directory_of(data)
    assert {n: data[m.offset : m.offset + m.size] for n, m in found.items()} == {"a": b"12345", "blocks/c.0": b"678"}


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/../b", "C:/a", "A", "a\\b", "a/", "a//b", "é", "a/b/c/d", "...a/..", "a\n"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    refused(archive(tmp_path, lambda made: made.writestr(zipfile.ZipInfo(name), b"x")), "segments of a-z")


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    refused(archive(tmp_path, lambda made: made.writestr("a", bytes(9999), zipfile.ZIP_DEFLATED)), "compressed")


def test_links_in_an_archive_are_refused(tmp_path: Path) -> None:
    def add(made: zipfile.ZipFile) -> None:
        link = zipfile.ZipInfo("a")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        made.writestr(link, b"/etc/passwd")

    refused(archive(tmp_path, add), "no regular file")


def test_members_given_twice_are_refused(tmp_path: Path) -> None:
    data = archive(tmp_path, lambda made: [made.writestr("a", b"1"), made.writestr("b", b"2")])  # type: ignore[arg-type, func-returns-value]
    refused(data.replace(b"b", b"a"), "twice")


def test_more_members_than_a_pack_has_are_refused(tmp_path: Path) -> None:
    data = bytearray(archive(tmp_path, lambda made: made.writestr("a", b"1")))
    end = data.rfind(b"PK\5\6")
    start, length = end - 47, 47
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 100_001, 100_001, length, start)
    wide += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    ending = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF, 0)
    refused(bytes(data[:end]) + wide + ending, "100001 members")
    wide = wide.replace(struct.pack("<2Q", 100_001, 100_001), struct.pack("<2Q", 1, 1))
    assert set(directory_of(bytes(data[:end]) + wide + ending)) == {"a"}
    wide = wide.replace(struct.pack("<2Q", 1, 1), struct.pack("<2Q", 1, 2))
    refused(bytes(data[:end]) + wide + ending, "do not agree")


def patched(data: bytes, mark: bytes, at: int, value: bytes) -> bytes:
    where = data.rfind(mark) + at
    return data[:where] + value + data[where + len(value) :]


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


@pytest.mark.parametrize(
    ("mark", "at", "value", "match"),
    [
        (CENTRAL, 8, b"\1\0", "encrypted"),
        (CENTRAL, 8, b"\x08\0", "streamed"),
        (CENTRAL, 10, b"\x08\0", "compressed"),
        (LOCAL, 8, b"\x08\0", "another one"),
        (LOCAL, 14, b"zzzz", "another one"),
        (LOCAL, 30, b"y", "another name"),
        (CENTRAL, 20, b"\xff\0\0\0", "two sizes"),
        (CENTRAL, 20, b"\xff\0\0\0\xff\0\0\0", "past the end"),
        (CENTRAL, 20, b"\xff\xff\xff\xff", "lacks its ZIP64"),
        (CENTRAL, 34, b"\1\0", "another part"),
        (CENTRAL, 42, b"\0\0\0\0", "another"),
        (CENTRAL, 42, b"\xf0\xff\0\0", "after the end"),
        (CENTRAL, 28, b"\xff\xff", "cut short"),
        (END, 4, b"\1\0", "part of several"),
        (END, 8, b"\1\0", "part of several"),
        (END, 8, b"\1\0\1\0", "more in it"),
        (END, 8, b"\3\0\3\0", "fewer members"),
        (END, 8, b"\xff\xff\xff\xff", "ZIP64 end is missing"),
        (END, 12, b"\1", "does not end where"),
        (END, 12, b"\0\0\0\2", "at most 16777216"),
        (END, 16, b"\1", "does not end where"),
        (END, 20, b"\1\0", "follows its end"),
    ],
)
def test_a_directory_that_lies_is_refused(tmp_path: Path, mark: bytes, at: int, value: bytes, match: str) -> None:
    data = archive(tmp_path, lambda made: [made.writestr("a", b"1"), made.writestr("b", b"22")])  # type: ignore[arg-type, func-returns-value]
    assert set(directory_of(data)) == {"a", "b"}
    refused(patched(data, mark, at, value), match)


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    inner = archive(tmp_path, lambda made: made.writestr("b", b"2"))
    begin = inner[: inner.find(CENTRAL)]
    data = archive(tmp_path, lambda made: [made.writestr("b", b"2"), made.writestr("a", begin)])  # type: ignore[arg-type, func-returns-value]
    where = data.rfind(begin)
    first = data.find(CENTRAL)
    refused(data[: first + 42] + struct.pack("<L", where) + data[first + 46 :], "lies over another")


def test_what_is_cut_or_follows_is_refused(tmp_path: Path) -> None:
    data = make_zip(tmp_path / "pack.zip", {"a": b"123", "b": b"4"}).read_bytes()
    for length in range(len(data)):
        with pytest.raises(PackError):
            directory_of(data[:length])
    refused(data + b"x", "follows its end")
    refused(b"x" + data, "does not end where")


def test_damage_of_any_one_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    """No damage leads outside the archive or crashes the reader; sizes are what bounds a reader's memory."""
    data = make_zip(tmp_path / "pack.zip", {"a": b"123", "b": b"4"}, limit=3).read_bytes()
    rng = random.Random(5)
    survived = 0
    for _ in range(4000):
        spoilt = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            spoilt[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        try:
            found = directory_of(bytes(spoilt))
        except PackError:
            continue
        survived += 1
        assert all(is_plain(name) and 0 <= m.offset <= m.offset + m.size <= len(data) for name, m in found.items())
    assert survived
