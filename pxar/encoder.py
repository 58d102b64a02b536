"""Writes file archives: self-contained, or split into metadata and payload.

Layout: docs/formats.md, "File archives". What comes in is metadata in their encoded form (`metadata.py`), contents go
around the encoder, straight into the stream they belong to.
"""

from struct import Struct
from typing import Any, Final

from pxar.errors import EncodeError
from pxar.format import (
    DEVICE,
    ENTRY_V1_SIZE,
    FILENAME,
    HARDLINK,
    HEADER,
    HEADER_SIZE,
    MAX_CONTENT,
    MAX_METADATA,
    MAX_NAME,
    MAX_PRELUDE,
    PAIR_SIZE,
    PAYLOAD,
    PAYLOAD_REF,
    PRELUDE,
    START_MARKER,
    SYMLINK,
    TAIL_MARKER,
    U64,
    VERSION_ITEM,
    name_fault,
    shown,
)
from pxar.goodbye import ROW, build_table, hash_name
from pxar.runs import encode
from pxar.sinks import ArchiveSink, PayloadSink

#: PAYLOAD_REF behind the metadata of a file: type, size, offset, size of the file.
_reference = Struct("<QQQQ").pack
_header = HEADER.pack
_row = ROW.pack
_FILENAME: Final = U64.pack(FILENAME)
_size = U64.pack


class _Directory:
    """A directory that is open: what its end needs."""

    __slots__ = ("entry_position", "name", "position", "records")

    def __init__(self, name: bytes, position: int, entry_position: int) -> None:
        self.name = name
        self.position = position  #: of its FILENAME
        self.entry_position = entry_position
        self.records = bytearray()  #: a ROW per child: hash, position of its FILENAME, size


