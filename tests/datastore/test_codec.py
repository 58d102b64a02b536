import hashlib
import os
import threading
import zlib
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import FleeceError, FormatError, UsageError
from datastore.blob import MAX_BLOB_SIZE, MAX_CHUNK_SIZE, Blob, BlobKind
from datastore.codec import (
    ChunkCodec,
    CryptKey,
    decode_plain,
    encode_plain,
    format_fingerprint,
    parse_fingerprint,
)
from datastore.crypt_mode import CryptMode
from datastore.errors import CorruptChunkError, KeyNeededError

KEY = CryptKey.from_raw(bytes(range(32)))
OTHER_KEY = CryptKey.from_raw(bytes(32))
PLAIN = ChunkCodec()
SECRET = ChunkCodec(KEY, CryptMode.ENCRYPT)
SIGNED = ChunkCodec(KEY, CryptMode.SIGN_ONLY)
FINGERPRINT = "0e:ab:d4:46:0b:6e:b9:ca:34:50:23:de:e2:b7:78:c7:90:e5:4a:16:83:b9:65:9c:0a:57:ae:19:90:90:15:9b"
# The worked examples of the format.
COMPRESSED = bytes.fromhex("31b958426fb6a37f b99a7c44 28b52ffd20786d000030666c656563650100 2f692902")
ENCRYPTED = bytes.fromhex(
    "7b6785be222d4cf0 737786ff 000102030405060708090a0b0c0d0e0f 66ea9a0cb5ac22d8dde94bf7a8fd010f 0100c5135a81"
)
ENCRYPTED_ZSTD = bytes.fromhex(
    "e6591bbf0bbfd80b befd04a4 000102030405060708090a0b0c0d0e0f 7819d33c91d1661713f5b1a97de7e70c"
    "4fd98f8b199c27289dcfbd4530c14fd655b344c84e8f"
)


def decode(codec: ChunkCodec, blob: Blob, **expected: object) -> bytes:
    arguments: dict[str, object] = {"digest": None, "size": None, "crypt_mode": None, **expected}
    return bytes(codec.decode(blob, where="vm/100/x.fidx", **arguments))  # type: ignore[arg-type]


def zstd_blob(payload: bytes) -> Blob:
    return Blob.make(BlobKind.PLAIN_ZSTD, payload)


# ---- keys ----


def test_worked_example_of_id_key_and_fingerprint() -> None:
    assert KEY.id_key.hex() == "7c2c013efd07f3b25717a485263343cd4d292a4b65c200bb3b18ea227abe225c"
    assert KEY.fingerprint_text == FINGERPRINT
    assert parse_fingerprint(FINGERPRINT) == parse_fingerprint(FINGERPRINT.replace(":", "").upper()) == KEY.fingerprint


@pytest.mark.parametrize("text", ["", "0e:ab", FINGERPRINT + ":00", "zz" + FINGERPRINT[2:], "١" * 64])
def test_what_is_no_fingerprint_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="32 pairs of hex digits"):
        parse_fingerprint(text)


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(UsageError, match=f"{length} bytes, a key has 32"):
        CryptKey.from_raw(bytes(length))


def test_a_key_does_not_show_its_secret() -> None:
    assert repr(KEY) == "CryptKey(0e:ab:d4:46:0b:6e:b9:ca)"
    assert CryptKey.from_raw(KEY.raw) == KEY
    assert KEY != OTHER_KEY


@pytest.mark.parametrize("mode", [CryptMode.ENCRYPT, CryptMode.SIGN_ONLY])
def test_a_mode_with_key_needs_one(mode: CryptMode) -> None:
    with pytest.raises(UsageError, match="needs an encryption key"):
        ChunkCodec(None, mode)


# ---- digests ----


def test_worked_examples_of_digests() -> None:
    chunks = [b"fleece", b"fleece" * 20]
    plain = [
        "c4df5370c58673dd0b4e5c79039e998bbf9d5ec6e4597b6bac45843941e0e3e8",
        "4039f085246fff08cfed211a0f1d66f1606447bf762ff98b64adf9c23d5af348",
    ]
    keyed = [
        "fbf325b7027677f4b69f4e2f9a9d95eadb584da89bd1dd26c67db3ae89aceb70",
        "5d7d2fe934c3b2732b848581c4addb286900102eb241dc9fca1712523e2367f7",
    ]
    assert [digest.hex() for digest in PLAIN.digest_many(chunks)] == plain
    assert [digest.hex() for digest in SIGNED.digest_many(chunks)] == plain
    assert [digest.hex() for digest in SECRET.digest_many(chunks)] == keyed
    assert SECRET.digest(chunks[0]).hex() == keyed[0]


