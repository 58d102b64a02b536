"""Archives that are cut off, damaged or forged end in an error that names the archive, at bounded cost."""

import tracemalloc
from collections.abc import Callable, Iterator
from random import Random
from struct import Struct

import pytest

import pxar.format as f
from core.errors import FormatError, UsageError
from pxar.accessor import ArchiveAccessor, Directory, FileNode, Hardlink
from pxar.decoder import ArchiveDecoder, Entry
from pxar.errors import ArchiveError
from pxar.goodbye import MAX_EQUAL, ROW, ROW_SIZE, hash_name, permutation
from pxar.metadata import MAX_ATTRIBUTES, Metadata, Stat, encode_metadata
from tests.pxar.archives import (
    MemoryBytes,
    MemoryReader,
    archived,
    item,
    rows_of_accessor,
    rows_of_decoder,
)
from tests.pxar.samples import every_kind, example

FOLDER = encode_metadata(Metadata(Stat(0o040755)))
FILE = encode_metadata(Metadata(Stat(0o100644)))
_U64 = Struct("<Q")
Streams = tuple[bytes, bytes]


def wrapped(kind: int, content: bytes = b"") -> bytes:
    return f.HEADER.pack(kind, 16 + len(content)) + content


def named(name: bytes) -> bytes:
    return wrapped(f.FILENAME, name + b"\0")


def decode(archive: bytes, payload: bytes = b"") -> int:
    reader = MemoryReader(payload) if payload else None
    return sum(1 for _ in rows_of_decoder(ArchiveDecoder(MemoryReader(archive), reader, where="root.pxar")))


def access(archive: bytes, payload: bytes = b"") -> int:
    accessor = ArchiveAccessor(MemoryBytes(archive), MemoryBytes(payload), where="root.pxar")
    count = 0
    for path, *_ in rows_of_accessor(accessor):
        node = accessor.lookup(path)
        if isinstance(node, Hardlink):
            node.follow()
        count += 1
    return count


BOTH = pytest.mark.parametrize("read", [decode, access])
SAMPLES = {
    "split example": archived(example(), split=True, prelude=b"{}"),
    "self-contained example": archived(example(), split=False),
    "every kind": archived(every_kind(), split=False),
    "every kind, split": archived(every_kind(), split=True),
}


@BOTH
@pytest.mark.parametrize("streams", SAMPLES.values(), ids=SAMPLES.keys())
def test_every_truncation_is_noticed(read: Callable[[bytes, bytes], int], streams: Streams) -> None:
    archive, payload = streams
    for length in range(len(archive)):
        with pytest.raises(ArchiveError, match=r"cannot read archive (payload of )?root\.pxar: at byte "):
            read(archive[:length], payload)
    if payload:
        # What is behind the last content, the marker, nobody needs.
        for length in range(1, len(payload) - 16):
            with pytest.raises(ArchiveError, match=r"root\.pxar"):
                read(archive, payload[:length])


@BOTH
def test_flipped_bits_give_another_archive_or_an_error(read: Callable[[bytes, bytes], int]) -> None:
    random = Random(20)
    errors: list[str] = []
    for _ in range(500):
        archive, payload = (bytearray(stream) for stream in random.choice(list(SAMPLES.values())))
        target = random.choice([archive, archive, archive, payload or archive])
        target[random.randrange(len(target))] ^= 1 << random.randrange(8)
        try:
            assert read(bytes(archive), bytes(payload)) <= 30
        except FormatError as error:
            errors.append(str(error))
    assert len(errors) > 100
    assert all("root.pxar" in error for error in errors)


@BOTH
def test_garbage_of_any_length_is_no_archive(read: Callable[[bytes, bytes], int]) -> None:
    random = Random(21)
    for length in [0, 1, 15, 16, 17, 23, 24, 25, 40, 95, 96, 97, 1000, 100_000]:
        for data in (random.randbytes(length), bytes(length), b"\xff" * length):
            with pytest.raises(ArchiveError, match=r"root\.pxar"):
                read(data, b"")


def measured(read: Callable[[], object]) -> tuple[int, BaseException | None]:
    """Most bytes that were in use at a time, and how it ended."""
    caught: BaseException | None = None
    tracemalloc.start()
    try:
        read()
    except ArchiveError as error:
        caught = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, caught


