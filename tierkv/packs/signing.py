"""Who vouches for a pack: Ed25519 signatures over its manifest, which has the SHA-256 of everything else.

Keys are files as openssl makes them (`openssl genpkey -algorithm ed25519`), or `tierkv pack keygen`; public ones also as 64 hex
digits. RFC 8032; the `cryptography` package does the arithmetic.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tierkv.errors import PackError
from tierkv.packs.manifest import Manifest, Signature, canonical

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_CONTEXT: Final = b"tierkv-pack-1\0"
"""Before what is signed: such a signature says nothing about any other kind of document."""
_MAX_KEY_FILE: Final = 16 << 10
log = logging.getLogger("tierkv")


def message(raw: Mapping[str, Any]) -> bytes:  # Any: JSON
    """What is signed."""
    return _CONTEXT + canonical(raw)


def make_key(path: Path) -> str:
    """Write a new private key, readable for its owner alone, and its public key beside it (.pub, hex); returns that.

    Raises PackError.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    public = _hex(key.public_key())
    _write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    try:
        _write_new(public_file(path), f"{public}\n".encode(), mode=0o644)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return public


def public_file(path: Path) -> Path:
    """Where the public key of a private key's file is."""
    return path.with_name(f"{path.stem}.pub")


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    """A file that was not there, whole or not at all."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise PackError(f"{path}: exists already; a key is never written over: give another name") from None
    except OSError as error:
        raise PackError(f"{path}: {error.strerror}; give a place that can be written to") from None
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise PackError(f"{path}: {error.strerror}; give a place with room") from None


def read_private(path: Path) -> "Ed25519PrivateKey":
    """A private key. Raises PackError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # no PEM; encrypted; a curve that it does not know
        raise _no_key(path, "an unencrypted private key in PEM form") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "an Ed25519 private key")
    return key


def read_public(given: str | Path) -> str:
    """A public key in hex: of 64 hex digits, of a PEM file (also a private one's), or of a file with the hex digits.

    Raises PackError.
    """
    if re.fullmatch(r"[0-9a-fA-F]{64}", str(given)):
        return str(given).lower()
    path = Path(given)
    data = _read(path)
    if re.fullmatch(rb"\s*[0-9a-fA-F]{64}\s*", data):
        return data.decode().strip().lower()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY" in data:
        return _hex(read_private(path).public_key())
    try:
        key = load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _no_key(path, "a public key in PEM form, or 64 hex digits") from None
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, "an Ed25519 public key")
    return _hex(key)


def sign(raw: Mapping[str, Any], key: "Ed25519PrivateKey") -> Signature:  # Any: JSON
    """Sign a manifest."""
    return Signature(_hex(key.public_key()), key.sign(message(raw)).hex())


def check(manifest: Manifest, *, trusted: Sequence[str] | None, place: str) -> list[str]:
    """Public keys whose signatures are right. Raises PackError for one that is wrong, and when no trusted key signed.

    trusted: public keys in hex, one of which must have signed; None: nobody must have.
    """
    if not manifest.signatures and trusted is None:
        return []
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ModuleNotFoundError:
        if trusted is not None:
            raise PackError(
                f"{place}: signatures are checked by a package that is not here: pip install 'tierkv[sign]'"
            ) from None
        log.info("%s: its signatures are not checked: pip install 'tierkv[sign]'", place)
        return []

    data = message(manifest.raw)
    for one in manifest.signatures:
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(one.public_key)).verify(bytes.fromhex(one.signature), data)
        except (InvalidSignature, ValueError):
            raise PackError(
                f"{place}: the signature of key {one.public_key[:16]}… is not over this manifest: "
                "one of the two was changed; fetch the pack again from whom you trust"
            ) from None
    signers = [one.public_key for one in manifest.signatures]
    if trusted is not None and not set(signers) & set(trusted):
        by = f"signed by {', '.join(f'{key[:16]}…' for key in signers)}" if signers else "not signed"
        raise PackError(
            f"{place}: {by}; this configuration demands one of {', '.join(f'{key[:16]}…' for key in trusted)} "
            "(pack.signers): `tierkv pack sign` with one of those keys, or trust its signer"
        )
    return signers


def _hex(key: "Ed25519PublicKey") -> str:
    return key.public_bytes_raw().hex()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in its name
        why = error.strerror if isinstance(error, OSError) else error
        raise PackError(f"{path}: {why}; give the file of a key") from None
    if len(data) > _MAX_KEY_FILE:
        raise _no_key(path, "a file of a few hundred bytes")
    return data


def _no_key(path: Path, expected: str) -> PackError:
    return PackError(f"{path}: no key that can be used here: expected {expected} (see `tierkv pack keygen`)")
