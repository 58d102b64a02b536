"""Reads a file archive front to back, from streams that cannot go back: a pipe, a download.

Layout: docs/formats.md, "File archives". `accessor.py` is the other way to read one, for what is stored.
"""

from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeAlias, TypeVar

from core.buffers import Buffer
from core.errors import UsageError
from pxar.entries import Head, read_head, read_name
from pxar.format import (
    FILENAME,
    GOODBYE,
    HEADER,
    HEADER_SIZE,
    PAYLOAD,
    START_MARKER,
    Kind,
    Short,
    bad,
    item_name,
    read_beginning,
)
from pxar.goodbye import ROW_SIZE
from pxar.metadata import Metadata, parse_metadata

#: Bytes that are asked for at once while entries are read, and while something is skipped.
_BLOCK: Final = 64 << 10
_T = TypeVar("_T")


class ForwardReader(Protocol):
    """A stream that is read front to back, as binary files are."""

    def read(self, size: int, /) -> Buffer:
        """The next bytes, `size` at most; none only at the end of the stream."""
        ...


class Entry:
    """An entry of the archive; what does not fit its kind is 0 or empty. Its content is `ArchiveDecoder.read`."""

    __slots__ = ("_head", "_where", "filename_position", "meta", "name", "parent", "position")

    def __init__(
        self, name: bytes, parent: "Entry | None", filename_position: int, position: int, head: Head, meta: bytes,
        where: str,
    ) -> None:  # fmt: skip
        self.name = name  #: empty for the root
        self.parent = parent  #: the directory it lies in; None for the root
        self.filename_position = filename_position  #: of its FILENAME item in the archive; of the root, its ENTRY
        self.position = position  #: of its ENTRY or HARDLINK item
        self.meta = meta  #: the metadata as they stand in the archive, empty for a hard link
        self._head = head
        self._where = where

    @property
    def kind(self) -> Kind:
        """What it is."""
        return self._head.kind

    @property
    def path(self) -> bytes:
        """From the root, with a leading `/`."""
        names: list[bytes] = []
        entry: Entry | None = self
        while entry is not None:
            names.append(entry.name)
            entry = entry.parent
        return b"/".join(reversed(names)) or b"/"

    @property
    def metadata(self) -> Metadata:
        """The metadata, parsed anew each time.

        Raises:
            ArchiveError: it is a hard link, which has none, or they say what no file has.
        """
        return parse_metadata(self.meta, where=self._where, base=self.position)[0]

    @property
    def size(self) -> int:
        """Bytes of a file's content."""
        return self._head.second if self._head.kind is Kind.FILE else 0

    @property
    def payload_position(self) -> int | None:
        """Where a file's PAYLOAD lies in the payload stream; None if the content is in the archive itself."""
        return self._head.first if self._head.kind is Kind.FILE and self._head.first >= 0 else None

    @property
    def target(self) -> bytes:
        """Where a symlink leads; a hard link's path from the root, which nobody has checked."""
        return self._head.target

    @property
    def target_position(self) -> int:
        """Of a hard link: position of the FILENAME item of the file it is a name of."""
        return self.filename_position - self._head.first

    @property
    def device(self) -> tuple[int, int]:
        """Major and minor number of a device."""
        is_device = self._head.kind in (Kind.BLOCK, Kind.CHARACTER)
        return (self._head.first, self._head.second) if is_device else (0, 0)


class EndOfDirectory:
    """All children of `directory` have come."""

    __slots__ = ("directory",)

    def __init__(self, directory: Entry) -> None:
        self.directory = directory


Event: TypeAlias = Entry | EndOfDirectory


