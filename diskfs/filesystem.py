"""What every file system here can do, and what they share."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol

from diskfs.blocks import Blocks
from diskfs.entries import Entry, Id, Run
from diskfs.errors import DiskFsError

#: Entries of one directory.
MAX_ENTRIES: Final = 2_000_000
#: Runs of one file. A file of 1 TiB in pieces of 1 MiB has as many.
MAX_RUNS: Final = 1_000_000
#: Bytes of one directory.
MAX_DIRECTORY: Final = 512 << 20


#: What it means that something was in use which was neither unmounted nor frozen by a guest agent.
UNWRITTEN: Final = (
    "unless it was frozen for the backup or unmounted, what was changed last may be missing, be as it was before, or be"
    " shown although it is gone"
)


class FileSystem(Protocol):
    """A file system that is read; synchronous. Whatever is not as it must be raises any exception."""

    @property
    def kind(self) -> str:
        """`ext4`, `fat32`."""
        ...

    @property
    def label(self) -> str:
        """As who made it called it."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What people should know of the whole of it: that it was in use, and what that means for what is read."""
        ...

    @property
    def root(self) -> Id:
        """The root directory."""
        ...

    def entry(self, id: Id) -> Entry:
        """What `id` names."""
        ...

    def names(self, id: Id) -> Iterable[tuple[bytes, Id]]:
        """Names in a directory, in any order, as they stand there: nothing was checked. `.` and `..` may be missing."""
        ...

    def runs(self, id: Id) -> list[Run] | None:
        """Where the content of a file lies; None if it has to be read by `read`, being packed or among metadata."""
        ...

    def read(self, id: Id, offset: int, length: int) -> bytes:
        """Content of a file without runs."""
        ...

    def xattrs(self, id: Id) -> Iterable[tuple[bytes, bytes]]:
        """Extended attributes by their full names, as Linux has them."""
        ...


class RunList:
    """Gathers the runs of a file from extents of its volume; what lies behind its end is cut off."""

    def __init__(self, blocks: Blocks, size: int) -> None:
        self._blocks, self._size = blocks, size
        self._end = 0
        self.runs: list[Run] = []

    def add(self, offset: int, length: int, position: int) -> None:
        """The `length` bytes of the file from `offset` on lie at `position` of the volume.

        Raises:
            DiskFsError: they lie before what was added last, or not on the volume; or there are too many.
        """
        length = min(length, self._size - offset)
        if length <= 0:
            return
        if offset < self._end:
            raise DiskFsError("read", "file", "its extents overlap")
        if position < 0 or position + length > self._blocks.size:
            raise DiskFsError("read", "file", "its content lies behind the end of the volume")
        self._end = offset + length
        last = self.runs[-1] if self.runs else None
        for run in self._blocks.places(position, length, offset):
            if (
                last is not None
                and last.disk == run.disk
                and last.offset + last.length == run.offset
                and last.position + last.length == run.position
            ):
                last = self.runs[-1] = last._replace(length=last.length + run.length)
            else:
                last = run
                self.runs.append(run)
            if len(self.runs) > MAX_RUNS:
                raise DiskFsError("read", "file", f"it lies in more than {MAX_RUNS} pieces")


def content(blocks: Blocks, extents: Iterable[tuple[int, int, int | None]], size: int) -> Iterator[bytes]:
    """The bytes of something small whose (offset, length, position) `extents` are in order, without gaps."""
    left = size
    for _, length, position in extents:
        part = min(length, left)
        if part <= 0:
            return
        yield bytes(part) if position is None else blocks.exactly(position, part)
        left -= part
