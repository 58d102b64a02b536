"""The cuts of streams that a real PBS client wrote, chunk by chunk."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from core.buffers import Buffer
from datastore import buzhash
from datastore.buzhash import Finder, finder
from datastore.chunker import ARCHIVE_AVERAGE, CATALOG_AVERAGE, Chunker, Cutter
from datastore.codec import CryptKey
from datastore.dynamic_index import DynamicIndex
from tests.support.golden_streams import open_stream

FILENAME = 0x16701121063917B3
PAYLOAD_REF = 0x419D3D6BC4BA977E
PAYLOAD = 0x28147A1B0B7C1A25
START_MARKER = 0x834C68C2194A4ED2
TAIL_MARKER = 0x6C72B78B984C81B5
HEADER_SIZE = 16
GATHERED = 256 << 10
LARGEST_WRITE = 4 << 20


def ends(index: DynamicIndex) -> list[int]:
    return [sum(index.span(number)) for number in range(index.count)]


def plain_cuts(data: bytes, average: int, block: int, find: Finder | None = None) -> list[int]:
    chunker = Chunker(average, find=find)
    found, done = [], 0
    for start in range(0, len(data), block):
        piece = memoryview(data)[start : start + block]
        while len(piece):
            cut = chunker.scan(piece)
            if not cut:
                break
            done = len(data) if start + block > len(data) else start + block
            found.append(done - len(piece) + cut)
            piece = piece[cut:]
    return found if found and found[-1] == len(data) else [*found, len(data)]


def references(archive: bytes) -> list[tuple[int, int]]:
    """Offset and size in every payload reference of a metadata archive, whose items follow each other."""
    found, position = [], 0
    while position < len(archive):
        kind, size = struct.unpack_from("<QQ", archive, position)
        if kind == PAYLOAD_REF:
            found.append(struct.unpack_from("<QQ", archive, position + HEADER_SIZE))
        position += size
    assert position == len(archive)
    return found


class Replay:
    """Hands a payload stream to a `Cutter` in the blocks of the reference client."""

    def __init__(self) -> None:
        self.cutter = Cutter(ARCHIVE_AVERAGE)
        self.chunks: list[int] = []  #: sizes of what was cut, 0 for every injection
        self._gathered = bytearray()
        self._large: Buffer = b""  # waits for the next write: a suggestion may come that lies at its end
        self._open = 0

    def write(self, data: Buffer) -> None:
        """One write of the encoder."""
        if len(self._large) or len(self._gathered) + len(data) > GATHERED:
            self.flush()
        if len(data) >= GATHERED:
            self._large = data
        else:
            self._gathered += data

    def file(self, payload: memoryview) -> None:
        """A header and its content."""
        self.write(payload[:HEADER_SIZE])
        for start in range(HEADER_SIZE, len(payload), LARGEST_WRITE):
            self.write(payload[start : start + LARGEST_WRITE])

    def flush(self) -> None:
        if self._gathered:
            self._feed(bytes(self._gathered))
            self._gathered.clear()
        if len(self._large):
            self._feed(self._large)
            self._large = b""

    def finish(self) -> list[int]:
        self.flush()
        for event in self.cutter.finish():
            self._event(event)
        if self._open:
            self.chunks.append(self._open)
        return self.chunks

    def _feed(self, block: Buffer) -> None:
        rest = len(block)
        for event in self.cutter.feed(block):
            rest -= event
            self._event(event)
        self._open += rest

    def _event(self, event: int) -> None:
        if self._open + event:
            self.chunks.append(self._open + event)
        if not event:
            self.chunks.append(0)
        self._open = 0


def streams(store: Path, ending: str, keys: dict[str, CryptKey]) -> Iterator[tuple[Path, DynamicIndex, bytes]]:
    for path in sorted(store.rglob(f"*.{ending}.didx")):
        yield path, *open_stream(store, path, keys)


def newly_written(archive: bytes, payload: bytes) -> Replay:
    """A payload stream in which nothing was reused."""
    replay = Replay()
    view = memoryview(payload)
    replay.write(view[:HEADER_SIZE])
    position = HEADER_SIZE
    for offset, size in references(archive):
        assert offset == position
        assert struct.unpack_from("<QQ", payload, offset) == (PAYLOAD, HEADER_SIZE + size)
        replay.cutter.suggest(offset)
        position += HEADER_SIZE + size
        replay.file(view[offset:position])
    replay.write(view[position:])
    assert len(payload) - position == HEADER_SIZE  # the tail marker
    return replay


@pytest.mark.parametrize("form", [form for form in buzhash.available() if form != "python"])
@pytest.mark.parametrize(
    ("ending", "average", "count"),
    [("pxar", ARCHIVE_AVERAGE, 3), ("mpxar", ARCHIVE_AVERAGE, 9), ("pcat1", CATALOG_AVERAGE, 3)],
)
def test_archives_and_catalogs_are_cut_where_the_client_cut_them(
    golden_store: Path, golden_keys: dict[str, CryptKey], form: str, ending: str, average: int, count: int
) -> None:
    seen = 0
    for path, index, data in streams(golden_store, ending, golden_keys):
        block = len(data) if seen % 2 else 100_000
        assert plain_cuts(data, average, block, finder(form)) == ends(index), path
        seen += 1
    assert seen == count


def test_payload_streams_are_cut_where_the_client_cut_them(
    golden_store: Path, golden_keys: dict[str, CryptKey]
) -> None:
    seen = 0
    for path, index, payload in streams(golden_store, "ppxar", golden_keys):
        if "tree-metadata/2026-01-03" in str(path) or "tree-metadata/2026-01-04" in str(path):
            continue  # these reuse chunks, see below
        _, archive = open_stream(golden_store, path.with_name(path.name.replace("ppxar", "mpxar")), golden_keys)
        sizes = newly_written(archive, payload).finish()
        assert sizes == list(index.lengths()), path
        seen += 1
    assert seen == 7


@pytest.mark.parametrize(("day", "reused"), [("03", range(1, 11)), ("04", range(1, 10))])
def test_payload_streams_with_reused_chunks_are_cut_where_the_client_cut_them(
    golden_store: Path, day: str, reused: range
) -> None:
    folder = golden_store / f"host/tree-metadata/2026-01-{day}T00:00:00Z"
    index, payload = open_stream(golden_store, folder / "root.ppxar.didx", {})
    _, archive = open_stream(golden_store, folder / "root.mpxar.didx", {})
    lengths = index.lengths()
    injected = [lengths[number] for number in reused]
    replay, view = Replay(), memoryview(payload)
    replay.write(view[:HEADER_SIZE])
    replay.cutter.inject(HEADER_SIZE, sum(injected))
    position = HEADER_SIZE + sum(injected)
    for offset, size in references(archive):
        if offset < position:
            continue  # in the reused chunks
        assert offset == position
        replay.cutter.suggest(offset)
        position += HEADER_SIZE + size
        replay.file(view[offset:position])
    replay.write(view[position:])
    sizes = replay.finish()
    assert sizes[:2] == [HEADER_SIZE, 0]
    assert [HEADER_SIZE, *injected, *sizes[2:]] == list(lengths)


@pytest.mark.long
def test_the_payload_stream_of_the_large_tree_is_cut_where_the_client_cut_it(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """250 MB made again by the script that made the tree, 117 chunks."""
    monkeypatch.syspath_prepend(str(golden))
    from make_bulk import MIB  # type: ignore[import-not-found]
    from make_bulk import size as size_of
    from make_tree import noise, text  # type: ignore[import-not-found]

    def content(name: bytes) -> bytes:
        match name:
            case b"noise":
                made: bytes = noise("fleeceL1", 60 * MIB)
            case b"text":
                made = text("fleeceL2", 30 * MIB)
            case b"mixed":
                made = noise("fleeceL3", 20 * MIB) + bytes(20 * MIB) + text("fleeceL4", 20 * MIB)
            case _:
                made = noise(f"fleeceb{int(name[1:])}", size_of(int(name[1:])))
        return made

    folder = golden / "bulk/host/bulk-metadata/2026-01-01T00:00:00Z"
    archive = zstandard.ZstdDecompressor().decompressobj().decompress((folder / "bulk.mpxar.zst").read_bytes())
    replay, csum, position, name = Replay(), hashlib.sha256(), 0, b""
    marker = struct.pack("<QQ", START_MARKER, HEADER_SIZE)
    replay.write(marker)
    csum.update(marker)
    while position < len(archive):
        kind, size = struct.unpack_from("<QQ", archive, position)
        if kind == FILENAME:
            name = archive[position + HEADER_SIZE : position + size - 1]
        elif kind == PAYLOAD_REF:
            offset, length = struct.unpack_from("<QQ", archive, position + HEADER_SIZE)
            payload = struct.pack("<QQ", PAYLOAD, HEADER_SIZE + length) + content(name)
            csum.update(payload)
            replay.cutter.suggest(offset)
            replay.file(memoryview(payload))
        position += size
    marker = struct.pack("<QQ", TAIL_MARKER, HEADER_SIZE)
    replay.write(marker)
    csum.update(marker)
    expected = json.loads((golden / "bulk/expected.json").read_text())
    snapshot = expected["host/bulk-metadata/2026-01-01T00:00:00Z"]
    assert csum.hexdigest() == snapshot["bulk.ppxar.didx"]["content-sha256"]
    assert replay.finish() == list(DynamicIndex.open(folder / "bulk.ppxar.didx").lengths())
