import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import FormatError
from datastore.blob import Blob, BlobKind

PLAIN = bytes.fromhex("42ab3807be8370a1 e1744102 666c65656365")
ENCRYPTED = bytes.fromhex(
    "7b6785be222d4cf0 737786ff 000102030405060708090a0b0c0d0e0f 66ea9a0cb5ac22d8dde94bf7a8fd010f 0100c5135a81"
)


def test_worked_example_of_a_plain_blob() -> None:
    assert bytes(Blob.make(BlobKind.PLAIN, b"fleece")) == PLAIN
    blob = Blob.parse(PLAIN, where="x")
    assert (blob.kind, blob.crc, bytes(blob.payload), len(blob)) == (BlobKind.PLAIN, 0x024174E1, b"fleece", 18)
    blob.check(where="x")


def test_an_empty_plain_blob_is_twelve_bytes() -> None:
    assert bytes(Blob.make(BlobKind.PLAIN, b"")) == bytes.fromhex("42ab3807be8370a1 00000000")


def test_worked_example_of_an_encrypted_blob() -> None:
    blob = Blob.parse(ENCRYPTED, where="x")
    assert blob.kind is BlobKind.ENCRYPTED
    assert (blob.iv, blob.tag) == (bytes(range(16)), bytes.fromhex("66ea9a0cb5ac22d8dde94bf7a8fd010f"))
    assert bytes(blob.payload) == bytes.fromhex("0100c5135a81")
    assert bytes(Blob.make(BlobKind.ENCRYPTED, blob.payload, iv=blob.iv, tag=blob.tag)) == ENCRYPTED


def test_magics_are_the_first_bytes_of_the_digests_of_their_texts() -> None:
    from hashlib import sha256

    texts = {
        BlobKind.PLAIN: "Proxmox Backup uncompressed blob v1.0",
        BlobKind.PLAIN_ZSTD: "Proxmox Backup zstd compressed blob v1.0",
        BlobKind.ENCRYPTED: "Proxmox Backup encrypted blob v1.0",
        BlobKind.ENCRYPTED_ZSTD: "Proxmox Backup zstd compressed encrypted blob v1.0",
    }
    assert {kind: kind.value for kind in BlobKind} == {
        kind: sha256(text.encode()).digest()[:8] for kind, text in texts.items()
    }


@pytest.mark.parametrize("length", range(12))
def test_a_truncated_header_names_both_lengths(length: int) -> None:
    with pytest.raises(FormatError, match=rf"cannot read blob vm/1/x\.blob: {length} bytes, a header has 12"):
        Blob.parse(PLAIN[:length], where="vm/1/x.blob")


@pytest.mark.parametrize("length", range(12, 44))
def test_a_truncated_encrypted_header_names_both_lengths(length: int) -> None:
    with pytest.raises(FormatError, match=rf"{length} bytes, an encrypted blob's header has 44"):
        Blob.parse(ENCRYPTED[:length], where="x")


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_magic_is_an_unknown_magic(position: int, bit: int) -> None:
    broken = bytearray(PLAIN)
    broken[position] ^= 1 << bit
    with pytest.raises(FormatError, match="unknown magic"):
        Blob.parse(broken, where="x")


@pytest.mark.parametrize("position", range(8, 18))
def test_every_flipped_byte_of_crc_or_payload_is_told_with_both_crcs(position: int) -> None:
    broken = bytearray(PLAIN)
    broken[position] ^= 0x10
    with pytest.raises(FormatError, match=r"CRC is [0-9a-f]{8}, the header says [0-9a-f]{8}"):
        Blob.parse(broken, where="x").check(where="x")


@settings(deadline=None)
@given(
    kind=st.sampled_from(BlobKind),
    payload=st.binary(max_size=300),
    iv=st.binary(min_size=16, max_size=16),
    tag=st.binary(min_size=16, max_size=16),
)
def test_any_blob_goes_round_and_its_crc_covers_the_payload_alone(
    kind: BlobKind, payload: bytes, iv: bytes, tag: bytes
) -> None:
    secret = (iv, tag) if kind.encrypted else (b"", b"")
    blob = Blob.make(kind, payload, iv=secret[0], tag=secret[1])
    encoded = bytes(blob)
    assert len(encoded) == len(blob) == kind.header_size + len(payload)
    assert encoded[8:12] == zlib.crc32(payload).to_bytes(4, "little")
    again = Blob.parse(encoded, where="x")
    again.check(where="x")
    assert (again.kind, again.iv, again.tag, bytes(again.payload)) == (kind, *secret, payload)
