"""Digests, compression and encryption of chunks and small files: the only module that knows keys.

Rules: docs/formats.md, "Data blob". Everything runs in the calling thread with the GIL released in the C code, so
callers hand whole batches to worker threads.
"""

import hashlib
import hmac
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Self

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from core.buffers import Buffer, WritableBuffer
from core.errors import FleeceError, FormatError, UsageError
from datastore import sha256
from datastore.blob import MAX_BLOB_SIZE, MAX_CHUNK_SIZE, MAX_ENCODED_CHUNK, Blob, BlobKind, Opened
from datastore.crypt_mode import CryptMode
from datastore.errors import CorruptChunkError, KeyNeededError

#: Bytes of a raw encryption key.
KEY_SIZE: Final = 32
#: The level PBS's clients use; higher ones cost far more time than they save space.
ZSTD_LEVEL: Final = 1
#: Bytes of a chunk of a disk image, and of its zero chunk.
ZERO_CHUNK_SIZE: Final = 4 << 20

_IV_SIZE: Final = 16
#: `update_into` may ask for a block less a byte of room behind the data; GCM never fills it.
_BLOCK_ROOM: Final = 15
_ID_KEY_SALT: Final = b"_id_key"
_ID_KEY_ROUNDS: Final = 10
#: SHA-256 of `Proxmox Backup Encryption Key Fingerprint`; its keyed digest is a key's fingerprint.
_FINGERPRINT_INPUT: Final = bytes.fromhex("6ed0ef77471fff4d55c7a8fe4a9db62161407f134c725ddf30992d25ec45ed26")
#: SHA-256 of 4 MiB of zeros: the zero chunk of every unencrypted backup.
_PLAIN_ZERO_DIGEST: Final = bytes.fromhex("bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8")
#: Bytes of input per step when a frame does not tell its size. Four bytes can make a block of 128 KiB, so one step
#: makes at most 33 MB before the cap is looked at.
_STREAM_STEP: Final = 1024
#: Streams may look back this far (zstd's own limit for decoders); larger windows are refused before they are allocated.
_MAX_WINDOW: Final = 128 << 20


def format_fingerprint(fingerprint: bytes) -> str:
    """A key's fingerprint as people and manifests write it: 32 pairs of hex digits with colons."""
    return fingerprint.hex(":")


def parse_fingerprint(text: str) -> bytes:
    """The 32 bytes of a fingerprint; colons may be missing, letters may be upper case.

    Raises:
        UsageError: anything else.
    """
    digits = text.replace(":", "")
    if len(digits) != 64 or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
        raise UsageError("read the key fingerprint", repr(text), "32 pairs of hex digits are needed")
    return bytes.fromhex(digits)


class CryptKey:
    """A backup encryption key and what is derived from it."""

    __slots__ = ("_raw", "fingerprint", "id_key")

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_SIZE:
            raise UsageError("use the encryption key", "given", f"{len(raw)} bytes, a key has {KEY_SIZE}")
        self._raw = bytes(raw)
        #: 32 bytes that digests and signatures are keyed with.
        self.id_key = hashlib.pbkdf2_hmac("sha256", self._raw, _ID_KEY_SALT, _ID_KEY_ROUNDS, 32)
        #: 32 bytes that name the key and may be shown.
        self.fingerprint = hashlib.sha256(_FINGERPRINT_INPUT + self.id_key).digest()

    @classmethod
    def from_raw(cls, raw: bytes) -> Self:
        """The key whose 32 secret bytes are `raw`.

        Raises:
            UsageError: another length.
        """
        return cls(raw)

    @property
    def raw(self) -> bytes:
        """The 32 secret bytes."""
        return self._raw

    @property
    def fingerprint_text(self) -> str:
        """The fingerprint as manifests write it."""
        return format_fingerprint(self.fingerprint)

    def sign(self, message: bytes) -> bytes:
        """The 32-byte authentication tag of `message`: HMAC-SHA256 under the id key."""
        return hmac.digest(self.id_key, message, "sha256")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CryptKey) and hmac.compare_digest(self._raw, other._raw)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"CryptKey({self.fingerprint[:8].hex(':')})"  # never the secret