def headers() -> Iterator[tuple[str, int]]:
    """Position of each item's size field in the example."""
    archive, at = SAMPLES["split example"][0], 0
    while at < len(archive):
        kind, size = f.HEADER.unpack_from(archive, at)
        yield f"{f.item_name(kind)} at {at}", at + 8
        at += size


@BOTH
@pytest.mark.parametrize("place", [place for _, place in headers()], ids=[name for name, _ in headers()])
@pytest.mark.parametrize("size", [0, 15, 16, 1 << 20, 1 << 40, (1 << 63) + 1, (1 << 64) - 1])
def test_sizes_beyond_the_archive_cost_nothing(read: Callable[[bytes, bytes], int], place: int, size: int) -> None:
    archive = bytearray(SAMPLES["split example"][0])
    _U64.pack_into(archive, place, size)
    peak, caught = measured(lambda: read(bytes(archive), SAMPLES["split example"][1]))
    assert isinstance(caught, ArchiveError)
    assert peak < 2 << 20


def test_an_endless_stream_of_attributes_or_of_a_prelude_is_not_kept() -> None:
    class Endless:
        def __init__(self, head: bytes, more: bytes) -> None:
            self.head, self.more = head, more * (65536 // len(more))

        def read(self, size: int, /) -> bytes:
            head, self.head = self.head, b""
            return head or self.more

    attribute = wrapped(f.XATTR, b"user.x\0" + bytes(16384 - 23))
    with pytest.raises(ArchiveError, match="more than 67108864 bytes of metadata"):
        ArchiveDecoder(Endless(FOLDER, attribute)).__iter__().__next__()
    with pytest.raises(ArchiveError, match="PRELUDE of 1099511627776 bytes"):
        ArchiveDecoder(Endless(f.VERSION_ITEM + f.HEADER.pack(f.PRELUDE, 1 << 40), b"x"))


def closed(body: bytes, rows: list[tuple[int, int, int]], *, entry: int = 0) -> bytes:
    """An archive with `body` and a table of `rows` (hash, position, size) whose directory began at `entry`."""
    position = len(body)
    rows = sorted(rows)
    table = b"".join(
        ROW.pack(rows[rank][0], (position - rows[rank][1]) % (1 << 64), rows[rank][2])
        for rank in permutation(len(rows))
    )
    size = 16 + ROW_SIZE * (len(rows) + 1)
    tail = ROW.pack(f.GOODBYE_TAIL_MARKER, position - entry, size)
    return body + f.HEADER.pack(f.GOODBYE, size) + table + tail


def test_tables_lead_nowhere_but_into_their_directory() -> None:
    child = named(b"a") + FILE + wrapped(f.PAYLOAD, b"c")
    body = FOLDER + child
    good = closed(body, [(hash_name(b"a"), 56, len(child))])
    assert access(good) == decode(good) == 2
    for position in (0, 55, 57, len(body), len(body) - 1, len(body) + 1, len(body) + 10_000, -1, -(1 << 63)):
        forged = ArchiveAccessor(MemoryBytes(closed(body, [(hash_name(b"a"), position, len(child))])))
        with pytest.raises(ArchiveError):
            forged.root.children()
        with pytest.raises(ArchiveError):
            forged.root.lookup(b"a")
    for size in (0, 1, len(child) - 1):
        with pytest.raises(ArchiveError, match="larger than"):
            access(closed(body, [(hash_name(b"a"), 56, size)]))


def test_a_directory_that_claims_to_be_its_own_child_is_refused() -> None:
    """What lies in it ends before it ends: a table cannot lead upwards, so nothing goes in circles."""
    inner = named(b"d") + FOLDER
    position = len(FOLDER) + len(inner)
    # The table of `d` says that `d` lies in `d`; the root's says the same of the root.
    for start, size in ((56, len(inner) + 64), (0, position + 64), (position, 64)):
        body = FOLDER + closed(inner, [(hash_name(b"d"), start - 56, size)], entry=18)
        archive = closed(body, [(hash_name(b"d"), 56, len(body) - 56)])
        root = ArchiveAccessor(MemoryBytes(archive)).root
        directory = root.lookup(b"d")
        assert isinstance(directory, Directory)
        with pytest.raises(ArchiveError):
            directory.children()
        with pytest.raises(ArchiveError):
            directory.lookup(b"d")


def test_directories_that_overlap_are_not_listed_twice() -> None:
    """Two names for one place in each of many levels would double with each level."""
    directory = named(b"d") + closed(FOLDER, [])
    body = FOLDER + directory
    row = (hash_name(b"d"), 56, len(directory))
    with pytest.raises(ArchiveError, match="two entries of one directory overlap"):
        access(closed(body + directory, [row, row]))
    with pytest.raises(ArchiveError, match="a second entry named 'd'"):
        access(closed(body + directory, [row, (hash_name(b"d"), 56 + len(directory), len(directory))]))


def test_a_table_cannot_have_more_rows_than_its_directory_has_room_for() -> None:
    archive = closed(FOLDER + named(b"a") + FILE + wrapped(f.PAYLOAD), [(1, 56, 90)] * 5)
    with pytest.raises(ArchiveError, match="a table of 160 bytes for 90 bytes of entries"):
        ArchiveAccessor(MemoryBytes(archive)).root.children()


@pytest.mark.parametrize(
    ("child", "message"),
    [
        (wrapped(f.FILENAME, b"\0") + FILE, "FILENAME of 17 bytes"),
        (wrapped(f.FILENAME, b"x" * 4097 + b"\0") + FILE, "FILENAME of 4114 bytes"),
        (wrapped(f.FILENAME, b"abc") + FILE, "without its closing NUL"),
        (named(b"."), "lead out"),
        (named(b".."), "lead out"),
        (named(b"a/b"), "lead out"),
        (named(b"/"), "lead out"),
        (named(b"a\0b"), "lead out"),
        (named(b"a") + named(b"b"), "FILENAME where an ENTRY must be"),
        (named(b"a") + wrapped(f.PAYLOAD), "PAYLOAD where an ENTRY must be"),
        (named(b"a") + FILE + wrapped(f.HARDLINK, bytes(10)), "HARDLINK of 26 bytes cannot follow"),
        (named(b"a") + FILE + wrapped(f.FORMAT_VERSION, bytes(8)), "FORMAT_VERSION of 24 bytes cannot follow"),
        (named(b"a") + FILE + wrapped(f.PRELUDE), "PRELUDE of 16 bytes cannot follow"),
        (named(b"a") + FILE + wrapped(1), "0x0000000000000001 of 16 bytes cannot follow"),
        (named(b"a") + FILE + wrapped(f.PAYLOAD_REF, bytes(15)), "PAYLOAD_REF of 31 bytes cannot follow"),
        (named(b"a") + FILE + wrapped(f.DEVICE, bytes(16)), "DEVICE of 32 bytes cannot follow the metadata of a file"),
        (named(b"a") + FOLDER + wrapped(f.PAYLOAD), "PAYLOAD of 16 bytes cannot follow the metadata of a directory"),
        (named(b"a") + encode_metadata(Metadata(Stat(0o644))), "mode 0o644 is no file's"),
        (named(b"a") + encode_metadata(Metadata(Stat(0o100644 | 1 << 40))), "is no file's"),
        (named(b"a") + encode_metadata(Metadata(Stat(0o060644))) + wrapped(f.DEVICE, bytes(8)), "DEVICE of 24 bytes"),
        (named(b"a") + encode_metadata(Metadata(Stat(0o120777))) + wrapped(f.SYMLINK, b"\0"), "SYMLINK of 17 bytes"),
        (named(b"a") + encode_metadata(Metadata(Stat(0o120777))) + wrapped(f.SYMLINK, b"a"), "SYMLINK of 17 bytes"),
        (named(b"a") + encode_metadata(Metadata(Stat(0o120777))) + wrapped(f.SYMLINK, b"ab"), "must have one NUL"),
        (named(b"a") + encode_metadata(Metadata(Stat(0o120777))) + wrapped(f.SYMLINK, b"a\0b\0"), "must have one NUL"),
        (
            named(b"a") + encode_metadata(Metadata(Stat(0o120777))) + wrapped(f.SYMLINK, b"x" * 4097 + b"\0"),
            "SYMLINK of 4114 bytes",
        ),
        (named(b"a") + wrapped(f.HARDLINK, bytes(8)), "HARDLINK of 24 bytes"),
        (named(b"a") + wrapped(f.HARDLINK, bytes(8) + b"a\0"), "a hard link to itself"),
        (named(b"a") + wrapped(f.HARDLINK, b"\1" * 8 + b"ab"), "must have one NUL"),
        (named(b"a") + wrapped(f.HARDLINK, b"\1" * 8 + b"x" * 4097 + b"\0"), "HARDLINK of 4122 bytes"),
    ],
)
@BOTH
def test_entries_that_no_writer_makes(read: Callable[[bytes, bytes], int], child: bytes, message: str) -> None:
    body = FOLDER + child + bytes(5000)
    with pytest.raises(ArchiveError, match=rf"cannot read archive root\.pxar: at byte \d+: .*{message}"):
        read(closed(body, [(hash_name(b"a"), 56, len(body) - 56)]), b"")


@BOTH
def test_attributes_of_one_entry_are_bounded(read: Callable[[bytes, bytes], int]) -> None:
    """Each takes ten times its size in memory."""
    for count, is_read in ((1000, True), (MAX_ATTRIBUTES + 1, False)):
        body = FOLDER + named(b"a") + FILE + wrapped(f.XATTR, b"a\0") * count + wrapped(f.PAYLOAD)
        archive = closed(body, [(hash_name(b"a"), 56, len(body) - 56)])
        if is_read:
            assert read(archive, b"") == 2
        else:
            with pytest.raises(ArchiveError, match="more than 65536 attributes of one entry"):
                read(archive, b"")


@pytest.mark.parametrize(("equal", "is_found"), [(MAX_EQUAL, True), (MAX_EQUAL + 1, False), (20_000, False)])
def test_names_of_one_hash_cost_a_bounded_number_of_reads(equal: int, is_found: bool) -> None:
    child = named(b"other") + FILE + wrapped(f.PAYLOAD)
    body = FOLDER + child * (equal - 1)
    rows = [(hash_name(b"a"), 56 + number * len(child), len(child)) for number in range(equal - 1)]
    wanted = named(b"a") + FILE + wrapped(f.PAYLOAD)
    rows.append((hash_name(b"a"), len(body), len(wanted)))
    stored = MemoryBytes(closed(body + wanted, rows))
    accessor = ArchiveAccessor(stored, where="root.pxar")
    if is_found:
        assert accessor.lookup(b"a") is not None
    else:
        before = stored.reads
        with pytest.raises(ArchiveError, match=rf"more than {MAX_EQUAL} names have the hash of 'a'"):
            accessor.lookup(b"a")
        assert stored.reads - before <= 2  # the table


def test_items_in_the_wrong_place_stop_the_decoder() -> None:
    for kind in (f.PAYLOAD, f.FORMAT_VERSION, f.PRELUDE, f.ENTRY, f.PAYLOAD_START_MARKER, 7):
        with pytest.raises(ArchiveError, match=r"where an entry or a table must be|cannot follow"):
            decode(FOLDER + named(b"a") + FILE + wrapped(f.PAYLOAD) + wrapped(kind, bytes(8)))
    good = SAMPLES["self-contained example"][0]
    with pytest.raises(ArchiveError, match="something follows the end"):
        decode(good + b"\0")
    with pytest.raises(ArchiveError, match="the root is no directory"):
        decode(FILE + wrapped(f.PAYLOAD))


@pytest.mark.parametrize("size", [16, 39, 41, 63])
def test_a_table_has_whole_rows(size: int) -> None:
    with pytest.raises(ArchiveError, match=f"at byte 56: a table of {size} bytes"):
        decode(FOLDER + f.HEADER.pack(f.GOODBYE, size) + bytes(100))


def linked(distance: int, *, to: bytes = FILE + wrapped(f.PAYLOAD, b"c")) -> Hardlink:
    """The second of two children, a hard link over `distance` bytes; the first is `to`."""
    first = named(b"a") + to
    second = named(b"b") + wrapped(f.HARDLINK, distance.to_bytes(8, "little") + b"a\0")
    body = FOLDER + first + second
    rows = [(hash_name(b"a"), 56, len(first)), (hash_name(b"b"), 56 + len(first), len(second))]
    node = ArchiveAccessor(MemoryBytes(closed(body, rows))).root.lookup(b"b")
    assert isinstance(node, Hardlink)
    return node


def test_hard_links_lead_to_files_before_them() -> None:
    length = len(named(b"a") + FILE + wrapped(f.PAYLOAD, b"c"))
    assert linked(length).follow().name == b"a"
    for distance in (1, length - 1, length + 1, length + 56, length + 57, 1 << 62, (1 << 64) - 1):
        with pytest.raises(ArchiveError):
            linked(distance).follow()
    pipe = encode_metadata(Metadata(Stat(0o010644)))
    link = wrapped(f.HARDLINK, (1).to_bytes(8, "little") + b"x\0")
    for to in (pipe, link):
        with pytest.raises(ArchiveError, match="leads to something that is no file"):
            linked(18 + len(to), to=to).follow()


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 6), (15, 6), (17, 6), (16, 5), (16, 7), (38, 6), (1 << 62, 6), (70, 1 << 62), (61, 0)]
)
def test_a_reference_must_lead_to_a_payload_of_its_size(offset: int, size: int) -> None:
    archive, payload = SAMPLES["split example"]
    at = archive.index(f.HEADER.pack(f.PAYLOAD_REF, 32)) + 16
    forged = archive[:at] + offset.to_bytes(8, "little") + size.to_bytes(8, "little") + archive[at + 16 :]
    accessor = ArchiveAccessor(MemoryBytes(forged), MemoryBytes(payload), where="root.pxar")
    node = accessor.lookup(b"/d/a.txt")
    assert isinstance(node, FileNode)  # looking it up is no reason to look at the payload
    with pytest.raises(ArchiveError, match=r"root\.pxar"):
        accessor.open_content(node)
    with pytest.raises(ArchiveError, match=r"root\.pxar"):
        decode(forged, payload)


