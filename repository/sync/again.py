"""A snapshot that is on both sides: what came late to the source is brought along, damage at the target mended.

The verify state of the target stays its own as long as its data do: what was found here is true of what lies here.
"""

from core.errors import FleeceError, FormatError
from core.limits import in_cpu_thread
from datastore.manifest import Manifest
from datastore.names import CLIENT_LOG_NAME, MANIFEST_NAME, Snapshot
from repository.interface import Reader, Repository, SnapshotInfo
from repository.sync.interface import ResyncSession, ResyncTarget
from repository.sync.plan import same_files
from repository.sync.report import Outcome, SnapshotReport, snapshot_text
from repository.sync.transfer import Source, SyncContext, client_log, send_file

_VERIFY_STATE = "verify_state"


async def look_again(
    source: Source, target: Repository, there: SnapshotInfo, context: SyncContext, *, corrupt: bool
) -> SnapshotReport | None:
    """Bring `there`, a snapshot of the target, up to what the source has; None if nothing had to be done.

    `corrupt`: its data are damaged, and everything is fetched again that the target does not have from elsewhere.

    Raises:
        LockedError: it is being read, while its data would have to be replaced.
        FleeceError: it cannot be read or written; it is as it was then.
    """
    snapshot = there.snapshot
    report: SnapshotReport | None = None
    ours = None if corrupt else await _manifest_there(target, snapshot)
    if corrupt or ours is None or not same_files(ours, source.manifest):
        if not isinstance(target, ResyncTarget):
            raise FleeceError("bring up to date", snapshot_text(snapshot), "what is on a server cannot be changed")
        async with target.resync(snapshot) as session:
            report = await _send_again(source, session, context, keep=not corrupt)
            await session.finish()
        report.outcome = Outcome.RESYNCED
    elif isinstance(target, ResyncTarget) and (wanted := _merged(source.manifest, ours)) is not None:
        await target.replace_manifest(snapshot, wanted)
        report = SnapshotReport(snapshot, Outcome.UPDATED)
    if all(file.filename != CLIENT_LOG_NAME for file in there.files):
        async with context.batches:  # no manifest says how long it is: only so many of these at a time
            log = await client_log(source.reader, context.progress)
            if log is not None:
                await target.upload_log(snapshot, log)
                report = report or SnapshotReport(snapshot, Outcome.LOG)
                report.sent += len(log)
    return report


async def _manifest_there(target: Repository, snapshot: Snapshot) -> Manifest | None:
    """The target's own manifest; None if it is none."""

    async def read(reader: Reader) -> Manifest | None:
        raw = await reader.manifest()
        try:
            return await in_cpu_thread(lambda: Manifest.parse(raw, where=f"{snapshot}/{MANIFEST_NAME}"))
        except FormatError:
            return None

    async with target.reader(snapshot) as reader:
        return await read(reader)


def _merged(theirs: Manifest, ours: Manifest) -> Manifest | None:
    """Their manifest with our verify state; None if that is what we have."""
    wanted = theirs.with_unprotected({_VERIFY_STATE: ours.verify_state or theirs.verify_state})
    same = (wanted.canonical(), wanted.signature, wanted.unprotected) == (
        ours.canonical(), ours.signature, ours.unprotected,
    )  # fmt: skip
    return None if same else wanted


async def _send_again(source: Source, session: ResyncSession, context: SyncContext, *, keep: bool) -> SnapshotReport:
    report = SnapshotReport(session.snapshot)
    total = sum(file.size for file in source.manifest.files)
    with context.progress.task(snapshot_text(session.snapshot), total) as task:
        for file in source.manifest.files:
            if keep and await session.keep(file):
                task.advance(file.size)
            else:
                await send_file(source.reader, session, file, context, report, task)
    await session.put_blob(MANIFEST_NAME, source.raw)
    return report