class _Contexts(threading.local):
    """The zstd contexts of one thread, and room for a chunk between decryption and decompression.

    A context must not be used by two threads at once, and a new one per chunk costs as much as compressing 100 KiB;
    fresh room costs a quarter of AES-GCM's rate in page faults. trio keeps its worker threads, so each makes its own
    once; they go with the thread. A pool with a lock would do the same with more code.
    """

    def __init__(self) -> None:
        self._room = bytearray()
        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True, write_checksum=False)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)

    def room(self, length: int) -> bytearray:
        """At least `length` bytes that the next caller in this thread gets again (new ones if more than a chunk)."""
        if length > MAX_ENCODED_CHUNK:
            return bytearray(length)
        if length > len(self._room):
            self._room = bytearray(length)
        return self._room


_contexts: Final = _Contexts()


class ChunkCodec:
    """Turns plain chunks and small files into blobs and back, with one key or none.

    `mode` says how new data is written: NONE and SIGN_ONLY make plain blobs and plain digests, ENCRYPT encrypts and
    keys the digests. What is read tells by itself whether it is encrypted; the key then has to be there. `needs` is
    the fingerprint of the key that the data at hand was written with, where known (from a manifest): messages name it.

    May be used by several threads at once.
    """

    def __init__(
        self, key: CryptKey | None = None, mode: CryptMode = CryptMode.NONE, *, needs: bytes | None = None
    ) -> None:
        if key is None and mode is not CryptMode.NONE:
            raise UsageError("use crypt mode", mode.value, "it needs an encryption key", "give one with --keyfile")
        self.key: Final = key
        self.mode: Final = mode
        self.needs: Final = needs
        self._suffix: Final = key.id_key if key is not None and mode is CryptMode.ENCRYPT else b""
        self._zero_digests: Final[dict[int, bytes]] = {}
        if not self._suffix:
            self._zero_digests[ZERO_CHUNK_SIZE] = _PLAIN_ZERO_DIGEST

    def digest(self, data: Buffer) -> bytes:
        """The 32-byte name of the plain chunk `data` under this codec's mode."""
        return self.digest_many([data])[0]

    def digest_many(self, chunks: Sequence[Buffer]) -> list[bytes]:
        """The names of `chunks`, in order; several at once are quicker than one by one."""
        return sha256.digest_many(chunks, suffix=self._suffix)

    def zero_digest(self, size: int = ZERO_CHUNK_SIZE) -> bytes:
        """The name of a chunk of `size` zeros (at most 16 MiB); computed once per size."""
        digest = self._zero_digests.get(size)
        if digest is None:
            if not 0 < size <= MAX_CHUNK_SIZE:
                raise FleeceError("name the zero chunk", f"of {size} bytes", f"chunks have 1 to {MAX_CHUNK_SIZE} bytes")
            digest = self._zero_digests[size] = self.digest(bytes(size))
        return digest

    def encode(self, data: Buffer, *, compress: bool = True) -> Blob:
        """The blob of `data` (at most 128 MiB), compressed if that is not longer, encrypted in mode ENCRYPT.

        Uncompressed and unencrypted, the blob refers to `data`: it must not change while the blob is used.

        Raises:
            FleeceError: more than 128 MiB.
        """
        payload, compressed = _compressed(data, compress)
        if self.key is None or self.mode is not CryptMode.ENCRYPT:
            return Blob.make(BlobKind.PLAIN_ZSTD if compressed else BlobKind.PLAIN, payload)
        kind = BlobKind.ENCRYPTED_ZSTD if compressed else BlobKind.ENCRYPTED
        iv = os.urandom(_IV_SIZE)
        encryptor = Cipher(AES(self.key.raw), GCM(iv)).encryptor()
        # `AESGCM.encrypt` would join data and tag, with several copies: a fifth of this rate.
        ciphertext = bytearray(len(payload) + _BLOCK_ROOM)
        written = _update_into(encryptor, payload, ciphertext)
        encryptor.finalize()
        return Blob.make(kind, memoryview(ciphertext)[:written], iv=iv, tag=encryptor.tag)

    def encode_blob(self, data: Buffer) -> Blob:
        """The blob of a small file: as `encode`, for `put_blob`."""
        return self.encode(data)

    def decode(
        self, blob: Blob, *, digest: bytes | None, size: int | None, crypt_mode: CryptMode | None, where: str
    ) -> Buffer:
        """The plain chunk in `blob`, with everything checked that can be.

        In this order: CRC, crypt mode, authentication tag, length, digest. So a `KeyNeededError` means that the CRC was
        right. An uncompressed plain chunk is returned as it lies in `blob`, uncopied.

        Args:
            blob: at most 16 MiB of plain data.
            digest: the chunk's name, None if there is none to compare.
            size: the chunk's plain length in bytes, None if unknown.
            crypt_mode: of the archive the chunk belongs to; None accepts encrypted and plain ones.
            where: the chunk or archive, for messages.

        Raises:
            CorruptChunkError: CRC, tag, zstd frame, length or digest are wrong.
            KeyNeededError: encrypted, and the key is missing or another one.
            FormatError: plain in an encrypted archive or the other way round; the chunk itself may be good.
        """
        data = self._opened(blob, MAX_CHUNK_SIZE, size, crypt_mode, where)
        if digest is not None and not _is_opened(blob, digest):
            actual = sha256.digest_many([data], suffix=self._suffix_of(blob))[0]
            if actual != digest:
                raise _digest_error(where, actual, digest)
        return data

    def opened(self, blob: Blob, digest: bytes, *, where: str) -> Blob:
        """The same blob, checked as `decode` does, with what it holds: the next `decode` of `digest` is done already.

        Encrypted blobs are only checked by their CRC, and stay as they are. Errors as `decode`.
        """
        if blob.kind.encrypted:
            try:
                blob.check(where=where)
            except FormatError as error:
                raise CorruptChunkError(error.what, where, error.why) from error
            return blob
        data = self.decode(blob, digest=digest, size=None, crypt_mode=None, where=where)
        return replace(blob, opened=Opened(digest, data))

    def decode_many(
        self,
        blobs: Sequence[tuple[Blob | Callable[[], Blob], bytes, int]],
        *,
        crypt_mode: CryptMode | None,
        where: str,
        buffers: Sequence[WritableBuffer] = (),
    ) -> list[Buffer | FleeceError]:
        """Decode a batch of (blob, digest, plain size), digests side by side.

        Args:
            blobs: the chunks. A function in place of a blob is called when its turn comes, and the blob let go of at
                once: so reading, CRC and decompression of a chunk happen in one core's cache. What it raises is the
                chunk's error.
            crypt_mode: as in `decode`.
            where: the archive, for messages.
            buffers: one per blob or none at all; a chunk that fits is decompressed into its buffer, which saves the
                page faults of fresh memory.

        Returns:
            one item per blob, in order: the plain chunk (perhaps a view of its buffer), or the error that `decode`
            would have raised.
        """
        results: list[Buffer | FleeceError] = []
        plain: list[int] = []
        keyed: list[int] = []
        for number, (source, digest, size) in enumerate(blobs):
            try:
                blob = source if isinstance(source, Blob) else source()
                into = buffers[number] if buffers else None
                results.append(self._opened(blob, MAX_CHUNK_SIZE, size, crypt_mode, _at(where, digest), into))
                if not _is_opened(blob, digest):
                    (keyed if blob.kind.encrypted else plain).append(number)
            except FleeceError as error:
                results.append(error)
        for numbers, suffix in ((plain, b""), (keyed, self.key.id_key if self.key is not None else b"")):
            if not numbers:
                continue
            chunks = [chunk for number in numbers if not isinstance(chunk := results[number], FleeceError)]
            actuals = sha256.digest_many(chunks, suffix=suffix)
            for number, actual in zip(numbers, actuals, strict=True):
                digest = blobs[number][1]
                if actual != digest:
                    results[number] = _digest_error(_at(where, digest), actual, digest)
        return results

    def decode_blob(self, raw: Buffer, *, crypt_mode: CryptMode | None, where: str) -> bytes:
        """The small file in the encoded blob `raw`; there is no digest to compare, the manifest has one of `raw`.

        Raises:
            FormatError, CorruptChunkError, KeyNeededError: as `decode`.
        """
        return bytes(self._opened(Blob.parse(raw, where=where), MAX_BLOB_SIZE, None, crypt_mode, where))

    def _suffix_of(self, blob: Blob) -> bytes:
        return self.key.id_key if self.key is not None and blob.kind.encrypted else b""

    def _opened(
        self,
        blob: Blob,
        cap: int,
        size: int | None,
        crypt_mode: CryptMode | None,
        where: str,
        into: WritableBuffer | None = None,
    ) -> Buffer:
        if blob.opened is None:
            try:
                blob.check(where=where)
            except FormatError as error:
                raise CorruptChunkError(error.what, where, error.why) from error
        if crypt_mode is not None and blob.kind.encrypted is not (crypt_mode is CryptMode.ENCRYPT):
            state = "encrypted" if blob.kind.encrypted else "not encrypted"
            raise FormatError("read blob", where, f"it is {state}, the manifest says crypt mode {crypt_mode.value}")
        if blob.opened is not None:
            data = blob.opened.data
            if size is not None and len(data) != size:
                raise _length_error(where, len(data), cap, size)
            return _moved(data, into) if blob.kind.compressed else data
        payload = self._decrypted(blob, where) if blob.kind.encrypted else blob.payload
        if blob.kind.compressed:
            return _decompressed(payload, cap, size, where, into)
        if len(payload) > cap or (size is not None and len(payload) != size):
            raise _length_error(where, len(payload), cap, size)
        return payload

    def _decrypted(self, blob: Blob, where: str) -> Buffer:
        needed = format_fingerprint(self.needs) if self.needs is not None else "of its backup"
        if self.key is None:
            raise KeyNeededError("read blob", where, f"it is encrypted with the key {needed}", "give it with --keyfile")
        if self.needs is not None and self.needs != self.key.fingerprint:
            raise KeyNeededError(
                "read blob", where, f"it is encrypted with the key {needed}, given is {self.key.fingerprint_text}"
            )
        decryptor = Cipher(AES(self.key.raw), GCM(blob.iv, blob.tag)).decryptor()
        length = len(blob.payload) + _BLOCK_ROOM
        output = _contexts.room(length) if blob.kind.compressed else bytearray(length)
        written = _update_into(decryptor, blob.payload, output)
        try:
            decryptor.finalize()
        except InvalidTag:
            why = f"its authentication tag does not match: altered, or not encrypted with {self.key.fingerprint_text}"
            raise CorruptChunkError("read blob", where, why) from None
        return memoryview(output)[:written]