def test_zero_digests_are_those_of_zeros_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PLAIN.zero_digest().hex() == "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8"
    codec = ChunkCodec(KEY, CryptMode.ENCRYPT)
    assert codec.zero_digest() == hashlib.sha256(bytes(4 << 20) + KEY.id_key).digest()
    assert codec.zero_digest(4096) == hashlib.sha256(bytes(4096) + KEY.id_key).digest()
    first = codec.zero_digest()
    monkeypatch.setattr(ChunkCodec, "digest", None)
    assert codec.zero_digest() == first


@pytest.mark.parametrize("size", [0, -1, MAX_CHUNK_SIZE + 1])
def test_there_is_no_zero_chunk_of_impossible_sizes(size: int) -> None:
    with pytest.raises(FleeceError, match="chunks have 1 to"):
        PLAIN.zero_digest(size)


# ---- encoding ----


def test_short_data_ends_uncompressed_and_long_compressed() -> None:
    assert bytes(PLAIN.encode(b"fleece")).hex() == "42ab3807be8370a1e1744102666c65656365"
    assert PLAIN.encode(b"fleece" * 20).kind is BlobKind.PLAIN_ZSTD
    assert PLAIN.encode(b"fleece" * 20, compress=False).kind is BlobKind.PLAIN
    assert bytes(PLAIN.encode(b"")).hex() == "42ab3807be8370a100000000"


def test_compressed_is_kept_even_if_it_saves_nothing() -> None:
    """Equal lengths keep the frame, one byte more drops it."""
    sizes = {}
    for length in range(8, 60):
        data = os.urandom(8) + b"a" * (length - 8)
        frame = zstandard.ZstdCompressor(level=1).compress(data)
        sizes[len(frame) - length] = PLAIN.encode(data).kind
    assert sizes[0] is BlobKind.PLAIN_ZSTD
    assert sizes[1] is BlobKind.PLAIN
    assert sizes[-1] is BlobKind.PLAIN_ZSTD


def test_frames_carry_their_size_and_no_checksum() -> None:
    parameters = zstandard.get_frame_parameters(bytes(PLAIN.encode(bytes(100_000)).payload))
    assert (parameters.content_size, parameters.has_checksum) == (100_000, False)


def test_encryption_has_a_new_16_byte_iv_each_time_and_the_crc_covers_the_ciphertext() -> None:
    blobs = [SECRET.encode(b"fleece" * 20) for _ in range(3)]
    assert len({blob.iv for blob in blobs}) == 3
    for blob in blobs:
        assert (blob.kind, len(blob.iv), len(blob.tag)) == (BlobKind.ENCRYPTED_ZSTD, 16, 16)
        assert blob.crc == zlib.crc32(blob.payload)
        assert decode(SECRET, blob) == b"fleece" * 20


def test_sign_only_makes_plain_blobs() -> None:
    assert SIGNED.encode(b"fleece").kind is BlobKind.PLAIN
    assert SIGNED.encode_blob(b"fleece" * 20).kind is BlobKind.PLAIN_ZSTD


def test_more_than_a_blob_holds_is_refused() -> None:
    with pytest.raises(FleeceError, match=f"at most {MAX_BLOB_SIZE}"):
        PLAIN.encode(memoryview(bytearray(MAX_BLOB_SIZE + 1)))


# ---- decoding ----


def test_worked_examples_are_decoded() -> None:
    assert decode(PLAIN, Blob.parse(COMPRESSED, where="x")) == b"fleece" * 20
    secret = Blob.parse(ENCRYPTED, where="x")
    assert decode(SECRET, secret, digest=SECRET.digest(b"fleece"), size=6, crypt_mode=CryptMode.ENCRYPT) == b"fleece"
    assert decode(SECRET, Blob.parse(ENCRYPTED_ZSTD, where="x"), size=120) == b"fleece" * 20


