"""Streams in memory, trees to archive, and an archive copied entry by entry."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from core.buffers import Buffer
from pxar.accessor import ArchiveAccessor, Device, Directory, FileNode, Hardlink, Node, Symlink
from pxar.decoder import ArchiveDecoder, Entry, ForwardReader
from pxar.encoder import ArchiveEncoder
from pxar.format import KIND_OF_MODE, Kind
from pxar.metadata import Metadata, Stat, encode_metadata
from pxar.sinks import ReusedChunk


class MemorySink:
    """An archive or payload stream; `position` may be moved on, as injected chunks do."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.suggested: list[int] = []
        self.skipped = 0
        self._room = bytearray()

    @property
    def position(self) -> int:
        return len(self.data) + self.skipped

    def write(self, data: Buffer) -> None:
        self.data += data

    def reserve(self, size: int) -> memoryview:
        self._room = bytearray(size)
        return memoryview(self._room)

    def commit(self, size: int) -> None:
        self.data += self._room[:size]

    def suggest(self) -> None:
        self.suggested.append(self.position)

    def inject(self, chunks: Sequence[ReusedChunk]) -> None:
        self.skipped += sum(chunk.size for chunk in chunks)


class MemoryBytes:
    """A stored stream that counts what is read of it."""

    def __init__(self, data: Buffer) -> None:
        self.data = memoryview(data)
        self.total = 0
        self.reads = 0

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> Buffer:
        assert offset >= 0
        assert length >= 0
        self.reads += 1
        self.total += length
        return self.data[offset : offset + length]


class MemoryReader:
    """A stream that cannot go back; `pace` bytes come at a time."""

    def __init__(self, data: Buffer, pace: int = 1 << 30) -> None:
        self.data = memoryview(data)
        self.at = 0
        self.pace = pace

    def read(self, size: int, /) -> Buffer:
        piece = self.data[self.at : self.at + min(size, self.pace)]
        self.at += len(piece)
        return piece


@dataclass
class Item:
    """An entry of a tree to archive; what does not fit its kind is left empty."""

    kind: Kind
    metadata: Metadata
    content: bytes = b""
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    children: "dict[bytes, Item]" = field(default_factory=dict)


def item(mode: int, *, mtime: tuple[int, int] = (0, 0), ids: tuple[int, int] = (0, 0), **more: object) -> Item:
    """An item with plain metadata; its kind follows from the mode."""
    stat = Stat(mode, 0, *ids, *mtime)
    return Item(KIND_OF_MODE[mode & 0o170000], Metadata(stat), **more)  # type: ignore[arg-type]


def archived(root: Item, *, split: bool, prelude: bytes | None = None) -> tuple[bytes, bytes]:
    """The archive stream and the payload stream (empty if not `split`) of a tree."""
    archive, payload = MemorySink(), MemorySink()
    encoder = ArchiveEncoder(archive, payload if split else None, prelude=prelude)
    encoder.begin(encode_metadata(root.metadata))
    positions: dict[bytes, int] = {}
    _children(encoder, root, b"", positions)
    encoder.finish()
    return bytes(archive.data), bytes(payload.data)


def _children(encoder: ArchiveEncoder, directory: Item, path: bytes, positions: dict[bytes, int]) -> None:
    for name, child in sorted(directory.children.items()):
        here = path + name
        if child.kind is Kind.HARDLINK:
            encoder.hardlink(name, child.target, positions[child.target])
            continue
        meta = encode_metadata(child.metadata)
        if child.kind is Kind.DIRECTORY:
            encoder.directory(name, meta)
            _children(encoder, child, here + b"/", positions)
            encoder.end_directory()
        elif child.kind is Kind.FILE:
            positions[here] = encoder.begin_file(name, meta, len(child.content))
            encoder.content.write(child.content)
            encoder.end_file()
        elif child.kind is Kind.SYMLINK:
            encoder.symlink(name, meta, child.target)
        elif child.kind in (Kind.BLOCK, Kind.CHARACTER):
            encoder.device(name, meta, *child.device)
        else:
            encoder.special(name, meta)


