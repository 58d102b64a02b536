from pathlib import Path

import pytest

from core.errors import UsageError
from pxar.decoder import ArchiveDecoder, EndOfDirectory, Entry
from pxar.format import Kind
from pxar.metadata import Stat
from tests.pxar.archives import MemoryReader, archived
from tests.pxar.samples import every_kind

DATA = Path(__file__).parents[1] / "data/pxar"


def decoder(name: str = "example") -> ArchiveDecoder:
    archive, payload = ((DATA / f"{name}.{kind}").read_bytes() for kind in ("mpxar", "ppxar"))
    return ArchiveDecoder(MemoryReader(archive, 5), MemoryReader(payload, 5))


def test_the_split_example_is_read() -> None:
    reader = decoder()
    assert (reader.version, reader.prelude) == (2, b'{"exclude-patterns":"*.tmp\\n"}')
    seen: list[tuple[bytes, Kind | None, int]] = []
    for event in reader:
        if isinstance(event, EndOfDirectory):
            seen.append((event.directory.path, None, 0))
        else:
            seen.append((event.path, event.kind, event.filename_position))
    assert seen == [
        (b"/", Kind.DIRECTORY, 70),
        (b"/d", Kind.DIRECTORY, 126),
        (b"/d/a.txt", Kind.FILE, 200),
        (b"/d/b.txt", Kind.FILE, 310),
        (b"/d", None, 0),
        (b"/h", Kind.HARDLINK, 508),
        (b"/s", Kind.SYMLINK, 558),
        (b"/", None, 0),
    ]


def test_entries_say_what_fits_their_kind() -> None:
    entries = {event.path: event for event in decoder() if isinstance(event, Entry)}
    link, symlink, file = entries[b"/h"], entries[b"/s"], entries[b"/d/b.txt"]
    assert (link.target, link.target_position, link.meta, link.size) == (b"d/a.txt", 200, b"", 0)
    assert (symlink.target, symlink.payload_position) == (b"d/b.txt", None)
    assert (file.size, file.payload_position, file.device) == (7, 38, (0, 0))
    assert file.metadata.stat == Stat(0o100644, 0, 1000, 1000, 1_700_000_003)
    reader = ArchiveDecoder(MemoryReader(archived(every_kind(), split=False)[0]))
    devices = {event.name: event.device for event in reader if isinstance(event, Entry) and any(event.device)}
    assert devices == {b"blk": (8, 17), b"chr": (0xABCD1234, 0xDCBA5678)}


def test_contents_nobody_reads_cost_nothing_of_the_payload_stream() -> None:
    payload = MemoryReader((DATA / "example.ppxar").read_bytes(), 8)
    for event in ArchiveDecoder(MemoryReader((DATA / "example.mpxar").read_bytes()), payload):
        assert event is not None
    assert payload.at == 16  # the start marker


def test_content_of_what_has_none_is_empty() -> None:
    reader = decoder()
    for event in reader:
        if not isinstance(event, Entry) or event.kind is not Kind.FILE:
            assert reader.read(100) == b""


def test_a_stream_is_read_once() -> None:
    reader = decoder()
    assert len(list(reader)) == 8
    with pytest.raises(UsageError, match="once only"):
        iter(reader)
