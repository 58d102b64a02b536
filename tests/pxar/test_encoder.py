import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from pxar.encoder import ArchiveEncoder
from pxar.errors import EncodeError
from pxar.format import HEADER, PAYLOAD, START_MARKER, TAIL_MARKER
from pxar.metadata import Metadata, Stat, encode_metadata
from pxar.sinks import ReusedChunk
from tests.pxar.archives import MemorySink, archived
from tests.pxar.samples import OURS, every_kind, example

DATA = Path(__file__).parents[1] / "data/pxar"
PRELUDE = b'{"exclude-patterns":"*.tmp\\n"}'
FOLDER = encode_metadata(Metadata(Stat(0o040755)))
FILE = encode_metadata(Metadata(Stat(0o100644)))


def test_the_self_contained_example() -> None:
    assert archived(example(), split=False) == ((DATA / "example.pxar").read_bytes(), b"")


def test_the_split_example() -> None:
    streams = ((DATA / "example.mpxar").read_bytes(), (DATA / "example.ppxar").read_bytes())
    assert archived(example(), split=True, prelude=PRELUDE) == streams


def test_every_kind_of_entry() -> None:
    archive, _ = archived(every_kind(), split=False)
    digest = "301dc6452cc88ea335abafc08f0bdbf8410d29f45630e7b30313060c8f44aa63"
    assert (len(archive), hashlib.sha256(archive).hexdigest()) == (2306, digest)


def hundred_files(encoder: ArchiveEncoder, add: Callable[[bytes, bytes], object]) -> None:
    """Ten folders of ten files; `add(name, meta)` writes a file."""
    folder, file = (encode_metadata(Metadata(Stat(mode | 0o777, 0, *OURS))) for mode in (0o040000, 0o100000))
    encoder.begin(folder)
    for number in range(10):
        encoder.directory(b"folder_%d" % number, folder)
        for inner in range(10):
            add(b"file_%d" % inner, file)
        encoder.end_directory()


def test_new_files_count_their_content_in_the_table() -> None:
    archive, payload = MemorySink(), MemorySink()
    encoder = ArchiveEncoder(archive, payload)

    def add(name: bytes, meta: bytes) -> None:
        encoder.begin_file(name, meta, 1 << 20)
        payload.skipped += 1 << 20  # nobody looks at the content
        encoder.end_file()

    hundred_files(encoder, add)
    encoder.finish()
    digest = "7c446fc024044bae50124deeac4aa111e11c29aa636f33cfa112dfc0a1b0efa8"
    assert (len(archive.data), hashlib.sha256(archive.data).hexdigest()) == (15070, digest)
    assert payload.position == 104_859_232
    assert payload.suggested == [16 + number * 1_048_592 for number in range(100)]


def test_references_do_not() -> None:
    archive, payload = MemorySink(), MemorySink()
    encoder = ArchiveEncoder(archive, payload, prelude=b"")
    offsets = iter(range(32, 1 << 30, 1_048_592))
    hundred_files(encoder, lambda name, meta: encoder.reference(name, meta, next(offsets), 1 << 20))
    payload.inject([ReusedChunk(bytes(32), 104_859_232)])
    encoder.finish()
    digest = "c4fb679353ab79412517ecda6b2a51c55413a4a360b1b422d50d31f7f6035b0d"
    assert (len(archive.data), hashlib.sha256(archive.data).hexdigest()) == (15086, digest)
    assert payload.data == START_MARKER + TAIL_MARKER


def begun(*, split: bool = True) -> tuple[ArchiveEncoder, MemorySink, MemorySink]:
    archive, payload = MemorySink(), MemorySink()
    encoder = ArchiveEncoder(archive, payload if split else None)
    encoder.begin(FOLDER)
    return encoder, archive, payload


def test_a_file_can_be_left_out_of_a_split_archive_to_its_end() -> None:
    encoder, archive, payload = begun()
    encoder.begin_file(b"a", FILE, 10)
    encoder.content.write(b"abc")
    encoder.abandon_file()
    encoder.begin_file(b"b", FILE, 1)
    encoder.content.write(b"B")
    encoder.end_file()
    encoder.finish()
    assert bytes(payload.data) == (
        START_MARKER + HEADER.pack(PAYLOAD, 26) + b"abc" + HEADER.pack(PAYLOAD, 17) + b"B" + TAIL_MARKER
    )
    other, same, moved = begun()
    moved.skipped += 19
    other.begin_file(b"b", FILE, 1)
    other.content.write(b"B")
    other.end_file()
    other.finish()
    assert same.data == archive.data


def test_a_self_contained_archive_cannot_leave_it_out() -> None:
    encoder, _, _ = begun(split=False)
    encoder.begin_file(b"a", FILE, 10)
    with pytest.raises(EncodeError, match="cannot leave out 'a'"):
        encoder.abandon_file()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("content", "message"), [(b"12", "1 are missing"), (b"1234", "1 bytes more than 3")])
