"""What `pxar.target` has open: the folders on the way to the current one, and the file that is being written."""

import os

from pxar.accessor import FileNode
from pxar.metadata import Metadata


class OpenFolder:
    """A folder on the way to the current one."""

    __slots__ = ("dev", "fd", "inherited", "inherits", "ino", "metadata", "name", "unlinked")

    def __init__(
        self, name: bytes, fd: int, metadata: Metadata | None, *, inherits: bool = False, inherited: bool = False
    ) -> None:
        self.inherits, self.inherited = inherits, inherited  # what is made in it, or itself, may have ACLs of others
        found = os.fstat(fd)
        self.unlinked: list[tuple[bytes, FileNode]] = []  # hard links in it for which no file was found
        self.name, self.fd, self.metadata = name, fd, metadata  # fd -1: closed for now; metadata None: left as they are
        self.dev, self.ino = found.st_dev, found.st_ino


class OpenFile:
    """The file that is being written."""

    __slots__ = ("copy", "fd", "metadata", "name", "position", "temporary", "written")

    def __init__(self, name: bytes, temporary: bytes, fd: int, metadata: Metadata, position: int, copy: bool) -> None:
        self.name, self.temporary, self.fd, self.metadata = name, temporary, fd, metadata
        self.position, self.copy = position, copy
        self.written = 0
