"""Entries of an archive as a tar or zip archive, and one file as it is, front to back into a `write` callable.

What is common to both formats is here; the formats are in `tar_stream.py` and `zip_stream.py`. Memory does not grow
with the tree, except for 8 bytes a file in a tar archive (which hard links may lead to). Synchronous, for one worker
thread.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from core.buffers import Buffer
from core.errors import FormatError, NotFoundError, UsageError
from pxar.accessor import ArchiveAccessor, Directory, FileNode, Hardlink, Node
from pxar.extract import ENTRY_LOST, Unreadable, pieces
from pxar.extract_report import ExtractOptions, ExtractReport
from pxar.format import Kind, shown
from pxar.selection import TAKEN, Selection

Write = Callable[[Buffer], object]
Progress = Callable[[ExtractReport], None]

#: Errors of one entry; all others concern every entry.
UNREADABLE: Final = (FormatError, NotFoundError)
_DAMAGED: Final = "the backup is damaged there"
#: Bytes that are written at once, at least.
_GATHERED: Final = 256 << 10


class Output:
    """Small writes put together; pieces of content go on as they are."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._gathered = bytearray()
        self.position = 0  #: bytes so far

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        self.position += len(data)
        if len(data) < _GATHERED:
            self._gathered += data
            if len(self._gathered) < _GATHERED:
                return
            data = b""
        self.flush()
        if len(data):
            self._write(data)

    def flush(self) -> None:
        """Hand over what is here."""
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._write(gathered)


class _Level(NamedTuple):
    """A folder that is gone through."""

    length: int  #: of its path
    node: Directory | None  #: None once it has been given out
    children: Iterator[Node]
    fate: int  #: as `Selection.fate`


class CutOffError(Exception):
    """A file could not be read to its end after its header was written."""