def test_worked_examples_are_encoded_with_their_iv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.codec.os.urandom", lambda count: bytes(range(count)))
    assert bytes(SECRET.encode(b"fleece")) == ENCRYPTED


@settings(deadline=None, max_examples=60)
@given(
    data=st.one_of(st.binary(max_size=2000), st.integers(0, 100_000).map(bytes)),
    compress=st.booleans(),
    codec=st.sampled_from([PLAIN, SECRET, SIGNED]),
)
def test_whatever_is_encoded_is_decoded(data: bytes, compress: bool, codec: ChunkCodec) -> None:
    blob = codec.encode(data, compress=compress)
    stored = Blob.parse(bytes(blob), where="x")
    assert decode(codec, stored, digest=codec.digest(data), size=len(data), crypt_mode=codec.mode) == data
    assert len(blob) <= len(data) + blob.kind.header_size


def test_a_signed_backups_chunk_is_read_without_the_key() -> None:
    assert decode(PLAIN, SIGNED.encode(b"x"), digest=PLAIN.digest(b"x"), crypt_mode=CryptMode.SIGN_ONLY) == b"x"


def test_a_key_is_no_hindrance_to_reading_plain_chunks() -> None:
    blob = PLAIN.encode(b"fleece" * 20)
    assert decode(SECRET, blob, digest=PLAIN.digest(b"fleece" * 20), crypt_mode=CryptMode.NONE) == b"fleece" * 20


@pytest.mark.parametrize("codec", [PLAIN, SECRET])
@pytest.mark.parametrize("data", [b"fleece", b"fleece" * 20])
def test_every_flipped_bit_behind_the_magic_is_a_corrupt_chunk(codec: ChunkCodec, data: bytes) -> None:
    encoded = bytes(codec.encode(data))
    for position in range(8 * 8, 8 * len(encoded)):
        broken = bytearray(encoded)
        broken[position // 8] ^= 1 << position % 8
        with pytest.raises(CorruptChunkError, match=r"cannot read blob vm/100/x\.fidx: "):
            decode(codec, Blob.parse(broken, where="x"), digest=codec.digest(data))


@pytest.mark.parametrize("codec", [PLAIN, SECRET])
def test_payloads_altered_with_a_matching_crc_are_found_by_tag_frame_or_digest(codec: ChunkCodec) -> None:
    data = os.urandom(50) * 4
    good = codec.encode(data)
    for position in range(len(good.payload)):
        payload = bytearray(good.payload)
        payload[position] ^= 0x40
        blob = Blob.make(good.kind, payload, iv=good.iv, tag=good.tag)
        with pytest.raises(CorruptChunkError):
            decode(codec, blob, digest=codec.digest(data), size=len(data))


def test_a_wrong_digest_names_both() -> None:
    with pytest.raises(CorruptChunkError, match=f"is {PLAIN.digest(b'a').hex()}, not {PLAIN.digest(b'b').hex()}"):
        decode(PLAIN, PLAIN.encode(b"a"), digest=PLAIN.digest(b"b"))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("size", [0, 99_999, 100_001])
def test_another_length_than_expected_is_refused(compress: bool, size: int) -> None:
    with pytest.raises(CorruptChunkError, match=f"100000 or more bytes of plain data, {size} are expected"):
        decode(PLAIN, PLAIN.encode(bytes(100_000), compress=compress), size=size)


def test_encrypted_data_without_key_names_the_key_that_is_needed() -> None:
    blob = Blob.parse(ENCRYPTED, where="x")
    with pytest.raises(KeyNeededError, match="encrypted with the key of its backup; give it with --keyfile"):
        decode(PLAIN, blob)
    with pytest.raises(KeyNeededError, match=f"encrypted with the key {FINGERPRINT}"):
        decode(ChunkCodec(needs=KEY.fingerprint), blob)
    with pytest.raises(KeyNeededError, match=f"with the key {FINGERPRINT}, given is {OTHER_KEY.fingerprint_text}"):
        decode(ChunkCodec(OTHER_KEY, needs=KEY.fingerprint), blob)


def test_a_wrong_key_is_told_by_its_fingerprint() -> None:
    with pytest.raises(CorruptChunkError, match=f"not encrypted with {OTHER_KEY.fingerprint_text}"):
        decode(ChunkCodec(OTHER_KEY, CryptMode.ENCRYPT), Blob.parse(ENCRYPTED, where="x"))


def test_the_crc_is_looked_at_before_the_key() -> None:
    broken = bytearray(ENCRYPTED)
    broken[-1] ^= 1
    with pytest.raises(CorruptChunkError, match="CRC"):
        decode(PLAIN, Blob.parse(broken, where="x"))


@pytest.mark.parametrize("mode", [CryptMode.NONE, CryptMode.SIGN_ONLY])
def test_an_encrypted_chunk_in_a_plain_archive_is_refused_but_not_called_corrupt(mode: CryptMode) -> None:
    with pytest.raises(FormatError, match=f"it is encrypted, the manifest says crypt mode {mode.value}") as error:
        decode(SECRET, SECRET.encode(b"x"), crypt_mode=mode)
    assert not isinstance(error.value, CorruptChunkError)


def test_a_plain_chunk_in_an_encrypted_archive_is_refused() -> None:
    with pytest.raises(FormatError, match="it is not encrypted, the manifest says crypt mode encrypt"):
        decode(SECRET, PLAIN.encode(b"x"), crypt_mode=CryptMode.ENCRYPT)


def test_a_plain_chunk_under_a_keyed_digest_does_not_pass_for_an_encrypted_one() -> None:
    with pytest.raises(CorruptChunkError, match="digest"):
        decode(SECRET, PLAIN.encode(b"x"), digest=SECRET.digest(b"x"))


# ---- zstd streams of others ----


def unsized(data: bytes, level: int = 1) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_content_size=False).compress(data)


