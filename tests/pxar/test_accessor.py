from pathlib import Path

import pytest

from core.buffers import Buffer
from core.errors import FleeceError, UsageError
from pxar.accessor import ArchiveAccessor, Device, Directory, FileNode, Hardlink, Special, Symlink
from pxar.format import Kind
from pxar.metadata import Metadata, Stat, encode_metadata, parse_metadata
from tests.pxar.archives import Item, MemoryBytes, archived, item, rows_of_accessor
from tests.pxar.samples import every_kind, example

DATA = Path(__file__).parents[1] / "data/pxar"


def split_example() -> tuple[MemoryBytes, MemoryBytes]:
    return MemoryBytes((DATA / "example.mpxar").read_bytes()), MemoryBytes((DATA / "example.ppxar").read_bytes())


def test_the_split_example_is_read() -> None:
    archive, payload = split_example()
    accessor = ArchiveAccessor(archive, payload)
    assert (accessor.version, accessor.prelude) == (2, b'{"exclude-patterns":"*.tmp\\n"}')
    root = accessor.root
    assert (root.name, root.position, root.end, root.id, len(root)) == (b"", 70, 768, 768, 3)
    assert root.names() == [b"d", b"h", b"s"]
    assert [node.name for node in root.stream()] == [b"d", b"h", b"s"]
    directory, link, symlink = root.children()
    assert isinstance(directory, Directory)
    assert (directory.filename_position, directory.position, directory.id) == (126, 144, 508)
    assert directory.metadata.stat == Stat(0o040755, 0, 1000, 1000, 1_700_000_001, 500)
    assert isinstance(symlink, Symlink)
    assert (symlink.target, symlink.id) == (b"d/b.txt", 576 | 1 << 63)
    assert isinstance(link, Hardlink)
    assert link.target_path == b"d/a.txt"
    file = directory.lookup(b"a.txt")
    assert isinstance(file, FileNode)
    assert link.follow().id == file.id == 222 | 1 << 63
    assert (file.size, file.payload_position) == (6, 16)
    for node in (file, link):
        stream, offset, size = accessor.open_content(node)
        assert bytes(stream.read(offset, size)) == b"hello\n"


def test_the_self_contained_example_is_read() -> None:
    archive = MemoryBytes((DATA / "example.pxar").read_bytes())
    accessor = ArchiveAccessor(archive)
    file = accessor.lookup(b"/d/b.txt")
    assert isinstance(file, FileNode)
    assert (accessor.version, accessor.prelude, file.payload_position) == (1, None, None)
    assert accessor.open_content(file) == (archive, 324, 7)


def test_entries_of_every_kind() -> None:
    accessor = ArchiveAccessor(MemoryBytes(archived(every_kind(), split=False)[0]))
    block, character = accessor.lookup(b"blk"), accessor.lookup(b"chr")
    assert isinstance(block, Device)
    assert (block.kind, block.major, block.minor) == (Kind.BLOCK, 8, 17)
    assert isinstance(character, Device)
    assert (character.kind, character.major, character.minor) == (Kind.CHARACTER, 0xABCD1234, 0xDCBA5678)
    for name, kind in ((b"fifo", Kind.FIFO), (b"sock", Kind.SOCKET)):
        node = accessor.lookup(name)
        assert isinstance(node, Special)
        assert node.kind is kind


@pytest.mark.parametrize("path", [b"", b"/", b".", b"/./", b"//"])
def test_paths_of_the_root(path: bytes) -> None:
    accessor = ArchiveAccessor(*split_example())
    assert accessor.lookup(path) is accessor.root


@pytest.mark.parametrize("path", [b"x", b"d/x", b"d/a.txt/x", b"h/x", b"s/a.txt"])
def test_paths_of_nothing(path: bytes) -> None:
    assert ArchiveAccessor(*split_example()).lookup(path) is None


