"""Random trees go through the encoder and come back out of decoder and accessor."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxar.accessor import ArchiveAccessor, Hardlink
from pxar.decoder import ArchiveDecoder, Entry
from pxar.encoder import ArchiveEncoder
from pxar.format import ENTRY, ENTRY_SIZE, ENTRY_V1, ENTRY_V1_CONTENT, ENTRY_V1_SIZE, FORMAT_VERSION, HEADER
from pxar.metadata import Metadata, Stat, encode_metadata
from tests.pxar.archives import (
    Item,
    MemoryBytes,
    MemoryReader,
    MemorySink,
    archived,
    copied,
    item,
    rows_of_accessor,
    rows_of_decoder,
    rows_of_tree,
)
from tests.pxar.strategies import trees


@settings(max_examples=50, deadline=None)
@given(trees(), st.booleans(), st.none() | st.binary(max_size=30), st.integers(1, 100))
def test_trees_come_back(root: Item, split: bool, prelude: bytes | None, pace: int) -> None:
    archive, payload = archived(root, split=split, prelude=prelude if split else None)
    stored = MemoryBytes(payload) if split else None
    accessor = ArchiveAccessor(MemoryBytes(archive), stored)
    decoder = ArchiveDecoder(MemoryReader(archive, pace), MemoryReader(payload, pace) if split else None)
    assert decoder.version == accessor.version == 1 + split
    assert decoder.prelude == accessor.prelude == (prelude if split else None)
    decoded = list(rows_of_decoder(decoder))
    assert [row[:6] for row in decoded] == rows_of_tree(root)
    assert list(rows_of_accessor(accessor)) == decoded
    for path, *_, position in decoded:
        node = accessor.lookup(path)
        assert node is not None
        assert node.filename_position == position
        if isinstance(node, Hardlink):
            target = accessor.lookup(node.target_path)
            assert target is not None
            assert node.follow().id == target.id
        assert accessor.lookup(path + b"/no such name") is None


@settings(max_examples=50, deadline=None)
@given(trees(), st.booleans())
def test_archives_written_again_are_the_same(root: Item, split: bool) -> None:
    archive, payload = archived(root, split=split, prelude=b"{}" if split else None)
    reader = MemoryReader(payload) if split else None
    assert copied(MemoryReader(archive), lambda _: True, payload=reader) == (archive, payload)


@settings(max_examples=50, deadline=None)
@given(trees(), st.data())
def test_contents_may_be_read_in_part_or_not_at_all(root: Item, data: st.DataObject) -> None:
    split = data.draw(st.booleans())
    archive, payload = archived(root, split=split)
    decoder = ArchiveDecoder(MemoryReader(archive, 7), MemoryReader(payload, 7) if split else None)
    contents = {row[0]: row[3] for row in rows_of_tree(root)}
    for event in decoder:
        if isinstance(event, Entry) and data.draw(st.booleans()):
            wanted = data.draw(st.integers(0, 70))
            got = b""
            while len(got) < wanted and (piece := decoder.read(wanted - len(got))):
                got += bytes(piece)
            assert got == contents[event.path][:wanted]


def test_the_older_form_of_entries_may_be_mixed_in() -> None:
    """The archive is written with ENTRY_V1 for one file, as by the first writers of the format."""
    sink = MemorySink()
    encoder = ArchiveEncoder(sink)
    encoder.begin(encode_metadata(Metadata(Stat(0o040755))))
    old = HEADER.pack(ENTRY_V1, ENTRY_V1_SIZE) + ENTRY_V1_CONTENT.pack(0o100644, 0, 1, 2, 3_000_000_004)
    for name, meta in ((b"new", encode_metadata(Metadata(Stat(0o100600)))), (b"old", old)):
        encoder.begin_file(name, meta, 1)
        encoder.content.write(b"c")
        encoder.end_file()
    encoder.special(b"pipe", HEADER.pack(ENTRY_V1, ENTRY_V1_SIZE) + ENTRY_V1_CONTENT.pack(0o010644, 0, 0, 0, 0))
    encoder.finish()
    decoded = list(rows_of_decoder(ArchiveDecoder(MemoryReader(sink.data))))
    accessor = ArchiveAccessor(MemoryBytes(sink.data))
    assert sorted(rows_of_accessor(accessor)) == sorted(decoded)
    assert {row[0]: row[2].stat for row in decoded if row[2]}[b"/old"] == Stat(0o100644, 0, 1, 2, 3, 4)
    assert copied(MemoryReader(sink.data), lambda _: True)[0] == sink.data


@pytest.mark.parametrize("split", [False, True])
def test_the_longest_names_and_targets(split: bool) -> None:
    long = b"x" * 4096
    children = {long: item(0o100644, content=b"c"), b"s": item(0o120777, target=long), b"z" + long[1:]: item(0o010600)}
    root = item(0o040755, children=children)
    archive, payload = archived(root, split=split)
    accessor = ArchiveAccessor(MemoryBytes(archive), MemoryBytes(payload))
    decoder = ArchiveDecoder(MemoryReader(archive), MemoryReader(payload) if split else None)
    assert [row[:6] for row in rows_of_accessor(accessor)] == rows_of_tree(root)
    assert [row[:6] for row in rows_of_decoder(decoder)] == rows_of_tree(root)


def test_an_archive_that_says_version_1_is_read() -> None:
    archive, _ = archived(item(0o040755, children={b"a": item(0o100644, content=b"c")}), split=False)
    # What stands before the root moves its ENTRY away from the first byte, where the root's table leads.
    position = len(archive) - 24
    marker, offset, size = struct.unpack_from("<QQQ", archive, position)
    said = HEADER.pack(FORMAT_VERSION, 24) + struct.pack("<Q", 1) + archive[:position]
    said += struct.pack("<QQQ", marker, offset + 24, size)
    assert ArchiveDecoder(MemoryReader(said)).version == 1
    accessor = ArchiveAccessor(MemoryBytes(said))
    assert accessor.version == 1
    assert accessor.root.names() == [b"a"]
    assert accessor.root.position + 32 == ENTRY_SIZE  # behind FORMAT_VERSION
    assert HEADER.unpack_from(said, 24) == (ENTRY, ENTRY_SIZE)
