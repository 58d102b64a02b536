import hashlib
import os
import random
import resource
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import FleeceError, FormatError, NotFoundError
from datastore import dynamic_index
from datastore.blob import MAX_CHUNK_SIZE
from datastore.dynamic_index import DynamicHeader, DynamicIndex, DynamicIndexWriter
from datastore.errors import StoreError
from datastore.index import ArchiveIndex
from datastore.index_file import HEADER_SIZE
from datastore.names import ArchiveKind

GIB = 1 << 30
WHERE = "host/a/2026-01-02T03:04:05Z/root.pxar.didx"
# The worked example of the format.
CHUNKS = [b"fleece" * 20_000, bytes(1000)]
DIGESTS = [hashlib.sha256(chunk).digest() for chunk in CHUNKS]
UUID = bytes.fromhex("0011223344554677 8899aabbccddeeff")
HEAD = bytes.fromhex(
    "1c914ea519bab3cd 0011223344554677 8899aabbccddeeff 00f1536500000000"
    "d412d23eb073b29a d62031798d4f7d24 c9466e9bc04537c3 a0247868807d34ed"
)
EXAMPLE = HEAD + bytes(HEADER_SIZE - len(HEAD)) + pack("<Q32sQ32s", 120_000, DIGESTS[0], 121_000, DIGESTS[1])


def with_ends(ends: list[int]) -> bytes:
    return EXAMPLE[:HEADER_SIZE] + b"".join(pack("<Q32s", end, DIGESTS[0]) for end in ends)


def write(path: Path) -> DynamicIndexWriter:
    return DynamicIndexWriter(path, where=WHERE, ctime=1_700_000_000, index_uuid=UUID)


def test_the_worked_example_is_written_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "root.pxar.tmp_didx"
    with write(path) as writer:
        writer.append(0, 120_000, DIGESTS[0])
        writer.append(120_000, 1000, DIGESTS[1])
        assert (writer.size, writer.count) == (121_000, 2)
        assert writer.csum() == writer.close() == EXAMPLE[32:64]
    data = path.read_bytes()
    assert data == EXAMPLE
    assert hashlib.sha256(data).hexdigest() == "f8cb80d8c54c7ce55bc70f86392e2caad7e344504a92879a812c8138515634e7"


def test_the_worked_example_is_read(tmp_path: Path) -> None:
    path = tmp_path / "root.pxar.didx"
    path.write_bytes(EXAMPLE)
    for index in (DynamicIndex.open(path, where=WHERE), DynamicIndex.from_bytes(EXAMPLE, where=WHERE)):
        assert isinstance(index, ArchiveIndex)
        assert (index.where, index.kind, index.size, index.count) == (WHERE, ArchiveKind.DYNAMIC, 121_000, 2)
        assert (index.header.uuid, index.header.ctime) == (UUID, 1_700_000_000)
        assert index.csum == index.header.csum == EXAMPLE[32:64]
        assert bytes(index.digests) == b"".join(DIGESTS)
        assert [index.digest(0), index.digest(1)] == DIGESTS
        assert [index.span(0), index.span(1)] == [(0, 120_000), (120_000, 1000)]
        assert list(index.lengths()) == [120_000, 1000]
        assert [index.find(offset) for offset in (0, 119_999, 120_000, 120_999)] == [0, 0, 1, 1]
        assert index.header.pack() == EXAMPLE[:HEADER_SIZE]


@pytest.mark.parametrize("number", [-1, 2])
def test_chunks_outside_are_index_errors(number: int) -> None:
    index = DynamicIndex.from_bytes(EXAMPLE, where=WHERE)
    with pytest.raises(IndexError):
        index.digest(number)
    with pytest.raises(IndexError):
        index.span(number)
    with pytest.raises(IndexError):
        index.find(-1 if number < 0 else 121_000)


# ---- bad input ----


@pytest.mark.parametrize("length", [0, 1, 63, HEADER_SIZE - 1])
def test_a_truncated_header_names_the_archive_and_both_lengths(length: int) -> None:
    with pytest.raises(FormatError, match=rf"root\.pxar\.didx: {length} bytes, a header has 4096"):
        DynamicHeader.parse(EXAMPLE[:length], where=WHERE)


