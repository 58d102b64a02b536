"""Indexes that come over a connection: a bound on their length before they are asked for, and checked afterwards."""

from typing import Final

from core.errors import FormatError, UsageError
from datastore.dynamic_index import DynamicIndex
from datastore.fixed_index import FixedIndex
from datastore.index import ArchiveIndex
from datastore.index_file import HEADER_SIZE, MAX_ENTRY_BYTES
from datastore.names import ArchiveKind, archive_kind

#: Bytes of the larger kind of entry.
_ENTRY: Final = 40
#: Bytes of an archive for each entry, on average, of which no writer makes less: the smallest chunk has 16 KiB, and
#: change detection cuts some of them.
_MIN_AVERAGE: Final = 8 << 10
#: Entries that even a small archive may have.
_FEW: Final = 1 << 16


def index_limit(size: int | None) -> int:
    """Bytes of the index file of an archive of `size` bytes, at most; None: not known."""
    entries = MAX_ENTRY_BYTES // _ENTRY if size is None else size // _MIN_AVERAGE + _FEW
    return HEADER_SIZE + min(MAX_ENTRY_BYTES, _ENTRY * entries)


def parse_index(data: bytes | bytearray, name: str, where: str, size: int | None) -> ArchiveIndex:
    """The index whose whole file is `data`, that of an archive of `size` bytes.

    Raises:
        FormatError: it is none, or one of another size.
        UsageError: `name` is not that of an index.
    """
    kind = archive_kind(name)
    if kind is ArchiveKind.BLOB:
        raise UsageError("read index", where, "a blob is no index")
    index: ArchiveIndex = (FixedIndex if kind is ArchiveKind.FIXED else DynamicIndex).from_bytes(data, where=where)
    if size is not None and index.size != size:
        raise FormatError("read index", where, f"wrong size ({index.size} != {size})")
    return index