def encode_plain(data: Buffer, *, compress: bool = True) -> Blob:
    """The blob of `data` without encryption, whatever the mode of the backup: manifests and the master key's blob."""
    payload, compressed = _compressed(data, compress)
    return Blob.make(BlobKind.PLAIN_ZSTD if compressed else BlobKind.PLAIN, payload)


def decode_plain(raw: Buffer, *, max_size: int, where: str) -> bytes:
    """The content (at most `max_size` bytes) of an encoded blob that must not be encrypted, CRC checked.

    Raises:
        FormatError: encrypted, too large, or broken.
    """
    blob = Blob.parse(raw, where=where)
    if blob.kind.encrypted:
        raise FormatError("read blob", where, "it is encrypted, and this kind of file never is")
    blob.check(where=where)
    if blob.kind.compressed:
        return bytes(_decompressed(blob.payload, max_size, None, where))
    if len(blob.payload) > max_size:
        raise _length_error(where, len(blob.payload), max_size, None)
    return bytes(blob.payload)


def _compressed(data: Buffer, compress: bool) -> tuple[Buffer, bool]:
    """`data`, or its zstd frame if that is not longer, and which of them it is."""
    length = len(data)
    if length > MAX_BLOB_SIZE:
        raise FleeceError("encode blob", f"of {length} bytes", f"at most {MAX_BLOB_SIZE} are possible")
    if compress and length:
        frame = _contexts.compressor.compress(data)
        if len(frame) <= length:  # equality keeps the frame, as PBS does
            return frame, True
    return data, False


