"""The journal of ext3 and ext4: what was committed and not yet written to its place.

A disk that is backed up while its file system is mounted, and was not frozen, is as after a loss of power: the newest
changes of directories and inodes are in the journal only. As the kernel does when it mounts such a file system,
blocks of complete transactions take the place of those on the volume, here without writing. Fast commits are not
taken over: what they say is missing then. Source: Linux fs/jbd2/recovery.c (behaviour), include/linux/jbd2.h
(layout).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from struct import Struct, unpack_from
from typing import Final

from diskfs.blocks import Blocks
from diskfs.entries import Run
from diskfs.errors import DiskFsError

_MAGIC: Final = b"\xc0\x3b\x39\x98"
_HEADER: Final = Struct(">4sII")  # magic, type, sequence
_SUPER: Final = Struct(">12xIIIII")  # bytes of a block, blocks, first of the log, sequence, start
_DESCRIPTOR, _COMMIT, _SUPER_V1, _SUPER_V2, _REVOKE = 1, 2, 3, 4, 5
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8
_WIDE, _CSUM_V2, _CSUM_V3, _FAST_COMMIT = 0x2, 0x8, 0x10, 0x20
_FAST_HEAD: Final = Struct("<HHII")  # tag, bytes, features, transaction
_FAST_COMMIT_HEAD: Final = 9
#: Blocks of a journal: 8 GiB in blocks of 4 KiB.
_MAX_BLOCKS: Final = 1 << 21


class Replayed(Blocks):
    """A volume of which some blocks lie in its journal: number -> position, and whether its first bytes do not."""

    def __init__(self, blocks: Blocks, size: int, moved: dict[int, tuple[int, bool]]) -> None:
        super().__init__(blocks.size)
        self._below, self._block, self._moved = blocks, size, moved
        self._numbers = sorted(moved)

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, tuple[int, bool] | None]]:
        """Offset, length and place of each part of a range."""
        size, numbers, end = self._block, self._numbers, offset + length
        slot = bisect_left(numbers, offset // size)
        last = bisect_right(numbers, (end - 1) // size)
        while offset < end:
            if slot < last and offset >= numbers[slot] * size:
                number = numbers[slot]
                stop = min(end, (number + 1) * size)
                yield offset, stop - offset, self._moved[number]
                slot += 1
            else:
                stop = min(end, numbers[slot] * size) if slot < last else end
                yield offset, stop - offset, None
            offset = stop

    def _read(self, offset: int, length: int) -> bytes:
        pieces = []
        for start, part, moved in self._parts(offset, length):
            if moved is None:
                pieces.append(self._below.read_at(start, part))
                continue
            position, escaped = moved
            block = self._below.read_at(position, self._block)
            if escaped:
                block = _MAGIC + block[4:]
            skip = start % self._block
            pieces.append(block[skip : skip + part])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def places(self, offset: int, length: int, at: int) -> Iterator[Run]:
        """See `Blocks.places`."""
        for start, part, moved in self._parts(offset, min(length, self.size - offset)):
            position = start
            if moved is not None:
                if moved[1]:
                    raise DiskFsError("read", "file", "its newest content is in the journal, and not as it is")
                position = moved[0] + start % self._block
            yield from self._below.places(position, part, at + start - offset)


def with_journal(blocks: Blocks, size: int, extents: Sequence[tuple[int, int, int]]) -> Blocks:
    """The volume `blocks`, with blocks of `size` bytes, as it is with what its journal holds, which lies in `extents`.

    Raises:
        DiskFsError: the journal is damaged.
    """
    moved = _Journal(blocks, size, _places(extents, size)).moved()
    return Replayed(blocks, size, moved) if moved else blocks


def _places(extents: Sequence[tuple[int, int, int]], size: int) -> dict[int, int]:
    """Position of each block of the journal."""
    places: dict[int, int] = {}
    for offset, length, position in extents:
        if len(places) + length // size > _MAX_BLOCKS:
            raise _damaged(f"more than {_MAX_BLOCKS} blocks")
        for number in range(length // size):
            places[offset // size + number] = position + number * size
    return places


def has_fast_commits(blocks: Blocks, size: int, extents: Sequence[tuple[int, int, int]]) -> bool:
    """Whether the journal has fast commits behind its last transaction; arguments and errors as of `with_journal`."""
    return _Journal(blocks, size, _places(extents, size)).has_fast_commits()


class _Journal:
    def __init__(self, blocks: Blocks, size: int, places: dict[int, int]) -> None:
        self._blocks, self._size, self._places = blocks, size, places
        head = self._block(0)
        magic, kind, _ = _HEADER.unpack_from(head)
        block, count, self._first, self._sequence, self._start = _SUPER.unpack_from(head)
        if magic != _MAGIC or kind not in (_SUPER_V1, _SUPER_V2) or block != size:
            raise _damaged("its first block is none of a journal")
        self._features = 0 if kind == _SUPER_V1 else unpack_from(">I", head, 0x28)[0]
        fast = unpack_from(">I", head, 0x54)[0] or 256 if self._features & _FAST_COMMIT else 0
        self._last = min(count, len(places)) - fast
        if self._start and not 1 <= self._first <= self._start < self._last:
            raise _damaged("its log begins outside of it")

    def moved(self) -> dict[int, tuple[int, bool]]:
        """Block of the volume -> position of its newest content, and whether that begins with zeros for the magic."""
        moved: dict[int, tuple[int, int, bool]] = {}  # with the sequence
        revoked: dict[int, int] = {}
        if not self._start:
            return {}
        for sequence, tags, gone in self._transactions():
            for block, position, escaped in tags:
                moved[block] = sequence, position, escaped
            for block in gone:
                revoked[block] = sequence
        limit = self._blocks.size // self._size
        return {
            block: (position, escaped)
            for block, (sequence, position, escaped) in moved.items()
            if block < limit and revoked.get(block, -1) < sequence
        }

    def has_fast_commits(self) -> bool:
        """See there: the second block of their area names the transaction that would have been the next one."""
        if not self._features & _FAST_COMMIT:
            return False
        tag, _, _, number = _FAST_HEAD.unpack_from(self._block(self._last + 1))
        if tag != _FAST_COMMIT_HEAD:
            return False
        last = self._sequence - 1
        for sequence, _, _ in self._transactions() if self._start else ():
            last = sequence
        return bool(number == (last + 1) & 0xFFFFFFFF)

    def _transactions(self) -> Iterator[tuple[int, list[tuple[int, int, bool]], list[int]]]:
        """Sequence, blocks and revoked blocks of each complete transaction, in order."""
        here, sequence = self._start, self._sequence
        tags: list[tuple[int, int, bool]] = []
        gone: list[int] = []
        passed = 0
        while passed < self._last:
            head = self._block(here)
            magic, kind, number = _HEADER.unpack_from(head)
            if magic != _MAGIC or number != sequence:
                return
            passed, here = passed + 1, self._next(here)
            if kind == _DESCRIPTOR:
                for block, flags in self._tags(head):
                    if here not in self._places:
                        return
                    tags.append((block, self._places[here], bool(flags & _ESCAPED)))
                    passed, here = passed + 1, self._next(here)
            elif kind == _REVOKE:
                gone += self._revoked(head)
            elif kind == _COMMIT:
                yield sequence, tags, gone
                tags, gone, sequence = [], [], (sequence + 1) & 0xFFFFFFFF
            else:
                return

    def _next(self, block: int) -> int:
        return block + 1 if block + 1 < self._last else self._first

    def _block(self, number: int) -> bytes:
        position = self._places.get(number)
        if position is None:
            raise _damaged(f"its block {number} is missing")
        return self._blocks.exactly(position, self._size)

    def _tags(self, head: bytes) -> Iterator[tuple[int, int]]:
        """Block of the volume and flags of each block that follows the descriptor `head`."""
        wide, third = self._features & _WIDE, self._features & _CSUM_V3
        length = 16 if third else 8 + (4 if wide else 0) + (2 if self._features & _CSUM_V2 else 0)
        end = self._size - (4 if self._features & (_CSUM_V2 | _CSUM_V3) else 0)
        at = _HEADER.size
        while at + length <= end:
            if third:
                low, flags, high = unpack_from(">III", head, at)
            else:
                low, _, flags = unpack_from(">IHH", head, at)
                high = unpack_from(">I", head, at + 8)[0] if wide else 0
            yield low | (high << 32 if wide else 0), flags
            at += length
            if not flags & _SAME_UUID:
                at += 16
            if flags & _LAST:
                return

    def _revoked(self, head: bytes) -> Sequence[int]:
        (used,) = unpack_from(">I", head, _HEADER.size)
        width = 8 if self._features & _WIDE else 4
        count = max(0, min(used, self._size) - _HEADER.size - 4) // width
        return unpack_from(f">{count}{'Q' if width == 8 else 'I'}", head, _HEADER.size + 4)


def _damaged(why: str) -> DiskFsError:
    return DiskFsError("read", "journal", f"it is damaged: {why}")
