"""Backup: disks, streams and small files into a session, and at the end the manifest.

How chunks flow is in `repository.pipeline`, how disks become chunks in `repository.disk_backup`, what is read and why
in `repository.planning`.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from core.disks import DiskSource
from core.errors import FleeceError, UsageError
from core.limits import in_cpu_thread
from core.progress import Progress
from datastore.blob import MAX_BLOB_SIZE, MAX_ENCODED_CHUNK
from datastore.codec import ChunkCodec
from datastore.manifest import Manifest, ManifestFile
from datastore.master_key import wrapped_key_blob
from datastore.names import (
    MANIFEST_NAME,
    MASTER_KEY_NAME,
    ArchiveKind,
    archive_kind,
    complete_archive_name,
    strip_archive_type,
)
from repository.buffers import shared_pool
from repository.disk_backup import DiskBackup, DiskStorer
from repository.interface import BackupSession
from repository.pipeline import Pipeline, UploadStats
from repository.planning import Base, ChunkMap, DiskPlan, check_size, choose_base, plan_disk
from repository.report import ArchiveReport
from repository.stream_backup import StreamBackup, StreamSpec, store_streams
from repository.throttle import Throttle


class SnapshotWriter:
    """Fills one backup session: disks, streams, small files, and at the end the manifest.

    Used by one task at a time. After an error the session can only be aborted. `wrapped_key`, the backup key under a
    master key, is stored beside the manifest.
    """

    def __init__(
        self,
        session: BackupSession,
        codec: ChunkCodec,
        progress: Progress | None = None,
        *,
        wrapped_key: bytes | None = None,
    ) -> None:
        self.session: Final = session
        self._wrapped_key: Final = wrapped_key
        self.codec: Final = codec
        self.progress: Final = Progress() if progress is None else progress
        self.reports: list[ArchiveReport] = []
        self._manifest = Manifest.new(session.snapshot)
        self._previous: bytes | None = None
        self._asked_previous = False
        self._stats = UploadStats()

    async def add_disk(self, source: DiskSource, *, bwlimit: int | Throttle | None = None) -> ArchiveReport:
        """Store one disk; as `add_disks`."""
        (report,) = await self.add_disks([source], bwlimit=bwlimit)
        return report

    async def add_disks(
        self, sources: Sequence[DiskSource], *, bwlimit: int | Throttle | None = None
    ) -> list[ArchiveReport]:
        """Store disks side by side; they are listed in the manifest in the given order.

        Args:
            sources: the disks, names without type extension and all different.
            bwlimit: bytes a second read from all of them together, or a throttle shared with others.

        Raises:
            SourceError: a disk of zero bytes, or one that cannot be read; the other disks are given up too.
            FleeceError: what the session raises.

        Cancelled, chunks that were stored stay in the store without use; nothing is left in the sources.
        """
        throttle = Throttle(bwlimit) if isinstance(bwlimit, int) else bwlimit
        for source in sources:
            check_size(source)
        disks = []
        for source in sources:
            base = await self._base(source)
            plan, chunks = await plan_disk(source, base)
            disks.append(await self._open(source, plan, chunks, base))
        pipeline = Pipeline(self.session, self.codec, self._stats)
        with shared_pool().lease() as lease:
            async with pipeline.opened():
                await DiskStorer(pipeline, self.progress, lease, throttle).run(disks)
        for disk in disks:
            self._manifest.add(ManifestFile(disk.filename, self.codec.mode, disk.chunks.size, disk.csum))
        reports = [disk.report for disk in disks]
        self.reports += reports
        return reports

    async def add_streams(
        self,
        name: str,
        specs: Sequence[StreamSpec],
        write: Callable[[Sequence[StreamBackup]], None],
        *,
        bwlimit: int | Throttle | None = None,
    ) -> list[ArchiveReport]:
        """Store streams that one thread writes; they are listed in the manifest in the given order.

        Args:
            name: of the whole, for the progress.
            specs: the streams, file names all different. Chunks of their namesakes in the base are known chunks.
            write: called in a worker thread with the streams; it fills them, in any order, and may `finish` each.
            bwlimit: bytes a second, or a throttle shared with others.

        Raises:
            FleeceError: what `write` or the session raises.

        Cancelled, `write` is waited for until it uses a stream again; chunks that were stored stay without use.
        """
        throttle = Throttle(bwlimit) if isinstance(bwlimit, int) else bwlimit
        pipeline = Pipeline(self.session, self.codec, self._stats)
        streams = []
        for spec in specs:
            await self.session.previous_index(spec.filename)
            writer = await self.session.open_index(spec.filename)
            report = ArchiveReport(strip_archive_type(spec.filename), 0, spec.mode, spec.reason)
            streams.append(StreamBackup(spec, writer, pipeline, report, throttle))
        async with pipeline.opened():
            await store_streams(pipeline, streams, self.progress, name, lambda: write(streams))
        for stream in streams:
            self._manifest.add(ManifestFile(stream.filename, self.codec.mode, stream.size, stream.csum))
        reports = [stream.report for stream in streams]
        self.reports += reports
        return reports

    async def previous_manifest(self) -> bytes | None:
        """The base's manifest blob as stored, None without a base; asked for once."""
        if not self._asked_previous:
            self._previous, self._asked_previous = await self.session.previous_manifest(), True
        return self._previous

    async def add_blob(self, name: str, data: bytes) -> ArchiveReport:
        """Store the small file `name` (with or without `.blob`).

        Raises:
            UsageError: the name is not that of a blob.
            FleeceError: more than 128 MiB, or more than 16 MiB encoded (the backup protocol takes no more).
        """
        filename = complete_archive_name(name)
        if archive_kind(filename) is not ArchiveKind.BLOB or filename in (MANIFEST_NAME, MASTER_KEY_NAME):
            raise UsageError(
                "store the file as", repr(name), "the name of a small file ends in .conf, .json, .log or .blob"
            )
        if len(data) > MAX_BLOB_SIZE:
            raise FleeceError("store", name, f"it has {len(data)} bytes, at most {MAX_BLOB_SIZE} are possible")
        raw, csum = await in_cpu_thread(self._encoded_blob, data)
        if len(raw) > MAX_ENCODED_CHUNK:
            raise FleeceError(
                "store", name, f"it has {len(raw)} bytes compressed, at most {MAX_ENCODED_CHUNK} are possible",
                "back it up as a disk image (NAME.img)",
            )  # fmt: skip
        await self.session.put_blob(filename, raw)
        self._manifest.add(ManifestFile(filename, self.codec.mode, len(raw), csum))
        self._stats.size += len(raw)
        report = ArchiveReport(
            strip_archive_type(filename), len(data), reason="small file", read=len(data), new=len(data), stored=len(raw)
        )
        self.reports.append(report)
        return report

    async def finish(self, *, notes: str | None = None) -> Manifest:
        """Put the manifest and finish the session: once this returns the snapshot is listed and durable.

        Raises:
            UsageError: nothing was added.
            FleeceError: what the session raises; the snapshot is not listed then.
        """
        if not self._manifest.files:
            raise UsageError("finish", str(self.session.snapshot), "nothing was added to it")
        if self._wrapped_key is not None:
            await self._put_wrapped_key(self._wrapped_key)
        # The manifest is written once, so the statistics go into it before the session makes it durable; a server
        # counts by itself and overwrites them.
        unprotected: dict[str, Any] = {"chunk_upload_stats": self._stats.to_json()}
        if notes is not None:
            unprotected["notes"] = notes
        manifest = self._manifest.with_unprotected(unprotected)
        blob = await in_cpu_thread(manifest.encode, self.codec)
        await self.session.put_blob(MANIFEST_NAME, blob)
        await self.session.finish()
        return manifest

    async def _put_wrapped_key(self, wrapped_key: bytes) -> None:
        raw = wrapped_key_blob(wrapped_key)
        await self.session.put_blob(MASTER_KEY_NAME, raw)
        # Listed with the backup's mode, as PBS does, although the blob is plain.
        csum = hashlib.sha256(raw).digest()
        self._manifest.add(ManifestFile(MASTER_KEY_NAME, self.codec.mode, len(raw), csum))
        self._stats.size += len(raw)

    def _encoded_blob(self, data: bytes) -> tuple[bytes, bytes]:
        raw = bytes(self.codec.encode_blob(data))
        return raw, hashlib.sha256(raw).digest()

    async def _base(self, source: DiskSource) -> Base:
        manifest = await self.previous_manifest()
        return await choose_base(source, self.codec, self.session.base, manifest, self.session.previous_index)

    async def _open(self, source: DiskSource, plan: DiskPlan, chunks: ChunkMap, base: Base) -> DiskBackup:
        filename = complete_archive_name(source.name)
        csum = base.index.csum if base.index is not None else None
        writer = await self.session.open_index(filename, size=source.size, reuse_csum=csum)
        report = ArchiveReport(source.name, source.size, plan.mode, plan.reason, dirty=plan.dirty, chunks=chunks.count)
        return DiskBackup(source, filename, writer, chunks, base.index, report)