def test_references_that_go_back_stop_the_decoder_only() -> None:
    archive, payload = SAMPLES["split example"]
    first = archive.index(f.HEADER.pack(f.PAYLOAD_REF, 32)) + 16
    second = archive.index(f.HEADER.pack(f.PAYLOAD_REF, 32), first) + 16
    swapped = bytearray(archive)
    swapped[first : first + 16], swapped[second : second + 16] = (
        archive[second : second + 16],
        archive[first : first + 16],
    )
    with pytest.raises(ArchiveError, match="content lies before, at 16"):
        decode(bytes(swapped), payload)
    accessor = ArchiveAccessor(MemoryBytes(swapped), MemoryBytes(payload))
    assert accessor.root.names() == [b"d", b"h", b"s"]


def test_a_payload_stream_begins_with_its_marker() -> None:
    archive, payload = SAMPLES["split example"]
    with pytest.raises(ArchiveError, match=r"payload of root\.pxar: at byte 0: no start marker"):
        ArchiveDecoder(MemoryReader(archive), MemoryReader(payload[16:]), where="root.pxar")


def test_contents_of_a_split_archive_need_its_payload_stream() -> None:
    archive, _ = SAMPLES["split example"]
    accessor = ArchiveAccessor(MemoryBytes(archive))
    node = accessor.lookup(b"d/a.txt")
    assert node is not None
    with pytest.raises(UsageError, match="lie in another stream"):
        accessor.open_content(node)
    with pytest.raises(UsageError, match="it is no file"):
        accessor.open_content(accessor.root)
    decoder = ArchiveDecoder(MemoryReader(archive))
    for event in decoder:
        if isinstance(event, Entry) and event.size:
            with pytest.raises(UsageError, match="lie in another stream"):
                decoder.read(1)


