"""What is fuzzed: a function of bytes per parser. Bytes that it refuses are a `FormatError`; anything else is a find.

The archive parsers take both streams in one input: length of the archive (u32), archive, payload.
"""

from collections.abc import Callable
from typing import Final

from core.errors import FormatError
from pxar.accessor import ArchiveAccessor, Directory, FileNode, Hardlink, Node
from pxar.decoder import ArchiveDecoder, Entry
from pxar.format import HEADER, HEADER_SIZE, Kind, Short
from pxar.listing import Listing, Row, row_of
from pxar.metadata import Metadata, encode_metadata, metadata_end, parse_metadata
from pxar.patterns import MatchList, MatchPattern, _Places, _Reader, parse_exclude_file
from tests.pxar.archives import MemoryBytes, MemoryReader


def joined(archive: bytes, payload: bytes = b"") -> bytes:
    """Both streams as one input."""
    return len(archive).to_bytes(4, "little") + archive + payload


def _streams(data: bytes) -> tuple[bytes, bytes]:
    end = 4 + int.from_bytes(data[:4], "little")
    return data[4:end], data[end:]


def decoder(data: bytes) -> None:
    """Everything in the archive is read, front to back."""
    archive, payload = _streams(data)
    reader = ArchiveDecoder(MemoryReader(archive, 50), MemoryReader(payload, 50) if payload else None)
    events = depth = 0
    for event in reader:
        events += 1
        if not isinstance(event, Entry):
            depth -= 1
            continue
        assert event.path.startswith(b"/")
        if event.kind is Kind.HARDLINK:
            continue
        assert encode_metadata(event.metadata)
        if event.kind is Kind.DIRECTORY:
            depth += 1
        elif event.kind is Kind.FILE and (payload or event.payload_position is None):
            assert sum(len(piece) for piece in iter(lambda: reader.read(100), b"")) == event.size
    assert depth == 0
    assert events * HEADER_SIZE <= len(archive)


def accessor(data: bytes) -> None:
    """Everything that is found from the root is read and looked up."""
    archive, payload = (MemoryBytes(stream) for stream in _streams(data))
    reader = ArchiveAccessor(archive, payload)
    pending: list[Node] = [reader.root]
    nodes = 0
    while pending:
        node = pending.pop()
        nodes += 1
        if isinstance(node, Directory):
            children = node.children()
            pending += children
            for child in children:
                found = node.lookup(child.name)  # a forged hash may hide it
                assert found is None or found.id == child.id
        if isinstance(node, Hardlink):
            node = node.follow()
        assert encode_metadata(node.metadata)
        if isinstance(node, FileNode):
            stream, offset, size = reader.open_content(node)
            assert len(stream.read(offset, size)) == size
    assert nodes * HEADER_SIZE <= archive.size


def metadata(data: bytes) -> None:
    """The metadata at the beginning are parsed and encoded again."""
    found, end = parse_metadata(data)
    assert metadata_end(data, 0) == end
    assert Metadata.parse(encode_metadata(found)) == found
    kinds, at = [], 0
    while at < end:
        kind, size = HEADER.unpack_from(data, at)
        kinds.append(kind)
        at += size
    assert at == end
    assert len(found.xattrs) <= len(kinds)


class _Windows:
    """Pieces of odd places and sizes."""

    def __init__(self, stream: MemoryBytes, size: int) -> None:
        self._stream, self._size = stream, size

    def window(self, offset: int) -> tuple[bytes, int, int]:
        start = offset // self._size * self._size
        end = min(start + self._size, self._stream.size)
        if not start <= offset < end:
            raise FormatError("read", "stream", "its end was reached")
        return bytes(self._stream.read(start, end - start)), start, end


def listing(data: bytes) -> None:
    """Every folder is listed as a mount does it, which says the same as reading its entries one by one."""
    archive, payload = (MemoryBytes(stream) for stream in _streams(data))
    reader = ArchiveAccessor(archive, payload)
    pending, nodes = [reader.root], 0
    while pending:
        directory = pending.pop()
        listed = Listing(directory, _Windows(archive, 61 + nodes % 900))
        expected = sorted(directory.children(), key=lambda node: node.position)
        found: list[tuple[bytes, Row]] = []
        behind = 0
        while len(found) < len(listed):
            more, behind = listed.rows(len(found), 3, behind, lambda _link, _target: None)
            assert more
            found += more
        assert found == [(node.name, row_of(node)) for node in expected]
        nodes += len(found)
        assert nodes * HEADER_SIZE <= archive.size
        pending += [node for node in expected if isinstance(node, Directory)]


def patterns(data: bytes) -> None:
    """Patterns, and behind a NUL each the paths that are matched: by regular expression and step by step."""
    text, *paths = data.split(b"\0")
    found, faults = parse_exclude_file(text, b"/a")
    matches = MatchList(found)
    for path in paths[:8]:
        path = b"/" + path[:120]
        decided = None
        for pattern in found:
            anchored = pattern.text.startswith(b"/")
            tokens = [frozenset({byte}) for byte in (b"/a" if anchored else b"")] + _Reader(pattern.text).tokens()
            matched = pattern.matches(path, is_dir=True)
            # A lone `!` looks as if a slash had been written.
            assert pattern.text == b"/" or matched == bool(_Places(tokens).match(path))
            decided = not pattern.inverted if matched else decided
        assert matches.decide(path, is_dir=True) == decided
        assert all(MatchPattern.parse(one.line()[:-1]).text == one.text for one in found)
    if faults:
        raise FormatError("use", "patterns", faults[0].partition(": ")[2])


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "accessor": accessor,
    "decoder": decoder,
    "listing": listing,
    "metadata": metadata,
    "patterns": patterns,
}


def outcome(target: str, data: bytes) -> str:
    """What becomes of `data`: the error's text without numbers and names, or `accepted`."""
    try:
        TARGETS[target](data)
    except FormatError as error:
        words = error.why.split()
        return " ".join(word for word in words if word.isalpha() and word.islower())
    except Short as short:
        raise AssertionError("what parsers say to each other came out") from short
    return "accepted"
