import hashlib
import os
import random
import stat
import tracemalloc
from pathlib import Path
from struct import pack_into

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import FleeceError, FormatError, NotFoundError
from datastore.errors import StoreError
from datastore.fixed_index import FixedHeader, FixedIndex, FixedIndexWriter
from datastore.index import ArchiveIndex
from datastore.index_file import HEADER_SIZE
from datastore.names import ArchiveKind

GIB = 1 << 30
WHERE = "vm/100/2026-01-02T03:04:05Z/drive-scsi0.img.fidx"
# The worked example of the format.
CHUNKS = [bytes(4 << 20), b"\1" * (4 << 20), b"\2" * 4096]
DIGESTS = [hashlib.sha256(chunk).digest() for chunk in CHUNKS]
UUID = bytes.fromhex("0011223344554677 8899aabbccddeeff")
SIZE = 8_392_704
HEAD = bytes.fromhex(
    "2f7f41ed91fd0fcd 0011223344554677 8899aabbccddeeff 00f1536500000000"
    "482a7ab5d79a966d 2856289cbaad1042 aa819bb532a22e53 fb4ed716c7b914c1"
    "0010800000000000 0000400000000000"
)
EXAMPLE = HEAD + bytes(HEADER_SIZE - len(HEAD)) + b"".join(DIGESTS)


def with_sizes(size: int, chunk_size: int, data: bytes = EXAMPLE) -> bytes:
    changed = bytearray(data)
    pack_into("<QQ", changed, 64, size, chunk_size)
    return bytes(changed)


def write(path: Path, size: int = SIZE, chunk_size: int = 4 << 20) -> FixedIndexWriter:
    return FixedIndexWriter(path, size, chunk_size, where=WHERE, ctime=1_700_000_000, index_uuid=UUID)


def test_the_worked_example_is_written_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "drive.tmp_fidx"
    writer = write(path)
    assert FixedIndex.open(path).header.csum == bytes(32)
    for number in (2, 0, 1):  # any order
        writer.set(number, DIGESTS[number])
    assert writer.close() == EXAMPLE[32:64]
    data = path.read_bytes()
    assert data == EXAMPLE
    assert hashlib.sha256(data).hexdigest() == "fca1729cb6e9c3eb7e9a1a4e2f1385f9a24ae070f2d92ff67368bbe90bb6e4bf"


def test_the_worked_example_is_read(tmp_path: Path) -> None:
    path = tmp_path / "drive.fidx"
    path.write_bytes(EXAMPLE)
    for index in (FixedIndex.open(path, where=WHERE), FixedIndex.from_bytes(EXAMPLE, where=WHERE)):
        assert isinstance(index, ArchiveIndex)
        assert (index.where, index.kind, index.size, index.count) == (WHERE, ArchiveKind.FIXED, SIZE, 3)
        assert (index.header.uuid, index.header.ctime, index.chunk_size) == (UUID, 1_700_000_000, 4 << 20)
        assert index.csum == index.header.csum == EXAMPLE[32:64]
        assert bytes(index.digests) == b"".join(DIGESTS)
        assert [index.digest(number) for number in range(3)] == DIGESTS
        assert [index.span(number) for number in range(3)] == [(0, 4 << 20), (4 << 20, 4 << 20), (8 << 20, 4096)]
        assert [index.find(offset) for offset in (0, (4 << 20) - 1, 4 << 20, SIZE - 1)] == [0, 0, 1, 2]
        assert index.header.pack() == EXAMPLE[:HEADER_SIZE]


@pytest.mark.parametrize("number", [-1, 3])
def test_chunks_outside_are_index_errors(number: int) -> None:
    index = FixedIndex.from_bytes(EXAMPLE, where=WHERE)
    with pytest.raises(IndexError):
        index.digest(number)
    with pytest.raises(IndexError):
        index.span(number)
    with pytest.raises(IndexError):
        index.find(-1 if number < 0 else SIZE)


def test_digests_cannot_be_changed_through_the_view() -> None:
    with pytest.raises(TypeError):
        FixedIndex.from_bytes(bytearray(EXAMPLE), where=WHERE).digests[0] = 1


# ---- bad input ----


@pytest.mark.parametrize("length", [0, 1, 79, HEADER_SIZE - 1])
def test_a_truncated_header_names_the_archive_and_both_lengths(length: int) -> None:
    with pytest.raises(FormatError, match=rf"drive-scsi0\.img\.fidx: {length} bytes, a header has 4096"):
        FixedHeader.parse(EXAMPLE[:length], where=WHERE)


@pytest.mark.parametrize("length", [HEADER_SIZE, HEADER_SIZE + 32, len(EXAMPLE) - 1, len(EXAMPLE) + 1])
def test_another_length_than_the_sizes_need_is_refused(length: int) -> None:
    with pytest.raises(FormatError, match=f"{length} bytes, header and 3 digests need 4192"):
        FixedIndex.from_bytes((EXAMPLE + b"\0")[:length], where=WHERE)


