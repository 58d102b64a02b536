"""One entry as it stands in an archive: name, metadata, and the item that says what it is.

Layout: docs/formats.md, "File archives". Decoder and accessor both read entries here, out of the bytes they have at
hand; `Short` tells them that these are too few.
"""

from struct import Struct
from typing import Final, NamedTuple

from core.buffers import Buffer
from pxar.format import (
    DEVICE,
    ENTRY,
    ENTRY_SIZE,
    FILENAME,
    GOODBYE,
    HARDLINK,
    HEADER_SIZE,
    KIND_OF_MODE,
    MAX_NAME,
    PAIR_ITEM,
    PAIR_SIZE,
    PAYLOAD,
    PAYLOAD_REF,
    SYMLINK,
    U64,
    Kind,
    Short,
    bad,
    check_length,
    item_name,
    name_fault,
    peek_header,
)
from pxar.metadata import metadata_end

#: Most files: ENTRY without attributes (type, size, mode, the rest), then PAYLOAD_REF (type, size, offset, size).
_COMMON: Final = Struct("<QQQ32xQQQQ")
#: Kinds whose entry has no item of its own behind the metadata.
_BARE: Final = frozenset({Kind.DIRECTORY, Kind.FIFO, Kind.SOCKET})


class Head(NamedTuple):
    """What the bytes of an entry say, from its ENTRY or HARDLINK item on; both sizes count from there."""

    kind: Kind
    meta_size: int  #: of the metadata; 0 for a hard link, which has none
    size: int  #: with the last item: of a PAYLOAD its header, of a directory none of its children
    first: int = 0  #: file: place of its PAYLOAD in the payload stream, -1: here; device: major; hard link: distance
    second: int = 0  #: file: size of the content; device: minor
    target: bytes = b""  #: of a symlink, path of a hard link


def read_name(data: Buffer, offset: int, *, where: str, base: int) -> tuple[bytes, int]:
    """The name in the FILENAME at `data[offset]`, and the index behind it.

    Raises:
        ArchiveError: it is none, or a name that no file has.
        Short: `data` end within it.
    """
    kind, size = peek_header(data, offset)
    if kind != FILENAME:
        raise bad(where, base + offset, f"{item_name(kind)} where a FILENAME must be")
    if not HEADER_SIZE + 2 <= size <= HEADER_SIZE + MAX_NAME + 1:
        raise bad(where, base + offset, f"FILENAME of {size} bytes, names have 1 to {MAX_NAME}")
    end = offset + size
    if len(data) < end:
        raise Short(end)
    name = bytes(data[offset + HEADER_SIZE : end])
    if name[-1]:
        raise bad(where, base + offset, "a name without its closing NUL")
    name = name[:-1]
    if b"/" in name or b"\0" in name or name[:1] == b".":
        fault = name_fault(name)
        if fault is not None:
            raise bad(where, base + offset, fault)
    return name, end


def read_head(data: Buffer, offset: int, *, where: str, base: int) -> Head:
    """The entry whose ENTRY or HARDLINK is at `data[offset]`, checked up to the header of what follows its metadata.

    Raises:
        ArchiveError: neither, or what no writer makes of an entry.
        Short: `data` end within it. Behind a directory, FIFO or socket the next item's header is wanted too.
    """
    if len(data) >= offset + _COMMON.size:
        entry, size, mode, item, length, first, second = _COMMON.unpack_from(data, offset)
        if item == PAYLOAD_REF and length == PAIR_SIZE and entry == ENTRY and size == ENTRY_SIZE and mode >> 12 == 8:
            return Head(Kind.FILE, ENTRY_SIZE, ENTRY_SIZE + PAIR_SIZE, first, second)
    if peek_header(data, offset)[0] == HARDLINK:
        return _hardlink(data, offset, where, base)
    end = metadata_end(data, offset, where=where, base=base)
    (mode,) = U64.unpack_from(data, offset + HEADER_SIZE)
    kind = KIND_OF_MODE.get(mode & 0o170000)
    if kind is None or mode >> 16:
        raise bad(where, base + offset, f"mode {mode:#o} is no file's")
    item, size = peek_header(data, end)
    meta_size = end - offset
    if kind is Kind.FILE:
        if item == PAYLOAD_REF and size == PAIR_SIZE:
            check_length(data, end + PAIR_SIZE)
            return Head(kind, meta_size, meta_size + PAIR_SIZE, *PAIR_ITEM.unpack_from(data, end)[2:])
        if item == PAYLOAD and size >= HEADER_SIZE:
            return Head(kind, meta_size, meta_size + HEADER_SIZE, -1, size - HEADER_SIZE)
    elif kind in _BARE:
        if item in (FILENAME, GOODBYE):
            return Head(kind, meta_size, meta_size)
    elif kind is Kind.SYMLINK:
        if item == SYMLINK:
            target = _text(data, end, 0, where, base)
            return Head(kind, meta_size, meta_size + size, target=target)
    elif item == DEVICE and size == PAIR_SIZE:
        check_length(data, end + PAIR_SIZE)
        return Head(kind, meta_size, meta_size + PAIR_SIZE, *PAIR_ITEM.unpack_from(data, end)[2:])
    raise bad(where, base + end, f"{item_name(item)} of {size} bytes cannot follow the metadata of a {_WORDS[kind]}")


_WORDS: Final = {
    Kind.DIRECTORY: "directory",
    Kind.FILE: "file",
    Kind.SYMLINK: "symlink",
    Kind.HARDLINK: "hard link",
    Kind.BLOCK: "block device",
    Kind.CHARACTER: "character device",
    Kind.FIFO: "FIFO",
    Kind.SOCKET: "socket",
}


def _hardlink(data: Buffer, offset: int, where: str, base: int) -> Head:
    target = _text(data, offset, U64.size, where, base)
    (distance,) = U64.unpack_from(data, offset + HEADER_SIZE)
    if not distance:
        raise bad(where, base + offset, "a hard link to itself")
    return Head(Kind.HARDLINK, 0, HEADER_SIZE + U64.size + len(target) + 1, distance, target=target)


def _text(data: Buffer, offset: int, before: int, where: str, base: int) -> bytes:
    """The text, without its NUL, in the item at `offset`, behind `before` other bytes."""
    kind, size = peek_header(data, offset)
    start = HEADER_SIZE + before
    if not start + 2 <= size <= start + MAX_NAME + 1:
        raise bad(where, base + offset, f"{item_name(kind)} of {size} bytes, targets have 1 to {MAX_NAME}")
    check_length(data, offset + size)
    text = bytes(data[offset + start : offset + size])
    if text.find(b"\0") != len(text) - 1:
        raise bad(where, base + offset, f"the target of a {item_name(kind)} must have one NUL, at its end")
    return text[:-1]