@pytest.mark.parametrize("data", [b"", b"x", b"fleece" * 20, bytes(3 << 20), os.urandom(300_000)])
def test_frames_without_their_size_are_read(data: bytes) -> None:
    assert decode(PLAIN, zstd_blob(unsized(data)), size=len(data)) == data
    assert decode(PLAIN, zstd_blob(unsized(data))) == data


def test_several_frames_and_skippable_ones_are_read_as_one_stream() -> None:
    skippable = bytes.fromhex("502a4d18 04000000 01020304")
    sized = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(b"one")
    for frames in (
        sized + unsized(b"two"),
        skippable + sized + unsized(b"two"),
        unsized(b"one") + skippable + unsized(b"two"),
    ):
        assert decode(PLAIN, zstd_blob(frames), size=6) == b"onetwo"


@pytest.mark.parametrize(
    "frame", [zstandard.compress(b"fleece" * 20), unsized(b"fleece" * 20)], ids=["sized", "unsized"]
)
@pytest.mark.parametrize("rubbish", [b"\0", b"rubbish behind the frame", bytes(5000)])
def test_rubbish_behind_a_frame_is_refused(frame: bytes, rubbish: bytes) -> None:
    with pytest.raises(CorruptChunkError, match="zstd frame"):
        decode(PLAIN, zstd_blob(frame + rubbish))


@pytest.mark.parametrize("data", [b"", b"fleece" * 200, bytes(200_000)])
@pytest.mark.parametrize("sized", [True, False])
def test_a_frame_cut_anywhere_is_refused(data: bytes, sized: bool) -> None:
    frame = zstandard.ZstdCompressor(level=1, write_content_size=sized).compress(data)
    for length in range(len(frame)):
        with pytest.raises(CorruptChunkError):
            decode(PLAIN, zstd_blob(frame[:length]))


def test_no_frame_at_all_is_refused() -> None:
    with pytest.raises(CorruptChunkError, match="zstd frame"):
        decode(PLAIN, zstd_blob(b"neither magic nor frame"))
    with pytest.raises(CorruptChunkError):
        decode(PLAIN, zstd_blob(b""))


def claim(size: int) -> bytes:
    """A frame header that says `size` bytes follow, and nothing behind it."""
    return bytes.fromhex("28b52ffd e0") + size.to_bytes(8, "little")


