"""Folders as file archives: joins the walk of `pxar` with the streams of `repository`.

All file archives of a snapshot are made by one thread, one after the other, while their chunks are hashed and stored.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import trio

from agent.beside import lend_threads
from agent.listing_output import put
from agent.specifications import Specification
from core.errors import FleeceError
from core.nursery import open_nursery
from core.progress import Progress
from core.units import format_size
from datastore.catalog import CatalogWriter
from datastore.chunker import ARCHIVE_AVERAGE, CATALOG_AVERAGE
from datastore.codec import ChunkCodec
from datastore.index import ArchiveIndex
from datastore.names import Group, Snapshot
from pxar.behind import Beside
from pxar.create import CreateOptions, OpenReference, create_archive, measure_archive
from pxar.create_report import CreateReport, shown_path
from pxar.reference import Reference
from repository.backup import SnapshotWriter
from repository.interface import Repository
from repository.report import Mode
from repository.stream_backup import StreamBackup, StreamSpec
from repository.stream_reference import StreamReference, open_reference
from repository.throttle import Throttle

ChangeDetection = Literal["legacy", "data", "metadata"]
CATALOG: Final = "catalog.pcat1.didx"
#: Bytes of memory for a stream that is written slowly: an open chunk, a large directory's table, a few on their way.
_METADATA_ARENA: Final = 48 << 20
_CATALOG_ARENA: Final = 24 << 20
#: Seconds between two notes on the progress.
_NOTE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class FileArchiveOptions:
    """How folders become archives."""

    mode: ChangeDetection = "legacy"
    chunk_size: int = ARCHIVE_AVERAGE  #: bytes on average
    create: CreateOptions = field(default_factory=CreateOptions)


@dataclass(slots=True)
class FileArchiveReport:
    """What became of one folder."""

    name: str  #: `root.pxar`
    source: str
    mode: ChangeDetection
    reason: str | None  #: why every file was read, None if unchanged files were reused
    figures: CreateReport

    def to_json(self) -> dict[str, Any]:
        """Its element of `file-archives` in the report of a backup."""
        figures = self.figures
        return {
            "name": self.name,
            "source": self.source,
            "change-detection-mode": self.mode,
            "reason": self.reason,
            "entries": figures.entries,
            "files": figures.files,
            "hardlinks": figures.hardlinks,
            "directories": figures.folders,
            "excluded": figures.excluded,
            "mount-points": [_path_document(path) for path in figures.skipped_mounts],
            "size": figures.size,
            "read": figures.read,
            "files-reused": figures.reused_files,
            "bytes-reused": figures.reused_size,
            "files-changed": figures.changed_files,
            "bytes-changed": figures.changed_size,
            "chunks-injected": figures.injected_chunks,
            "bytes-injected": figures.injected_size,
            "padding": figures.padding,
            "chunks-padded": figures.partial_chunks,
        }

    def lines(self, *, dry_run: bool = False) -> list[str]:
        """The same for people."""
        figures = self.figures
        read = "would read" if dry_run else "read"
        why = f" ({self.reason})" if self.reason else ""
        text = (
            f"{self.name}: {figures.entries} entries of {self.source}, {format_size(figures.size)} in files, "
            f"mode {self.mode}{why}, {read} {format_size(figures.read)}"
        )
        lines = [text]
        if self.reason is None:
            lines.append(
                f"{self.name}: {figures.reused_files} unchanged files ({format_size(figures.reused_size)}), "
                f"{figures.changed_files} new or changed ({format_size(figures.changed_size)}), "
                f"{format_size(figures.padding)} padding in {figures.partial_chunks} chunks"
            )
        if mounts := figures.skipped_mounts:
            more = f" and {figures.more_mounts} more" if figures.more_mounts else ""
            lines.append(
                f"{self.name}: mount points stored as empty folders: {', '.join(map(shown_path, mounts))}{more}"
            )
        return lines


def _path_document(path: bytes) -> dict[str, Any]:
    document: dict[str, Any] = {}
    put(document, "path", b"/" + path)
    return document


def stem_of(specification: Specification) -> str:
    """`root` of `root.pxar:/`."""
    return specification.name.removesuffix(".pxar")


async def add_file_archives(
    writer: SnapshotWriter,
    repository: Repository,
    specifications: Sequence[Specification],
    options: FileArchiveOptions,
    *,
    bwlimit: int | Throttle | None = None,
) -> list[FileArchiveReport]:
    """Store folders in the snapshot of `writer`; what was left out of them becomes warnings of its progress.

    Raises:
        SourceError: a folder cannot be read at all.
        FleeceError: what the session raises.

    Cancelled, the walk is waited for until it writes the next time.
    """
    session, codec = writer.session, writer.codec
    async with AsyncExitStack() as stack:
        references = {
            one.name: await stack.enter_async_context(
                _reference(
                    options.mode, repository, session.base, writer.previous_manifest, session.previous_index, codec, one
                )
            )
            for one in specifications
        }
        reports = [_report(one, options.mode, references[one.name]) for one in specifications]
        specs = _streams(specifications, reports, options)
        progress = _Notes(writer.progress)

        nursery = await stack.enter_async_context(open_nursery())
        beside = lend_threads(nursery)

        def write(streams: Sequence[StreamBackup]) -> None:
            _write(specifications, reports, options, references, streams, progress, beside)

        name = ", ".join(one.name for one in specifications)
        await writer.add_streams(name, specs, write, bwlimit=bwlimit)
    _settle_reports(writer, specifications, reports)
    return reports


def _report(one: Specification, mode: ChangeDetection, reference: StreamReference | str) -> FileArchiveReport:
    reason = reference if isinstance(reference, str) else None
    return FileArchiveReport(one.name, one.source, mode, reason, CreateReport())


def _streams(
    specifications: Sequence[Specification], reports: Sequence[FileArchiveReport], options: FileArchiveOptions
) -> list[StreamSpec]:
    """The streams of all archives, in the order in which PBS lists them."""
    specs = []
    for one, report in zip(specifications, reports, strict=True):
        stem, size = stem_of(one), options.chunk_size
        mode = Mode.FULL if report.reason is not None else Mode.INCREMENTAL
        if options.mode == "legacy":
            specs.append(StreamSpec(f"{stem}.pxar.didx", size, mode, report.reason))
        else:
            specs.append(StreamSpec(f"{stem}.ppxar.didx", size, mode, report.reason))
            specs.append(StreamSpec(f"{stem}.mpxar.didx", size, mode, report.reason, _METADATA_ARENA))
    if options.mode == "legacy":
        specs.append(StreamSpec(CATALOG, CATALOG_AVERAGE, Mode.FULL, "made anew", _CATALOG_ARENA))
    return specs


def _write(
    specifications: Sequence[Specification],
    reports: Sequence[FileArchiveReport],
    options: FileArchiveOptions,
    references: dict[str, StreamReference | str],
    streams: Sequence[StreamBackup],
    notes: "_Notes",
    beside: Beside,
) -> None:
    """In a worker thread: one archive after the other."""
    by_name = {stream.filename: stream for stream in streams}
    catalog = CatalogWriter(by_name[CATALOG].write) if CATALOG in by_name else None
    for one, report in zip(specifications, reports, strict=True):
        stem = stem_of(one)
        notes.begin(by_name)
        if catalog is not None:
            archive = by_name[f"{stem}.pxar.didx"]
            catalog.start_archive(archive.filename.encode())
            create_archive(
                one.source, archive, None, options.create, catalog=catalog, report=report.figures, progress=notes
            )
            archive.finish()
            continue
        archive, payload = by_name[f"{stem}.mpxar.didx"], by_name[f"{stem}.ppxar.didx"]
        found = references[one.name]
        create_archive(
            one.source,
            archive,
            payload,
            options.create,
            reference=_opener(found, report),
            report=report.figures,
            progress=notes,
            beside=beside,
        )
        payload.finish()
        archive.finish()
    if catalog is not None:
        catalog.finish()


def _opener(found: StreamReference | str, report: FileArchiveReport) -> OpenReference | None:
    if isinstance(found, str):
        return None

    def open_it() -> Reference | None:
        try:
            return Reference(found.archive, found.payload)
        except FleeceError as error:
            # A bad old archive is a reason to read everything, not to fail.
            report.reason = f"the previous archive cannot be read ({error.why})"
            return None

    return open_it


def _settle_reports(
    writer: SnapshotWriter, specifications: Sequence[Specification], reports: Sequence[FileArchiveReport]
) -> None:
    """Put into the reports of the streams what only the walk knows, and its warnings where they are shown."""
    streams = {stream.name: stream for stream in writer.reports}
    for one, report in zip(specifications, reports, strict=True):
        figures, stem = report.figures, stem_of(one)
        for name in (f"{stem}.pxar", f"{stem}.ppxar", f"{stem}.mpxar"):
            if name in streams:
                # Metadata are not counted as read.
                streams[name].read = 0 if name.endswith(".mpxar") else figures.read
                streams[name].mode = Mode.FULL if report.reason is not None else Mode.INCREMENTAL
                streams[name].reason = report.reason
        for warning in figures.warnings:
            writer.progress.warn(f"{one.name}: {warning}")
        if figures.more_warnings:
            writer.progress.warn(f"{one.name}: {figures.more_warnings} more warnings like these")
    if "catalog.pcat1" in streams:
        streams["catalog.pcat1"].read = 0


class _Notes:
    """Shows how far the walk is; called in its thread."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._token = trio.lowlevel.current_trio_token()
        self._next = 0.0
        self._streams: dict[str, StreamBackup] = {}

    def begin(self, streams: dict[str, StreamBackup]) -> None:
        """The streams whose task has the note."""
        self._streams = streams

    def __call__(self, report: CreateReport) -> None:
        """Note the figures of `report`, now and then."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _NOTE_S
        trio.from_thread.check_cancelled()
        note = f"{report.entries} entries"
        # After the loop has ended nobody looks.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._show, note)

    def _show(self, note: str) -> None:
        for stream in self._streams.values():
            if stream.task is not None:
                stream.task.update(note=note)
                return


@asynccontextmanager
async def _reference(
    mode: ChangeDetection,
    repository: Repository,
    base: Snapshot | None,
    manifest: Callable[[], Awaitable[bytes | None]],
    previous_index: Callable[[str], Awaitable[ArchiveIndex | None]],
    codec: ChunkCodec,
    one: Specification,
) -> AsyncIterator[StreamReference | str]:
    """The previous archive as reference, or why every file is read."""
    if mode != "metadata":
        yield f"mode {mode} reads every file"
        return
    opening = open_reference(repository, base, await manifest(), previous_index, codec, stem_of(one))
    async with opening as reference:
        yield reference


async def plan_file_archives(
    repository: Repository,
    group: Group,
    specifications: Sequence[Specification],
    codec: ChunkCodec,
    options: FileArchiveOptions,
) -> list[FileArchiveReport]:
    """`--dry-run`: what a backup of folders into `group` would read, and why. Writes nothing.

    Raises:
        SourceError: a folder cannot be read.
        FleeceError: the repository cannot be read.
    """
    base = await repository.latest(group)
    if base is not None:
        info = await repository.snapshot(base)
        if info.verification is not None and info.verification.get("state") == "failed":
            base = None  # a session would not use it either
    reports = []
    async with AsyncExitStack() as stack:
        reader = None if base is None else await stack.enter_async_context(repository.reader(base))

        async def manifest() -> bytes | None:
            return None if reader is None else await reader.manifest()

        async def index(name: str) -> ArchiveIndex | None:
            try:
                return None if reader is None else await reader.open_index(name)
            except FleeceError:
                return None

        for one in specifications:
            found = await stack.enter_async_context(
                _reference(options.mode, repository, base, manifest, index, codec, one)
            )
            report = _report(one, options.mode, found)
            reports.append(report)

            def measure(
                one: Specification = one, report: FileArchiveReport = report, found: StreamReference | str = found
            ) -> None:
                def look(_: CreateReport) -> None:
                    trio.from_thread.check_cancelled()

                measure_archive(
                    one.source,
                    options.create,
                    split=options.mode != "legacy",
                    reference=_opener(found, report),
                    report=report.figures,
                    progress=look,
                )

            await trio.to_thread.run_sync(measure)
    return reports
