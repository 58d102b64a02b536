"""Blobs that come with what they hold: fetched, decoded and compared once, for whoever reads them."""

from dataclasses import replace
from typing import NoReturn

import pytest

from core.errors import FleeceError, FormatError
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import CorruptChunkError


def test_an_opened_blob_is_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who fetched it has decoded and compared it; the mark counts for that digest only."""
    codec, data = ChunkCodec(), b"words " * 10000
    digest = codec.digest(data)
    blob = codec.opened(codec.encode(data), digest, where="x")
    assert bytes(blob) == bytes(codec.encode(data))
    assert blob == codec.encode(data)
    buffer = bytearray(len(data) + 5)

    def fail(*args: object, **options: object) -> NoReturn:
        raise AssertionError("decoded or hashed again")

    with monkeypatch.context() as patched:
        patched.setattr("datastore.codec._decompressed", fail)
        patched.setattr("datastore.blob.crc32", fail)
        patched.setattr("datastore.codec.sha256.digest_many", fail)
        one = codec.decode(blob, digest=digest, size=len(data), crypt_mode=CryptMode.NONE, where="x")
        assert bytes(one) == data
        [two] = codec.decode_many([(blob, digest, len(data))], crypt_mode=None, where="x", buffers=[buffer])
        assert not isinstance(two, FleeceError)
        assert bytes(two) == data
        assert buffer[: len(data)] == data
    with pytest.raises(CorruptChunkError, match="expected"):
        codec.decode(blob, digest=digest, size=len(data) - 1, crypt_mode=None, where="x")
    with pytest.raises(FormatError, match="not encrypted"):
        codec.decode(blob, digest=digest, size=len(data), crypt_mode=CryptMode.ENCRYPT, where="x")
    with pytest.raises(CorruptChunkError, match="digest"):
        codec.decode(blob, digest=bytes(32), size=len(data), crypt_mode=None, where="x")
    [error] = codec.decode_many([(blob, bytes(32), len(data))], crypt_mode=None, where="x")
    assert isinstance(error, CorruptChunkError)


def test_only_what_matches_its_digest_is_opened() -> None:
    codec = ChunkCodec()
    with pytest.raises(CorruptChunkError):
        codec.opened(codec.encode(b"words"), bytes(32), where="x")
    key = CryptKey(bytes(32))
    blob = ChunkCodec(key, CryptMode.ENCRYPT).encode(b"words")
    assert codec.opened(blob, bytes(32), where="x").opened is None
    with pytest.raises(CorruptChunkError):
        codec.opened(replace(blob, crc=blob.crc ^ 1), bytes(32), where="x")