def _decompressed(
    payload: Buffer, cap: int, size: int | None, where: str, into: WritableBuffer | None = None
) -> Buffer:
    """The content of a zstd stream: one frame as a rule, several or frames without a size also pass."""
    try:
        parameters = zstandard.get_frame_parameters(payload)
        known = parameters.content_size
        if known in (0, zstandard.CONTENTSIZE_UNKNOWN):
            data = _streamed(payload, cap, size, where)
        else:
            # The frame's own word sizes the buffer, so it is looked at first.
            if known > cap or (size is not None and known > size):
                raise _length_error(where, known, cap, size)
            if into is not None and known == size and known <= len(into):
                room = memoryview(into)[:known]
                if _filled(payload, room):
                    return room
            try:
                data = _contexts.decompressor.decompress(payload, allow_extra_data=False)
            except zstandard.ZstdError:
                # Rare: more frames behind the first (fine), or rubbish, which the stream says in the same way.
                data = _streamed(payload, cap, size, where)
    except zstandard.ZstdError as error:
        raise CorruptChunkError("read blob", where, f"the zstd frame is broken ({error})") from error
    if size is not None and len(data) != size:
        raise _length_error(where, len(data), cap, size)
    return data


def _is_opened(blob: Blob, digest: bytes) -> bool:
    return blob.opened is not None and blob.opened.digest == digest


