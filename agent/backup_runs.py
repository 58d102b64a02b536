"""One backup from beginning to end, into a repository that is open: what commands and jobs have in common."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.cli_backup import open_images, read_small_files
from agent.client_log import ClientLog, client_log
from agent.sessions import new_session
from agent.specifications import Specification, SpecificationKind
from repository.backup import SnapshotWriter
from repository.report import BackupReport

if TYPE_CHECKING:
    from agent.file_archives import FileArchiveOptions
    from agent.keys import BackupKeys
    from agent.vm_backup import ViewHooks
    from agent.vm_settings import VmSettings
    from core.progress import Progress
    from datastore.names import Group, Snapshot
    from repository.interface import BackupSession, Repository


@dataclass(frozen=True, slots=True)
class SnapshotOptions:
    """What a new snapshot is made with."""

    group: "Group"
    owner: str  #: of a new group
    keys: "BackupKeys"
    ctime: int | None = None  #: Unix seconds; None: now
    bwlimit: int | None = None  #: bytes a second
    notes: str | None = None
    lock_wait_s: float = 0.0


@asynccontextmanager
async def _begun(
    repository: "Repository", options: SnapshotOptions, progress: "Progress"
) -> AsyncIterator[tuple[ClientLog, "BackupSession"]]:
    """A session, and the log that goes along with its snapshot."""
    async with (
        client_log(repository, progress, options.keys.codec) as log,
        new_session(
            repository,
            options.group,
            owner=options.owner,
            progress=log.progress,
            ctime=options.ctime,
            lock_wait_s=options.lock_wait_s,
        ) as session,
    ):
        yield log, session


async def vm_into(
    repository: "Repository",
    settings: "VmSettings",
    options: SnapshotOptions,
    progress: "Progress",
    *,
    on_listed: "Callable[[Snapshot], None]",
    hooks: "ViewHooks | None" = None,
) -> BackupReport:
    """Back up a virtual machine; `on_listed` is `agent.sessions.until_listed`'s.

    Raises:
        FleeceError: as `agent.sessions.new_session` and `agent.vm_backup.back_up_vm`.
    """
    from agent.vm_backup import back_up_vm

    keys = options.keys
    async with _begun(repository, options, progress) as (log, session):
        report = await back_up_vm(
            settings,
            repository,
            session,
            keys.codec,
            log.progress,
            bwlimit=options.bwlimit,
            notes=options.notes,
            wrapped_key=keys.wrapped_key,
            on_listed=on_listed,
            hooks=hooks,
        )
        log.snapshot, log.report = session.snapshot, report.lines()
        return report


async def archives_into(
    repository: "Repository",
    specifications: Sequence[Specification],
    folders: "FileArchiveOptions",
    options: SnapshotOptions,
    progress: "Progress",
    *,
    on_listed: "Callable[[Snapshot], None]",
    image_format: str | None = None,
    force: bool = False,
) -> BackupReport:
    """Store folders, disk images and small files; `on_listed` is `agent.sessions.until_listed`'s.

    Raises:
        FleeceError: a source cannot be read, or as `agent.sessions.new_session`.
    """
    started = time.monotonic()
    keys = options.keys
    # A small file that is missing should not cost the time of a disk.
    blobs = await read_small_files(specifications)
    trees = [one for one in specifications if one.kind is SpecificationKind.ARCHIVE]
    async with _begun(repository, options, progress) as (log, session):
        writer = SnapshotWriter(session, keys.codec, log.progress, wrapped_key=keys.wrapped_key)
        async with open_images(specifications, progress, image_format=image_format, force=force) as sources:
            if sources:
                await writer.add_disks(sources, bwlimit=options.bwlimit)
        figures = []
        if trees:
            from agent.file_archives import add_file_archives

            figures = await add_file_archives(writer, repository, trees, folders, bwlimit=options.bwlimit)
        for name, data in blobs:
            await writer.add_blob(name, data)
        await writer.finish(notes=options.notes)
        on_listed(session.snapshot)
        duration = time.monotonic() - started
        report = BackupReport(session.snapshot, writer.reports, duration, file_archives=figures)
        log.snapshot, log.report = session.snapshot, list(report.lines())
        return report
