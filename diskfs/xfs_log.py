"""The log of XFS: what was committed and not yet written to its place.

XFS writes everything into its log first, and to its place half a minute later or when the log gets full; an `fsync` or
`sync` of the guest needs the log alone. So a disk that is backed up while its file system is mounted, and was not
frozen, has all of the newest files in the log only. As the kernel does when it mounts such a file system, buffers and
inodes of complete transactions are put over what lies on the volume, here without writing. What a transaction intended
and had not done yet (freeing extents, mostly) is not done. Of one kind of it files show that it is missing: extents
that were to be moved, as copies on write do in two steps; that there are such is told.
Source: Linux fs/xfs/libxfs/xfs_log_format.h (layout), fs/xfs/xfs_log_recover.c and xfs_inode_item_recover.c
(behaviour).
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import Struct, pack_into, unpack_from
from typing import Final, NamedTuple

from diskfs.blocks import Blocks
from diskfs.entries import Run
from diskfs.errors import DiskFsError

_BLOCK: Final = 512
_MAGIC: Final = b"\xfe\xed\xba\xbe"
_RECORD: Final = Struct(
    ">4s"  #   0  magic
    "I"    #   4  cycle: how often the log was gone through
    "I"    #   8  version
    "I"    #  12  bytes of data
    "Q"    #  16  LSN: cycle, block
    "Q"    #  24  LSN of the oldest record that is needed
    "8x"
    "I"    #  40  operations
)  # fmt: skip
_CYCLES_AT: Final = 44  # what the first four bytes of each block of data were
_FORMAT_AT, _SIZE_AT = 300, 320
_LITTLE_ENDIAN: Final = 1
#: Bytes of data whose first words one header block holds.
_PER_HEADER: Final = 32 << 10
#: Bytes of the largest record, and how many of them may be on their way to the disk at once.
_MAX_RECORD: Final = 256 << 10
_IN_FLIGHT: Final = 8
#: Blocks of the log that these take, with their headers.
_WINDOW: Final = _IN_FLIGHT * (_MAX_RECORD // _BLOCK + _MAX_RECORD // _PER_HEADER)
_OPERATION: Final = Struct(">IIBBxx")  # transaction, bytes, who, flags
_START, _COMMIT, _CONTINUES, _CONTINUED, _END, _UNMOUNT = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_TRANSACTION_HEADER: Final = 16
_INODE_ITEM, _BUFFER_ITEM = 0x123B, 0x123C
#: Extents are to be mapped or unmapped, or exchanged between files; and have been.
_MOVES, _MOVED = (0x1244, 0x1248), (0x1245, 0x1249)
_MOVE: Final = Struct("<HHxxxxQ")  # type, regions, number
_BUFFER: Final = Struct("<HHHHqI")  # type, regions, flags, blocks, place in blocks of 512, words of the map
_OF_INODES, _CANCELLED, _OF_QUOTA = 0x1, 0x2, 0x4 | 0x8 | 0x10
#: A bit of the map of a buffer stands for as many bytes.
_PIECE: Final = 128
#: Bytes of what is logged in one piece, and words of a map: buffers have up to 64 KiB.
_MAX_REGION: Final = 1 << 20
_MAX_WORDS: Final = 64
_INODE: Final = Struct("<HHIHHxxxxQ16sqii")  # type, regions, fields, sizes of forks, inode, device, place, size, offset
_INODE_OLD: Final = Struct("<HHIHHQ16sqii")
_DATA_FORK, _DATA_ROOT, _DEVICE, _ATTR_FORK, _ATTR_ROOT = 0x2 | 0x4 | 0x8, 0x8, 0x10, 0x40 | 0x80 | 0x100, 0x100
#: Offset and bytes of the numbers in an inode: those of the log are little endian.
_NUMBERS: Final = (
    (0, 2), (2, 2), (8, 4), (12, 4), (16, 4), (20, 2), (22, 2), (56, 8), (64, 8), (72, 4), (76, 4), (80, 2),
    (84, 4), (88, 2), (90, 2), (92, 4),
)  # fmt: skip
_NUMBERS_V3: Final = ((104, 8), (112, 8), (120, 8), (128, 4), (152, 8))
_TIMES, _TIMES_V3 = (32, 40, 48), (144,)
_BIG_TIME, _BIG_COUNTERS = 0x8, 0x10
_SIZE_V2, _SIZE_V3 = 100, 176
_NEXT_UNLINKED: Final = slice(96, 100)
_ROOT_HEADER_V4, _ROOT_HEADER_V5 = 24, 72
#: Bytes of the log that are gone through, at most, and seconds of a processor for that.
_MAX_ACTIVE: Final = 128 << 20
_MAX_S: Final = 10.0


class Geometry(NamedTuple):
    """Where the log lies, and what inodes are like."""

    position: int  #: bytes
    size: int  #: bytes
    inode_size: int
    has_crc: bool  #: version 5


class Overlaid(Blocks):
    """A volume with other bytes at some places. Content of files, which is never in the log, lies where it lay."""

    def __init__(self, below: Blocks) -> None:
        super().__init__(below.size)
        self._below = below
        self._changed: dict[int, bytearray] = {}  # by number of the block of 512 bytes

    def put(self, position: int, data: bytes) -> None:
        """Show `data` at `position`.

        Raises:
            DiskFsError: that is not on the volume.
        """
        if position < 0 or position + len(data) > self.size - self.size % _BLOCK:
            raise _damaged(f"something of it belongs to byte {position}")
        at = 0
        while at < len(data):
            number, start = divmod(position + at, _BLOCK)
            block = self._changed.get(number)
            if block is None:
                block = self._changed[number] = bytearray(self._below.exactly(number * _BLOCK, _BLOCK))
            piece = data[at : at + _BLOCK - start]
            block[start : start + len(piece)] = piece
            at += len(piece)

    def _read(self, offset: int, length: int) -> bytes:
        data = self._below.read_at(offset, length)
        first, last = offset // _BLOCK, (offset + length - 1) // _BLOCK
        changed = [number for number in range(first, last + 1) if number in self._changed]
        if not changed:
            return data
        found = bytearray(data)
        for number in changed:
            start = number * _BLOCK - offset
            skip = max(0, -start)
            piece = self._changed[number][skip : length - start]
            found[start + skip : start + skip + len(piece)] = piece
        return bytes(found)

    def places(self, offset: int, length: int, at: int) -> Iterator[Run]:
        """See `Blocks.places`."""
        return self._below.places(offset, length, at)


def with_log(blocks: Blocks, geometry: Geometry) -> tuple[Blocks, bool]:
    """The volume `blocks` as it is with what its log holds, and whether extents were just being moved.

    Raises:
        DiskFsError: the log is damaged, or holds more than is gone through here.
    """
    end = time.process_time() + _MAX_S
    items = list(_Log(blocks, geometry).items(end))
    if not items:
        return blocks, False
    overlaid = Overlaid(blocks)
    replay = _Replay(overlaid, geometry)
    # A buffer that was freed later is not put back; one that came to be at its place after that is.
    for item in items:
        if isinstance(item, _Buffer) and item.flags & _CANCELLED:
            replay.cancelled[item.place, item.length] += 1
    moves: set[int] = set()
    for item in items:
        _check_time(end)
        if not isinstance(item, _Move):
            replay.put(item)
        elif item.is_done:
            moves.discard(item.number)
        else:
            moves.add(item.number)
    return overlaid, bool(moves)


class _Buffer(NamedTuple):
    flags: int
    place: int  # in blocks of 512 bytes
    length: int
    bits: bytes  # the map
    regions: list[bytes]


class _Inode(NamedTuple):
    fields: int
    device: bytes
    place: int  # of the buffer that it lies in
    length: int
    offset: int  # in the buffer
    regions: list[bytes]


class _Move(NamedTuple):
    number: int  # which the kernel gave it
    is_done: bool


@dataclass
class _Transaction:
    has_header: bool = False
    items: list[list[bytes]] = field(default_factory=list)  # regions, the first of which says how many there are

    def add(self, region: bytes) -> None:
        if not self.has_header:
            self.has_header = True
            return
        last = self.items[-1] if self.items else None
        if last is None or len(last) >= _regions(last[0]):
            self.items.append([region])
        else:
            last.append(region)

    def extend(self, region: bytes) -> None:
        """`region` goes on where the one before ended with its record."""
        if self.items:
            if len(self.items[-1][-1]) > _MAX_REGION:
                raise _damaged("a part of a transaction does not end")
            self.items[-1][-1] += region


class _Log:
    def __init__(self, blocks: Blocks, geometry: Geometry) -> None:
        self._blocks, self._position = blocks, geometry.position
        self._count = geometry.size // _BLOCK
        if self._count < 16 or geometry.position + geometry.size > blocks.size:
            raise _damaged("it lies outside of the volume")

    def items(self, end: float) -> Iterator[_Buffer | _Inode | _Move]:
        """What complete transactions changed, in order; until `end` of this process's time."""
        open_ones: dict[int, _Transaction] = {}
        for count, data in self._records():
            _check_time(end)
            at = 0
            for _ in range(count):  # what is behind them fills a block
                if at + _OPERATION.size > len(data):
                    raise _damaged("a record has fewer operations than it says")
                number, length, _, flags = _OPERATION.unpack_from(data, at)
                at += _OPERATION.size
                region = data[at : at + length]
                if len(region) < length:
                    raise _damaged("an operation is longer than its record")
                at += length
                flags &= ~_END
                if flags & _CONTINUED:
                    flags &= ~_CONTINUES
                if flags == _UNMOUNT or (not flags and not length):
                    continue
                if flags == _START:
                    open_ones[number] = _Transaction()
                elif flags == _COMMIT:
                    done = open_ones.pop(number, None)
                    if done is not None:
                        yield from _in_order(done)
                elif number in open_ones:
                    one = open_ones[number]
                    one.extend(region) if flags == _CONTINUED else one.add(region)

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """Number of operations and data of each record that is needed, from the oldest on."""
        head = self._head()
        newest = self._newest(head)
        if newest is None:
            return
        start, header, data = newest
        if header[5] == 1 and len(data) >= _OPERATION.size and _OPERATION.unpack_from(data)[3] & _UNMOUNT:
            return  # it was unmounted, which leaves nothing to do
        here = header[4] & 0xFFFFFFFF
        if here >= self._count:
            raise _damaged("it begins outside of itself")
        left = (start - here) % self._count  # blocks to the beginning of the newest
        if left * _BLOCK > _MAX_ACTIVE:
            raise DiskFsError("read", "log", f"it holds more than {_MAX_ACTIVE >> 20} MiB")
        while left > 0:
            # What is of a cycle before stands where something newer was not written yet.
            found = self._record(here, header[0] - (here > start))
            if found is None and left <= _WINDOW:
                return  # several are on their way at once, and a later one was there before this one: this is the end
            if found is None:
                raise _damaged(f"its block {here} is none of a record")
            yield found[0][5], found[1]
            left -= found[2]
            here = (here + found[2]) % self._count
        yield header[5], data

    def _head(self) -> int:
        """The block behind the newest: from there on blocks are of the cycle before, or were never written.

        Several records are on their way at once, so that one may be missing before another that is there: the first
        that is missing counts, also where it lies at the end of the log, and those that are there at its beginning.
        """
        first, last = self._cycle(0), self._cycle(self._count - 1)
        head, before = self._count, last
        if first == last:
            before = last - 1
        else:
            low = 0  # it is not of the cycle `last`, `head` is
            head -= 1
            while head - low > 1:
                middle = (low + head) // 2
                if self._cycle(middle) == last:
                    head = middle
                else:
                    low = middle
        start = head - min(self._count, _WINDOW)
        for number in range(self._count + start, self._count) if start < 0 else ():
            if self._cycle(number) == before - 1:
                return number
        for number in range(max(0, start), head):
            if self._cycle(number) == before:
                return number
        return head

    def _newest(self, head: int) -> tuple[int, tuple[int, ...], bytes] | None:
        """Begin, header and data of the newest record that is whole; None if there is none at all."""
        last = self._cycle(head - 1)
        for back in range(1, min(self._count, _WINDOW) + 1):
            start = (head - back) % self._count
            if self._raw(start, 1)[:4] == _MAGIC:
                found = self._record(start, last - (start >= head))
                if found is not None and found[2] <= back:
                    return start, found[0], found[1]
        if not any(self._raw(0, 1)):
            return None
        raise _damaged("no record is at its end")

    def _record(self, start: int, wanted: int) -> tuple[tuple[int, ...], bytes, int] | None:
        """Header, data and number of blocks of the record of cycle `wanted` that begins at a block.

        None if none does, or not wholly.
        """
        head = self._raw(start, 1)
        header = _RECORD.unpack_from(head)
        magic, cycle, version, length, lsn, _, _ = header
        size, form = unpack_from(">I", head, _SIZE_AT)[0], unpack_from(">I", head, _FORMAT_AT)[0]
        is_it = (magic, cycle, lsn) == (_MAGIC, wanted, wanted << 32 | start)
        if not is_it or not 0 < length <= _MAX_RECORD or version not in (1, 2):
            return None
        if form != _LITTLE_ENDIAN:
            raise DiskFsError("read", "log", "it is that of another kind of processor")
        headers = 1 if version == 1 else max(1, -(-min(size, _MAX_RECORD) // _PER_HEADER))
        blocks = -(-length // _BLOCK)
        if blocks > headers * (_PER_HEADER // _BLOCK) or headers + blocks > self._count:
            return None
        raw = bytearray(self._raw(start, headers + blocks))
        words = b"".join(
            raw[number * _BLOCK + at : number * _BLOCK + at + 256]
            for number in range(headers)
            for at in (_CYCLES_AT if not number else 4,)
        )
        for number in range(1, headers + blocks):
            at = number * _BLOCK
            if int.from_bytes(raw[at : at + 4], "big") != cycle + (start + number >= self._count):
                return None  # it was not written yet
            word = (number - headers) * 4
            if word >= 0:
                raw[at : at + 4] = words[word : word + 4]
        return header[1:], bytes(raw[headers * _BLOCK : headers * _BLOCK + length]), headers + blocks

    def _cycle(self, number: int) -> int:
        block = self._raw(number, 1)
        return int.from_bytes(block[4:8] if block[:4] == _MAGIC else block[:4], "big")

    def _raw(self, start: int, count: int) -> bytes:
        """Blocks of the log, which is a ring."""
        first = min(count, self._count - start)
        data = self._blocks.exactly(self._position + start * _BLOCK, first * _BLOCK)
        if first < count:
            data += self._blocks.exactly(self._position, (count - first) * _BLOCK)
        return data


def _regions(head: bytes) -> int:
    return int(unpack_from("<H", head, 2)[0]) if len(head) >= 4 else 1


def _in_order(done: _Transaction) -> Iterator[_Buffer | _Inode | _Move]:
    """The items of a transaction: buffers before inodes, which may lie in them, and what was freed last."""
    inodes: list[_Inode] = []
    cancelled: list[_Buffer] = []
    for head, *regions in done.items:
        kind = unpack_from("<H", head)[0] if len(head) >= 4 else 0
        if kind == _BUFFER_ITEM:
            if len(head) < _BUFFER.size:
                raise _damaged("a buffer is cut off")
            _, _, flags, length, place, words = _BUFFER.unpack_from(head)
            if words > _MAX_WORDS:
                raise _damaged(f"the map of a buffer has {words} words")
            bits = head[_BUFFER.size : _BUFFER.size + words * 4]
            buffer = _Buffer(flags, place, length, bits, regions)
            if flags & _CANCELLED:
                cancelled.append(buffer)
            else:
                yield buffer
        elif kind == _INODE_ITEM:
            form = _INODE if len(head) >= _INODE.size else _INODE_OLD
            if len(head) < form.size:
                raise _damaged("an inode is cut off")
            _, _, fields, _, _, _, device, place, length, offset = form.unpack_from(head)
            inodes.append(_Inode(fields, device, place, length, offset, regions))
        elif kind in (*_MOVES, *_MOVED):
            if len(head) < _MOVE.size:
                raise _damaged("what it intends is cut off")
            yield _Move(_MOVE.unpack_from(head)[2], kind in _MOVED)
    yield from inodes
    yield from cancelled


class _Replay:
    def __init__(self, overlaid: Overlaid, geometry: Geometry) -> None:
        self._overlaid, self._geometry = overlaid, geometry
        self.cancelled: Counter[tuple[int, int]] = Counter()

    def put(self, item: _Buffer | _Inode) -> None:
        key = item.place, item.length
        if isinstance(item, _Buffer) and item.flags & _CANCELLED:
            self.cancelled[key] -= 1
        elif self.cancelled[key] <= 0:
            self._inode(item) if isinstance(item, _Inode) else self._buffer(item)

    def _buffer(self, item: _Buffer) -> None:
        if item.flags & (_OF_INODES | _OF_QUOTA):
            return  # of inodes these are chains of unlinked ones alone
        bits = int.from_bytes(item.bits, "little")
        regions = iter(item.regions)
        at, limit = 0, item.length * (_BLOCK // _PIECE)
        while bits >> at:
            rest = bits >> at
            at += (rest & -rest).bit_length() - 1
            rest = bits >> at
            count = ((rest + 1) & -(rest + 1)).bit_length() - 1
            region = next(regions, b"")
            # Where it lies in several pages of memory, bits that follow each other may be logged in several regions.
            count = min(count, len(region) // _PIECE)
            if not count or at + count > limit:
                raise _damaged("a buffer is not what its map says")
            self._overlaid.put(item.place * _BLOCK + at * _PIECE, region[: count * _PIECE])
            at += count

    def _inode(self, item: _Inode) -> None:
        size = self._geometry.inode_size
        position = item.place * _BLOCK + item.offset
        regions = iter(item.regions)
        core = next(regions, b"")
        if len(core) < _SIZE_V2 - 4 or item.offset < 0 or position < 0:
            raise _damaged("an inode is cut off")
        inode = bytearray(self._overlaid.exactly(position, size))
        used = _SIZE_V3 if core[4] >= 3 else _SIZE_V2
        if used > size or (used == _SIZE_V3 and len(core) < _SIZE_V3):
            raise _damaged("an inode is cut off")
        unlinked = bytes(inode[_NEXT_UNLINKED])
        inode[:used] = _on_disk(core, used)
        inode[_NEXT_UNLINKED] = unlinked
        split = used + inode[82] * 8 if inode[82] else size
        if split > size:
            raise _damaged("an inode has no room for its attributes")
        if item.fields & _DATA_FORK:
            region = next(regions, b"")
            self._fork(inode, used, split, region, is_root=bool(item.fields & _DATA_ROOT))
        elif item.fields & _DEVICE:
            inode[used : used + 4] = item.device[3::-1]
        if item.fields & _ATTR_FORK:
            region = next(regions, b"")
            self._fork(inode, split, size, region, is_root=bool(item.fields & _ATTR_ROOT))
        self._overlaid.put(position, bytes(inode))

    def _fork(self, inode: bytearray, start: int, end: int, region: bytes, *, is_root: bool) -> None:
        if not is_root:
            if len(region) > end - start + 3:
                raise _damaged("a fork has no room in its inode")
            part = region[: end - start]
            inode[start : start + len(part)] = part
            return
        # In memory the root of a tree has the header of a block.
        header = _ROOT_HEADER_V5 if self._geometry.has_crc else _ROOT_HEADER_V4
        if len(region) < header + 16:
            raise _damaged("a root is cut off")
        level, count = unpack_from(">HH", region, 4)
        room, room_here = (len(region) - header) // 16, (end - start - 4) // 16
        if count > min(room, room_here):
            raise _damaged("a root has no room in its inode")
        pack_into(">HH", inode, start, level, count)
        inode[start + 4 : start + 4 + count * 8] = region[header : header + count * 8]
        to, since = start + 4 + room_here * 8, header + room * 8
        inode[to : to + count * 8] = region[since : since + count * 8]


def _on_disk(core: bytes, size: int) -> bytes:
    """An inode of the log as it lies on the disk, without chain and checksum."""
    found = bytearray(size)
    found[4:8] = core[4:8]
    found[82:84] = core[82:84]
    is_v3 = size == _SIZE_V3
    flags = int.from_bytes(core[120:128], "little") if is_v3 else 0
    if is_v3:
        found[160:176] = core[160:176]
    for at, width in (*_NUMBERS, *(_NUMBERS_V3 if is_v3 else ())):
        found[at : at + width] = core[at : at + width][::-1]
    if flags & _BIG_COUNTERS:
        found[24:32] = core[24:32][::-1]
    for at in (*_TIMES, *(_TIMES_V3 if is_v3 else ())):
        if flags & _BIG_TIME:
            found[at : at + 8] = core[at : at + 8][::-1]
        else:
            found[at : at + 4], found[at + 4 : at + 8] = core[at : at + 4][::-1], core[at + 4 : at + 8][::-1]
    return bytes(found)


def _check_time(end: float) -> None:
    if time.process_time() > end:
        raise DiskFsError("read", "log", f"it takes more than {_MAX_S:.0f} s of a processor")


def _damaged(why: str) -> DiskFsError:
    return DiskFsError("read", "log", f"it is damaged: {why}")