class Export:
    """What is exported, and what becomes of it."""

    def __init__(
        self, accessor: ArchiveAccessor, options: ExtractOptions, start: Directory | None, prefix: bytes,
        report: ExtractReport, progress: Progress | None, folder: bytes = b"",
    ) -> None:  # fmt: skip
        """`start`: a folder at the path `prefix` that is exported instead of all; `folder`: what it is called there."""
        self.accessor, self.options, self.report = accessor, options, report
        self._start = start or accessor.root
        self._prefix = prefix.strip(b"/")
        self._progress = progress
        self._folder = folder
        self._selection = Selection(options.patterns)
        self._positions = array("Q")  # of the files that were exported under their own names
        self._copies: dict[int, bytes] = {}  # where a file is that was exported under a hard link's name

    def each(self, add: Callable[[bytes, Node], None]) -> None:
        """Call `add` with name and node of each of `entries`; one that cannot be read is complained about.

        Raises:
            FormatError: `add` raised CutOffError: what follows would be taken for the rest of that file.
        """
        for path, node in self.entries():
            try:
                add(self.named(path), node)
            except CutOffError as error:
                whole = b"/".join(part for part in (self._prefix, path) if part)
                hint = "a --pattern with ! leaves the file out, and a restore to a folder leaves out what is damaged"
                raise FormatError("write to its end", shown(whole), str(error), hint) from error.__cause__
            except UNREADABLE as error:
                self.complain(path, "left out", error)

    def entries(self) -> Iterator[tuple[bytes, Node]]:
        """Path, without slashes at its ends, and node of what is taken: first the start, folders before their entries.

        A folder that cannot be read is complained about.
        """
        selection = self._selection
        before = b"/" + self._prefix if self._prefix else b""
        fate = selection.fate(before or b"/", True, selection.root) if selection else TAKEN
        path = b""  # of the last level

        def lost(error: Unreadable) -> None:
            self.complain(path, ENTRY_LOST, error)

        levels = [_Level(0, None, _distinct(self._start, lost), fate)]
        yield b"", self._start
        while levels:
            length, _, children, above = levels[-1]
            path = path[:length]
            below = None
            try:
                for node in children:
                    here = path + b"/" + node.name if path else node.name
                    fate = above
                    if selection:
                        kind = node.kind
                        is_folder = None if kind is Kind.HARDLINK else kind is Kind.DIRECTORY
                        fate = selection.fate(before + b"/" + here, is_folder, above)
                    if not isinstance(node, Directory):
                        if fate == TAKEN:
                            yield from self._given_out(levels, path)
                            yield here, node
                    elif fate == TAKEN or selection.may_hold(before + b"/" + here, fate):
                        below, path = _Level(len(here), node, _distinct(node, lost), fate), here
                        break
            except UNREADABLE as error:
                self.complain(path, "not all of the folder could be read", error)
            if below is None:
                levels.pop()
                continue
            levels.append(below)
            if fate == TAKEN:
                yield from self._given_out(levels, path)
            self.tick()

    @staticmethod
    def _given_out(levels: list[_Level], path: bytes) -> Iterator[tuple[bytes, Directory]]:
        """The folders on the way to `path` that were not given out."""
        first = len(levels)
        while first and levels[first - 1][1] is not None:
            first -= 1
        for index in range(first, len(levels)):
            length, node, _, _ = levels[index]
            levels[index] = levels[index]._replace(node=None)
            assert node is not None
            yield path[:length], node

    def exported(self, node: FileNode, path: bytes, *, copy: bool) -> None:
        """`node` was written at `path`; `copy`: of a hard link."""
        if copy:
            self._copies[node.filename_position] = path
        else:
            self._positions.append(node.filename_position)

    def path_of(self, link: Hardlink, node: FileNode) -> bytes | None:
        """Where the file of a hard link was written; None if it was not.

        Raises:
            ArchiveError: the path that the archive has for it cannot be looked up.
        """
        position = node.filename_position
        if position in self._copies:
            return self._copies[position]
        index = bisect_left(self._positions, position)
        if index == len(self._positions) or self._positions[index] != position:
            return None
        path, prefix = link.target_path, self._prefix + b"/" if self._prefix else b""
        # Whoever unpacks it follows the path that stands there.
        names = path.split(b"/")
        if not path.startswith(prefix) or not all(names) or b"." in names or b".." in names:
            return None
        found = self.accessor.lookup(path)
        if not isinstance(found, FileNode) or found.filename_position != position:
            return None
        return self.named(path.removeprefix(prefix))

    def named(self, path: bytes) -> bytes:
        """What the entry at `path` is called in the output."""
        return b"/".join(part for part in (self._folder, path) if part)

    def complain(self, path: bytes, what: str, error: Exception) -> None:
        """The entry at `path` could not be read."""
        self.report.failed += 1
        shown_path = b"/".join(part for part in (self._prefix, path) if part)
        self.report.complain(what, shown_path, str(error), alike=_DAMAGED)

    def tick(self) -> None:
        """Tell the progress."""
        if self._progress is not None:
            self._progress(self.report)


def _distinct(directory: Directory, lost: Callable[[Unreadable], None]) -> Iterator[Node]:
    """The children of `directory` in archive order, up to a name that was there before; `lost`: as `readable` has it.

    Whoever unpacks a symlink and then a folder of the same name may write where the symlink leads.

    Raises:
        ArchiveError: as `Directory.stream`, and at the second entry of a name.
    """
    last, is_checked = b"", False
    for node in directory.readable(lost):
        if node.name <= last and not is_checked:
            directory.children()
            is_checked = True
        last = max(last, node.name)
        yield node


def write_content(
    accessor: ArchiveAccessor,
    node: Node,
    write: Write,
    *,
    report: ExtractReport | None = None,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write the content of a file, or of what a hard link leads to.

    Raises:
        UsageError: it is no file.
        FleeceError: it cannot be read to its end; what was read is written.
    """
    report = report or ExtractReport()
    if isinstance(node, Hardlink):
        node = node.follow()
    if not isinstance(node, FileNode):
        raise UsageError("write the content of", shown(node.name), "it is no file")
    for piece in pieces(accessor, node):
        write(piece)
        report.size += len(piece)
        if progress is not None:
            progress(report)
    report.files = 1
    return report