class ArchiveEncoder:
    """Writes one archive, front to back: `begin`, the root's children, `finish`.

    Without `payload` the archive is self-contained (version 1), with it split (version 2). `prelude` is for split ones
    only. Children should come sorted by the bytes of their names, so that equal trees give equal archives. Memory: 24
    bytes per child of the directories that are open. An error, its own or one of a sink, leaves it unusable.
    """

    def __init__(
        self, archive: ArchiveSink, payload: PayloadSink | None = None, *, prelude: bytes | None = None
    ) -> None:
        if prelude is not None and payload is None:
            raise EncodeError("write", "archive", "a prelude needs a split archive")
        if prelude is not None and len(prelude) > MAX_PRELUDE:
            raise EncodeError("write", "archive", f"a prelude of {len(prelude)} bytes, the limit is {MAX_PRELUDE}")
        self._archive = archive
        self._payload = payload
        self._prelude = prelude
        self._content: ArchiveSink = archive if payload is None else payload
        self._open: list[_Directory] = []
        self._records: bytearray | None = None  #: of the innermost open directory; None: nothing may be added
        self._begun = False
        self._file: tuple[bytes, bytes, int, int] | None = None  #: name, entry to be written, its position, size
        self._content_end = 0
        #: Where in the payload stream the last file's payload ends.
        self._payload_end = 0

    @property
    def content(self) -> ArchiveSink:
        """Where a file's content goes between `begin_file` and `end_file`."""
        return self._content

    def begin(self, meta: bytes) -> None:
        """The root directory, with its encoded metadata.

        Raises:
            EncodeError: it is not the first call.
        """
        if self._begun:
            raise EncodeError("write", "archive", "it has begun already")
        self._check_meta(b"/", meta)
        self._begun = True
        head = b""
        if self._payload is not None:
            self._payload.write(START_MARKER)
            self._payload_end = self._payload.position
            head = VERSION_ITEM
            if self._prelude is not None:
                head += _header(PRELUDE, HEADER_SIZE + len(self._prelude)) + self._prelude
        # A table's distances are counted within the archive; the root's leads to its very first byte.
        start = self._archive.position
        self._archive.write(head + meta)
        self._open.append(_Directory(b"", start, start))
        self._records = self._open[0].records

    def directory(self, name: bytes, meta: bytes) -> None:
        """Go into a new directory; what is added from now on goes into it.

        Raises:
            EncodeError: the name or metadata cannot be stored, or no directory is open.
        """
        position = self._add(name, meta)
        directory = _Directory(name, position, position + HEADER_SIZE + len(name) + 1)
        self._open.append(directory)
        self._records = directory.records

    def end_directory(self) -> None:
        """Leave the innermost directory, which is not the root.

        Raises:
            EncodeError: only the root is open, or a file is.
        """
        if len(self._open) < 2 or self._records is None:
            raise EncodeError("write", "archive", "no directory below the root is open")
        directory = self._close()
        self._records = self._open[-1].records
        size = self._archive.position - directory.position
        self._records += _row(hash_name(directory.name), directory.position, size)

    def begin_file(self, name: bytes, meta: bytes, size: int) -> int:
        """A regular file whose `size` bytes are written to `content` next, until `end_file`.

        Returns:
            The position of its FILENAME in the archive, which hard links need.

        Raises:
            EncodeError: the name, metadata or size cannot be stored, or this is no place for a file.
        """
        if not 0 <= size <= MAX_CONTENT:
            raise EncodeError("write", shown(name), f"{size} is no size of a file")
        self._check(name, meta)
        payload, position = self._payload, self._archive.position
        if payload is None:
            self._archive.write(_entry(name, meta, _header(PAYLOAD, HEADER_SIZE + size)))
            self._file = name, b"", position, size
        else:
            payload.suggest()
            start = payload.position
            self._check_injected(start)
            payload.write(_header(PAYLOAD, HEADER_SIZE + size))
            # Written when the content is complete, so that a file can be left out to the end.
            self._file = name, _entry(name, meta, _reference(PAYLOAD_REF, PAIR_SIZE, start, size)), position, size
        self._content_end = self._content.position + size
        self._records = None
        return position

    @property
    def missing(self) -> int:
        """Bytes of content that the file that is open still needs."""
        return self._content_end - self._content.position

    def end_file(self) -> None:
        """The content is complete.

        Raises:
            EncodeError: it is shorter or longer than announced, or no file is open.
        """
        name, entry, position, size = self._open_file()
        missing = self.missing
        if missing:
            why = f"{size} bytes were announced, {missing} are missing"
            raise EncodeError("write", shown(name), why if missing > 0 else f"{-missing} bytes more than {size}")
        if entry:
            self._archive.write(entry)
            # As PBS does it: the content counts although it lies in the other stream.
            size += len(entry)
        else:
            size = self._archive.position - position
        self._file = None
        self._payload_end = self._content_end
        self._records = self._open[-1].records
        self._records += _row(hash_name(name), position, size)

    def abandon_file(self) -> None:
        """Leave the file that is open out. What was written of its content stays in the payload stream, as padding.

        Raises:
            EncodeError: no file is open, or the archive is self-contained and has it already.
        """
        name, entry, _, _ = self._open_file()
        if not entry:
            raise EncodeError("leave out", shown(name), "a self-contained archive has its beginning already")
        self._file = None
        self._payload_end = self._content.position
        self._records = self._open[-1].records

    def _open_file(self) -> tuple[bytes, bytes, int, int]:
        if self._file is None:
            raise EncodeError("write", "archive", "no file is open")
        return self._file

    def reference(self, name: bytes, meta: bytes, offset: int, size: int) -> int:
        """A regular file whose payload lies, or will be injected, at `offset` of the payload stream.

        Returns:
            The position of its FILENAME in the archive, which hard links need.

        Raises:
            EncodeError: not a split archive; before the end of the payload stream or of the file before, which no
                sequential reader could follow; or as `begin_file`.
        """
        payload = self._payload
        if payload is None:
            raise EncodeError("write", shown(name), "a self-contained archive has no references")
        if offset < self._payload_end or offset < payload.position or size < 0:
            why = f"its payload at {offset} lies before {max(payload.position, self._payload_end)}"
            raise EncodeError("write", shown(name), why if size >= 0 else f"{size} is no size of a file")
        # A hot path: one write, and nothing that is not needed.
        records = self._records
        count = len(name) + 1
        if not 1 < count <= MAX_NAME + 1 or b"/" in name or b"\0" in name or name[:1] == b"." or records is None:
            records = self._check(name, meta)
        if not ENTRY_V1_SIZE <= len(meta) <= MAX_METADATA:
            self._check_meta(name, meta)
        archive = self._archive
        position = archive.position
        archive.write(
            b"%b%b%b\0%b%b" % (_FILENAME, _size(16 + count), name, meta, _reference(PAYLOAD_REF, 32, offset, size))
        )
        records += _row(hash_name(name), position, 16 + count + len(meta) + 32)
        self._payload_end = offset + 16 + size
        return position

    def references(self, entries: list[Any], first: int, base: int) -> int:
        """As `reference` for plain files from `entries[first]` on, each `(name, meta, size, offset - base, None)`.

        Returns:
            How many were taken. The next one is of another kind, is to be refused, or has to wait for the next call.
        """
        payload, records, archive = self._payload, self._records, self._archive
        if payload is None or records is None:
            return 0
        earliest = max(self._payload_end, payload.position)
        count, items, rows, end = encode(entries, first, base, archive.position, earliest)
        if count:
            archive.write(items)
            records += rows
            self._payload_end = end
        return count

    def symlink(self, name: bytes, meta: bytes, target: bytes) -> None:
        """A symbolic link.

        Raises:
            EncodeError: the name, metadata or target cannot be stored, or this is no place for it.
        """
        self._whole(name, meta, _header(SYMLINK, HEADER_SIZE + len(target) + 1) + _text(name, target))

    def device(self, name: bytes, meta: bytes, major: int, minor: int) -> None:
        """A block or character device, by its mode.

        Raises:
            EncodeError: as `symlink`.
        """
        if major >> 64 or minor >> 64:
            raise EncodeError("write", shown(name), f"{major}:{minor} is no device number")
        self._whole(name, meta, _reference(DEVICE, PAIR_SIZE, major, minor))

    def special(self, name: bytes, meta: bytes) -> None:
        """A FIFO or socket, by its mode.

        Raises:
            EncodeError: as `symlink`.
        """
        self._whole(name, meta, b"")

    def hardlink(self, name: bytes, target_path: bytes, target_position: int) -> None:
        """A further name of the file at `target_path` (from the root, without leading slash).

        `target_position` is what `begin_file` or `reference` returned for it.

        Raises:
            EncodeError: the file does not lie before; or as `symlink`.
        """
        records = self._check(name, None)
        position = self._archive.position
        if not 0 <= target_position < position:
            raise EncodeError("write", shown(name), f"a link at {position} cannot lead to {target_position}")
        path = _text(name, target_path)
        head = _header(HARDLINK, HEADER_SIZE + 8 + len(path)) + U64.pack(position - target_position)
        item = b"%b%b\0%b%b" % (_header(FILENAME, HEADER_SIZE + len(name) + 1), name, head, path)
        self._archive.write(item)
        records += _row(hash_name(name), position, len(item))

    def finish(self) -> None:
        """The root's end, and that of the payload stream.

        Raises:
            EncodeError: the root is not the only directory open, or a file is.
        """
        if len(self._open) != 1 or self._records is None:
            raise EncodeError("write", "archive", "the root is not what is open")
        if self._payload is not None:
            self._check_injected(self._payload.position)
        self._close()
        self._records = None
        if self._payload is not None:
            self._payload.write(TAIL_MARKER)

    def _check_injected(self, position: int) -> None:
        if position < self._payload_end:
            why = f"chunks for references up to {self._payload_end} were not injected at {position}"
            raise EncodeError("write", "archive", why)

    def _close(self) -> _Directory:
        directory = self._open.pop()
        position = self._archive.position
        self._archive.write(build_table(directory.records, position, directory.entry_position))
        return directory

    def _whole(self, name: bytes, meta: bytes, item: bytes) -> None:
        """An entry that is complete with `item`."""
        position = self._add(name, meta, item)
        assert self._records is not None
        self._records += _row(hash_name(name), position, self._archive.position - position)

    def _add(self, name: bytes, meta: bytes, item: bytes = b"") -> int:
        self._check(name, meta)
        position = self._archive.position
        self._archive.write(_entry(name, meta, item))
        return position

    def _check(self, name: bytes, meta: bytes | None) -> bytearray:
        if self._records is None:
            raise EncodeError("write", shown(name), "no directory is open, or a file's content is not complete")
        suspicious = b"/" in name or b"\0" in name or name[:1] == b"." or not 0 < len(name) <= MAX_NAME
        if suspicious and (fault := name_fault(name)):
            raise EncodeError("write", shown(name), fault)
        if meta is not None:
            self._check_meta(name, meta)
        return self._records

    def _check_meta(self, name: bytes, meta: bytes) -> None:
        if not ENTRY_V1_SIZE <= len(meta) <= MAX_METADATA:
            why = f"{len(meta)} bytes of metadata, {ENTRY_V1_SIZE} to {MAX_METADATA} are allowed"
            raise EncodeError("write", shown(name), why)


def _entry(name: bytes, meta: bytes, item: bytes) -> bytes:
    return b"%b%b%b\0%b%b" % (_FILENAME, _size(HEADER_SIZE + len(name) + 1), name, meta, item)


def _text(name: bytes, text: bytes) -> bytes:
    if not 0 < len(text) <= MAX_NAME or b"\0" in text:
        raise EncodeError(
            "write", shown(name), f"a target of {len(text)} bytes, 1 to {MAX_NAME} without NUL are allowed"
        )
    return text + b"\0"