@pytest.mark.parametrize("size", [MAX_CHUNK_SIZE + 1, 1 << 40, (1 << 64) - 3])
def test_a_frame_that_claims_more_than_a_chunk_is_refused_before_room_is_made(size: int) -> None:
    with pytest.raises(CorruptChunkError, match=f"{size} or more bytes of plain data, at most {MAX_CHUNK_SIZE}"):
        decode(PLAIN, zstd_blob(claim(size)))
    with pytest.raises(CorruptChunkError):
        PLAIN.decode_blob(bytes(zstd_blob(claim(MAX_BLOB_SIZE + 1))), crypt_mode=None, where="x")


@pytest.fixture
def memory_limit() -> Iterator[None]:
    """Far too little address space for what a bomb would make."""
    import resource
    from pathlib import Path

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (384 << 20), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def bomb(blocks: int) -> bytes:
    """A frame of `blocks` blocks of 128 KiB that take four bytes each, without its size."""
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    return bytes.fromhex("28b52ffd 00 58") + block * blocks


@pytest.mark.usefixtures("memory_limit")
def test_a_stream_that_grows_over_the_cap_is_stopped() -> None:
    small = bomb(100) + bytes.fromhex("010000")  # a last, empty block
    assert decode(PLAIN, zstd_blob(small)) == bytes(100 * (128 << 10))
    with pytest.raises(CorruptChunkError, match=f"at most {MAX_CHUNK_SIZE} are allowed"):
        decode(PLAIN, zstd_blob(bomb(1_000_000)))  # 4 MB that would be 131 GB


def test_a_window_larger_than_any_blob_is_refused() -> None:
    with pytest.raises(CorruptChunkError, match="zstd frame"):
        decode(PLAIN, zstd_blob(bytes.fromhex("28b52ffd 00 a0 010000")))


# ---- batches ----


def test_a_batch_gives_chunks_and_errors_in_order() -> None:
    reader = ChunkCodec(KEY)
    good = [os.urandom(1000) + bytes(5000), b"fleece", bytes(100_000)]
    items = [
        (PLAIN.encode(good[0]), PLAIN.digest(good[0]), len(good[0])),
        (PLAIN.encode(b"altered"), PLAIN.digest(b"original"), 7),
        (SECRET.encode(good[1]), SECRET.digest(good[1]), 6),
        (Blob(BlobKind.PLAIN, 0, b"wrong CRC"), PLAIN.digest(b"wrong CRC"), 9),
        (PLAIN.encode(good[2]), PLAIN.digest(good[2]), 100_000),
        (PLAIN.encode(good[2]), PLAIN.digest(good[2]), 99_999),
        (SECRET.encode(b"keyed"), PLAIN.digest(b"keyed"), 5),
    ]
    results = reader.decode_many(items, crypt_mode=None, where="vm/100/x.fidx")
    assert [bytes(results[number]) for number in (0, 2, 4)] == good  # type: ignore[arg-type]
    for number in (1, 3, 5, 6):
        error = results[number]
        assert isinstance(error, CorruptChunkError)
        assert error.where == f"vm/100/x.fidx chunk {items[number][1].hex()}"


@pytest.mark.parametrize("codec", [PLAIN, SECRET], ids=["plain", "encrypted"])
def test_chunks_are_decompressed_into_the_buffers_where_they_fit(codec: ChunkCodec) -> None:
    data = [b"fleece" * 1000, os.urandom(6000), b"x" * 6000, b"long" * 2000]
    items = [(codec.encode(one), codec.digest(one), len(one)) for one in data]
    buffers = [bytearray(b"?" * size) for size in (6000, 6000, 7000, 7999)]
    results = codec.decode_many(items, crypt_mode=None, where="x", buffers=buffers)
    assert [bytes(result) for result in results] == data  # type: ignore[arg-type]
    assert bytes(buffers[0]) == data[0]
    assert bytes(buffers[2]) == data[2] + b"?" * 1000  # nothing beyond the chunk is touched
    assert bytes(buffers[3]) == b"?" * 7999  # too small by a byte