def test_exactly_the_announced_content_must_come(split: bool, content: bytes, message: str) -> None:
    encoder, _, _ = begun(split=split)
    encoder.begin_file(b"a", FILE, 3)
    encoder.content.write(content)
    with pytest.raises(EncodeError, match=f"cannot write 'a': .*{message}"):
        encoder.end_file()


ADDERS: list[Callable[[ArchiveEncoder, bytes], object]] = [
    lambda encoder, name: encoder.directory(name, FOLDER),
    lambda encoder, name: encoder.begin_file(name, FILE, 0),
    lambda encoder, name: encoder.reference(name, FILE, 1 << 20, 0),
    lambda encoder, name: encoder.symlink(name, FILE, b"target"),
    lambda encoder, name: encoder.device(name, FILE, 1, 2),
    lambda encoder, name: encoder.special(name, FILE),
    lambda encoder, name: encoder.hardlink(name, b"target", 0),
]


@pytest.mark.parametrize("add", ADDERS)
@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"x" * 4097])
def test_names_that_lead_elsewhere_are_not_written(add: Callable[[ArchiveEncoder, bytes], object], name: bytes) -> None:
    encoder, archive, payload = begun()
    before = bytes(archive.data), bytes(payload.data)
    with pytest.raises(EncodeError):
        add(encoder, name)
    assert (bytes(archive.data), bytes(payload.data)) == before
    add(encoder, b"x" * 4096)
    assert (bytes(archive.data), bytes(payload.data)) != before


@pytest.mark.parametrize("add", ADDERS)
def test_nothing_is_added_where_it_has_no_place(add: Callable[[ArchiveEncoder, bytes], object]) -> None:
    fresh = ArchiveEncoder(MemorySink(), MemorySink())
    with pytest.raises(EncodeError):
        add(fresh, b"a")
    encoder, _, _ = begun()
    encoder.begin_file(b"f", FILE, 0)
    with pytest.raises(EncodeError, match="not complete"):
        add(encoder, b"a")
    encoder.end_file()
    encoder.finish()
    with pytest.raises(EncodeError):
        add(encoder, b"a")


@pytest.mark.parametrize("meta", [b"", bytes(47), bytes((64 << 20) + 1)])
def test_metadata_that_no_reader_takes_are_not_written(meta: bytes) -> None:
    encoder, _, _ = begun()
    for add in (
        lambda: encoder.directory(b"a", meta),
        lambda: encoder.begin_file(b"a", meta, 0),
        lambda: encoder.reference(b"a", meta, 16, 0),
        lambda: encoder.special(b"a", meta),
        lambda: ArchiveEncoder(MemorySink()).begin(meta),
    ):
        with pytest.raises(EncodeError, match="bytes of metadata"):
            add()


def test_references_ascend_and_do_not_overlap() -> None:
    encoder, _, payload = begun()
    with pytest.raises(EncodeError, match="its payload at 15 lies before 16"):
        encoder.reference(b"a", FILE, 15, 0)
    encoder.reference(b"a", FILE, 100, 10)
    with pytest.raises(EncodeError, match="its payload at 125 lies before 126"):
        encoder.reference(b"b", FILE, 125, 10)
    with pytest.raises(EncodeError, match="not injected"):
        encoder.begin_file(b"b", FILE, 0)
    with pytest.raises(EncodeError, match="not injected"):
        encoder.finish()
    payload.inject([ReusedChunk(bytes(32), 200)])
    with pytest.raises(EncodeError, match="its payload at 126 lies before 216"):
        encoder.reference(b"b", FILE, 126, 0)
    encoder.finish()


def test_what_else_cannot_be_written() -> None:
    encoder, _, _ = begun(split=False)
    for add in (
        lambda: encoder.reference(b"a", FILE, 16, 0),
        lambda: encoder.symlink(b"a", FILE, b""),
        lambda: encoder.symlink(b"a", FILE, b"x" * 4097),
        lambda: encoder.symlink(b"a", FILE, b"x\0"),
        lambda: encoder.hardlink(b"a", b"x" * 4097, 0),
        lambda: encoder.hardlink(b"a", b"x", 1 << 40),
        lambda: encoder.hardlink(b"a", b"x", -1),
        lambda: encoder.device(b"a", FILE, 1 << 64, 0),
        lambda: encoder.begin_file(b"a", FILE, -1),
        lambda: encoder.begin_file(b"a", FILE, (1 << 64) - 16),
        encoder.end_directory,
        encoder.end_file,
        encoder.abandon_file,
        lambda: encoder.begin(FOLDER),
    ):
        with pytest.raises(EncodeError):
            add()
    encoder.directory(b"a", FOLDER)
    with pytest.raises(EncodeError, match="root is not what is open"):
        encoder.finish()


def test_a_prelude_is_for_split_archives_and_not_endless() -> None:
    with pytest.raises(EncodeError, match="needs a split archive"):
        ArchiveEncoder(MemorySink(), prelude=b"")
    with pytest.raises(EncodeError, match="limit is 16777216"):
        ArchiveEncoder(MemorySink(), MemorySink(), prelude=bytes((16 << 20) + 1))
