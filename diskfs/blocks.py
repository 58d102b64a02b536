"""Disks and parts of disks as things that can be read at any place, and mapped back to the disk.

Everything here is synchronous. Objects also have `seek`, `tell` and `read`, for libraries that want a file.
"""

import io
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from core.buffers import Buffer
from diskfs.entries import Run
from diskfs.errors import DiskFsError

#: Bytes that are fetched at once: a few hundred inodes lie side by side, and what hands them over costs 0.1 ms.
BLOCK: Final = 64 << 10
#: Blocks that are kept for each disk: 32 MiB.
_KEPT: Final = 512
#: Called with a disk's number, offset and length; the range lies inside of the disk.
Fetch = Callable[[int, int, int], Buffer]


class Blocks(ABC):
    """Bytes that can be read at any place."""

    def __init__(self, size: int) -> None:
        self.size: Final = size  #: bytes
        self._position = 0

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on: `length` of them, fewer at the end."""
        if offset < 0 or length <= 0 or offset >= self.size:
            return b""
        return self._read(offset, min(length, self.size - offset))

    def exactly(self, offset: int, length: int) -> bytes:
        """As `read_at`, but all of it.

        Raises:
            DiskFsError: it ends before.
        """
        data = self.read_at(offset, length)
        if len(data) != length:
            raise DiskFsError("read", f"byte {offset}", f"{length} bytes are needed, {len(data)} are there")
        return data

    @abstractmethod
    def _read(self, offset: int, length: int) -> bytes:
        """As `read_at`, of a range that is there."""

    @abstractmethod
    def places(self, offset: int, length: int, at: int) -> Iterator[Run]:
        """Where the bytes from `offset` on lie, as the content of a file from `at` on; zeros lie nowhere."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of a file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"offset {offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """As of a file."""
        return self._position

    def read(self, length: int = -1) -> bytes:
        """As of a file."""
        data = self.read_at(self._position, self.size if length is None or length < 0 else length)
        self._position += len(data)
        return data


class Disk(Blocks):
    """A whole disk, in blocks that are kept for a while."""

    def __init__(self, number: int, size: int, fetch: Fetch) -> None:
        super().__init__(size)
        self.number: Final = number
        self._fetch = fetch
        self._blocks: OrderedDict[int, Buffer] = OrderedDict()

    def _read(self, offset: int, length: int) -> bytes:
        number, start = divmod(offset, BLOCK)
        if start + length <= BLOCK:
            return bytes(self._block(number)[start : start + length])
        pieces = []
        while length:
            piece = self._block(number)[start : start + length]
            pieces.append(piece)
            length -= len(piece)
            number, start = number + 1, 0
        return b"".join(pieces)

    def _block(self, number: int) -> Buffer:
        block = self._blocks.get(number)
        if block is not None:
            self._blocks.move_to_end(number)
            return block
        offset = number * BLOCK
        block = self._fetch(self.number, offset, min(BLOCK, self.size - offset))
        self._blocks[number] = block
        if len(self._blocks) > _KEPT:
            self._blocks.popitem(last=False)
        return block

    def places(self, offset: int, length: int, at: int) -> Iterator[Run]:
        """See `Blocks.places`."""
        if offset < self.size:
            yield Run(at, min(length, self.size - offset), self.number, offset)


class Slice(Blocks):
    """A part of something; cut off where that ends."""

    def __init__(self, whole: Blocks, offset: int, size: int) -> None:
        super().__init__(max(0, min(size, whole.size - offset)))
        self._whole, self._offset = whole, offset

    def _read(self, offset: int, length: int) -> bytes:
        return self._whole.read_at(self._offset + offset, length)

    def places(self, offset: int, length: int, at: int) -> Iterator[Run]:
        """See `Blocks.places`."""
        if offset < self.size:
            yield from self._whole.places(self._offset + offset, min(length, self.size - offset), at)


class Piece(NamedTuple):
    """A part of something that is put together."""

    offset: int  #: in the whole
    length: int
    blocks: Blocks | None  #: None: zeros
    position: int = 0  #: in `blocks`


class Pieces(Blocks):
    """Put together of pieces in order, without gaps and overlaps.

    Raises:
        DiskFsError: they are not like that.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        end = 0
        for piece in pieces:
            if piece.offset != end or piece.length <= 0:
                raise DiskFsError(
                    "put together", "volume", f"a part begins at {piece.offset}, the one before ends at {end}"
                )
            end += piece.length
        super().__init__(end)
        self._pieces = pieces
        self._starts = [piece.offset for piece in pieces]

    def _cut(self, offset: int, length: int) -> Iterator[tuple[Piece, int, int, int]]:
        """Piece, offset in the whole, position in the piece's own blocks and length of each part of a range."""
        number = bisect_right(self._starts, offset) - 1
        while length > 0 and number < len(self._pieces):
            piece = self._pieces[number]
            skip = offset - piece.offset
            part = min(length, piece.length - skip)
            yield piece, offset, piece.position + skip, part
            offset, length, number = offset + part, length - part, number + 1

    def _read(self, offset: int, length: int) -> bytes:
        parts = []
        for piece, _, position, part in self._cut(offset, length):
            data = bytes(part) if piece.blocks is None else piece.blocks.read_at(position, part)
            parts.append(data)
            if len(data) < part:
                break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def places(self, offset: int, length: int, at: int) -> Iterator[Run]:
        """See `Blocks.places`."""
        for piece, start, position, part in self._cut(offset, min(length, self.size - offset)):
            if piece.blocks is not None:
                yield from piece.blocks.places(position, part, at + start - offset)


class Striped(Blocks):
    """Columns of equal length that take turns every `stripe` bytes."""

    def __init__(self, columns: Sequence[Blocks], stripe: int) -> None:
        super().__init__(len(columns) * min(column.size for column in columns))
        self._columns, self._stripe = columns, stripe

    def _cut(self, offset: int, length: int) -> Iterator[tuple[Blocks, int, int, int]]:
        while length > 0:
            number, skip = divmod(offset, self._stripe)
            row, column = divmod(number, len(self._columns))
            part = min(length, self._stripe - skip)
            yield self._columns[column], offset, row * self._stripe + skip, part
            offset, length = offset + part, length - part

    def _read(self, offset: int, length: int) -> bytes:
        return b"".join(column.read_at(position, part) for column, _, position, part in self._cut(offset, length))

    def places(self, offset: int, length: int, at: int) -> Iterator[Run]:
        """See `Blocks.places`."""
        for column, start, position, part in self._cut(offset, min(length, self.size - offset)):
            yield from column.places(position, part, at + start - offset)
