"""Master key: an RSA pair whose public half wraps the backup key into every encrypted snapshot.

Who has the private half, locked away, can restore snapshots whose key file is lost. Format: docs/formats.md, "Key
file".
"""

from datetime import datetime
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from core.errors import FormatError, UsageError
from datastore.blob import Blob, BlobKind
from datastore.codec import CryptKey
from datastore.errors import PassphraseError
from datastore.keyfile import KeyFile, check_passphrase

#: Bits of a new pair's modulus, PBS's size.
MASTER_KEY_BITS: Final = 4096

#: Bytes that PKCS #1 v1.5 adds at least.
_PADDING: Final = 11
#: Bits of the largest modulus that is used: a larger one only costs time.
_MAX_BITS: Final = 16384
#: Bytes of the largest wrapped key, as a blob.
MAX_WRAPPED_SIZE: Final = _MAX_BITS // 8 + 12


class MasterPublicKey:
    """The public half: can wrap backup keys, but not unwrap them."""

    __slots__ = ("_key",)

    def __init__(self, key: rsa.RSAPublicKey) -> None:
        self._key = key

    @classmethod
    def parse(cls, pem: bytes, *, where: str) -> "MasterPublicKey":
        """Read a PEM file (`master-public.pem`).

        Raises:
            FormatError: no RSA public key.
        """
        try:
            key = serialization.load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm):
            raise FormatError("read the master public key", where, "it is no PEM file of a public key") from None
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size > _MAX_BITS:
            raise FormatError("read the master public key", where, f"it is no RSA key of at most {_MAX_BITS} bits")
        return cls(key)

    @property
    def size(self) -> int:
        """Bytes of the modulus, and of a wrapped key."""
        return (self._key.key_size + 7) // 8

    @property
    def exponent(self) -> int:
        """The public exponent."""
        return self._key.public_numbers().e

    @property
    def modulus(self) -> int:
        """The modulus."""
        return self._key.public_numbers().n

    def wrap(self, key: CryptKey, *, created: datetime | None = None, now: datetime | None = None) -> bytes:
        """`key` as an unprotected key file, encrypted: `size` bytes.

        Args:
            key: the backup key.
            created: when it was made, as its key file says.
            now: with offset; else the clock's.

        Raises:
            UsageError: the modulus is too short for it.
        """
        text = KeyFile.make(key, None, kdf="none", created=created, now=now).encode()
        if len(text) > self.size - _PADDING:
            raise UsageError(
                "use the master key", f"of {self._key.key_size} bits", f"it cannot hold {len(text)} bytes",
                f"make one of {MASTER_KEY_BITS} bits with 'fleece key create-master-key'",
            )  # fmt: skip
        return self._key.encrypt(text, padding.PKCS1v15())


def wrapped_key_blob(wrapped: bytes) -> bytes:
    """The content of `rsa-encrypted.key.blob`: a plain, uncompressed blob, whatever the backup's crypt mode."""
    return bytes(Blob.make(BlobKind.PLAIN, wrapped))


def create_pair(passphrase: bytes) -> tuple[bytes, bytes]:
    """A new pair of PEM files: private (PKCS #8, encrypted with `passphrase`) and public. Takes seconds.

    Raises:
        UsageError: the passphrase is too short.
    """
    check_passphrase(passphrase)
    private = rsa.generate_private_key(public_exponent=65537, key_size=MASTER_KEY_BITS)
    return (
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase),
        ),
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    )  # fmt: skip


def needs_passphrase(private_pem: bytes) -> bool:
    """Whether the private half says that it is encrypted."""
    return b"ENCRYPTED" in private_pem


def unwrap_key(wrapped: bytes, private_pem: bytes, passphrase: bytes | None, *, where: str, master: str) -> KeyFile:
    """The unprotected key file in a wrapped key.

    Args:
        wrapped: the restored `rsa-encrypted.key`, or the blob file as a datastore holds it.
        private_pem: the private half.
        passphrase: its own, None if it has none.
        where: path of the wrapped key, for messages.
        master: path of the private half, for messages.

    Raises:
        PassphraseError: the private half's passphrase is missing or wrong.
        FormatError: no such private key, or it is not the one that this was wrapped for.
    """
    private = _private_key(private_pem, passphrase, master)
    size = (private.key_size + 7) // 8
    if len(wrapped) == size + 12:
        wrapped = bytes(Blob.parse(wrapped, where=where).payload)
    if len(wrapped) != size:
        why = f"it has {len(wrapped)} bytes, a key wrapped for this master key has {size}"
        raise FormatError(
            "decrypt the backup key", where, why, "restore it with 'fleece restore SNAPSHOT rsa-encrypted.key'"
        )
    other = "it was not encrypted for this master key, or is damaged"
    try:
        text = private.decrypt(wrapped, padding.PKCS1v15())
        found = KeyFile.parse(text, where=where)
    except ValueError:  # FormatError too: newer OpenSSL answers a wrong key with noise instead of an error
        raise FormatError("decrypt the backup key", where, other) from None
    if found.kdf is not None:
        raise FormatError("decrypt the backup key", where, "the key in it has a passphrase, which no writer makes")
    return found


def _private_key(pem: bytes, passphrase: bytes | None, where: str) -> rsa.RSAPrivateKey:
    what = "read the master private key"
    encrypted = needs_passphrase(pem)
    if encrypted and not passphrase:
        raise PassphraseError(what, where, "it is protected by a passphrase")
    try:
        key = serialization.load_pem_private_key(pem, passphrase if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if encrypted:
            raise PassphraseError(what, where, "the passphrase is wrong, or the file is damaged") from None
        raise FormatError(what, where, "it is no PEM file of a private key") from None
    if not isinstance(key, rsa.RSAPrivateKey) or key.key_size > _MAX_BITS:
        raise FormatError(what, where, f"it is no RSA key of at most {_MAX_BITS} bits")
    return key
