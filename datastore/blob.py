"""Data blob: the container of a chunk or a small file (magic, CRC, payload).

Layout: docs/formats.md, "Data blob". Keys, compression and digests are `datastore.codec`'s; this module only knows the
container.
"""

from dataclasses import dataclass, field
from enum import Enum
from struct import Struct
from typing import Final, Self

from core.buffers import Buffer
from core.errors import FormatError
from datastore.checksums import crc32

_PLAIN: Final = Struct(
    "<8s"  #  0  magic
    "I"    #  8  CRC-32 over everything after the header of the kind
)  # fmt: skip
_ENCRYPTED: Final = Struct(
    "<8s"  #  0  magic
    "I"    #  8  CRC-32, see above
    "16s"  # 12  IV
    "16s"  # 28  AES-GCM tag
)  # fmt: skip
#: Bytes of plain data a blob may hold.
MAX_BLOB_SIZE: Final = 128 << 20
#: Bytes of plain data a chunk may hold.
MAX_CHUNK_SIZE: Final = 16 << 20
#: Bytes of the largest header.
MAX_HEADER_SIZE: Final = _ENCRYPTED.size
#: An encoded blob is at most this long.
MAX_ENCODED_BLOB: Final = MAX_BLOB_SIZE + MAX_HEADER_SIZE
#: An encoded chunk is at most this long.
MAX_ENCODED_CHUNK: Final = MAX_CHUNK_SIZE + MAX_HEADER_SIZE


class BlobKind(Enum):
    """The four magics: first 8 bytes of SHA-256 of a text."""

    PLAIN = bytes.fromhex("42ab3807be8370a1")
    PLAIN_ZSTD = bytes.fromhex("31b958426fb6a37f")
    ENCRYPTED = bytes.fromhex("7b6785be222d4cf0")
    ENCRYPTED_ZSTD = bytes.fromhex("e6591bbf0bbfd80b")

    @property
    def compressed(self) -> bool:
        """True if the payload is a zstd frame (inside the encryption, if there is one)."""
        return self in (BlobKind.PLAIN_ZSTD, BlobKind.ENCRYPTED_ZSTD)

    @property
    def encrypted(self) -> bool:
        """True if the payload is AES-256-GCM ciphertext."""
        return self in (BlobKind.ENCRYPTED, BlobKind.ENCRYPTED_ZSTD)

    @property
    def header_size(self) -> int:
        """Bytes before the payload."""
        return _ENCRYPTED.size if self.encrypted else _PLAIN.size


@dataclass(frozen=True, slots=True)
class Opened:
    """The plain chunk in a blob, decoded and compared with `digest` in this process; made by `ChunkCodec.opened`."""

    digest: bytes  #: its name, of a chunk that is not encrypted
    data: Buffer  #: not to be changed: several readers may have it


@dataclass(frozen=True, slots=True)
class Blob:
    """One encoded blob, header and payload apart so that neither is copied to join them."""

    kind: BlobKind
    crc: int
    payload: Buffer  #: as stored: raw data, a zstd frame, or ciphertext
    iv: bytes = b""  #: 16 bytes if encrypted
    tag: bytes = b""  #: 16 bytes if encrypted
    #: There if whoever brought the blob had to decode it anyway, so that its reader need not do so again.
    opened: Opened | None = field(default=None, compare=False, repr=False)

    @classmethod
    def make(cls, kind: BlobKind, payload: Buffer, *, iv: bytes = b"", tag: bytes = b"") -> Self:
        """A blob around `payload`, with its CRC computed."""
        return cls(kind, crc32(payload), payload, iv, tag)

    @classmethod
    def parse(cls, data: Buffer, *, where: str) -> Self:
        """Read the encoded blob `data`; the payload is a view of it. The CRC is not compared: `check` does.

        Raises:
            FormatError: too short, or an unknown magic.
        """
        view = memoryview(data)
        if len(view) < _PLAIN.size:
            raise FormatError("read blob", where, f"{len(view)} bytes, a header has {_PLAIN.size}")
        try:
            kind = BlobKind(bytes(view[:8]))
        except ValueError:
            raise FormatError("read blob", where, f"unknown magic {bytes(view[:8]).hex()}") from None
        if len(view) < kind.header_size:
            raise FormatError(
                "read blob", where, f"{len(view)} bytes, an encrypted blob's header has {kind.header_size}"
            )
        if kind.encrypted:
            _, crc, iv, tag = _ENCRYPTED.unpack_from(view)
            return cls(kind, crc, view[_ENCRYPTED.size :], iv, tag)
        return cls(kind, _PLAIN.unpack_from(view)[1], view[_PLAIN.size :])

    def check(self, *, where: str) -> None:
        """Compare the CRC with the payload.

        Raises:
            FormatError: they differ.
        """
        actual = crc32(self.payload)
        if actual != self.crc:
            raise FormatError("read blob", where, f"CRC is {actual:08x}, the header says {self.crc:08x}")

    @property
    def header(self) -> bytes:
        """The encoded header."""
        if self.kind.encrypted:
            return _ENCRYPTED.pack(self.kind.value, self.crc, self.iv, self.tag)
        return _PLAIN.pack(self.kind.value, self.crc)

    def __len__(self) -> int:
        return self.kind.header_size + len(self.payload)

    def __bytes__(self) -> bytes:
        return b"".join((self.header, self.payload))