def test_an_index_without_entries_is_refused() -> None:
    with pytest.raises(FormatError, match="it has no entries"):
        DynamicIndex.from_bytes(EXAMPLE[:HEADER_SIZE], where=WHERE)


@pytest.mark.parametrize("length", [1, 39, 41, 79])
def test_half_an_entry_is_refused(length: int) -> None:
    with pytest.raises(FormatError, match=f"{length} bytes of entries, each of them has 40"):
        DynamicIndex.from_bytes(EXAMPLE[: HEADER_SIZE + length], where=WHERE)


def test_the_magic_of_another_format_is_refused() -> None:
    with pytest.raises(FormatError, match="unknown magic 2f7f41ed91fd0fcd"):
        DynamicIndex.from_bytes(bytes.fromhex("2f7f41ed91fd0fcd") + EXAMPLE[8:], where=WHERE)


BAD_ENDS = [
    ([0], 0),
    ([5, 5], 1),
    ([5, 4], 1),
    ([MAX_CHUNK_SIZE + 1], 0),
    ([1, MAX_CHUNK_SIZE + 2], 1),
    ([5, (1 << 64) - 1], 1),
    ([5, 10, 7, 20, 20], 2),
]


@pytest.mark.parametrize(("ends", "number"), BAD_ENDS)
@pytest.mark.parametrize("many", [1, 50_000], ids=["numpy", "loop"])
def test_ends_that_do_not_rise_or_leave_too_large_chunks_are_refused(
    ends: list[int], number: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_index, "_MANY", many)
    start = ends[number - 1] if number else 0
    with pytest.raises(FormatError, match=f"chunk {number} goes from {start} to {ends[number]}, chunks have 1 to"):
        DynamicIndex.from_bytes(with_ends(ends), where=WHERE)


def test_the_largest_chunk_passes() -> None:
    assert DynamicIndex.from_bytes(with_ends([MAX_CHUNK_SIZE, 2 * MAX_CHUNK_SIZE]), where=WHERE).size == 32 << 20