def test_deep_trees_cost_no_more_than_their_bytes() -> None:
    depth = 3000
    body, starts = FOLDER, []
    for _ in range(depth):
        starts.append(len(body))
        body += named(b"x" * 200) + FOLDER
    size = 0
    for start in reversed(starts):
        body = closed(body, [(hash_name(b"x" * 200), start + 273, size)] if size else [], entry=start + 217)
        size = len(body) - start
    body = closed(body, [(hash_name(b"x" * 200), 56, size)])
    peak, caught = measured(lambda: sum(1 for _ in ArchiveDecoder(MemoryReader(body))))
    assert caught is None
    assert peak < 8 << 20
    node = ArchiveAccessor(MemoryBytes(body)).root
    for _ in range(depth):
        (child,) = node.children()
        assert isinstance(child, Directory)
        node = child
    assert len(node) == 0


def test_trees_are_not_walked_twice_however_names_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    """All names have one hash: all are found, and none that is not there."""
    for room in ("pxar.encoder", "pxar.accessor"):
        monkeypatch.setattr(f"{room}.hash_name", lambda _: 42)
    names = [b"%d" % number for number in range(50)]
    archive, _ = archived(item(0o040755, children={name: item(0o100644) for name in names}), split=False)
    root = ArchiveAccessor(MemoryBytes(archive)).root
    for name in names:
        node = root.lookup(name)
        assert node is not None
        assert node.name == name
    assert root.lookup(b"50") is None
    assert root.names() == sorted(names)
