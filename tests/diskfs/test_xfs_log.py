"""The log of XFS as no test can make the kernel leave it: what was on its way to the disk, and forms of old kernels."""

import struct

import pytest

from diskfs.blocks import Blocks, Disk
from diskfs.xfs_log import Geometry, with_log

_BLOCK = 512
#: Blocks of the log, which lies at the beginning of the volume, and of the volume.
_LOG, _VOLUME = 64, 192
_START, _COMMIT, _INODE, _BUFFER = 1, 2, 0x123B, 0x123C
_CANCELLED = 2


class Log:
    """A volume of zeros with a log, into which records are written."""

    def __init__(self) -> None:
        self.data = bytearray(_VOLUME * _BLOCK)

    def record(
        self, cycle: int, start: int, *items: list[bytes], tail: tuple[int, int] = (1, 0), blocks: int = 0,
        only: int = 0,
    ) -> None:  # fmt: skip
        """A record with a transaction, of `blocks` blocks or more; `only` as many are written, the last if below 0."""
        regions = [bytes(16), *(region for item in items for region in item)]
        operations = [(_START, b""), *((0, region) for region in regions), (_COMMIT, b"")]
        body = b"".join(struct.pack(">IIBBxx", 7, len(region), 0x69, flag) + region for flag, region in operations)
        body = body.ljust(max(-(-len(body) // _BLOCK), blocks - 1) * _BLOCK, b"\0")
        head = bytearray(_BLOCK)
        lsn, oldest = cycle << 32 | start, tail[0] << 32 | tail[1]
        struct.pack_into(">4sIIIQQ8xI", head, 0, b"\xfe\xed\xba\xbe", cycle, 2, len(body), lsn, oldest, len(operations))
        struct.pack_into(">I16xI", head, 300, 1, 32 << 10)
        for number in range(len(body) // _BLOCK):
            head[44 + number * 4 : 48 + number * 4] = body[number * _BLOCK : number * _BLOCK + 4]
        record = bytes(head) + body
        pieces = list(range(len(record) // _BLOCK))
        for number in pieces[:only] if only > 0 else pieces[only:]:
            here = start + number
            piece = record[number * _BLOCK : (number + 1) * _BLOCK]
            if number:
                piece = (cycle + here // _LOG).to_bytes(4, "big") + piece[4:]
            self.data[here % _LOG * _BLOCK : (here % _LOG + 1) * _BLOCK] = piece

    def read(self) -> tuple[Blocks, bool]:
        """The volume with what the log holds, and whether extents were just being moved."""
        whole = Disk(0, len(self.data), lambda _, offset, length: bytes(self.data[offset : offset + length]))
        return with_log(whole, Geometry(0, _LOG * _BLOCK, 512, has_crc=True))

    def letters(self) -> str:
        """The first letter of each block behind the log, as far as there is something."""
        blocks, _ = self.read()
        found = (blocks.exactly((_LOG + number) * _BLOCK, 1) for number in range(_LOG // 4))
        return "".join(letter.decode() if letter != b"\0" else "." for letter in found)


def buffer(place: int, *regions: bytes, flags: int = 0, length: int = 1) -> list[bytes]:
    """A buffer of `length` blocks at block `place` behind the log, all of it logged, in one region or several."""
    bits = (1 << length * 4) - 1 if regions else 0
    head = struct.pack("<HHHHqI", _BUFFER, 1 + len(regions), flags, length, _LOG + place, 1)
    return [head + bits.to_bytes(4, "little"), *regions]


def letter(start: int, what: str) -> list[bytes]:
    """What a record that begins at `start` changes: one block, which tells that it was replayed."""
    return buffer(start // 4, what.encode() * _BLOCK)


def go_through(log: Log, cycle: int, what: str, places: range, tail: tuple[int, int] = (1, 0)) -> None:
    for start in places:
        log.record(cycle, start, letter(start, what), tail=tail, blocks=4)


def test_records_from_the_oldest_that_is_needed_to_the_newest_are_replayed() -> None:
    log = Log()
    go_through(log, 1, "a", range(0, _LOG, 4))
    go_through(log, 2, "b", range(0, 16, 4), tail=(1, 32))
    assert log.letters() == "bbbb....aaaaaaaa"


def test_one_that_was_not_written_yet_ends_it_though_an_older_one_stands_at_its_place() -> None:
    log = Log()
    go_through(log, 1, "a", range(0, _LOG, 4))
    go_through(log, 2, "b", range(0, 8, 4), tail=(1, 32))
    go_through(log, 2, "b", range(12, 20, 4), tail=(1, 32))
    assert log.letters() == "bb......aaaaaaaa"


@pytest.mark.parametrize("missing", [range(56, 64, 4), range(52, 56, 4)], ids=["last", "before-the-last"])
def test_one_at_the_end_of_the_log_that_was_not_written_yet_ends_it_though_it_goes_on_at_the_beginning(
    missing: range,
) -> None:
    log = Log()
    go_through(log, 1, "a", range(0, _LOG, 4))
    for start in range(0, _LOG, 4):
        if start not in missing:
            go_through(log, 2, "b", range(start, start + 4, 4), tail=(2, 32))
    go_through(log, 3, "c", range(0, 8, 4), tail=(2, 32))
    written = (missing.start - 32) // 4
    assert log.letters() == ("." * 8 + "b" * written).ljust(16, ".")


@pytest.mark.parametrize(("only", "count"), [(0, 8), (2, 7), (-2, 7)])
def test_a_record_over_the_end_of_the_log_counts_if_both_of_its_parts_are_there(only: int, count: int) -> None:
    log = Log()
    go_through(log, 1, "a", range(0, _LOG, 4))
    log.record(2, 0, letter(0, "b"), blocks=6)
    go_through(log, 2, "b", range(6, 60, 4), tail=(2, 34))
    log.record(2, 62, letter(62, "b"), tail=(2, 34), blocks=4, only=only)
    assert log.letters() == ("." * 8 + "b" * count).ljust(16, ".")


def test_a_buffer_that_lay_in_several_pages_of_memory_is_logged_in_several_regions() -> None:
    log = Log()
    log.record(1, 0, buffer(0, b"a" * 384, b"b" * 640, length=2))
    assert log.read()[0].exactly(_LOG * _BLOCK, 1024) == b"a" * 384 + b"b" * 640


def test_inodes_in_a_buffer_that_was_freed_are_not_put_over_what_took_its_place() -> None:
    place, length = 8, 32
    core = (0x494E).to_bytes(2, "little") + bytes((0, 0, 3, 2)) + bytes(170)
    head = struct.pack("<HHIHHxxxxQ16sqii", _INODE, 2, 1, 0, 0, 99, b"", _LOG + place, length, 0)
    for freed in (False, True):
        log = Log()
        cancelled = [buffer(place, flags=_CANCELLED, length=length)] if freed else []
        log.record(1, 0, [head, core], *cancelled, buffer(place, b"d" * _BLOCK))
        found = log.read()[0].exactly((_LOG + place) * _BLOCK, 2)
        assert found == (b"dd" if freed else b"IN")


@pytest.mark.parametrize("kind", [0x1244, 0x1248])
def test_that_extents_were_just_being_moved_is_told(kind: int) -> None:
    log = Log()
    intended, done = ([struct.pack("<HHIQ", kind + step, 1, 0, 77)] for step in (0, 1))
    for start, items, wanted in ((0, [intended], True), (4, [done], False), (8, [intended], True)):
        log.record(1, start, *items, blocks=4)
        assert log.read()[1] is wanted