@pytest.mark.parametrize(
    "payload",
    [
        zstandard.ZstdCompressor().compress(b"fleece" * 99),
        zstandard.ZstdCompressor().compress(b"fleece" * 101),
        zstandard.ZstdCompressor().compress(b"fleece" * 100)[:-4],
        zstandard.ZstdCompressor().compress(b"fleece" * 100) + b"rubbish",
        zstandard.ZstdCompressor().compress(b"fleece" * 100) + zstandard.ZstdCompressor().compress(b"more"),
        b"",
    ],
    ids=["shorter", "longer", "truncated", "rubbish behind", "frame behind", "empty"],
)
def test_frames_that_are_not_the_chunk_are_refused_with_and_without_buffers(payload: bytes) -> None:
    items = [(zstd_blob(payload), PLAIN.digest(b"fleece" * 100), 600)]
    for buffers in ([], [bytearray(600)]):
        (result,) = PLAIN.decode_many(items, crypt_mode=None, where="x", buffers=buffers)
        assert isinstance(result, CorruptChunkError)


def test_frames_in_several_pieces_are_read_with_and_without_buffers() -> None:
    halves = [zstandard.ZstdCompressor().compress(b"fleece" * 50) for _ in range(2)]
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(b"fleece" * 100)
    for payload in (b"".join(halves), unsized):
        items = [(zstd_blob(payload), PLAIN.digest(b"fleece" * 100), 600)]
        for buffers in ([], [bytearray(600)]):
            (result,) = PLAIN.decode_many(items, crypt_mode=None, where="x", buffers=buffers)
            assert not isinstance(result, FleeceError)
            assert bytes(result) == b"fleece" * 100


def test_blobs_that_are_read_in_their_turn_fail_alone() -> None:
    turns = []

    def read(number: int) -> Blob:
        turns.append(number)
        if number == 1:
            raise FleeceError("read chunk", "x", "it is gone")
        return PLAIN.encode(b"fleece" * number)

    items = [(lambda number=number: read(number), PLAIN.digest(b"fleece" * number), 6 * number) for number in range(3)]
    results = PLAIN.decode_many(items, crypt_mode=None, where="x")
    assert turns == [0, 1, 2]
    assert [bytes(results[0]), bytes(results[2])] == [b"", b"fleece" * 2]  # type: ignore[arg-type]
    assert isinstance(results[1], FleeceError)
    assert results[1].why == "it is gone"


def test_an_empty_batch_is_empty() -> None:
    assert PLAIN.decode_many([], crypt_mode=None, where="x") == []


def test_many_threads_share_a_codec() -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for round_ in range(20):
                data = bytes([seed, round_]) * 20_000
                blob = SECRET.encode(data)
                assert decode(SECRET, blob, digest=SECRET.digest(data), size=len(data)) == data
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_what_was_decoded_stays_when_the_next_chunk_is() -> None:
    """The room between decryption and decompression is used again; results never lie in it."""
    blobs = [SECRET.encode(bytes([number]) * 1000) for number in range(4)]
    blobs += [SECRET.encode(os.urandom(1000), compress=False) for _ in range(4)]
    decoded = [SECRET.decode(blob, digest=None, size=None, crypt_mode=None, where="x") for blob in blobs]
    assert [bytes(data) for data in decoded] == [decode(SECRET, blob) for blob in blobs]


# ---- small files ----


@pytest.mark.parametrize("codec", [PLAIN, SECRET, SIGNED])
def test_small_files_go_round(codec: ChunkCodec) -> None:
    for data in (b"", b"name: vm\n" * 50, os.urandom(100)):
        raw = bytes(codec.encode_blob(data))
        assert codec.decode_blob(raw, crypt_mode=codec.mode, where="x.conf.blob") == data


def test_a_small_file_may_be_larger_than_a_chunk() -> None:
    data = bytes(MAX_CHUNK_SIZE + 1)
    assert len(PLAIN.decode_blob(bytes(PLAIN.encode_blob(data)), crypt_mode=None, where="x")) == len(data)


def test_files_that_are_never_encrypted() -> None:
    assert decode_plain(bytes(encode_plain(b"{}" * 100)), max_size=200, where="x") == b"{}" * 100
    assert decode_plain(bytes(encode_plain(b"{}", compress=False)), max_size=2, where="x") == b"{}"
    for compress in (True, False):
        with pytest.raises(FormatError, match="at most 199 are allowed"):
            decode_plain(bytes(encode_plain(b"{}" * 100, compress=compress)), max_size=199, where="x")
    with pytest.raises(FormatError, match="encrypted, and this kind of file never is"):
        decode_plain(ENCRYPTED, max_size=100, where="x")
    assert format_fingerprint(b"\x0e\xab") == "0e:ab"
