"""Restores files of an archive into a folder.

    accessor, contents  ->  `Behind`, another thread  ->  `Target`, the folder

This side reads, in the order of the archive, which is that of the payload stream; the other side makes the entries.
Neither recurses, so the depth of a tree costs memory only. Synchronous, for one worker thread, or two if the caller
lends a second one.

Docs: docs/formats.md, "File archives"; what is safe against forged archives: `target.py`.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, TypeAlias

from core.buffers import Buffer
from core.errors import FormatError, NotFoundError
from pxar.accessor import ArchiveAccessor, Device, Directory, FileNode, Hardlink, Node, Special, Symlink
from pxar.behind import Behind, Beside
from pxar.extract_report import ExtractOptions, ExtractReport
from pxar.features import CHATTR_FLAGS, FAT_FLAGS, Features
from pxar.format import ENTRY, ENTRY_CONTENT, ENTRY_SIZE, HEADER, HEADER_SIZE, Kind
from pxar.metadata import Metadata
from pxar.selection import TAKEN, Selection
from pxar.target import Target

Progress = Callable[[ExtractReport], None]

#: Files without attributes up to this size are written many in one call ...
_SMALL: Final = 256 << 10
#: ... of at most so many files, and bytes of content.
_BATCH_FILES: Final = 128
_BATCH_SIZE: Final = 4 << 20
#: Bytes of a larger file that are read at once. Only reads across the end of a chunk are copied.
_PIECE: Final = 512 << 10
#: Bytes of the largest chunk.
_MAX_HELD: Final = 16 << 20
_DAMAGED: Final = "the backup is damaged there"
#: What is told of a folder for each of its entries of which not even the name is known.
ENTRY_LOST: Final = "an entry in it, with all that may be in that, is missing"
#: Errors of one entry. All others (no connection, no key) concern every entry.
_UNREADABLE: Final = (FormatError, NotFoundError)
Unreadable: TypeAlias = FormatError | NotFoundError
_WANTED: Final = {
    Kind.BLOCK: Features.DEVICE_NODES,
    Kind.CHARACTER: Features.DEVICE_NODES,
    Kind.FIFO: Features.FIFOS,
    Kind.SOCKET: Features.SOCKETS,
}
_FLAGS: Final = CHATTR_FLAGS | FAT_FLAGS
#: Linux has 12 bits for the major and 20 for the minor number of a device.
_MAX_MAJOR: Final = 1 << 12
_MAX_MINOR: Final = 1 << 20


def extract_folder(
    accessor: ArchiveAccessor,
    path: str,
    options: ExtractOptions | None = None,
    *,
    start: Directory | None = None,
    prefix: bytes = b"",
    report: ExtractReport | None = None,
    progress: Progress | None = None,
    beside: Beside | None = None,
) -> ExtractReport:
    """Restore the archive, or its folder `start` at the path `prefix`, into the folder `path`, which may be new.

    What cannot be restored is a warning in the report, and the rest goes on. `report` is kept up to date while it runs
    (a new one otherwise); `progress` is called with it now and then and may raise to stop. Patterns see paths from the
    root of the archive. The target gets the metadata of `start`, except if only patterns chose what goes into a folder
    that was there before. With `beside` entries are made in a second thread, which has ended when this returns.

    Raises:
        TargetError: the target cannot be used, is full, read-only, or gone.
        FleeceError: the archive cannot be read at all, or not any more.

    After any error what was restored stays; a file that was not complete is removed, and folders that were being
    filled still belong to the user alone (0700).
    """
    run = _Run(accessor, options or ExtractOptions(), report or ExtractReport(), progress, beside)
    return run.folder(path, start or accessor.root, prefix.strip(b"/"))


def extract_entry(
    accessor: ArchiveAccessor,
    node: Node,
    folder: str,
    name: bytes,
    options: ExtractOptions | None = None,
    *,
    prefix: bytes = b"",
    report: ExtractReport | None = None,
    progress: Progress | None = None,
    beside: Beside | None = None,
) -> ExtractReport:
    """Restore `node`, which is no folder and lies in the archive's folder `prefix`, as `name` in an existing `folder`.

    Of a hard link the file is restored. Everything else is as with `extract_folder`, which has the folder's side.

    Raises:
        TargetError, FleeceError: as `extract_folder`.
    """
    # That the folder is there is the point.
    options = replace(options or ExtractOptions(), allow_existing=True)
    run = _Run(accessor, options, report or ExtractReport(), progress, beside)
    return run.entry(node, folder, name, prefix.strip(b"/"))


def pieces(accessor: ArchiveAccessor, node: FileNode) -> Iterator[Buffer]:
    """The content of a file in pieces; a piece may be a view of memory that is shared, and may be kept.

    Raises:
        ArchiveError: not all of it is there.
        FleeceError: it cannot be read.
    """
    stream, offset, size = accessor.open_content(node)
    end = offset + size
    if end > stream.size:
        raise FormatError("read", "archive", f"a file of {size} bytes, the stream ends after {stream.size - offset}")
    while offset < end:
        data = stream.read(offset, min(_PIECE, end - offset))
        if not len(data):
            raise FormatError("read", "archive", f"the stream ends {end - offset} bytes before the end of a file")
        yield data
        offset += len(data)


class _Level:
    """A folder that is gone through."""

    __slots__ = ("entered", "fate", "links", "metadata", "name", "stream")

    def __init__(
        self, node: Directory, metadata: Metadata, fate: int, entered: bool, lost: Callable[[Unreadable], None]
    ) -> None:
        self.name, self.metadata = node.name, metadata
        self.stream = node.readable(lost)
        self.fate = fate
        self.entered = entered  #: the target is told
        self.links = False  #: there were hard links in it


class _Run:
    def __init__(
        self,
        accessor: ArchiveAccessor,
        options: ExtractOptions,
        report: ExtractReport,
        progress: Progress | None,
        beside: Beside | None,
    ) -> None:
        self._beside = beside
        self._accessor, self._options, self._report, self._progress = accessor, options, report, progress
        self._selection = Selection(options.patterns)
        self._levels: list[_Level] = []
        self._path = b""  #: of the current folder from the root, without a slash at the end; only with patterns
        self._small: list[tuple[bytes, bytes, Buffer]] = []
        self._small_positions: list[int] = []
        self._small_size = 0
        self._flags = int(options.features & _FLAGS)  # operations on enums are slow
        self._whole: object = None  #: what the last piece was a part of
        self._prefix = b""  #: path of the folder that is restored
        self._copied: set[int] = set()  #: where the files are that were restored as one of their further names

    def folder(self, path: str, start: Directory, prefix: bytes) -> ExtractReport:
        with Target(path, self._options, self._report, prefix=prefix) as target, Behind(self._beside) as behind:
            self._target, self._behind, self._prefix = target, behind, prefix
            selection = self._selection
            shown = b"/" + prefix if prefix else b""
            fate = selection.fate(shown or b"/", True, selection.root) if selection else TAKEN
            metadata = start.metadata
            self._path = shown
            self._levels.append(_Level(start, metadata, fate, True, self._lost))
            while self._levels:
                self._go_on()
            behind.drain()
            target.finish(metadata if fate == TAKEN or target.made else None)
        self._report.settle()
        return self._report

    def entry(self, node: Node, folder: str, name: bytes, prefix: bytes) -> ExtractReport:
        with Target(folder, self._options, self._report, prefix=prefix) as target, Behind(self._beside) as behind:
            self._target, self._behind, self._prefix = target, behind, prefix
            if isinstance(node, Hardlink):
                self._file(node.follow(), name, False)
            else:
                self._leaf(node, name)
            self._flush()
            behind.drain()
        self._report.settle()
        return self._report

    def _go_on(self) -> None:
        """Go through the current folder up to the next one in it, or to its end."""
        level = self._levels[-1]
        selection, is_choosing = self._selection, bool(self._selection)
        try:
            for node in level.stream:
                fate, path = level.fate, b""
                if is_choosing:
                    path = self._path + b"/" + node.name
                    kind = node.kind
                    fate = selection.fate(path, None if kind is Kind.HARDLINK else kind is Kind.DIRECTORY, fate)
                if isinstance(node, Directory):
                    if fate != TAKEN and not selection.may_hold(path, fate):
                        continue
                    if self._push(node, path, fate):
                        return
                    continue
                if fate == TAKEN:
                    self._enter()
                    self._leaf(node, node.name)
        except _UNREADABLE as error:
            self._lose(None, "not all of the folder could be read", error)
        self._leave(level)

    def _push(self, node: Directory, path: bytes, fate: int) -> bool:
        """Go into a folder; False if it cannot be read."""
        try:
            metadata = node.metadata
        except _UNREADABLE as error:
            self._lose(node.name, "the folder, with all that is in it, is missing", error)
            return False
        self._path = path
        self._levels.append(_Level(node, metadata, fate, False, self._lost))
        if fate == TAKEN:
            self._enter()
        if self._progress is not None:
            self._progress(self._report)
        return True

    def _enter(self) -> None:
        """Tell the target of the folders on the way that it does not know yet."""
        if self._levels[-1].entered:
            return
        self._flush()
        for level in self._levels:
            if not level.entered:
                level.entered = True
                self._behind.put(0, self._target.enter, level.name, level.metadata, level.fate == TAKEN)

    def _leave(self, level: _Level) -> None:
        if level.entered:
            self._flush()
            if level.links:
                self._copy_unlinked()
        self._levels.pop()
        self._path = self._path[: -1 - len(level.name)]
        if level.entered and self._levels:
            self._behind.put(0, self._target.leave)

    def _copy_unlinked(self) -> None:
        """Hard links whose file is not there become files, the first name of each, and further names of these."""
        put, target, copied = self._behind.put, self._target, self._copied
        self._behind.drain()  # only the target knows which files are there
        again = False
        for name, node in target.take_unlinked():
            if node.filename_position in copied:
                put(0, target.hardlink, name, b"", node)
                again = True
            else:
                copied.add(node.filename_position)
                self._copy(node, name)
        if again:
            self._behind.drain()
            for name, node in target.take_unlinked():
                self._copy(node, name)

    def _copy(self, node: FileNode, name: bytes) -> None:
        try:
            self._file(node, name, True)
        except _UNREADABLE as error:
            self._lose(name, "not restored", error)

    def _leaf(self, node: Node, name: bytes) -> None:
        try:
            if isinstance(node, FileNode):
                self._file(node, name, False)
            elif isinstance(node, Symlink):
                self._behind.put(0, self._target.symlink, name, node.metadata, node.target)
            elif isinstance(node, Hardlink):
                file = node.follow()
                self._flush()
                self._levels[-1].links = True
                self._behind.put(0, self._target.hardlink, name, node.target_path, file)
            elif isinstance(node, Device | Special):
                self._node(node, name)
        except _UNREADABLE as error:
            self._lose(name, "not restored", error)

    def _node(self, node: Device | Special, name: bytes) -> None:
        if not self._options.features & _WANTED[node.kind]:
            self._report.left_out += 1
            return
        device = 0
        if isinstance(node, Device):
            if node.major >= _MAX_MAJOR or node.minor >= _MAX_MINOR:
                raise FormatError("restore", "device", f"no device has the numbers {node.major}:{node.minor}")
            device = os.makedev(node.major, node.minor)
        self._behind.put(0, self._target.node, name, node.metadata, device)

    def _file(self, node: FileNode, name: bytes, copy: bool) -> None:
        size, meta = node.size, node.meta
        if size <= _SMALL and not copy and self._is_plain(meta):
            stream, offset, size = self._accessor.open_content(node)
            # A view would keep all of its chunk, and a batch may be of as many chunks as files.
            data = bytes(stream.read(offset, size)) if size else b""
            if len(data) != size:
                raise FormatError("read", "archive", f"a file of {size} bytes, {len(data)} are there")
            self._small.append((name, meta, data))
            self._small_positions.append(node.filename_position)
            self._small_size += size
            if len(self._small) >= _BATCH_FILES or self._small_size >= _BATCH_SIZE:
                self._flush()
            return
        self._flush()
        target, put = self._target, self._behind.put
        content = pieces(self._accessor, node)
        # Whether there is anything to be read shows with the first piece.
        first = next(content, b"")
        put(0, target.begin_file, name, node.metadata, node.filename_position, copy)
        try:
            put(self._held(first), target.content, first)
            for piece in content:
                put(self._held(piece), target.content, piece)
                if self._progress is not None:
                    self._progress(self._report)
        except _UNREADABLE:
            put(0, target.drop_file)
            raise
        put(0, target.end_file)

    def _held(self, piece: Buffer) -> int:
        """Bytes of memory that `piece` keeps: of a view all that it is a part of, unless the last one was, too."""
        whole = piece.obj if isinstance(piece, memoryview) else piece
        if whole is self._whole:
            return len(piece)
        self._whole = whole
        return max(len(piece), min(_MAX_HELD, memoryview(whole).nbytes))

    def _is_plain(self, meta: bytes) -> bool:
        """Whether there is nothing to be set but owner, permissions and time."""
        if len(meta) != ENTRY_SIZE or HEADER.unpack_from(meta) != (ENTRY, ENTRY_SIZE):
            return False
        fields = ENTRY_CONTENT.unpack_from(meta, HEADER_SIZE)
        return not fields[1] & self._flags and fields[5] < 10**9

    def _flush(self) -> None:
        if not self._small:
            return
        self._behind.put(self._small_size, self._target.files, self._small, self._small_positions)
        self._small, self._small_positions, self._small_size = [], [], 0
        if self._progress is not None:
            self._progress(self._report)

    def _lost(self, error: Unreadable) -> None:
        self._lose(None, ENTRY_LOST, error)

    def _lose(self, name: bytes | None, what: str, error: Unreadable) -> None:
        """An entry of the current folder, or a part of the folder itself, cannot be read."""
        names = [level.name for level in self._levels[1:]]
        if name is not None:
            names.append(name)
        path = b"/".join([self._prefix, *names] if self._prefix else names)
        self._behind.put(0, self._target.complain, path, what, str(error), _DAMAGED)