def _moved(data: Buffer, into: WritableBuffer | None) -> Buffer:
    """`data`, in the caller's buffer if it fits: the memory it came in goes with the blob, so memory stays bounded."""
    if into is None or len(data) > len(into):
        return data
    room = memoryview(into)[: len(data)]
    room[:] = data
    return room


def _filled(payload: Buffer, room: memoryview) -> bool:
    """Decompress the only frame in `payload` into all of `room`; False if it is anything else, which others explain."""
    try:
        with _contexts.decompressor.stream_reader(payload, read_size=len(payload)) as stream:
            # One call for a frame that fits is one pass of zstd, without a window of its own.
            return stream.readinto(room) == len(room) and not stream.read(1)
    except zstandard.ZstdError:
        return False


def _streamed(payload: Buffer, cap: int, size: int | None, where: str) -> bytes:
    view = memoryview(payload)
    pieces: list[bytes] = []
    total = position = 0
    limit = cap if size is None else min(cap, size)
    stream = _contexts.decompressor.decompressobj()
    while position < len(view):
        if stream.eof:
            stream = _contexts.decompressor.decompressobj()
        step = view[position : position + _STREAM_STEP]
        piece = stream.decompress(step)
        position += len(step) - len(stream.unused_data)
        total += len(piece)
        if total > limit:
            raise _length_error(where, total, cap, size)
        pieces.append(piece)
    if not stream.eof:
        raise CorruptChunkError("read blob", where, "the zstd frame ends too early")
    return b"".join(pieces)


def _update_into(context: Any, data: Buffer, output: bytearray) -> int:
    # cryptography 38 takes any buffers, but its annotations say bytes.
    written: int = context.update_into(data, output)
    return written


def _at(where: str, digest: bytes) -> str:
    return f"{where} chunk {digest.hex()}"


def _length_error(where: str, actual: int, cap: int, size: int | None) -> CorruptChunkError:
    wanted = f"at most {cap} are allowed" if size is None or actual > cap else f"{size} are expected"
    return CorruptChunkError("read blob", where, f"{actual} or more bytes of plain data, {wanted}")


def _digest_error(where: str, actual: bytes, digest: bytes) -> CorruptChunkError:
    return CorruptChunkError("read blob", where, f"the digest of its data is {actual.hex()}, not {digest.hex()}")
