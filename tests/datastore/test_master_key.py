import json
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from core.errors import FormatError, UsageError
from datastore.codec import CryptKey
from datastore.errors import PassphraseError
from datastore.keyfile import read_key_file
from datastore.master_key import MasterPublicKey, create_pair, unwrap_key, wrapped_key_blob

KEY = CryptKey.from_raw(bytes(range(32)))
CREATED = datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PEM, SPKI = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo


def pair(bits: int) -> tuple[bytes, bytes]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, key.public_key().public_bytes(PEM, SPKI)


@pytest.fixture(scope="module")
def short_pair() -> tuple[bytes, bytes]:
    """Of 3072 bits: enough, and quickly made."""
    return pair(3072)


def test_a_key_comes_back_with_the_time_it_was_made(short_pair: tuple[bytes, bytes]) -> None:
    private, public = short_pair
    wrapped = MasterPublicKey.parse(public, where="m.pem").wrap(KEY, created=CREATED, now=NOW)
    assert len(wrapped) == 384
    found = unwrap_key(wrapped, private, None, where="x", master="m")
    assert found.unlock(None, where="x") == KEY
    assert (found.created, found.modified, found.kdf) == (CREATED, NOW, None)
    assert found.fingerprint == KEY.fingerprint


def test_the_blob_is_plain_and_read_as_well_as_its_content(short_pair: tuple[bytes, bytes]) -> None:
    private, public = short_pair
    wrapped = MasterPublicKey.parse(public, where="m").wrap(KEY)
    blob = wrapped_key_blob(wrapped)
    assert blob[:8].hex() == "42ab3807be8370a1"
    assert blob[12:] == wrapped
    assert unwrap_key(blob, private, None, where="x", master="m").unlock(None, where="x") == KEY


def test_a_made_pair_has_4096_bits_and_a_passphrase() -> None:
    private, public = create_pair(b"master-password")
    assert private.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    master = MasterPublicKey.parse(public, where="m")
    assert (master.size, master.exponent, master.modulus.bit_length()) == (512, 65537, 4096)
    wrapped = master.wrap(KEY)
    assert len(wrapped_key_blob(wrapped)) == 524
    assert unwrap_key(wrapped, private, b"master-password", where="x", master="m").unlock(None, where="x") == KEY
    for wrong in (None, b"", b"master-passwort"):
        with pytest.raises(PassphraseError, match=r"master private key p\.pem: "):
            unwrap_key(wrapped, private, wrong, where="x", master="p.pem")


def test_a_passphrase_of_four_bytes_makes_no_pair() -> None:
    with pytest.raises(UsageError, match="at least 5 bytes"):
        create_pair(b"four")


def test_a_key_that_pbs_wrapped(golden: Path) -> None:
    with tarfile.open(golden / "store.tar") as archive:
        member = next(name for name in archive.getnames() if name.endswith("rsa-encrypted.key.blob"))
        file = archive.extractfile(member)
        assert file is not None
        blob = file.read()
    assert len(blob) == 524
    private = (golden / "keys/master-private.pem").read_bytes()
    found = unwrap_key(blob, private, b"master-password", where="x", master="m")
    original = read_key_file(golden / "keys/scrypt.key")
    assert found.unlock(None, where="x").fingerprint == original.fingerprint
    assert found.created == original.created
    # Ours for the same public key is the same but for the padding and the time.
    master = MasterPublicKey.parse((golden / "keys/master-public.pem").read_bytes(), where="m")
    ours = master.wrap(found.unlock(None, where="x"), created=found.created, now=found.modified)
    again = unwrap_key(ours, private, b"master-password", where="x", master="m")
    assert json.loads(again.encode()) == json.loads(found.encode())


def test_2048_bits_are_too_few() -> None:
    _, public = pair(2048)
    with pytest.raises(UsageError, match=r"of 2048 bits: it cannot hold 255 bytes; make one of 4096"):
        MasterPublicKey.parse(public, where="m").wrap(KEY)


def test_another_master_key_does_not_open_it(short_pair: tuple[bytes, bytes]) -> None:
    wrapped = MasterPublicKey.parse(short_pair[1], where="m").wrap(KEY)
    with pytest.raises(FormatError, match="not encrypted for this master key"):
        unwrap_key(wrapped, pair(3072)[0], None, where="x", master="m")


@pytest.mark.parametrize("change", ["flip", "short", "long", "empty"])
def test_damage_is_told_and_nothing_of_the_content(short_pair: tuple[bytes, bytes], change: str) -> None:
    private, public = short_pair
    wrapped = bytearray(MasterPublicKey.parse(public, where="m").wrap(KEY))
    if change == "flip":
        wrapped[100] ^= 4
    damaged = {"flip": wrapped, "short": wrapped[:-1], "long": wrapped + b"x", "empty": b""}[change]
    with pytest.raises(FormatError, match=r"decrypt the backup key x: ") as caught:
        unwrap_key(bytes(damaged), private, None, where="x", master="m")
    assert "data" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"\xff" * 99]
)
def test_what_is_no_public_key_is_refused(content: bytes) -> None:
    with pytest.raises(FormatError, match=r"master public key m\.pem: "):
        MasterPublicKey.parse(content, where="m.pem")


def test_a_key_of_another_kind_is_refused() -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(FormatError, match="no RSA key"):
        MasterPublicKey.parse(curve.public_key().public_bytes(PEM, SPKI), where="m")
    private = curve.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with pytest.raises(FormatError, match="no RSA key"):
        unwrap_key(b"", private, None, where="x", master="m")
    with pytest.raises(FormatError, match="no PEM file of a private key"):
        unwrap_key(b"", b"nothing", None, where="x", master="m")
