"""Reads folders in a second thread before the walk comes to them, for backups that compare most files and read few.

Half of the time of such a backup is spent in system calls. One call of `scan_tree` makes thousands of them without the
GIL, in several threads, so other cores make them while the first compares what came before.
"""

import os
import threading
from collections import deque
from types import TracebackType
from typing import Final, NamedTuple, Self

from core.limits import cpu_count
from pxar.behind import Beside
from pxar.filesystem import Scanned, Seen, scan_tree
from pxar.folders import Folder

#: Entries that one call reads, and that wait for the walk (500 bytes each) until no further call is made.
AT_ONCE: Final = 2048
WAITING: Final = 6 * AT_ONCE
#: Threads that help one call, one even on one core: a disk or a server that is asked for more at once gives more.
MAX_HELPERS: Final = 3
_DT_DIR: Final = 4
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Place(NamedTuple):
    """Folders that are to be read: `names` of the folder at `path`, from the root."""

    path: tuple[bytes, ...]
    names: list[bytes]


class SeenFolder(NamedTuple):
    """A folder that was read ahead."""

    found: Scanned
    names: list[bytes]
    kinds: bytes  #: `d_type` of each
    scanned: list[Scanned | int | None]  #: None for folders
    entered: bool  #: the folders in it are read ahead too, and come next


class Ahead:
    """A context manager: its end waits until the thread has ended.

    The walk has to ask for every folder that it comes to, in order, as long as the one it lies in was `entered`.
    """

    def __init__(
        self, beside: Beside, root: Folder, fd: int, names: list[bytes], kinds: bytes, *, last: bytes, skip_e2big: bool
    ) -> None:
        """`beside` starts the thread. `fd` is `root`, open as long as this lives, with `names` in it.

        A folder with an entry called `last` is read, the folders in it are not.
        """
        self._beside, self._root, self._fd = beside, root, fd
        self._last, self._skip_e2big = last, skip_e2big
        self._helpers = min(MAX_HELPERS, max(1, cpu_count() - 1))
        #: Innermost last.
        self._left = [_Place((), [name for name, kind in zip(names, kinds, strict=True) if kind == _DT_DIR])]
        self._ready: deque[tuple[bytes, SeenFolder | None, int]] = deque()
        self._waiting = 0  #: entries in there
        self._changed = threading.Condition()
        self._closed = False
        self._ended = False

    def __enter__(self) -> Self:
        self._beside(self._run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while not self._ended:
                self._changed.wait()

    def take(self, name: bytes) -> SeenFolder | None:
        """The next folder, called `name`; None if it has to be read by the walk itself, with all below."""
        with self._changed:
            while not self._ready and not self._ended:
                self._changed.wait()
            if not self._ready:
                return None
            if self._ready[0][0] != name:
                # Cannot be, and would give a folder the content of another one.
                self._closed = True
                self._ready.clear()
                return None
            _, seen, entries = self._ready.popleft()
            before = self._waiting
            self._waiting -= entries
            if before > WAITING >= self._waiting:
                self._changed.notify_all()
            return seen

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._left:
                self._read(self._left.pop())
                with self._changed:
                    while self._waiting > WAITING and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read(self, place: _Place) -> None:
        """Read folders of one place, and note what is left of it and below."""
        if not place.names:
            return
        try:
            fd = self._open(place.path)
        except OSError:
            self._hand_over([(name, None, 1) for name in place.names])
            return
        try:
            folders, rest = scan_tree(
                fd,
                place.names,
                self._root.features,
                dev=self._root.dev,
                limit=AT_ONCE,
                last=self._last,
                skip_e2big=self._skip_e2big,
                helpers=self._helpers,
            )
        finally:
            os.close(fd)
        self._hand_over([(seen[1], _folder(seen), 1 + len(seen[3])) for seen in folders])
        for number, index in rest:
            if number < 0:
                self._left.append(_Place(place.path, place.names[index:]))
                continue
            names, kinds = folders[number][3], folders[number][4]
            left = [name for name, kind in zip(names[index:], kinds[index:], strict=True) if kind == _DT_DIR]
            self._left.append(_Place(place.path + _path(folders, number), left))

    def _hand_over(self, seen: list[tuple[bytes, SeenFolder | None, int]]) -> None:
        with self._changed:
            if not self._closed:
                self._ready += seen
                self._waiting += sum(entries for _, _, entries in seen)
            self._changed.notify_all()

    def _open(self, path: tuple[bytes, ...]) -> int:
        fd = os.dup(self._fd)
        for name in path:
            try:
                below = os.open(name, _FLAGS, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd


def _folder(seen: Seen) -> SeenFolder | None:
    _, _, found, names, kinds, scanned, entered = seen
    if isinstance(found, int):
        return None
    return SeenFolder(found, names, kinds, scanned, entered)


def _path(folders: list[Seen], number: int) -> tuple[bytes, ...]:
    """From the start to a folder."""
    path = []
    while number >= 0:
        path.append(folders[number][1])
        number = folders[number][0]
    return tuple(reversed(path))
