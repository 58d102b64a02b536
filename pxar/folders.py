"""Folders of the source while it is walked: what is open, and how a closed one is found again.

A walk may be thousands of folders deep, and files that change detection put aside are opened much later than they were
seen. So a folder is known by its place below the root, and a bounded number of descriptors serves them all.
"""

import os
from typing import Final

from pxar.features import Features

#: Folders kept open. The root comes on top; a process may usually have 1024 files open.
MAX_OPEN: Final = 64
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Folder:
    """A folder that was entered."""

    __slots__ = ("dev", "features", "ino", "name", "parent")

    def __init__(self, parent: "Folder | None", name: bytes, dev: int, ino: int, features: Features) -> None:
        self.parent, self.name = parent, name
        self.dev, self.ino = dev, ino
        self.features = features  #: what is read of its entries' metadata

    @property
    def path(self) -> bytes:
        """From the root, without slashes at the ends; put together each time, as deep trees have long paths."""
        names = []
        folder = self
        while folder.parent is not None:
            names.append(folder.name)
            folder = folder.parent
        return b"/".join(reversed(names))

    def path_of(self, name: bytes) -> bytes:
        """The path of its entry `name` from the root."""
        path = self.path
        return b"%b/%b" % (path, name) if path else name


class OpenFolders:
    """Descriptors of the folders used last; the others are opened again where they were, beneath the root."""

    def __init__(self, root: Folder, fd: int, *, limit: int = MAX_OPEN) -> None:
        """`fd` is closed by `close`, like all that follow."""
        self._root, self._root_fd, self._limit = root, fd, limit
        self._fds: dict[Folder, int] = {}  # the one used last comes last

    def add(self, folder: Folder, fd: int) -> None:
        """`fd` is `folder`, opened for reading."""
        while len(self._fds) >= self._limit:
            os.close(self._fds.pop(next(iter(self._fds))))
        self._fds[folder] = fd

    def fd(self, folder: Folder) -> int:
        """A descriptor of `folder`, good until the next call of `fd` or `add`.

        Raises:
            FileNotFoundError: it is not where it was.
            OSError: it cannot be opened.
        """
        if folder is self._root:
            return self._root_fd
        fd = self._fds.pop(folder, -1)
        if fd >= 0:
            self._fds[folder] = fd
            return fd
        closed = [folder]
        parent = folder.parent
        while parent is not None and parent is not self._root and parent not in self._fds:
            closed.append(parent)
            parent = parent.parent
        fd = self._root_fd if parent is None or parent is self._root else self._fds[parent]
        for step in reversed(closed):
            fd = os.open(step.name, _FLAGS, dir_fd=fd)
            self.add(step, fd)
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) != (step.dev, step.ino):
                os.close(self._fds.pop(step))
                raise FileNotFoundError(2, "its folder was replaced")
        return fd

    def forget(self, folder: Folder) -> None:
        """`folder` is not needed any more, for all that is known."""
        fd = self._fds.pop(folder, -1)
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Close all, the root too."""
        for fd in (*self._fds.values(), self._root_fd):
            os.close(fd)
        self._fds.clear()