def test_a_path_does_not_go_up() -> None:
    with pytest.raises(UsageError, match=r"'d/\.\./s'"):
        ArchiveAccessor(*split_example()).lookup(b"d/../s")


def test_listing_parses_no_metadata_and_touches_no_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Buffer] = []

    def parse(data: Buffer, *, where: str, base: int) -> tuple[Metadata, int]:
        calls.append(data)
        return parse_metadata(data, where=where, base=base)

    monkeypatch.setattr("pxar.accessor.parse_metadata", parse)
    archive, payload = archived(every_kind(), split=True)
    stored = MemoryBytes(payload)
    accessor = ArchiveAccessor(MemoryBytes(archive), stored)
    nodes = accessor.root.children()
    assert accessor.lookup(b"acl/f") is not None
    assert calls == []
    assert stored.reads == 0
    assert nodes[0].kind is Kind.DIRECTORY
    assert isinstance(nodes[0], Directory)
    assert nodes[0].metadata.acl.default is not None
    assert len(calls) == 1


def test_a_large_directory_is_read_in_blocks() -> None:
    names = [b"file-%05d" % number for number in range(20_000)]
    root = item(0o040755, children={name: item(0o100644) for name in names})
    archive = MemoryBytes(archived(root, split=True)[0])
    accessor = ArchiveAccessor(archive)
    assert accessor.root.names() == names
    assert archive.reads < 50
    assert archive.total < 1.2 * archive.size


def test_contents_between_entries_are_not_read() -> None:
    children = {b"%03d" % number: item(0o100644, content=bytes(20_000)) for number in range(100)}
    archive = MemoryBytes(archived(item(0o040755, children=children), split=False)[0])
    assert len(ArchiveAccessor(archive).root.children()) == 100
    assert archive.total < 110 * 4096


def test_metadata_of_any_size_are_read_and_not_kept() -> None:
    big = Metadata(Stat(0o100644), tuple((b"user.%d" % number, bytes(60_000)) for number in range(4)))
    children = {b"%d" % number: Item(Kind.FILE, big) for number in range(50)}
    archive, payload = archived(item(0o040755, children=children), split=True)
    stored = MemoryBytes(archive)
    nodes = ArchiveAccessor(stored, MemoryBytes(payload)).root.children()
    before = stored.total
    for node in nodes:
        assert isinstance(node, FileNode)
        assert node.metadata == big
        assert node.stat == big.stat
        assert node.meta == encode_metadata(big)
    assert stored.total > before


class MissingError(FleeceError):
    """A range that is not at hand yet."""


class Fetched(MemoryBytes):
    """A stored stream of which only 64 byte pieces are there that were asked for before."""

    def __init__(self, data: Buffer) -> None:
        super().__init__(data)
        self.there: set[int] = set()

    def read(self, offset: int, length: int) -> Buffer:
        for piece in range(offset // 64, (offset + length - 1) // 64 + 1):
            if piece not in self.there:
                self.there.add(piece)
                raise MissingError("read", "chunk", "not at hand")
        return super().read(offset, length)


def test_a_reader_may_raise_and_be_asked_again() -> None:
    archive, payload = archived(example(), split=True)
    expected = list(rows_of_accessor(ArchiveAccessor(MemoryBytes(archive), MemoryBytes(payload))))
    streams = Fetched(archive), Fetched(payload)
    found = None
    accessor = None
    refusals = 0
    while found is None:
        try:
            accessor = accessor or ArchiveAccessor(*streams)
            found = list(rows_of_accessor(accessor))
        except MissingError:
            refusals += 1
    assert found == expected
    assert refusals >= len(archive) // 64


def test_a_reader_that_gives_less_is_noticed() -> None:
    class Short(MemoryBytes):
        def read(self, offset: int, length: int) -> Buffer:
            return super().read(offset, length - 1)

    with pytest.raises(FleeceError, match="bytes should lie here"):
        ArchiveAccessor(Short((DATA / "example.pxar").read_bytes()))