class ArchiveDecoder:
    """Iterates over an archive: entries, each directory's children between it and its `EndOfDirectory`.

    `payload` is the payload stream of a split archive; without it the contents cannot be read. `where` names the
    archive in errors. Memory: the entry at hand, and the directories above it.

    Raises:
        ArchiveError: no archive begins like this.
    """

    def __init__(self, archive: ForwardReader, payload: ForwardReader | None = None, *, where: str = "archive") -> None:
        self._archive = _Source(archive, where)
        self._payload = _Source(payload, f"payload of {where}") if payload is not None else None
        self._where = where
        beginning = self._archive.parse(lambda data: read_beginning(data, where=where))
        self.version = beginning.version
        self.prelude = beginning.prelude  #: what the writer noted before the root; None without
        self._archive.take(beginning.end)
        if self._payload is not None and self._payload.take(HEADER_SIZE) != START_MARKER:
            raise bad(self._payload.where, 0, "no start marker")
        self._file: Entry | None = None  #: the file at hand whose payload has not been looked for yet
        self._left = 0  #: bytes of its content still to come
        self._content_is_apart = False  #: whether they come from the payload stream
        self._started = False

    def __iter__(self) -> Iterator[Event]:
        """The events, once.

        Raises:
            ArchiveError: what follows is no archive. Everything that came before was whole.
        """
        if self._started:
            raise UsageError("read", self._where, "a stream can be read once only")
        self._started = True
        return self._events()

    def read(self, size: int) -> Buffer:
        """The next bytes of the content of the file that came last, `size` at most; none at its end.

        What is not read is skipped.

        Raises:
            ArchiveError: the payload is not where the entry says, or the stream ends.
            UsageError: the payload stream was not given.
        """
        if self._file is not None:
            self._open_payload(self._file)
        size = min(size, self._left)
        if not size:
            return b""
        source = self._payload if self._content_is_apart else self._archive
        assert source is not None
        data = source.some(size)
        self._left -= len(data)
        return data

    def _events(self) -> Iterator[Event]:
        archive = self._archive
        entry = self._entry(b"", None, archive.position)
        if entry.kind is not Kind.DIRECTORY:
            raise bad(self._where, entry.position, "the root is no directory")
        yield entry
        directory: Entry | None = entry
        while directory is not None:
            if not self._content_is_apart:
                archive.skip(self._left)
            self._file, self._left = None, 0
            kind, size = HEADER.unpack_from(archive.peek(HEADER_SIZE))
            if kind == FILENAME:
                position = archive.position
                name, end = archive.parse(self._name_at(position))
                archive.take(end)
                entry = self._entry(name, directory, position)
                yield entry
                if entry.kind is Kind.DIRECTORY:
                    directory = entry
            elif kind == GOODBYE:
                if size < HEADER_SIZE + ROW_SIZE or (size - HEADER_SIZE) % ROW_SIZE:
                    raise bad(self._where, archive.position, f"a table of {size} bytes")
                archive.skip(size)
                yield EndOfDirectory(directory)
                directory = directory.parent
            else:
                raise bad(self._where, archive.position, f"{item_name(kind)} where an entry or a table must be")
        if not archive.at_end():
            raise bad(self._where, archive.position, "something follows the end of the root directory")

    def _name_at(self, position: int) -> Callable[[Buffer], tuple[bytes, int]]:
        return lambda data: read_name(data, 0, where=self._where, base=position)

    def _entry(self, name: bytes, parent: Entry | None, filename_position: int) -> Entry:
        position = self._archive.position
        head = self._archive.parse(lambda data: read_head(data, 0, where=self._where, base=position))
        meta = bytes(self._archive.take(head.size)[: head.meta_size])
        entry = Entry(name, parent, filename_position, position, head, meta, self._where)
        self._content_is_apart = entry.payload_position is not None
        self._file, self._left = (entry, 0) if self._content_is_apart else (None, entry.size)
        return entry

    def _open_payload(self, entry: Entry) -> None:
        """Go to the payload of `entry` and check its header. Files nobody reads cost no byte of the payload stream."""
        payload, start = self._payload, entry.payload_position
        if payload is None:
            raise UsageError("read", self._where, "its contents lie in another stream")
        assert start is not None
        if start < payload.position:
            raise bad(payload.where, payload.position, f"a file's content lies before, at {start}")
        payload.skip(start - payload.position)
        if HEADER.unpack_from(payload.peek(HEADER_SIZE)) != (PAYLOAD, HEADER_SIZE + entry.size):
            raise bad(payload.where, start, f"no PAYLOAD with {entry.size} bytes")
        payload.take(HEADER_SIZE)
        self._file, self._left = None, entry.size


class _Source:
    """Bytes that have come from a forward reader and were not used yet."""

    def __init__(self, reader: ForwardReader, where: str) -> None:
        self._reader = reader
        self.where = where
        self.position = 0  #: of the next byte that is not used yet
        self._data = b""
        self._at = 0

    def parse(self, parse: Callable[[Buffer], _T]) -> _T:
        """What `parse` makes of the next bytes, of as many as it needs; nothing is used up."""
        wanted = HEADER_SIZE
        while True:
            data = self.peek(wanted)
            try:
                return parse(data)
            except Short as short:
                # Twice as many each time, so that many attributes are not gone over for each of them.
                wanted = short.needed
                self._fill(max(wanted, 2 * len(data)))

    def peek(self, size: int) -> memoryview:
        """What is at hand: `size` bytes or more; nothing is used up."""
        self._fill(size)
        view = memoryview(self._data)[self._at :]
        if len(view) < size:
            end = self.position + len(view)
            raise bad(self.where, end, f"the stream ends here, {size - len(view)} bytes are missing")
        return view

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        data = self.peek(size)[:size]
        self._at += size
        self.position += size
        return data

    def some(self, size: int) -> Buffer:
        """The next bytes, one at least and `size` at most."""
        if self._at < len(self._data):
            return self.take(min(size, len(self._data) - self._at))
        data = self._reader.read(size)
        if not data:
            raise bad(self.where, self.position, f"the stream ends here, {size} bytes are missing")
        self.position += len(data)
        return data

    def skip(self, size: int) -> None:
        """Leave `size` bytes out."""
        while size:
            size -= len(self.some(min(size, _BLOCK)))

    def at_end(self) -> bool:
        """Whether no byte is left."""
        self._fill(1)
        return self._at == len(self._data)

    def _fill(self, size: int) -> None:
        """Have `size` bytes at hand, or all there are."""
        missing = size - (len(self._data) - self._at)
        if missing <= 0:
            return
        parts: list[Buffer] = [memoryview(self._data)[self._at :]]
        while missing > 0:
            # Read, not allocated, as much as a header says: a forged size costs what the stream really has.
            data = self._reader.read(_BLOCK)
            if not data:
                break
            parts.append(data)
            missing -= len(data)
        self._data, self._at = b"".join(parts), 0
