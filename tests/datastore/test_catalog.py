"""The list of names beside a self-contained archive: the format's example, catalogs of a real PBS, hostile ones."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import FleeceError, FormatError
from datastore import catalog
from datastore.catalog import DIRECTORY, FILE, MAGIC, Catalog, CatalogEntry, CatalogWriter, pack_signed, pack_varint
from datastore.codec import CryptKey
from tests.fuzz import fuzz_catalog
from tests.support.golden_streams import open_stream

#: The example of the format.
EXAMPLE = bytes.fromhex(
    "91fd60f9c46758d515026605686f737473bb0180e2cfaa066c046d746162010017036403657463186405656d707479026603"
    "6f6c64008100120164"
    "0e726f6f742e707861722e64696478183800000000000000"
)
EXAMPLE_ENTRIES = [
    (0, DIRECTORY, b"root.pxar.didx", 0, 0),
    (1, DIRECTORY, b"etc", 0, 0),
    (2, FILE, b"hosts", 187, 1700000000),
    (2, b"l", b"mtab", 0, 0),
    (1, DIRECTORY, b"empty", 0, 0),
    (1, FILE, b"old", 0, -1),
]


def write_example(write: Callable[[bytes], object]) -> None:
    writer = CatalogWriter(write)
    writer.start_archive(b"root.pxar.didx")
    writer.start_directory(b"etc")
    writer.file(b"hosts", 187, 1700000000)
    writer.entry(b"l", b"mtab")
    writer.end_directory()
    writer.start_directory(b"empty")
    writer.end_directory()
    writer.file(b"old", 0, -1)
    writer.finish()


def listing(data: bytes) -> list[tuple[int, bytes, bytes, int, int]]:
    return [(depth, *entry[:4]) for depth, entry in Catalog(data, where="catalog").walk()]


def rewritten(data: bytes) -> bytes:
    """What our writer makes of the entries of `data`."""
    out = bytearray()
    writer = CatalogWriter(out.extend)
    depth = 0
    for level, entry in Catalog(data, where="catalog").walk():
        for _ in range(depth - max(level, 1)):
            writer.end_directory()
        depth = level
        if level == 0:
            writer.start_archive(entry.name)
        elif entry.kind == DIRECTORY:
            writer.start_directory(entry.name)
        elif entry.kind == FILE:
            writer.file(entry.name, entry.size, entry.mtime_s)
        else:
            writer.entry(entry.kind, entry.name)
        if entry.kind == DIRECTORY:
            depth += 1
    for _ in range(depth - 1):
        writer.end_directory()
    writer.finish()
    return bytes(out)


def read_all(data: bytes) -> int:
    """Go through everything in `data`, by `walk` and by `lookup`; the number of entries, or -1 if it is refused."""
    try:
        whole = Catalog(data, where="catalog")
        count = 0
        for _, entry in whole.walk():
            count += 1
            assert catalog.name_problem(entry.name) == ""
            assert 0 <= entry.size < 1 << 64
            assert -(1 << 63) <= entry.mtime_s < 1 << 63
        for first in whole.entries(whole.root):
            whole.lookup(whole.root, first.name)
    except FormatError:
        return -1
    return count


def catalog_of(*blocks: bytes, root: int | None = None) -> bytes:
    """A catalog of `blocks` (tables without their length), the last of them the root."""
    data, last = bytearray(MAGIC), 0
    for block in blocks:
        last = len(data)
        data += pack_varint(len(block)) + block
    return bytes(data) + (last if root is None else root).to_bytes(8, "little")


def test_example_of_the_format_is_written_and_read() -> None:
    out = bytearray()
    write_example(out.extend)
    assert bytes(out) == EXAMPLE
    assert listing(EXAMPLE) == EXAMPLE_ENTRIES


def test_blocks_are_written_when_their_directory_ends() -> None:
    writes: list[bytes] = []
    write_example(writes.append)
    assert [len(write) for write in writes] == [8, 22, 2, 24, 19, 8]


@pytest.mark.parametrize(
    ("value", "packed"),
    [(0, "00"), (127, "7f"), (128, "8001"), (300, "ac02"), ((1 << 64) - 1, "ffffffffffffffffff01")],
)
def test_numbers_as_the_format_says(value: int, packed: str) -> None:
    assert pack_varint(value).hex() == packed
    assert read_file(bytes.fromhex(packed) + b"\0") == (value, 0)


@pytest.mark.parametrize(
    ("value", "packed"),
    [
        (0, "00"),
        (-1, "8100"),
        (-127, "ff00"),
        (-128, "808100"),
        (-(1 << 63), "8080808080808080808100"),
        ((1 << 63) - 1, "ffffffffffffffff7f"),
    ],
)
def test_signed_numbers_as_the_format_says(value: int, packed: str) -> None:
    assert pack_signed(value).hex() == packed
    assert read_file(b"\0" + bytes.fromhex(packed)) == (0, value)


def read_file(numbers: bytes) -> tuple[int, int]:
    """Size and time of a file whose entry ends in `numbers`."""
    whole = Catalog(catalog_of(b"\x01f\x01x" + numbers), where="catalog")
    (entry,) = whole.entries(whole.root)
    return entry.size, entry.mtime_s


@given(value=st.integers(0, (1 << 64) - 1), signed=st.integers(-(1 << 63), (1 << 63) - 1))
def test_numbers_come_back(value: int, signed: int) -> None:
    assert read_file(pack_varint(value) + pack_signed(signed)) == (value, signed)


def test_numbers_longer_than_they_need_to_be_are_read() -> None:
    assert read_file(bytes.fromhex("8000" + "00")) == (0, 0)
    assert read_file(bytes.fromhex("00" + "8080808080808080808000")) == (0, 0)


@pytest.mark.parametrize(
    "numbers",
    [
        "ffffffffffffffffff0200",  # 2^64 and more
        "8080808080808080808001" + "00",  # eleven bytes
        "00" + "ffffffffffffffffff7f",  # beyond 2^63 - 1
        "00" + "8180808080808080808100",  # below -2^63
        "00" + "808080808080808080808000",
        "00" + "80",
        "80",
        "",
    ],
)
def test_numbers_that_do_not_fit_or_end_are_refused(numbers: str) -> None:
    with pytest.raises(FormatError, match="a number without an end at byte"):
        read_file(bytes.fromhex(numbers))


def test_several_archives_in_one_catalog_and_every_kind() -> None:
    out = bytearray()
    writer = CatalogWriter(out.extend)
    for archive in (b"etc.pxar.didx", b"srv.pxar.didx"):
        writer.start_archive(archive)
        for kind in sorted(catalog.OTHER_KINDS):
            writer.entry(kind, b"kind-" + kind)
        writer.file(b"\xff" * 4095, (1 << 64) - 1, -(1 << 63))
    writer.finish()
    assert writer.position == len(out)
    assert rewritten(bytes(out)) == bytes(out)
    whole = Catalog(out, where="catalog")
    assert [entry.name for entry in whole.entries(whole.root)] == [b"etc.pxar.didx", b"srv.pxar.didx"]
    archive_entry = whole.lookup(whole.root, b"srv.pxar.didx")
    assert archive_entry is not None
    assert whole.lookup(archive_entry, b"kind-s") == CatalogEntry(b"s", b"kind-s")
    assert whole.lookup(archive_entry, b"kind") is None
    with pytest.raises(ValueError, match="not a directory"):
        whole.entries(CatalogEntry(b"s", b"kind-s"))
    with pytest.raises(ValueError, match="not a directory"):
        next(whole.walk(CatalogEntry(b"s", b"kind-s")))


def test_a_directory_larger_than_the_first_read_is_read_whole() -> None:
    out = bytearray()
    writer = CatalogWriter(out.extend)
    writer.start_archive(b"a")
    for number in range(5000):
        writer.file(b"%d" % number, number, number)
    writer.finish()
    reads = []

    class Reader:
        size = len(out)

        def read(self, offset: int, length: int) -> memoryview:
            reads.append((offset, length))
            return memoryview(out)[offset : offset + length]

    whole = Catalog(Reader(), where="catalog")
    assert [entry[1:4] for _, entry in whole.walk()][1:] == [(b"%d" % n, n, n) for n in range(5000)]
    assert len(reads) == 5  # magic, root's offset, root, the head of the archive, the archive


def test_a_read_that_fails_goes_through_and_can_be_made_again() -> None:
    class Reader:
        size = len(EXAMPLE)
        failing = False

        def read(self, offset: int, length: int) -> bytes:
            if self.failing:
                raise LookupError("not fetched yet")
            return EXAMPLE[offset : offset + length]

    reader = Reader()
    whole = Catalog(reader, where="catalog")
    reader.failing = True
    with pytest.raises(LookupError):
        whole.lookup(whole.root, b"root.pxar.didx")
    reader.failing = False
    assert whole.lookup(whole.root, b"root.pxar.didx") is not None


def test_a_reader_that_gives_less_than_its_size_is_an_error() -> None:
    class Reader:
        size = len(EXAMPLE) + 100

        def read(self, offset: int, length: int) -> bytes:
            return EXAMPLE[offset : offset + length]

    with pytest.raises(FormatError, match="0 of 8 bytes at 175"):
        Catalog(Reader(), where="catalog")


@pytest.mark.parametrize(
    "call",
    [
        lambda writer: writer.start_directory(b"early"),
        lambda writer: writer.file(b"early", 1, 1),
        lambda writer: writer.end_directory(),
        lambda writer: (writer.start_archive(b"a"), writer.end_directory()),
        lambda writer: (writer.start_archive(b"a"), writer.start_directory(b"b"), writer.finish()),
        lambda writer: (writer.start_archive(b"a"), writer.start_directory(b"b"), writer.start_archive(b"c")),
        lambda writer: (writer.finish(), writer.finish()),
        lambda writer: (writer.start_archive(b"a"), writer.file(b"x", -1, 0)),
        lambda writer: (writer.start_archive(b"a"), writer.file(b"x", 0, 1 << 63)),
        lambda writer: (writer.start_archive(b"a"), writer.entry(b"f", b"x")),
        lambda writer: (writer.start_archive(b"a"), writer.entry(b"", b"x")),
    ],
)
def test_calls_that_make_no_catalog_are_refused(call: Callable[[CatalogWriter], object]) -> None:
    with pytest.raises(FleeceError, match="cannot write catalog: "):
        call(CatalogWriter(lambda _: None))


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"nul\0", b"n" * 4096])
def test_names_that_none_can_have_are_neither_written_nor_read(name: bytes) -> None:
    writer = CatalogWriter(lambda _: None)
    writer.start_archive(b"a")
    calls: list[Callable[[], None]] = [
        lambda: writer.file(name, 1, 1),
        lambda: writer.entry(b"l", name),
        lambda: writer.start_directory(name),
        lambda: CatalogWriter(lambda _: None).start_archive(name),
    ]
    for call in calls:
        with pytest.raises(FleeceError, match="name"):
            call()
    block = b"\x01l" + pack_varint(len(name)) + name
    with pytest.raises(FormatError):
        listing(catalog_of(block if len(block) > 4 else block + b"??"))


def test_a_tree_deeper_than_any_is_refused() -> None:
    out = bytearray()
    writer = CatalogWriter(out.extend)
    writer.start_archive(b"a")
    for _ in range(catalog.MAX_DEPTH - 1):
        writer.start_directory(b"d")
    with pytest.raises(FleeceError, match="more than 4096 directories within each other"):
        writer.start_directory(b"d")
    for _ in range(catalog.MAX_DEPTH - 1):
        writer.end_directory()
    writer.finish()
    assert read_all(bytes(out)) == catalog.MAX_DEPTH
    # Each block holds the one before it.
    deep = catalog_of(b"\0", *[b"\x01d\x01d" + pack_varint(size) for size in (2, *[6] * (catalog.MAX_DEPTH + 1))])
    with pytest.raises(FormatError, match="more than 4096 directories within each other"):
        listing(deep)


def test_a_directory_cannot_hold_itself_or_what_comes_behind_it() -> None:
    for distance in (b"\0", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x7f", b"\x03"):
        with pytest.raises(FormatError, match="the directory b'd' at"):
            listing(catalog_of(b"\0", b"\x01d\x01d" + distance))


def test_a_block_that_reaches_into_its_parent_is_refused() -> None:
    block = b"\x05" + b"\x01l\x01x"  # one byte longer than it is
    data = MAGIC + block + b"\x05\x01d\x01d\x05" + (13).to_bytes(8, "little")
    with pytest.raises(FormatError, match="the block at 8 has 5 bytes, there is room up to 13"):
        listing(data)


def test_directories_in_several_places_do_not_multiply() -> None:
    """Thirty blocks that each hold the one before twice would be a billion entries."""
    blocks, sizes = [b"\0"], [2]
    for _ in range(30):
        block = b"\x02d\x01a" + pack_varint(sizes[-1]) + b"d\x01b" + pack_varint(sizes[-1])
        blocks.append(block)
        sizes.append(1 + len(block))
    with pytest.raises(FormatError, match="its blocks are longer than itself"):
        listing(catalog_of(*blocks))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "0 bytes, the smallest has 18"),
        (MAGIC + bytes(8), "16 bytes, the smallest has 18"),
        (b"fleece!!" + bytes(20), "unknown magic"),
        (catalog_of(b"\0", root=7), "its root is at 7, its blocks end at 10"),
        (catalog_of(b"\0", root=10), "its root is at 10"),
        (catalog_of(b"\0", root=1 << 63), "its root is at"),
        (catalog_of(b"\x02l\x01x"), "2 entries in 4 bytes, in the block at 8"),
        (catalog_of(b"\x01x\x01x"), "an entry of unknown kind at byte 1"),
        (catalog_of(b"\x01l\x05x"), "a name of 5 bytes at byte 3"),
        (catalog_of(b"\x01l\x01xx"), "1 bytes behind the entries"),
        (catalog_of(b"\xff\xff\xff\xff\x7f"), "34359738367 entries in"),
        (MAGIC + b"\xff\xff\xff\xff\x7f" + (8).to_bytes(8, "little"), "the block at 8 has 34359738367 bytes"),
    ],
)
def test_what_no_writer_makes_is_refused_with_a_reason(data: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        listing(data)


def test_a_huge_block_is_not_read_even_if_the_stream_is_said_to_have_it() -> None:
    class Reader:
        size = 1 << 62

        def read(self, offset: int, length: int) -> bytes:
            assert length <= 4096
            whole = {0: MAGIC, (1 << 62) - 8: (8).to_bytes(8, "little")}
            return whole.get(offset, pack_varint(1 << 61))[:length].ljust(length, b"\0")

    whole = Catalog(Reader(), where="catalog")
    with pytest.raises(FormatError, match="the block at 8 has"):
        whole.entries(whole.root)


Tree = dict[bytes, "Tree | int | None"]
names = st.binary(min_size=1, max_size=6).filter(lambda name: catalog.name_problem(name) == "")
trees = st.recursive(
    st.none() | st.integers(-(1 << 63), (1 << 63) - 1), lambda children: st.dictionaries(names, children, max_size=5)
)


@settings(max_examples=100, deadline=None)
@given(archives=st.dictionaries(names, st.dictionaries(names, trees, max_size=5), max_size=3))
def test_any_tree_comes_back(archives: dict[bytes, Tree]) -> None:
    out, expected = bytearray(), []
    writer = CatalogWriter(out.extend)

    def put(children: Tree, depth: int) -> None:
        for name, child in children.items():
            if isinstance(child, dict):
                expected.append((depth, DIRECTORY, name, 0, 0))
                writer.start_directory(name)
                put(child, depth + 1)
                writer.end_directory()
            elif child is None:
                expected.append((depth, b"p", name, 0, 0))
                writer.entry(b"p", name)
            else:
                expected.append((depth, FILE, name, abs(child), child))
                writer.file(name, abs(child), child)

    for archive, tree in archives.items():
        expected.append((0, DIRECTORY, archive, 0, 0))
        writer.start_archive(archive)
        put(tree, 1)
    writer.finish()
    assert listing(bytes(out)) == expected
    assert rewritten(bytes(out)) == bytes(out)


def test_every_truncation_is_refused_and_none_runs_on() -> None:
    for length in range(len(EXAMPLE)):
        assert read_all(EXAMPLE[:length]) == -1
        # The root's offset behind a shortened stream: what is left may make sense by chance, but it ends.
        read_all(EXAMPLE[:length] + EXAMPLE[-8:])


def test_flipped_bits_are_refused_or_read_to_an_end() -> None:
    rng = random.Random(500)
    refused = 0
    for _ in range(500):
        data = bytearray(EXAMPLE)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        refused += read_all(bytes(data)) < 0
    assert 100 < refused < 500


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=60), root=st.integers(0, 80))
def test_any_bytes_are_refused_or_read_to_an_end(body: bytes, root: int) -> None:
    read_all(MAGIC + body + root.to_bytes(8, "little"))


REFUSED = {"huge-block", "huge-count", "self", "shared-blocks", "truncated"}


@pytest.mark.parametrize("path", sorted(fuzz_catalog.CORPUS.iterdir()), ids=lambda path: path.name)
def test_the_corpus_of_the_fuzzer_is_refused_or_read_to_an_end(path: Path) -> None:
    count = fuzz_catalog.one_input(path.read_bytes())
    assert (count < 0) == (path.name in REFUSED)


def test_mutations_of_the_corpus_are_refused_or_read_to_an_end() -> None:
    corpus = [path.read_bytes() for path in sorted(fuzz_catalog.CORPUS.iterdir())]
    rng = random.Random(11)
    results = [fuzz_catalog.one_input(fuzz_catalog.mutated(rng, corpus)) for _ in range(2000)]
    assert min(results) == -1
    assert max(results) > 0


def test_catalogs_of_the_large_trees_are_written_again_byte_for_byte(golden: Path) -> None:
    paths = sorted((golden / "bulk").rglob("catalog.pcat1.zst"))
    assert len(paths) == 3
    for path in paths:
        data = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        assert read_all(data) > 3000
        assert rewritten(data) == data
        rng = random.Random(path.parent.name)
        for _ in range(50):
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            read_all(bytes(flipped))
            read_all(data[: rng.randrange(len(data))])


def test_catalogs_of_a_real_store_are_written_again_byte_for_byte(
    golden_store: Path, golden_keys: dict[str, CryptKey]
) -> None:
    indexes = sorted(golden_store.rglob("catalog.pcat1.didx"))
    assert len(indexes) == 3
    for path in indexes:
        _, data = open_stream(golden_store, path, golden_keys)
        whole = Catalog(data, where=str(path))
        archive = whole.lookup(whole.root, b"root.pxar.didx")
        assert archive is not None
        assert read_all(data) > 20
        assert rewritten(data) == data