#: What is compared of an entry: path, kind, metadata, content, target, device, position.
Row = tuple[bytes, Kind, Metadata | None, bytes, bytes, tuple[int, int], int]


def rows_of_tree(root: Item) -> list[tuple[bytes, Kind, Metadata | None, bytes, bytes, tuple[int, int]]]:
    """Every entry of a tree in archive order."""
    rows = []

    def add(path: bytes, one: Item) -> None:
        metadata = None if one.kind is Kind.HARDLINK else one.metadata
        rows.append((path, one.kind, metadata, one.content, one.target, one.device))
        for name, child in sorted(one.children.items()):
            add(path.rstrip(b"/") + b"/" + name, child)

    add(b"/", root)
    return rows


def rows_of_decoder(decoder: ArchiveDecoder, *, contents: bool = True) -> Iterator[Row]:
    """Every entry that comes out of `decoder`."""
    for event in decoder:
        if isinstance(event, Entry):
            content = b""
            if contents and event.kind is Kind.FILE:
                content = b"".join(bytes(piece) for piece in iter(lambda: decoder.read(100_000), b""))
            metadata = None if event.kind is Kind.HARDLINK else event.metadata
            yield event.path, event.kind, metadata, content, event.target, event.device, event.filename_position


def rows_of_accessor(accessor: ArchiveAccessor, *, contents: bool = True) -> Iterator[Row]:
    """Every entry that is found from the root of `accessor`, in order of the names."""
    pending: list[tuple[bytes, Node]] = [(b"/", accessor.root)]
    while pending:
        path, node = pending.pop()
        content = b""
        if contents and isinstance(node, FileNode):
            stream, offset, size = accessor.open_content(node)
            content = bytes(stream.read(offset, size))
        metadata = None if isinstance(node, Hardlink) else node.metadata
        target = node.target_path if isinstance(node, Hardlink) else node.target if isinstance(node, Symlink) else b""
        device = (node.major, node.minor) if isinstance(node, Device) else (0, 0)
        yield path, node.kind, metadata, content, target, device, node.filename_position
        if isinstance(node, Directory):
            pending += [(path.rstrip(b"/") + b"/" + child.name, child) for child in reversed(node.children())]


def copied(
    reader: ForwardReader, is_new: Callable[[Entry], bool], *, payload: ForwardReader | None = None
) -> tuple[bytes, bytes]:
    """The archive that `reader` gives, decoded and encoded again.

    Split without `payload`: contents are made up, and files for which `is_new` is false become references.
    """
    decoder = ArchiveDecoder(reader, payload)
    split = decoder.version == 2
    archive, sink = MemorySink(), MemorySink()
    encoder = ArchiveEncoder(archive, sink if split else None, prelude=decoder.prelude)
    for event in decoder:
        if not isinstance(event, Entry):
            if event.directory.parent is not None:
                encoder.end_directory()
        elif event.parent is None:
            encoder.begin(event.meta)
        elif event.kind is Kind.DIRECTORY:
            encoder.directory(event.name, event.meta)
        elif event.kind is Kind.HARDLINK:
            encoder.hardlink(event.name, event.target, event.target_position)
        elif event.kind is Kind.SYMLINK:
            encoder.symlink(event.name, event.meta, event.target)
        elif event.kind in (Kind.BLOCK, Kind.CHARACTER):
            encoder.device(event.name, event.meta, *event.device)
        elif event.kind in (Kind.FIFO, Kind.SOCKET):
            encoder.special(event.name, event.meta)
        elif not is_new(event):
            assert event.payload_position is not None
            encoder.reference(event.name, event.meta, event.payload_position, event.size)
        else:
            if event.payload_position is not None:
                sink.skipped += event.payload_position - sink.position
            encoder.begin_file(event.name, event.meta, event.size)
            if event.payload_position is not None and payload is None:
                sink.skipped += event.size
            else:
                for piece in iter(lambda: decoder.read(1 << 20), b""):
                    encoder.content.write(piece)
            encoder.end_file()
    # Whatever is behind the last reference.
    sink.skipped += 1 << 50
    encoder.finish()
    return bytes(archive.data), bytes(sink.data)
