"""Files of a snapshot: joins the restore of `pxar` with the stored streams of `repository`.

One thread looks up entries and fetches their contents, another makes the files (pxar/behind.py), while chunks are read
ahead and decoded in others.
"""

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import trio

from agent.beside import lend_threads
from agent.image_nodes import ImageFolder
from agent.image_trees import image_part, open_image_tree
from agent.restore_options import RestoreOptions
from core.buffers import Buffer
from core.errors import FleeceError, NotFoundError, TargetError, UsageError
from core.nursery import open_nursery
from core.progress import Progress, Task
from core.units import format_size
from datastore.codec import ChunkCodec
from datastore.manifest import Manifest
from datastore.names import ArchiveKind, archive_kind, strip_archive_type
from pxar.accessor import ArchiveAccessor, Directory, Node
from pxar.export import write_content
from pxar.extract import extract_entry, extract_folder
from pxar.extract_report import ExtractReport
from pxar.format import escaped
from pxar.patterns import MatchPattern
from pxar.tar_stream import write_tar
from pxar.zip_stream import write_zip
from repository.archive import open_cache
from repository.interface import Reader
from repository.stored_bytes import CACHE_SIZE, ArchiveStreams, archive_stream_names, open_streams

#: Seconds between two looks at signals, and two notes on the progress.
_NOTE_S: Final = 0.1
StreamFormat = Literal["tar", "zip"]


@dataclass(frozen=True, slots=True)
class FilesRestored:
    """What became of a file archive, or of a part of it."""

    name: str  #: `root.pxar`, or `root.pxar/etc`
    target: str
    figures: ExtractReport

    def to_json(self) -> dict[str, Any]:
        """Its element of `restored`."""
        figures = self.figures
        return {
            "name": self.name,
            "target": self.target,
            "size": figures.size,
            "entries": figures.entries,
            "files": figures.files,
            "hardlinks": figures.hardlinks,
            "directories": figures.folders,
            "left-out": figures.left_out,
            "failed": figures.failed,
        }

    def line(self) -> str:
        """The same for people."""
        figures = self.figures
        text = f"{self.name} -> {self.target}: {figures.entries} entries, {format_size(figures.size)} in files"
        if figures.left_out:
            text += f", {figures.left_out} entries left out"
        return text + (f", {figures.failed} entries failed" if figures.failed else "")


@dataclass(frozen=True, slots=True)
class FilesWanted:
    """A file archive or a disk image that is looked into, and what of it."""

    name: str  #: `root`, `drive-scsi0.img`
    path: bytes = b""  #: from its root, without slashes at its ends
    is_image: bool = False

    @property
    def archive(self) -> str:
        """As the command line has it: `root.pxar`, `drive-scsi0.img`."""
        return self.name if self.is_image else f"{self.name}.pxar"

    @property
    def shown(self) -> str:
        """For people: as the command line takes it, but for what is not printable."""
        return self.archive + (f"/{escaped(self.path)}" if self.path else "")


def wanted_files(manifest: Manifest, archive: str) -> FilesWanted | None:
    """What `archive` (`root.pxar`, `root.pxar/etc/passwd`, `drive-scsi0.img/part1`) means.

    None if it names no file archive of the snapshot, and nothing in a disk image of it.
    """
    name, slash, path = archive.partition("/")
    if slash:
        image = image_part(manifest, archive)
        if image is not None:
            return FilesWanted(*image, is_image=True)
    for file in manifest.files:
        is_other = archive_kind(file.filename) is not ArchiveKind.DYNAMIC
        if is_other and archive in (file.filename, strip_archive_type(file.filename)):
            return None
    try:
        stream, _ = archive_stream_names(manifest, name)
    except NotFoundError:
        return None
    return FilesWanted(_stem(stream), os.fsencode(path).strip(b"/"))


def file_archives(manifest: Manifest) -> list[FilesWanted]:
    """All file archives of a snapshot."""
    names = [file.filename for file in manifest.files]
    return [FilesWanted(_stem(name)) for name in names if name.endswith((".pxar.didx", ".mpxar.didx"))]


def _stem(name: str) -> str:
    return strip_archive_type(name).rpartition(".")[0]


async def restore_to_folder(
    reader: Reader,
    codec: ChunkCodec,
    manifest: Manifest,
    wanted: FilesWanted,
    target: str,
    options: RestoreOptions,
    progress: Progress,
) -> FilesRestored:
    """Restore a file archive or a folder in it into the folder `target`, or one file to the file `target`.

    What cannot be restored becomes warnings of `progress`.

    Raises:
        NotFoundError: the path is not in the archive.
        TargetError, FleeceError: as `pxar.extract.extract_folder`; of one file: it cannot be restored.

    Cancelled, what was restored stays, except for the file that was not complete.
    """
    extract = options.to_folder()

    def work(accessor: ArchiveAccessor, report: ExtractReport, notes: "_Notes") -> str:
        node = _found(accessor, manifest, wanted)
        if isinstance(node, Directory):
            _refuse_unreadable(node)
            extract_folder(
                accessor, target, extract, start=node, prefix=wanted.path, report=report, progress=notes,
                beside=notes.beside,
            )  # fmt: skip
            return target
        if extract.patterns:
            raise UsageError("use", "--pattern", f"{wanted.shown} is no folder")
        return _restore_entry(accessor, node, target, options, wanted, report, notes)

    return await _run(reader, codec, manifest, wanted, target, progress, work, extract.patterns)


