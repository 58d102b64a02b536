"""Items of a file archive: their numbers, layouts and limits.

Layout: docs/formats.md, "File archives". An archive is a row of items: type (u64), size of the whole item (u64),
content. What a metadata item holds is in `metadata.py`, the search tree at a directory's end in `goodbye.py`.
"""

from enum import Enum
from struct import Struct
from typing import Final, NamedTuple

from core.buffers import Buffer
from pxar.errors import ArchiveError

FORMAT_VERSION: Final = 0x730F6C75DF16A40D
PRELUDE: Final = 0xE309D79D9F7B771B
ENTRY: Final = 0xD5956474E588ACEF
ENTRY_V1: Final = 0x11DA850A1C1CCEFF
FILENAME: Final = 0x16701121063917B3
SYMLINK: Final = 0x27F971E7DBF5DC5F
DEVICE: Final = 0x9FC9E906586D5CE9
XATTR: Final = 0x0DAB0229B57DCD03
ACL_USER: Final = 0x2CE8540A457D55B8
ACL_GROUP: Final = 0x136E3ECEB04C03AB
ACL_GROUP_OBJ: Final = 0x10868031E9582876
ACL_DEFAULT: Final = 0xBBBB13415A6896F5
ACL_DEFAULT_USER: Final = 0xC89357B40532CD1F
ACL_DEFAULT_GROUP: Final = 0xF90A8A5816038FFE
FCAPS: Final = 0x2DA9DD9DB5F7FB67
QUOTA_PROJID: Final = 0xE07540E82F7D1CBB
HARDLINK: Final = 0x51269C8422BD7275
PAYLOAD: Final = 0x28147A1B0B7C1A25
PAYLOAD_REF: Final = 0x419D3D6BC4BA977E
GOODBYE: Final = 0x2FEC4FA642D5731D
PAYLOAD_START_MARKER: Final = 0x834C68C2194A4ED2
PAYLOAD_TAIL_MARKER: Final = 0x6C72B78B984C81B5
#: Not an item: the hash field of a goodbye table's last row.
GOODBYE_TAIL_MARKER: Final = 0xEF5EED5B753E1555

#: Every number is the SipHash-2-4 (goodbye.py) of `__PROXMOX_FORMAT_NAME__` with this name.
HASHED_NAMES: Final = {
    FORMAT_VERSION: "VERSION",
    PRELUDE: "PRELUDE",
    ENTRY: "ENTRY_V2",
    ENTRY_V1: "ENTRY",
    FILENAME: "FILENAME",
    SYMLINK: "SYMLINK",
    DEVICE: "DEVICE",
    XATTR: "XATTR",
    ACL_USER: "ACL_USER",
    ACL_GROUP: "ACL_GROUP",
    ACL_GROUP_OBJ: "ACL_GROUP_OBJ",
    ACL_DEFAULT: "ACL_DEFAULT",
    ACL_DEFAULT_USER: "ACL_DEFAULT_USER",
    ACL_DEFAULT_GROUP: "ACL_DEFAULT_GROUP",
    FCAPS: "FCAPS",
    QUOTA_PROJID: "QUOTA_PROJID",
    HARDLINK: "HARDLINK",
    PAYLOAD: "PXAR_PAYLOAD",
    PAYLOAD_REF: "PXAR_PAYLOAD_REF",
    GOODBYE: "GOODBYE",
    PAYLOAD_START_MARKER: "PXAR_PAYLOAD_START_MARKER",
    PAYLOAD_TAIL_MARKER: "PXAR_PAYLOAD_TAIL_MARKER",
    GOODBYE_TAIL_MARKER: "PXAR_GOODBYE_TAIL_MARKER",
}

HEADER: Final = Struct("<QQ")  #: type, size of the whole item
U64: Final = Struct("<Q")
#: A whole PAYLOAD_REF or DEVICE item: type, size 32, and its two numbers.
PAIR_ITEM: Final = Struct("<QQQQ")
ENTRY_CONTENT: Final = Struct(
    "<Q"  #  0  mode, st_mode
    "Q"  #   8  flags
    "I"  #  16  uid
    "I"  #  20  gid
    "q"  #  24  mtime, seconds, floor
    "I"  #  32  mtime, nanoseconds
    "I"  #  36  zero
)  # fmt: skip
#: The older form ends in one u64: mtime in nanoseconds.
ENTRY_V1_CONTENT: Final = Struct("<QQIIQ")

HEADER_SIZE: Final = HEADER.size
ENTRY_SIZE: Final = HEADER_SIZE + ENTRY_CONTENT.size  #: 56, the whole item
ENTRY_V1_SIZE: Final = HEADER_SIZE + ENTRY_V1_CONTENT.size  #: 48
PAIR_SIZE: Final = PAIR_ITEM.size  #: 32
#: Bytes of the smallest child: a FILENAME with one letter, and a HARDLINK with one.
MIN_CHILD_SIZE: Final = 18 + 26

#: Longest name, symlink target or hard link path, bytes without the closing NUL.
MAX_NAME: Final = 4096
#: Longest content of an XATTR (name, NUL, value) or FCAPS item.
MAX_XATTR: Final = 255 + 65536
#: ENTRY and all attributes of one entry. The format has no limit; Fleece holds them in memory as a whole.
MAX_METADATA: Final = 64 << 20
#: The same for a prelude: a list of patterns.
MAX_PRELUDE: Final = 16 << 20
#: What an item's size field can say of a file's content.
MAX_CONTENT: Final = (1 << 64) - 1 - HEADER_SIZE

