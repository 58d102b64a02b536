"""Catalog (`catalog.pcat1.didx`): the names in a snapshot's self-contained file archives, with sizes and times.

Layout: docs/formats.md, "Catalog". This module is its only description in code. Names are bytes.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol

from core.buffers import Buffer
from core.errors import FleeceError, FormatError

MAGIC: Final = bytes.fromhex("91fd60f9c46758d5")
MAX_NAME_SIZE: Final = 4095
#: Bytes of one directory's block; six million entries. PBS has no limit, but a hostile length must not size a buffer.
MAX_BLOCK_SIZE: Final = 256 << 20
#: Directories within each other, the archive's included. Linux itself cannot name a path of more than 2048 components.
MAX_DEPTH: Final = 4096

DIRECTORY: Final = b"d"
FILE: Final = b"f"
#: Kinds that have a name and nothing else: symlink, hard link, block and character device, FIFO, socket.
OTHER_KINDS: Final = frozenset((b"l", b"h", b"b", b"c", b"p", b"s"))

_ROOT: Final = struct.Struct("<Q")  # offset of the root block, the last 8 bytes
_U64_MAX: Final = (1 << 64) - 1
_I64_MIN: Final = -(1 << 63)
_I64_MAX: Final = (1 << 63) - 1
_VARINT_MAX: Final = 10  # bytes
_SIGNED_MAX: Final = 11
#: Type, length of the name, one byte of name.
_MIN_ENTRY: Final = 3
#: Bytes of a block that are read at once; longer ones need a second read.
_FIRST_READ: Final = 4096
_KINDS: Final = {kind[0]: kind for kind in (DIRECTORY, FILE, *OTHER_KINDS)}


class CatalogEntry(NamedTuple):
    """One name in a directory."""

    kind: bytes  #: `DIRECTORY`, `FILE` or one of `OTHER_KINDS`
    name: bytes
    size: int = 0  #: bytes, of a file
    mtime_s: int = 0  #: Unix seconds, of a file
    block: int = 0  #: offset of its block, of a directory; it ends before `limit`
    limit: int = 0


class PositionalReader(Protocol):
    """A stored stream, read at any place."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes from `offset` on: `length` of them, or fewer at the end of the stream."""
        ...


class _Level:
    """A directory that is still open."""

    __slots__ = ("children", "count", "name", "packed")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.count = 0
        self.packed = bytearray()
        #: Directories: place in `packed` where the distance to their block belongs, and where that block is.
        self.children: list[tuple[int, int]] = []