def test_every_flipped_header_bit_is_refused_or_harmless() -> None:
    refused, messages = set(), set()
    for position in range(HEADER_SIZE * 8):
        broken = bytearray(EXAMPLE)
        broken[position // 8] ^= 1 << position % 8
        try:
            index = DynamicIndex.from_bytes(broken, where=WHERE)
        except FormatError as error:
            refused.add(position // 8)
            messages.add(str(error).partition("unknown magic")[0])
        else:
            assert (index.csum, index.size) == (EXAMPLE[32:64], 121_000)
    assert (refused, messages) == (set(range(8)), {f"cannot read index {WHERE}: "})


def test_every_flipped_bit_of_an_entry_is_refused_or_changes_the_csum() -> None:
    for position in range(HEADER_SIZE * 8, len(EXAMPLE) * 8):
        broken = bytearray(EXAMPLE)
        broken[position // 8] ^= 1 << position % 8
        with suppress(FormatError):
            assert DynamicIndex.from_bytes(broken, where=WHERE).csum != EXAMPLE[32:64]


def test_files_that_cannot_be_read_have_precise_errors(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no such file"):
        DynamicIndex.open(tmp_path / "absent.didx")
    with pytest.raises(FormatError, match="no regular file"):
        DynamicIndex.open(tmp_path)


@pytest.mark.parametrize(
    ("entries", "end", "listed", "message"),
    [
        (GIB // 40, 0, None, f"{GIB // 40} chunks end at 0, each of them has 1 to {MAX_CHUNK_SIZE} bytes"),
        (GIB // 40, GIB // 40 - 1, None, f"{GIB // 40} chunks end at {GIB // 40 - 1}, each"),
        (GIB // 40, MAX_CHUNK_SIZE * (GIB // 40) + 1, None, "chunks end at"),
        (GIB // 40, GIB, 121_000, rf"wrong size \({GIB} != 121000\)"),
        (2, 121_000, 120_000, r"wrong size \(121000 != 120000\)"),
    ],
)
def test_a_long_file_that_is_not_what_the_manifest_or_its_own_end_says_takes_no_memory(
    entries: int, end: int, listed: int | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "long.didx"
    with path.open("wb") as file:
        file.write(EXAMPLE[:HEADER_SIZE])
        file.seek(HEADER_SIZE + 40 * (entries - 1))
        file.write(pack("<Q32s", end, DIGESTS[0]))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            DynamicIndex.open(path, size=listed)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 8, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 39, len(EXAMPLE) - 40])
def test_a_short_file_is_refused_by_its_outline_as_by_its_bytes(length: int, tmp_path: Path) -> None:
    path = tmp_path / "short.didx"
    path.write_bytes(EXAMPLE[:length])
    if length == len(EXAMPLE) - 40:
        assert DynamicIndex.open(path, size=120_000).count == 1
        return
    with pytest.raises(FormatError) as by_bytes:
        DynamicIndex.from_bytes(EXAMPLE[:length], where=str(path))
    with pytest.raises(FormatError) as by_outline:
        DynamicIndex.open(path)
    assert str(by_outline.value) == str(by_bytes.value)


def test_a_million_chunks_are_opened_quickly_in_bounded_memory(tmp_path: Path) -> None:
    import numpy as np

    count = 1_000_000
    entries = np.zeros((count, 5), "<u8")
    entries[:, 0] = np.arange(1, count + 1, dtype=np.uint64) * 4_000_000
    entries[:, 1] = np.arange(count)
    path = tmp_path / "big.didx"
    path.write_bytes(EXAMPLE[:HEADER_SIZE] + entries.tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    index = DynamicIndex.open(path)
    assert (index.count, index.size) == (count, count * 4_000_000)
    assert index.find(123_456 * 4_000_000 + 5) == 123_456
    assert len(index.digests) == 32 * count
    assert index.digests[32 * 777 : 32 * 777 + 2] == (777).to_bytes(2, "little")
    assert time.thread_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB: 40 MB, twice, and room


# ---- writing ----


def test_offsets_must_follow_each_other(tmp_path: Path) -> None:
    with write(tmp_path / "x") as writer:
        writer.append(0, 10, DIGESTS[0])
        for offset in (0, 9, 11):
            with pytest.raises(FleeceError, match=f"the next chunk starts at {offset}, the one before ends at 10"):
                writer.append(offset, 10, DIGESTS[0])
        assert writer.count == 1


@pytest.mark.parametrize("length", [-1, 0, MAX_CHUNK_SIZE + 1])
def test_impossible_lengths_are_refused(tmp_path: Path, length: int) -> None:
    with write(tmp_path / "x") as writer, pytest.raises(FleeceError, match=f"a chunk of {length} bytes"):
        writer.append(0, length, DIGESTS[0])


@pytest.mark.parametrize("digest", [bytes(32), b"short", bytes(33)])
def test_what_is_no_digest_is_refused(tmp_path: Path, digest: bytes) -> None:
    with write(tmp_path / "x") as writer, pytest.raises(FleeceError, match="is no digest"):
        writer.append(0, 1, digest)


def test_an_empty_stream_cannot_be_represented_and_leaves_no_file(tmp_path: Path) -> None:
    writer = write(tmp_path / "x")
    with pytest.raises(FleeceError, match="an empty stream cannot be represented"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_leaving_the_block_without_close_deletes_the_file(tmp_path: Path) -> None:
    with write(tmp_path / "x") as writer:
        writer.append(0, 1, DIGESTS[0])
        assert (tmp_path / "x").stat().st_size == HEADER_SIZE
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_is_a_store_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        write(tmp_path / "absent" / "x")
    monkeypatch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="No space left on device"):
        write(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("many", [1, 50_000], ids=["numpy", "loop"])
@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, MAX_CHUNK_SIZE), min_size=1, max_size=60), seed=st.integers(0, 1000))
def test_any_index_goes_round(
    many: int, lengths: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "property.tmp_didx"
    rng = random.Random(seed)
    digests = [rng.randbytes(32) for _ in lengths]
    with DynamicIndexWriter(path) as writer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_index, "_MANY", many)
        for length, digest in zip(lengths, digests, strict=True):
            writer.append(writer.size, length, digest)
        csum = writer.close()
        index = DynamicIndex.open(path)
        assert (index.size, index.count, index.csum) == (sum(lengths), len(lengths), csum)
        assert bytes(index.digests) == b"".join(digests)
        assert list(index.lengths()) == lengths
        for number, length in enumerate(lengths):
            offset, actual = index.span(number)
            assert actual == length
            assert index.find(offset) == index.find(offset + length - 1) == number
