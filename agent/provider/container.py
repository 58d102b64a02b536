"""The files of a container, as they come over the stream of a session, into its snapshot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from agent.provider.stream import ARCHIVE, put_pieces, receive_archive, unpacked_report
from core.units import format_size
from datastore.chunker import ARCHIVE_AVERAGE, CATALOG_AVERAGE
from datastore.names import CATALOG_NAME
from pxar.create_report import CreateReport, shown_path
from repository.report import Mode
from repository.stream_backup import StreamBackup, StreamSpec

if TYPE_CHECKING:
    from repository.backup import SnapshotWriter

#: Bytes of memory for the catalog on its way.
_CATALOG_ARENA: Final = 24 << 20


async def add_container(writer: "SnapshotWriter", fd: int, *, bwlimit: int | None) -> CreateReport:
    """Store the archive and the catalog that come from `fd`; what was left out becomes warnings.

    Raises:
        FormatError, SourceError: the stream makes no sense, or ends early.
        FleeceError: what the session raises.

    Cancelled, it ends with the next look at the stream.
    """
    report = CreateReport()
    specs = [
        StreamSpec(ARCHIVE, ARCHIVE_AVERAGE, Mode.FULL, "every file is read"),
        StreamSpec(CATALOG_NAME, CATALOG_AVERAGE, Mode.FULL, "made anew", _CATALOG_ARENA),
    ]

    def write(streams: Sequence[StreamBackup]) -> None:
        archive, catalog = streams
        document = receive_archive(fd, {b"A": put_pieces(archive.write), b"C": put_pieces(catalog.write)})
        trio.from_thread.check_cancelled()
        unpacked_report(document, report)

    await writer.add_streams("root.pxar", specs, write, bwlimit=bwlimit)
    for warning in report.warnings:
        writer.progress.warn(f"root.pxar: {warning}")
    if report.more_warnings:
        writer.progress.warn(f"root.pxar: {report.more_warnings} more warnings like these")
    if report.skipped_mounts:
        mounts = ", ".join(map(shown_path, report.skipped_mounts))
        writer.progress.log(f"root.pxar: mount points stored as empty folders: {mounts}")
    writer.progress.log(f"root.pxar: {report.entries} entries, {format_size(report.size)} in files")
    return report