def test_the_magic_of_another_format_is_refused() -> None:
    with pytest.raises(FormatError, match="unknown magic 1c914ea519bab3cd"):
        FixedIndex.from_bytes(bytes.fromhex("1c914ea519bab3cd") + EXAMPLE[8:], where=WHERE)


@pytest.mark.parametrize("size", [0, 1 << 63, (1 << 64) - 1])
def test_impossible_image_sizes_are_refused(size: int) -> None:
    with pytest.raises(FormatError, match=f"an image of {size} bytes"):
        FixedIndex.from_bytes(with_sizes(size, 4 << 20), where=WHERE)


@pytest.mark.parametrize("chunk_size", [0, 3, (4 << 20) + 1, 32 << 20, 1 << 63, (1 << 64) - 1])
def test_chunk_sizes_that_are_no_power_of_two_up_to_16_mib_are_refused(chunk_size: int) -> None:
    with pytest.raises(FormatError, match=f"chunks of {chunk_size} bytes"):
        FixedIndex.from_bytes(with_sizes(SIZE, chunk_size), where=WHERE)


def test_a_header_that_claims_an_immense_image_needs_no_memory() -> None:
    with pytest.raises(FormatError, match="4192 bytes, header and 2199023255552 digests need"):
        FixedIndex.from_bytes(with_sizes(1 << 62, 2 << 20), where=WHERE)


