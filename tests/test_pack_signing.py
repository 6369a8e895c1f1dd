"""Who vouches for a pack: trusted, strange, copied and broken signatures, keys of every kind, and signing that breaks off."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pack_parts import (
    TINY,
    Files,
    changed,
    files_of,
    group_of,
    make_keys,
    make_pack,
    prompt,
    put,
    signed,
)
from tierkv.errors import PackError
from tierkv.packs.manifest import ATTRIBUTE, ROOT
from tierkv.packs.pack import open_pack
from tierkv.packs.signing import check, read_private, read_public, sign
from tierkv.packs.verify import verify
from tierkv.packs.write import sign_in_place

DOCUMENTS = {"one": prompt(1, 66), "two": prompt(1, 3) + prompt(2, 2)}
ROWS = 68
Change = Callable[[Files], None]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(make_pack(tmp_path_factory.mktemp("verify") / "pack", DOCUMENTS))


@pytest.fixture(params=["pack", "pack.zip"])
def place(request: pytest.FixtureRequest, tmp_path: Path, pack: Files) -> Path:
    return put(tmp_path / str(request.param), pack)


def found(place: Path, **options: Any) -> dict[str, str]:
    """Findings by where they are; every one must be told once."""
    result = verify(place, **options)
    assert len({(one.where, one.what) for one in result.findings}) == len(result.findings)
    return {one.where: one.what for one in reversed(result.findings)}


# -- with a key -------------------------------------------------------------------------------------------------------------


def test_a_signature_of_a_stranger_is_right_and_not_enough(place: Path, tmp_path: Path) -> None:
    stranger, theirs = make_keys(tmp_path, "stranger")
    key, public = make_keys(tmp_path)
    signed(place, stranger)
    assert verify(place).signers == (theirs,) and found(place, trusted=[theirs]) == {}
    with pytest.raises(PackError, match=rf"signed by {theirs[:16]}…; this configuration demands one of {public[:16]}…"):
        open_pack(place, trusted=[public])
    assert found(place, trusted=[public]).keys() == {"signature"}
    signed(place, key)
    with open_pack(place, trusted=[public]) as pack:
        assert pack.signers == (theirs, public) and pack.strict


def test_a_signature_of_another_pack_is_none_of_this(place: Path, tmp_path: Path) -> None:
    key, public = make_keys(tmp_path)
    other = signed(make_pack(tmp_path / "other", {"one": prompt(7, 2)}), key)
    taken = group_of(files_of(other))["attributes"]["signatures"]
    add_signatures(place, taken)
    for trusted in (None, [public]):
        with pytest.raises(PackError, match=f"the signature of key {public[:16]}… is not over this manifest"):
            open_pack(place, trusted=trusted)


def add_signatures(place: Path, given: Any) -> None:
    def change(files: Files) -> None:
        group = group_of(files)
        group["attributes"]["signatures"] = given
        files[ROOT] = (json.dumps(group, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()

    changed(place, change)


@pytest.mark.parametrize("field", ["signature", "public_key"])
def test_a_flipped_bit_of_a_signature_is_found(place: Path, tmp_path: Path, field: str) -> None:
    key, public = make_keys(tmp_path)
    signed(place, key)
    (good,) = group_of(files_of(place))["attributes"]["signatures"]
    for bit in (0, 5, 255 if field == "public_key" else 511):
        raw = bytearray.fromhex(good[field])
        raw[bit // 8] ^= 1 << bit % 8
        add_signatures(place, [good | {field: raw.hex()}])
        assert "not over this manifest" in found(place, trusted=[public])["signature"]


def test_a_bad_signature_beside_a_good_one_is_refused(place: Path, tmp_path: Path) -> None:
    key, public = make_keys(tmp_path)
    signed(place, key)
    (good,) = group_of(files_of(place))["attributes"]["signatures"]
    add_signatures(place, [good, good | {"public_key": "0" * 64}])
    with pytest.raises(PackError, match="the signature of key 0000000000000000… is not over"):
        open_pack(place, trusted=[public])


def test_a_signature_is_over_a_pack_and_nothing_else(place: Path, tmp_path: Path) -> None:
    """The same bytes without the context, signed elsewhere by the same key, do not vouch for a pack."""
    from tierkv.packs.manifest import Signature, canonical

    key, public = make_keys(tmp_path)
    with open_pack(place) as pack:
        bare = read_private(key).sign(canonical(pack.manifest.raw)).hex()
        sign_in_place(place, pack.manifest.raw, [Signature(public, bare)])
    with pytest.raises(PackError, match="not over this manifest"):
        open_pack(place)


def test_the_reading_of_who_signed_needs_no_demand(place: Path, tmp_path: Path) -> None:
    key, public = make_keys(tmp_path)
    with open_pack(place) as pack:
        assert pack.signers == () and not pack.strict
        assert check(pack.manifest, trusted=None, place="here") == []
        made = sign(pack.manifest.raw, read_private(key))
    assert made.public_key == public == read_public(str(key)) == read_public(public.upper())


# -- signing ----------------------------------------------------------------------------------------------------------------


def test_signing_changes_the_root_alone_and_a_second_key_keeps_the_first(place: Path, tmp_path: Path) -> None:
    before = files_of(place)
    publics = []
    for name in ("one", "two"):
        key, public = make_keys(tmp_path, name)
        publics.append(public)
        signed(place, key)
        after = files_of(place)
        assert {file for file in after if after[file] != before.get(file)} == {ROOT} and after.keys() == before.keys()
    group, plain = group_of(after), group_of(before)
    assert [one["public_key"] for one in group["attributes"]["signatures"]] == publics
    assert group["attributes"][ATTRIBUTE] == plain["attributes"][ATTRIBUTE]
    assert verify(place, trusted=publics[1:]).signers == tuple(publics)
    assert found(place) == {}
    leftovers = {path.name for path in tmp_path.iterdir()} - {place.name, "one.pem", "one.pub", "two.pem", "two.pub"}
    assert not leftovers and not list(tmp_path.rglob("*.tmp"))


def test_signing_keeps_who_may_read_a_pack_and_the_link_to_it(place: Path, tmp_path: Path) -> None:
    file = place / ROOT if place.is_dir() else place
    file.chmod(0o640)
    link = tmp_path / f"link{place.suffix}"
    link.symlink_to(place)
    key, public = make_keys(tmp_path)
    signed(link, key)
    assert link.is_symlink() and verify(place).signers == (public,)
    assert file.stat().st_mode & 0o777 == 0o640


def test_signing_twice_with_one_key_is_the_same_bytes(place: Path, tmp_path: Path) -> None:
    key, _ = make_keys(tmp_path)
    with open_pack(place) as pack:
        raw = pack.manifest.raw
    seen = []
    for _ in range(2):
        sign_in_place(place, raw, [sign(raw, read_private(key))])
        seen.append(files_of(place) if place.is_dir() else place.read_bytes())
    assert seen[0] == seen[1]


@pytest.mark.parametrize("broken", ["replace", "fsync", "no space"])
def test_signing_that_breaks_off_leaves_the_old_pack_whole(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    key, _ = make_keys(tmp_path)
    before = place.read_bytes() if place.is_file() else files_of(place)
    names = sorted(str(path) for path in tmp_path.rglob("*"))

    def fails(*given: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as planted:
        if broken == "replace":
            planted.setattr(Path, "replace", fails)
        elif broken == "fsync":
            planted.setattr("os.fsync", fails)
        else:
            planted.setattr("tierkv.packs.archive._central_header" if place.is_file() else "os.fsync", fails)
        with pytest.raises(PackError, match="cannot be written: No space left on device; free some space"):
            signed(place, key)
    assert (place.read_bytes() if place.is_file() else files_of(place)) == before
    assert sorted(str(path) for path in tmp_path.rglob("*")) == names
    assert verify(place).findings == ()


def test_more_signatures_than_are_read_are_not_written(place: Path, tmp_path: Path) -> None:
    key, _ = make_keys(tmp_path)
    with open_pack(place) as pack:
        raw = pack.manifest.raw
    with pytest.raises(PackError, match="at most 16"):
        sign_in_place(place, raw, [sign(raw, read_private(key))] * 17)
    assert found(place) == {}


@pytest.mark.parametrize("kind", ["rsa", "secp112r1", "text", "empty", "large", "absent", "folder", "encrypted"])
def test_what_is_no_key_is_told_in_a_sentence(tmp_path: Path, kind: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    path, pem, pkcs8 = tmp_path / "key", Encoding.PEM, PrivateFormat.PKCS8
    public = path
    if kind == "rsa":
        key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
        path.write_bytes(key.private_bytes(pem, pkcs8, NoEncryption()))
        public = tmp_path / "public"
        public.write_bytes(key.public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo))
    elif kind == "secp112r1":  # a curve that the library has no name for
        path.write_text(ODD_KEY)
    elif kind == "encrypted":
        path.write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, BestAvailableEncryption(b"x")))
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes({"text": b"no key", "empty": b"", "large": bytes(100_000)}[kind])
    for read, given in ((read_private, path), (read_public, public)):
        with pytest.raises(PackError, match=r"no key that can be used here|give the file of a key"):
            read(given)


ODD_KEY = "".join(
    f"-----{edge} PRIVATE KEY-----\n{body}"
    for edge, body in (
        (
            "BEGIN",
            "ME4CAQAwEAYHKoZIzj0CAQYFK4EEAAYENzA1AgEBBA4LIyDNTRCDQJsCmAhhTKEg\nAx4ABJhTNCyjUgHvOckBPmZCVD5dv1tScPqHzN0TLhs=\n",
        ),
        ("END", ""),
    )
)


def test_a_new_key_is_its_owners_alone_and_writes_over_nothing(tmp_path: Path) -> None:
    path, public = make_keys(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600 and len(public) == 64
    before = path.read_bytes()
    with pytest.raises(PackError, match="never written over"):
        make_keys(tmp_path)
    with pytest.raises(PackError, match=r"cannot|give a place"):
        make_keys(tmp_path / "absent")
    assert path.read_bytes() == before
    assert hashlib.sha256(before).digest() and TINY.block_bytes == 64


def test_without_the_package_for_it_signatures_are_left_alone_or_demanded_in_vain(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, public = make_keys(tmp_path)
    signed(place, key)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with open_pack(place) as pack:
        assert pack.signers == ()
    with pytest.raises(PackError, match=r"pip install 'tierkv\[sign\]'"):
        open_pack(place, trusted=[public])