#: Content of the FORMAT_VERSION item of a split archive; a self-contained one has no such item.
SPLIT_VERSION: Final = 2
VERSION_ITEM: Final = HEADER.pack(FORMAT_VERSION, 24) + U64.pack(SPLIT_VERSION)
START_MARKER: Final = HEADER.pack(PAYLOAD_START_MARKER, HEADER_SIZE)
TAIL_MARKER: Final = HEADER.pack(PAYLOAD_TAIL_MARKER, HEADER_SIZE)


class Kind(Enum):
    """What an entry is; the value is the letter that catalogs use."""

    DIRECTORY = b"d"
    FILE = b"f"
    SYMLINK = b"l"
    HARDLINK = b"h"
    BLOCK = b"b"
    CHARACTER = b"c"
    FIFO = b"p"
    SOCKET = b"s"


#: Kind of an entry by the type bits of its mode (`stat.S_IFMT`).
KIND_OF_MODE: Final = {
    0o140000: Kind.SOCKET,
    0o120000: Kind.SYMLINK,
    0o100000: Kind.FILE,
    0o060000: Kind.BLOCK,
    0o040000: Kind.DIRECTORY,
    0o020000: Kind.CHARACTER,
    0o010000: Kind.FIFO,
}


class Short(Exception):  # noqa: N818 - not a fault: the caller fetches more and asks again
    """The data at hand end before index `needed`."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class Beginning(NamedTuple):
    """What stands before the root's ENTRY."""

    version: int  #: 1 or 2
    prelude: bytes | None
    end: int  #: position of the root's ENTRY


def read_beginning(data: Buffer, *, where: str) -> Beginning:
    """What stands before the root, at the beginning of an archive.

    Raises:
        ArchiveError: a version that is unknown, a prelude that is too long.
        Short: `data` end within it.
    """
    kind, size = peek_header(data, 0)
    if kind != FORMAT_VERSION:
        return Beginning(1, None, 0)
    if size != HEADER_SIZE + U64.size:
        raise bad(where, 0, f"FORMAT_VERSION of {size} bytes, it has {HEADER_SIZE + U64.size}")
    check_length(data, size)
    (version,) = U64.unpack_from(data, HEADER_SIZE)
    if version not in (1, SPLIT_VERSION):
        raise bad(where, 0, f"version {version} of the format, known are 1 and {SPLIT_VERSION}")
    kind, length = peek_header(data, size)
    if kind != PRELUDE:
        return Beginning(version, None, size)
    if version == 1:
        raise bad(where, size, "a PRELUDE in version 1 of the format")
    if not HEADER_SIZE <= length <= HEADER_SIZE + MAX_PRELUDE:
        raise bad(where, size, f"PRELUDE of {length} bytes, the limit is {HEADER_SIZE + MAX_PRELUDE}")
    check_length(data, size + length)
    return Beginning(version, bytes(data[size + HEADER_SIZE : size + length]), size + length)


def peek_header(data: Buffer, offset: int) -> tuple[int, int]:
    """Type and size of the item at `data[offset]`.

    Raises:
        Short: `data` end within the header.
    """
    if len(data) < offset + HEADER_SIZE:
        raise Short(offset + HEADER_SIZE)
    kind, size = HEADER.unpack_from(data, offset)
    return kind, size


def check_length(data: Buffer, needed: int) -> None:
    """Make sure that `data` have `needed` bytes.

    Raises:
        Short: they do not.
    """
    if len(data) < needed:
        raise Short(needed)


def item_name(kind: int) -> str:
    """The name of an item type for people; a number if it is none."""
    if kind == GOODBYE_TAIL_MARKER or kind not in HASHED_NAMES:
        return f"{kind:#018x}"
    if kind in (ENTRY, ENTRY_V1):
        return "ENTRY" if kind == ENTRY else "ENTRY_V1"
    return HASHED_NAMES[kind].removeprefix("PXAR_") if kind != FORMAT_VERSION else "FORMAT_VERSION"


def bad(where: str, position: int, why: str) -> ArchiveError:
    """The error for `why` at byte `position` of the stream `where`."""
    return ArchiveError("read archive", where, f"at byte {position}: {why}")


def name_fault(name: Buffer) -> str | None:
    """Why `name` cannot be the name of a directory's child; None if it can."""
    text = bytes(name)
    if not 0 < len(text) <= MAX_NAME:
        return f"a name of {len(text)} bytes, 1 to {MAX_NAME} are allowed"
    if b"/" in text or b"\0" in text or text in (b".", b".."):
        return f"the name {shown(text)} would lead out of its directory"
    return None


def shown(name: bytes) -> str:
    """A name or path for people: shortened, and nothing that a terminal would act on."""
    text = escaped(name)
    return f"'{text if len(text) <= 100 else text[:97] + '...'}'"


def escaped(name: bytes) -> str:
    """`name`, or a path, on one line: no two names look the same.

    A backslash becomes `\\\\`, a control character `\\n` or `\\x1b`, another letter that is not printable `\\u202e`, a
    byte that is not UTF-8 `\\xff`.
    """
    text = name.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_escaped_letter, text))


def _escaped_letter(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    if letter.isprintable() and letter != "\\":
        return letter
    if letter.isascii():
        return letter.encode("unicode_escape").decode()
    # Two digits are for bytes that are no letters.
    return f"\\u{ord(letter):04x}" if letter <= "\uffff" else f"\\U{ord(letter):08x}"