def test_every_flipped_header_bit_is_refused_or_harmless() -> None:
    """Harmless: uuid, time and csum say nothing that is trusted, and sizes that need the same number of digests."""
    refused, messages = set(), set()
    for position in range(HEADER_SIZE * 8):
        broken = bytearray(EXAMPLE)
        broken[position // 8] ^= 1 << position % 8
        try:
            index = FixedIndex.from_bytes(broken, where=WHERE)
        except FormatError as error:
            refused.add(position // 8)
            messages.add(str(error)[: len(f"cannot read index {WHERE}: ")])
        else:
            assert index.csum == EXAMPLE[32:64]
            assert index.count == 3
            assert sum(index.span(number)[1] for number in range(3)) == index.size
    assert (refused, messages) == ({*range(8), *range(65, 80)}, {f"cannot read index {WHERE}: "})


def test_files_that_cannot_be_read_have_precise_errors(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=f"cannot read index {WHERE}: there is no such file"):
        FixedIndex.open(tmp_path / "absent.fidx", where=WHERE)
    with pytest.raises(FormatError, match="no regular file"):
        FixedIndex.open(tmp_path, where=WHERE)
    os.mkfifo(tmp_path / "pipe.fidx")
    with pytest.raises(FormatError, match="no regular file"):
        FixedIndex.open(tmp_path / "pipe.fidx", where=WHERE)
    with pytest.raises(StoreError, match="File name too long"):
        FixedIndex.open(tmp_path / ("x" * 300), where=WHERE)


def test_a_sparse_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.fidx"
    with path.open("wb") as file:
        file.write(with_sizes(1 << 50, 16 << 10))
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match="more than any index has"):
        FixedIndex.open(path)


@pytest.mark.parametrize(
    ("size", "listed", "message"),
    [
        (SIZE, None, f"{GIB + HEADER_SIZE} bytes, header and 3 digests need 4192"),
        ((4 << 20) * (GIB // 32), SIZE, rf"wrong size \({(4 << 20) * (GIB // 32)} != {SIZE}\)"),
    ],
)
def test_a_long_file_that_is_not_what_the_manifest_or_its_own_header_says_takes_no_memory(
    size: int, listed: int | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "long.fidx"
    with path.open("wb") as file:
        file.write(with_sizes(size, 4 << 20))
        file.truncate(HEADER_SIZE + GIB)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            FixedIndex.open(path, size=listed)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_size_that_the_manifest_lists_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "drive.fidx"
    path.write_bytes(EXAMPLE)
    assert FixedIndex.open(path, size=SIZE).count == 3
    with pytest.raises(FormatError, match=rf"cannot read index {WHERE}: wrong size \({SIZE} != {SIZE + 1}\)"):
        FixedIndex.open(path, where=WHERE, size=SIZE + 1)


# ---- writing ----


def test_a_writer_starts_with_the_final_length_and_mode_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        writer = write(tmp_path / "x.tmp_fidx")
    finally:
        os.umask(old)
    status = (tmp_path / "x.tmp_fidx").stat()
    assert (status.st_size, stat.S_IMODE(status.st_mode)) == (len(EXAMPLE), 0o644)
    writer.abort()
    assert not (tmp_path / "x.tmp_fidx").exists()


def test_closing_with_unset_entries_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    writer = write(tmp_path / "x.tmp_fidx")
    writer.set_many([(0, DIGESTS[0]), (2, DIGESTS[2]), (0, DIGESTS[1])])
    assert writer.missing == 1
    with pytest.raises(FleeceError, match="1 of 3 entries were never set"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("digest", [bytes(32), b"short", bytes(33)])
def test_what_is_no_digest_is_refused(tmp_path: Path, digest: bytes) -> None:
    with write(tmp_path / "x.tmp_fidx") as writer, pytest.raises(FleeceError, match="is no digest"):
        writer.set(0, digest)


@pytest.mark.parametrize("number", [-1, 3])
def test_setting_an_entry_outside_is_an_index_error(tmp_path: Path, number: int) -> None:
    with write(tmp_path / "x.tmp_fidx") as writer, pytest.raises(IndexError):
        writer.set(number, DIGESTS[0])


def test_a_base_prefills_and_only_changes_need_setting(tmp_path: Path) -> None:
    base = FixedIndex.from_bytes(EXAMPLE, where=WHERE)
    new = hashlib.sha256(b"new").digest()
    with FixedIndexWriter(tmp_path / "x", SIZE, 4 << 20, base=base.digests) as writer:
        assert writer.missing == 0
        writer.set(1, new)
        csum = writer.close()
    index = FixedIndex.open(tmp_path / "x")
    assert [index.digest(number) for number in range(3)] == [DIGESTS[0], new, DIGESTS[2]]
    assert csum == index.csum == index.header.csum == hashlib.sha256(DIGESTS[0] + new + DIGESTS[2]).digest()
    assert index.header.uuid != base.header.uuid


def test_a_base_with_unset_entries_keeps_them_missing(tmp_path: Path) -> None:
    with FixedIndexWriter(tmp_path / "x", SIZE, 4 << 20, base=DIGESTS[0] + bytes(32) + DIGESTS[2]) as writer:
        assert writer.missing == 1


def test_a_base_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FleeceError, match="the base has 2 chunks, this image 3"):
        FixedIndexWriter(tmp_path / "x", SIZE, 4 << 20, base=b"".join(DIGESTS[:2]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "chunk_size"), [(0, 4096), (-1, 4096), (1 << 63, 4096), (4096, 0), (4096, 3000), (4096, 32 << 20)]
)
def test_sizes_that_cannot_be_represented_are_refused(tmp_path: Path, size: int, chunk_size: int) -> None:
    with pytest.raises(FleeceError, match="cannot be represented"):
        FixedIndexWriter(tmp_path / "x", size, chunk_size)
    assert list(tmp_path.iterdir()) == []


def test_the_alignment_check_of_the_protocol() -> None:
    with FixedIndexWriter("/dev/shm/fleece-test-alignment.tmp_fidx", SIZE, 4 << 20, where=WHERE) as writer:
        assert [writer.number_of(0, 4 << 20), writer.number_of(4 << 20, 4 << 20), writer.number_of(8 << 20, 4096)] == [
            0,
            1,
            2,
        ]
        for offset, length in [
            (1, 4 << 20),  # not aligned
            (0, 4096),  # short, but not the last one
            (0, 8 << 20),
            (0, 0),
            (8 << 20, 4 << 20),  # over the end
            (8 << 20, 4095),
            (12 << 20, 4096),
            (-(4 << 20), 4 << 20),
        ]:
            with pytest.raises(FleeceError, match="no chunk of it has offset"):
                writer.number_of(offset, length)


def test_leaving_the_block_without_close_deletes_the_file_and_close_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), write(tmp_path / "x"):
        assert (tmp_path / "x").exists()
        raise RuntimeError
    assert not (tmp_path / "x").exists()
    with FixedIndexWriter(tmp_path / "x", 1, 4096) as writer:
        writer.set(0, DIGESTS[0])
        writer.close()
    writer.abort()
    assert (tmp_path / "x").exists()


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"cannot write index {WHERE}: No such file or directory"):
        write(tmp_path / "absent" / "x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic links"):
        write(tmp_path / "link")


def test_a_failing_write_deletes_the_file_and_leaks_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write(tmp_path / "x")
    writer.set_many(enumerate(DIGESTS))
    before = len(list(Path("/proc/self/fd").iterdir()))

    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datastore.index_file.os.pwrite", full)
    with pytest.raises(StoreError, match="No space left on device"):
        writer.close()
    monkeypatch.undo()
    assert not (tmp_path / "x").exists()
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr("datastore.index_file.os.pwrite", lambda fd, data, offset: whole(fd, data[:7], offset))
    writer = write(tmp_path / "x")
    writer.set_many(enumerate(DIGESTS))
    writer.close()
    assert (tmp_path / "x").read_bytes() == EXAMPLE


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 3_000_000), shift=st.integers(12, 24), seed=st.integers(0, 1000))
def test_any_index_goes_round(size: int, shift: int, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "property.tmp_fidx"
    rng = random.Random(seed)
    with FixedIndexWriter(path, size, 1 << shift) as writer:
        digests = [rng.randbytes(32) for _ in range(writer.count)]
        order = list(range(writer.count))
        rng.shuffle(order)
        writer.set_many((number, digests[number]) for number in order)
        csum = writer.close()
    index = FixedIndex.open(path)
    assert (index.size, index.chunk_size, index.csum, bytes(index.digests)) == (
        size,
        1 << shift,
        csum,
        b"".join(digests),
    )
    position = 0
    for number in range(index.count):
        offset, length = index.span(number)
        assert offset == position
        assert 0 < length <= 1 << shift
        assert index.find(offset) == index.find(offset + length - 1) == number
        position += length
    assert position == size
