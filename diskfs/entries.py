"""What is found on a disk, as plain data: volumes, entries of file systems, and where the content of a file lies.

These travel between the process that reads an image (`worker.py`) and the one that asks (`client.py`) as JSON; names
are bytes there and become text by latin-1, which loses nothing.
"""

import stat
from typing import Any, Final, NamedTuple, TypeAlias

#: What names an entry of a file system, hard links alike: of ext, XFS and NTFS (inode, 0), of btrfs (inode, subvolume),
#: of FAT (place of the directory entry, 0). The same in every process.
Id: TypeAlias = tuple[int, int]

#: Longest name of an entry, bytes. NTFS has 255 units of 16 bits.
MAX_NAME: Final = 1024
#: Letters of what is said of an image.
_MAX_TEXT: Final = 500


class Volume(NamedTuple):
    """A part of a disk that may hold a file system."""

    name: bytes  #: `part1` as Linux numbers partitions, `VG/LV`, or `raw` for a disk without partitions
    size: int  #: bytes
    kind: str  #: `ext4`, `xfs`, `swap`, `LVM2 member`, ...; `empty`, `unknown`
    label: str  #: of the file system or of the GPT partition; may be empty
    problem: str  #: why it cannot be looked into; empty if it can, as far as its first blocks tell


class Remark(NamedTuple):
    """Something that people should know of a disk or file system that can be read."""

    text: str
    is_loss: bool = False  #: something that is there is not shown


class Entry(NamedTuple):
    """An entry of a file system, without its name."""

    id: Id
    mode: int  #: `st_mode`: type and permissions
    uid: int
    gid: int
    size: int  #: bytes; of a directory 0, of a symlink those of its target
    mtime_ns: int  #: Unix time, nanoseconds
    links: int  #: names that it has
    rdev: tuple[int, int] | None = None  #: major and minor number of a device
    target: bytes | None = None  #: of a symlink
    has_xattrs: bool = False  #: it may have extended attributes

    @property
    def is_directory(self) -> bool:
        """Whether it can be listed."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it has content."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether it leads to another path."""
        return stat.S_ISLNK(self.mode)


class Run(NamedTuple):
    """Content of a file that lies on a disk as it is; what no run covers are zeros."""

    offset: int  #: in the file
    length: int  #: bytes
    disk: int  #: number of the disk
    position: int  #: on the disk


def printable(text: str) -> str:
    """`text`, which an image may have made up, as a terminal and a log can have it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_TEXT])


def text_of(name: bytes) -> str:
    """Bytes as text for JSON."""
    return name.decode("latin-1")


def bytes_of(text: str) -> bytes:
    """What `text_of` was given."""
    return text.encode("latin-1")


def entry_to_json(entry: Entry) -> list[Any]:
    """An entry as JSON."""
    return [*entry[:8], None if entry.target is None else text_of(entry.target), entry.has_xattrs]


def entry_from_json(data: list[Any]) -> Entry:
    """What `entry_to_json` was given.

    Raises:
        ValueError, TypeError: something else.
    """
    (one, other), mode, uid, gid, size, mtime_ns, links, rdev, target, has_xattrs = data
    return Entry(
        (one, other), mode, uid, gid, size, mtime_ns, links,
        None if rdev is None else (rdev[0], rdev[1]), None if target is None else bytes_of(target), has_xattrs,
    )  # fmt: skip
