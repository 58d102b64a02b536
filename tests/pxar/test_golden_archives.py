"""Archives that a real PBS wrote are read both ways, and written again to the same bytes."""

import hashlib
import json
from pathlib import Path

import pytest
import zstandard

from pxar.accessor import ArchiveAccessor, Directory, FileNode, Hardlink
from pxar.decoder import ArchiveDecoder, Entry
from pxar.format import Kind
from pxar.goodbye import ROW, hash_name
from tests.pxar.archives import MemoryBytes, MemoryReader, copied, rows_of_accessor, rows_of_decoder
from tests.pxar.golden_streams import stream

SPLIT = [f"host/tree-metadata/2026-01-0{day}T00:00:00Z/root" for day in (1, 2, 3, 4)] + [
    f"host/tree-data/2026-01-0{day}T00:00:00Z/root" for day in (1, 2)
]
SELF_CONTAINED = [f"host/tree-legacy/2026-01-0{day}T00:00:00Z/root.pxar.didx" for day in (1, 2)]


def sizes(accessor: ArchiveAccessor) -> dict[int, int]:
    """What the tables say of every entry: position of its FILENAME -> size."""
    found: dict[int, int] = {}
    pending: list[Directory] = [accessor.root]
    while pending:
        directory = pending.pop()
        position, rows = directory.table
        found |= {position - offset: size for _, offset, size in ROW.iter_unpack(rows)}
        pending += [node for node in directory.children() if isinstance(node, Directory)]
    return found


def is_same_when_written_again(data: bytes) -> None:
    """As nothing of PBS's choices but new or reused, which the tables tell, is needed for the same bytes."""
    known = sizes(ArchiveAccessor(MemoryBytes(data)))

    def is_new(entry: Entry) -> bool:
        if entry.payload_position is None:
            return True
        head = entry.position - entry.filename_position + len(entry.meta) + 32
        return known[entry.filename_position] == head + entry.size

    again, _ = copied(MemoryReader(data), is_new)
    assert hashlib.sha256(again).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("day", [1, 2, 3])
def test_metadata_archives_of_large_trees_come_out_the_same(golden: Path, day: int) -> None:
    snapshot = f"host/bulk-metadata/2026-01-0{day}T00:00:00Z"
    data = zstandard.decompress((golden / "bulk" / snapshot / "bulk.mpxar.zst").read_bytes(), 1 << 28)
    expected = json.loads((golden / "bulk/expected.json").read_text())[snapshot]["bulk.mpxar.didx"]
    assert hashlib.sha256(data).hexdigest() == expected["content-sha256"]
    is_same_when_written_again(data)
    decoded = rows_of_decoder(ArchiveDecoder(MemoryReader(data)), contents=False)
    found = rows_of_accessor(ArchiveAccessor(MemoryBytes(data)), contents=False)
    assert list(decoded) == list(found)


@pytest.mark.parametrize("path", SPLIT)
def test_split_archives_are_read_alike_both_ways_and_come_out_the_same(golden: Path, path: str) -> None:
    archive, payload = (stream(golden / "store.tar", f"{path}.{kind}.didx") for kind in ("mpxar", "ppxar"))
    is_same_when_written_again(archive)
    accessor = ArchiveAccessor(MemoryBytes(archive), MemoryBytes(payload))
    decoder = ArchiveDecoder(MemoryReader(archive), MemoryReader(payload))
    assert decoder.version == accessor.version == 2
    are_alike(decoder, accessor)


@pytest.mark.parametrize("path", SELF_CONTAINED)
def test_self_contained_archives_are_read_alike_both_ways_and_come_out_the_same(golden: Path, path: str) -> None:
    archive = stream(golden / "store.tar", path)
    again, _ = copied(MemoryReader(archive), lambda _: True)
    assert hashlib.sha256(again).digest() == hashlib.sha256(archive).digest()
    are_alike(ArchiveDecoder(MemoryReader(archive)), ArchiveAccessor(MemoryBytes(archive)))


def are_alike(decoder: ArchiveDecoder, accessor: ArchiveAccessor) -> None:
    """Both give the same entries with the same contents, and every path is found."""
    kinds = set()
    pending = {row[0]: row for row in rows_of_decoder(decoder)}
    for row in rows_of_accessor(accessor):
        assert row == pending.pop(row[0])
        node = accessor.lookup(row[0])
        assert node is not None
        assert (node.filename_position, node.kind) == (row[6], row[1])
        if isinstance(node, Hardlink):
            target = accessor.lookup(node.target_path)
            assert isinstance(target, FileNode)
            assert node.follow().id == target.id
        kinds.add(row[1])
    assert not pending
    assert {Kind.DIRECTORY, Kind.FILE, Kind.SYMLINK, Kind.HARDLINK, Kind.FIFO} <= kinds


def test_every_name_has_the_hash_that_its_table_says(golden: Path) -> None:
    archive = stream(golden / "store.tar", f"{SPLIT[0]}.mpxar.didx")
    directory = ArchiveAccessor(MemoryBytes(archive)).root
    hashes = {value for value, _, _ in ROW.iter_unpack(directory.table[1])}
    assert hashes == {hash_name(name) for name in directory.names()}