class CatalogWriter:
    """Writes a catalog front to back through `write`; in memory are the entries of the directories that are open.

    Its directory methods are what `pxar.sinks.CatalogSink` asks for. What is written depends on the calls alone. Used
    by one thread at a time; after an error the catalog is worthless.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        """Begin a catalog; `write` takes the next bytes of the stream, a whole directory at a time."""
        self._write: Final = write
        self._position = 0
        self._open: Final = [_Level(b"")]
        self._put(MAGIC)

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._position

    def start_archive(self, name: bytes) -> None:
        """Go on with the archive `name` (its whole file name: `root.pxar.didx`); the one before ends.

        Raises:
            FleeceError: directories are open, or no name.
        """
        self._end_archive()
        self._start(name)

    def start_directory(self, name: bytes) -> None:
        """Go into a directory of the open one.

        Raises:
            FleeceError: no archive was started, no name, or too deep.
        """
        self._in_archive(name)
        self._start(name)

    def end_directory(self) -> None:
        """Leave the open directory: its block is written.

        Raises:
            FleeceError: there is none; or its block is larger than `MAX_BLOCK_SIZE`.
        """
        if len(self._open) < 3:
            raise FleeceError("write", "catalog", "no directory is open")
        self._end()

    def file(self, name: bytes, size: int, mtime_s: int) -> None:
        """A regular file of `size` bytes, last changed at `mtime_s` (Unix seconds).

        Raises:
            FleeceError: no archive was started, no name, or a number that does not fit.
        """
        if not 0 <= size <= _U64_MAX or not _I64_MIN <= mtime_s <= _I64_MAX:
            raise FleeceError("write", "catalog", f"a file of {size} bytes and time {mtime_s}")
        level = self._in_archive(name)
        level.packed += b"f%b%b%b%b" % (pack_varint(len(name)), name, pack_varint(size), pack_signed(mtime_s))
        level.count += 1

    def entry(self, kind: bytes, name: bytes) -> None:
        """Something that has a name only: `l` symlink, `h` hard link, `b` and `c` devices, `p` FIFO, `s` socket.

        Raises:
            FleeceError: no archive was started, another kind, or no name.
        """
        if kind not in OTHER_KINDS:
            raise FleeceError("write", "catalog", f"an entry of kind {kind!r}")
        level = self._in_archive(name)
        level.packed += b"%b%b%b" % (kind, pack_varint(len(name)), name)
        level.count += 1

    def finish(self) -> None:
        """End the last archive and write the root; nothing may follow.

        Raises:
            FleeceError: directories are open.
        """
        self._end_archive()
        root = self._position
        self._put(self._block(self._open.pop()))
        self._put(_ROOT.pack(root))

    def _in_archive(self, name: bytes) -> _Level:
        """The open directory, to which `name` is added."""
        if len(self._open) < 2:
            raise FleeceError("write", "catalog", "no archive was started")
        why = name_problem(name)
        if why:
            raise FleeceError("write", "catalog", why)
        return self._open[-1]

    def _start(self, name: bytes) -> None:
        why = name_problem(name)
        if not why and len(self._open) > MAX_DEPTH:
            why = f"more than {MAX_DEPTH} directories within each other"
        if why:
            raise FleeceError("write", "catalog", why)
        self._open.append(_Level(name))

    def _end_archive(self) -> None:
        if not self._open:
            raise FleeceError("write", "catalog", "it was finished already")
        if len(self._open) > 2:
            raise FleeceError("write", "catalog", f"{len(self._open) - 2} directories are open")
        if len(self._open) == 2:
            self._end()

    def _end(self) -> None:
        level = self._open.pop()
        block = self._block(level)
        parent = self._open[-1]
        parent.packed += b"d%b%b" % (pack_varint(len(level.name)), level.name)
        parent.children.append((len(parent.packed), self._position))
        parent.count += 1
        self._put(block)

    def _block(self, level: _Level) -> bytes:
        """The block of `level`, which is about to be written."""
        packed = bytearray(pack_varint(level.count))
        done = 0
        for place, child in level.children:
            packed += level.packed[done:place]
            packed += pack_varint(self._position - child)
            done = place
        packed += level.packed[done:]
        if len(packed) > MAX_BLOCK_SIZE:
            raise FleeceError("write", "catalog", f"{level.count} entries in one directory")
        return pack_varint(len(packed)) + packed

    def _put(self, data: bytes) -> None:
        self._write(data)
        self._position += len(data)


class Catalog:
    """A catalog opened for reading. It may be hostile: whatever it holds, methods end, and raise nothing but errors.

    Nothing is kept between calls, so one that failed because its stream could not be read can be made again.
    """

    def __init__(self, source: Buffer | PositionalReader, *, where: str) -> None:
        """Open the catalog `source`; `where` names it in messages.

        Raises:
            FormatError: too short, another magic, or the root lies outside.
        """
        if isinstance(source, bytes | bytearray | memoryview):
            source = _Memory(source)
        self.where: Final = where
        self.size: Final = source.size
        self._source: Final = source
        end = self.size - _ROOT.size
        if end <= len(MAGIC):
            raise self._bad(f"{self.size} bytes, the smallest has {len(MAGIC) + 2 + _ROOT.size}")
        magic = bytes(self._read(0, len(MAGIC)))
        if magic != MAGIC:
            raise self._bad(f"unknown magic {magic.hex()}")
        (root,) = _ROOT.unpack(self._read(end, _ROOT.size))
        if not len(MAGIC) <= root < end:
            raise self._bad(f"its root is at {root}, its blocks end at {end}")
        #: Holds a directory for every archive, named like the archive's file.
        self.root: Final = CatalogEntry(DIRECTORY, b"", block=root, limit=end)

    def entries(self, directory: CatalogEntry) -> Iterator[CatalogEntry]:
        """What `directory` (`root`, or an entry of this catalog) holds, in the catalog's order.

        Raises:
            ValueError: not a directory.
            FormatError: its block is none that a writer makes.
        """
        if directory.kind != DIRECTORY:
            raise ValueError("not a directory")
        return self._parse(directory.block, self._table(directory))

    def lookup(self, directory: CatalogEntry, name: bytes) -> CatalogEntry | None:
        """The first entry called `name` in `directory`, or None; reads the directory up to it.

        Raises:
            ValueError, FormatError: as `entries`.
        """
        return next((entry for entry in self.entries(directory) if entry.name == name), None)

    def walk(self, directory: CatalogEntry | None = None) -> Iterator[tuple[int, CatalogEntry]]:
        """Everything below `directory` (default: the root), depth first: depth (0 right in it) and entry.

        Raises:
            ValueError, FormatError: as `entries`; also for directories that are in several places, which would make the
                walk longer than the catalog.
        """
        directory = self.root if directory is None else directory
        budget = directory.limit
        stack: list[Iterator[CatalogEntry]] = []
        entering: CatalogEntry | None = directory
        while True:
            if entering is not None:
                if entering.kind != DIRECTORY:
                    raise ValueError("not a directory")
                if len(stack) > MAX_DEPTH:
                    raise self._bad(f"more than {MAX_DEPTH} directories within each other")
                table = self._table(entering)
                # Blocks do not overlap, so all of them together are no longer than what they lie in.
                budget -= len(table) + 1
                if budget < 0:
                    raise self._bad(f"its blocks are longer than itself, at {entering.block}")
                stack.append(self._parse(entering.block, table))
                entering = None
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
                if not stack:
                    return
                continue
            yield len(stack) - 1, entry
            if entry.kind == DIRECTORY:
                entering = entry

    def _table(self, directory: CatalogEntry) -> memoryview:
        """The entries of a directory, still packed, with their number in front."""
        offset, limit = directory.block, directory.limit
        head = self._read(offset, min(_FIRST_READ, limit - offset))
        length, start = self._varint(head, 0, offset)
        end = offset + start + length
        if end > limit or length > MAX_BLOCK_SIZE:
            raise self._bad(f"the block at {offset} has {length} bytes, there is room up to {limit}")
        if start + length <= len(head):
            return head[start : start + length]
        return self._read(offset + start, length)

    def _parse(self, block: int, table: memoryview) -> Iterator[CatalogEntry]:
        """The entries in `table`, whose block lies at `block`."""
        size = len(table)
        count, position = self._varint(table, 0, block)
        if count * _MIN_ENTRY > size - position:
            raise self._bad(f"{count} entries in {size} bytes, in the block at {block}")
        for _ in range(count):
            kind = _KINDS.get(table[position]) if position < size else None
            if kind is None:
                raise self._bad(f"an entry of unknown kind at byte {position} of the block at {block}")
            length, start = self._varint(table, position + 1, block)
            position = start + length
            if position > size:
                raise self._bad(f"a name of {length} bytes at byte {start} of the block at {block}")
            name = bytes(table[start:position])
            why = name_problem(name)
            if why:
                raise self._bad(f"{why}, in the block at {block}")
            if kind == DIRECTORY:
                distance, position = self._varint(table, position, block)
                child = block - distance
                if not len(MAGIC) <= child < block:
                    raise self._bad(f"the directory {name!r} at {child}, in the block at {block}")
                # Children come before their parents, so there are no cycles, and theirs end where ours begins.
                yield CatalogEntry(kind, name, block=child, limit=block)
            elif kind == FILE:
                file_size, position = self._varint(table, position, block)
                mtime_s, position = self._signed(table, position, block)
                yield CatalogEntry(kind, name, file_size, mtime_s)
            else:
                yield CatalogEntry(kind, name)
        if position != size:
            raise self._bad(f"{size - position} bytes behind the entries of the block at {block}")

    def _varint(self, data: memoryview, position: int, block: int) -> tuple[int, int]:
        """The number at `position`, and where it ends."""
        value = 0
        for index in range(min(_VARINT_MAX, len(data) - position)):
            byte = data[position + index]
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                if value > _U64_MAX:
                    break
                return value, position + index + 1
        raise self._bad(f"a number without an end at byte {position} of the block at {block}")

    def _signed(self, data: memoryview, position: int, block: int) -> tuple[int, int]:
        """The signed number at `position`, and where it ends."""
        value = 0
        for index in range(min(_SIGNED_MAX, len(data) - position)):
            byte = data[position + index]
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                value = -value if byte == 0 else value
                if not _I64_MIN <= value <= _I64_MAX:
                    break
                return value, position + index + 1
        raise self._bad(f"a number without an end at byte {position} of the block at {block}")

    def _read(self, offset: int, length: int) -> memoryview:
        data = memoryview(self._source.read(offset, length))
        if len(data) != length:
            raise self._bad(f"{len(data)} of {length} bytes at {offset}")
        return data

    def _bad(self, why: str) -> FormatError:
        return FormatError("read catalog", self.where, why)


class _Memory:
    """A buffer as a positional reader."""

    def __init__(self, data: Buffer) -> None:
        self._data: Final = memoryview(data)

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> memoryview:
        return self._data[offset : offset + length]


def name_problem(name: bytes) -> str:
    """Why `name` cannot be that of an entry, or nothing."""
    if not 0 < len(name) <= MAX_NAME_SIZE:
        return f"a name of {len(name)} bytes"
    if b"/" in name or b"\0" in name or name in (b".", b".."):
        return f"the name {name!r}"
    return ""


def pack_varint(value: int) -> bytes:
    """`value`, 0 to 2^64 - 1, seven bits a byte, the lowest first; all bytes but the last have the top bit set."""
    if value < 0x80:
        return _SMALL[value]
    packed = bytearray()
    while value >= 0x80:
        packed.append(value & 0x7F | 0x80)
        value >>= 7
    packed.append(value)
    return bytes(packed)


def pack_signed(value: int) -> bytes:
    """`value`, -2^63 to 2^63 - 1: of a negative one the magnitude with the top bit set in every byte, and a zero."""
    if value >= 0:
        return pack_varint(value)
    magnitude = pack_varint(-value)
    return magnitude[:-1] + bytes((magnitude[-1] | 0x80, 0))


_SMALL: Final = [bytes((value,)) for value in range(0x80)]