async def restore_to_stream(
    reader: Reader,
    codec: ChunkCodec,
    manifest: Manifest,
    wanted: FilesWanted,
    write: Callable[[Buffer], Awaitable[None]],
    options: RestoreOptions,
    progress: Progress,
    *,
    format: StreamFormat | None = None,
    terminal: bool = False,
    folder: bytes = b"",
) -> FilesRestored:
    """Write a file archive or a folder in it as tar (or zip), or one file as it is; only the latter to a `terminal`.

    Entries are in a folder called `folder` there.

    Raises:
        NotFoundError: the path is not in the archive.
        FleeceError: what `write` raises, and as `pxar.tar_stream.write_tar` and `pxar.export.write_content`.
    """
    extract = options.to_stream()

    def work(accessor: ArchiveAccessor, report: ExtractReport, notes: "_Notes") -> str:
        def put(data: Buffer) -> None:
            trio.from_thread.run(write, data)

        node = _found(accessor, manifest, wanted)
        if isinstance(node, Directory):
            if terminal:
                raise TargetError(
                    "write to", "standard output", "it is a terminal", "redirect it into a file or a pipe"
                )
            _refuse_unreadable(node)
            export = write_zip if format == "zip" else write_tar
            export(accessor, put, extract, start=node, prefix=wanted.path, folder=folder, report=report, progress=notes)
        elif format is not None or extract.patterns:
            option = "--pattern" if extract.patterns else f"--format {format}"
            raise UsageError("use", option, f"{wanted.shown} is no folder: its content is written as it is")
        else:
            write_content(accessor, node, put, report=report, progress=notes)
        return "-"

    return await _run(reader, codec, manifest, wanted, "-", progress, work, extract.patterns)


def _found(accessor: ArchiveAccessor, manifest: Manifest, wanted: FilesWanted) -> Node:
    node = accessor.lookup(wanted.path)
    if node is None:
        raise NotFoundError(
            "restore", f"{manifest.snapshot} {wanted.shown}", "the archive has nothing at this path",
            "'fleece ls' shows what there is",
        )  # fmt: skip
    return node


def _refuse_unreadable(folder: Directory) -> None:
    """Make sure that the folder that somebody wants can be read at all, before anything is made.

    Raises:
        FormatError: it is a volume without a file system, or the like.
    """
    if isinstance(folder, ImageFolder):
        next(folder.stream(), None)


def _restore_entry(
    accessor: ArchiveAccessor,
    node: Node,
    target: str,
    options: RestoreOptions,
    wanted: FilesWanted,
    report: ExtractReport,
    notes: "_Notes",
) -> str:
    """Restore what is no folder; returns where it is."""
    path = Path(target)
    if path.is_dir():
        path /= os.fsdecode(node.name)
    extract = options.to_folder()
    if os.path.lexists(path) and not (extract.overwrite_others or extract.overwrite_files):
        raise TargetError("restore to", str(path), "something is there already", "use another name, or --force")
    if not path.parent.is_dir():
        raise TargetError("restore to", str(path), "the folder for it is not there")
    inside = wanted.path.rpartition(b"/")[0]
    extract_entry(
        accessor, node, str(path.parent), os.fsencode(path.name), extract, prefix=inside, report=report,
        progress=notes, beside=notes.beside,
    )  # fmt: skip
    if report.failed:
        raise FleeceError("restore", wanted.shown, report.warnings.pop().partition(": ")[2])
    return str(path)


async def _run(
    reader: Reader,
    codec: ChunkCodec,
    manifest: Manifest,
    wanted: FilesWanted,
    target: str,
    progress: Progress,
    work: Callable[[ArchiveAccessor, ExtractReport, "_Notes"], str],
    patterns: Sequence[MatchPattern],
) -> FilesRestored:
    report = ExtractReport()
    async with AsyncExitStack() as stack:
        opened: Callable[[], ArchiveAccessor]
        total = None
        if wanted.is_image:
            cache = await stack.enter_async_context(open_cache(CACHE_SIZE))
            image = await stack.enter_async_context(
                open_image_tree(reader, codec, manifest, wanted.name, cache, progress.warn)
            )
            opened = lambda: image  # noqa: E731
        else:
            streams = await stack.enter_async_context(open_streams(reader, codec, manifest, wanted.name))
            total = None if patterns or wanted.path else _size(streams)
            opened = lambda: ArchiveAccessor(  # noqa: E731
                streams.archive, streams.payload, where=f"{manifest.snapshot}/{wanted.archive}"
            )
        nursery = await stack.enter_async_context(open_nursery())
        with progress.task(wanted.shown, total) as task:
            notes = _Notes(task, nursery)

            def restore() -> str:
                return work(opened(), report, notes)

            try:
                target = await trio.to_thread.run_sync(restore)
                chosen = report.entries or report.failed or report.left_out
                if not chosen and any(not pattern.inverted for pattern in patterns):
                    progress.warn(f"{wanted.shown}: no entry matches the patterns")
            finally:
                report.settle()
                for warning in report.warnings:
                    progress.warn(f"{wanted.archive}: {warning}")
            task.update(note=f"{report.entries} entries")
            task.advance(report.size - task.done)
    return FilesRestored(wanted.shown, target, report)


def _size(streams: ArchiveStreams) -> int:
    return (streams.payload or streams.archive).size


class _Notes:
    """What a restore needs of the event loop; called in its thread. Ends it if it is cancelled."""

    def __init__(self, task: Task, nursery: trio.Nursery) -> None:
        self._task = task
        self.beside = lend_threads(nursery)
        self._token = trio.lowlevel.current_trio_token()
        self._next = 0.0

    def __call__(self, report: ExtractReport) -> None:
        """Note the figures of `report`, now and then."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _NOTE_S
        trio.from_thread.check_cancelled()
        # After the loop has ended nobody looks.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._show, report.size, report.entries)

    def _show(self, size: int, entries: int) -> None:
        if size > self._task.done:
            self._task.update(note=f"{entries} entries")
            self._task.advance(size - self._task.done)
