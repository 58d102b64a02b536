"""A backup into a remote repository: the backup protocol of PBS.

Life of a session: the connection is the session. Lost, cancelled or left without `finish`, the server throws the
snapshot away. The one doubtful moment is `finish` itself: a lost answer is looked up, never asked for again.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import trio

from core.buffers import Buffer
from core.errors import FleeceError, UsageError
from core.limits import in_cpu_thread
from datastore.blob import Blob
from datastore.digests import DigestSet
from datastore.errors import SnapshotNotFoundError, StoreError
from datastore.index import ArchiveIndex
from datastore.interface import PutResult
from datastore.manifest import MAX_MANIFEST_SIZE, Manifest
from datastore.names import CLIENT_LOG_NAME, MANIFEST_NAME, ArchiveKind, Snapshot, archive_kind
from datastore.written import WrittenFiles, named_blob
from repository.interface import FIXED_CHUNK_SIZE
from repository.remote.connection import RemoteServer, ask, download
from repository.remote.errors import (
    FinishUnknownError,
    RemoteAnswerError,
    RemoteError,
    RemoteRefusedError,
    RemoteUnavailableError,
)
from repository.remote.http2 import Http2Client
from repository.remote.index_writer import IndexWriter
from repository.remote.indexes import index_limit, parse_index
from repository.remote.listing import MAX_CTIME, snapshot_parameters
from repository.remote.looking import is_listed, opened_snapshot

#: Entries sent by one call; the reference clients send 64 to 128.
ENTRIES_AT_ONCE: Final = 512
#: Bytes of a manifest blob as stored.
_MAX_MANIFEST_BLOB: Final = MAX_MANIFEST_SIZE + (64 << 10)
#: Indexes that one session may write.
_MAX_WRITERS: Final = 256
#: Key of the manifest's unprotected part.
_STATISTICS: Final = "chunk_upload_stats"
#: Seconds for `finish`: a server makes gigabytes durable meanwhile.
FINISH_TIMEOUT_S: Final = 3600.0
#: Seconds to find out what became of a lost `finish`: a server may take minutes to notice that a client is gone.
LOOK_UP_S: Final = 300.0
#: Seconds to wait for a server to remove what was given up.
_GONE_S: Final = 10.0
_LOST_HINT: Final = "the server throws the snapshot away; back it up again"


class RemoteBackupSession:
    """See `repository.interface.BackupSession`. Made by `open_backup`; several tasks may use it."""

    def __init__(self, client: Http2Client, server: RemoteServer, snapshot: Snapshot) -> None:
        self.snapshot: Final = snapshot
        self.base: Snapshot | None = None
        self.warnings: list[str] = []
        self.puts_at_once: Final = server.uploads
        self._client, self._server = client, server
        self._where = str(snapshot)
        self._known = DigestSet()
        self._writers: dict[int, IndexWriter] = {}
        self._names: set[str] = set()  #: of everything that was begun
        self._opened = 0  #: indexes
        self._files = WrittenFiles()
        self._previous: bytes | None = None
        self._listed: Manifest | None = None  #: what `_previous` says
        self._manifest: Blob | None = None
        self.finished = False
        self._aborted = False

    async def begin(self) -> None:
        """Ask which snapshot is the base, and for its manifest.

        Raises:
            RemoteError: the server cannot be asked.
        """
        ctime = await self._ask("GET", "previous_backup_time", what="begin")
        if ctime is None:
            return
        if not isinstance(ctime, int) or isinstance(ctime, bool) or not 1 <= ctime <= MAX_CTIME:
            raise RemoteAnswerError("begin", self._where, "the time of the previous snapshot is no time")
        self.base = self.snapshot.group.at(ctime)
        raw = await self._download_previous(MANIFEST_NAME, _MAX_MANIFEST_BLOB)
        if raw is None:
            return
        with suppress(FleeceError):  # what cannot be understood is no base
            self._listed = Manifest.parse(raw, where=f"{self.base}/{MANIFEST_NAME}")
            self._previous = bytes(raw)

    async def previous_manifest(self) -> bytes | None:
        """See `BackupSession.previous_manifest`; also None if it cannot be read."""
        return self._previous

    async def previous_index(self, name: str) -> ArchiveIndex | None:
        """See `BackupSession.previous_index`."""
        if self.base is None or self._listed is None:
            return None
        listed = next((file for file in self._listed.files if file.filename == name), None)
        if listed is None or archive_kind(name) is ArchiveKind.BLOB:
            return None
        raw = await self._download_previous(name, index_limit(listed.size))
        if raw is None:
            return None

        def checked(data: bytearray, where: str) -> ArchiveIndex | None:
            try:
                index = parse_index(data, name, where, listed.size)
            except FleeceError:
                return None
            return index if index.csum == listed.csum else None

        index = await in_cpu_thread(checked, raw, f"{self.base}/{name}")
        if index is not None:
            self._known.add_index(index)
        return index

    async def _download_previous(self, name: str, limit: int) -> bytearray | None:
        """A file of the base; None if the server does not give it, which must not fail a backup."""
        try:
            return await download(
                self._client,
                "previous",
                {"archive-name": name},
                what="read the previous",
                where=f"{self.base}/{name}",
                limit=limit,
            )
        except RemoteUnavailableError as error:
            raise RemoteUnavailableError(error.what, error.where, error.why, _LOST_HINT) from error
        except (RemoteRefusedError, RemoteAnswerError):
            if self._client.broken is not None:
                raise
            return None

    def knows(self, digest: bytes) -> bool:
        """See `BackupSession.knows`."""
        return digest in self._known

    async def open_index(
        self, name: str, *, size: int | None = None, chunk_size: int = FIXED_CHUNK_SIZE, reuse_csum: bytes | None = None
    ) -> int:
        """See `BackupSession.open_index`."""
        self._check_new(name)
        kind = archive_kind(name)
        where = f"{self.snapshot}/{name}"
        if kind is ArchiveKind.BLOB or (kind is ArchiveKind.FIXED) != (size is not None):
            raise UsageError(
                "write index", where, "a fixed index needs a size, a dynamic one has none, a blob is no index"
            )
        if size is not None and (chunk_size != FIXED_CHUNK_SIZE or not 1 <= size < 1 << 63):
            raise UsageError("write index", where, f"{size} bytes in chunks of {chunk_size}; servers use 4 MiB")
        if self._opened >= _MAX_WRITERS:
            raise UsageError("write index", where, f"a snapshot on a server has at most {_MAX_WRITERS} indexes")
        previous = None
        if reuse_csum is not None:
            previous = await self.previous_index(name)
            if previous is None or previous.csum != reuse_csum:
                raise StoreError("reuse index", where, "the base snapshot holds no such index", "back it up in full")
            if previous.size != size:
                raise StoreError("reuse index", where, "the base's has another size", "back it up in full")
        writer = IndexWriter(name, where, size, previous)
        self._names.add(name)
        self._opened += 1
        csum = None if reuse_csum is None else reuse_csum.hex()
        parameters: dict[str, Any] = {"archive-name": name, "size": size, "reuse-csum": csum}
        number = await self._ask("POST", f"{writer.prefix}_index", parameters, what="open index", where=where)
        if not isinstance(number, int) or isinstance(number, bool) or number in self._writers:
            raise RemoteAnswerError("open index", where, "the server gives no number for it")
        self._writers[number] = writer
        return number

    async def put_chunk(self, writer: int, digest: bytes, size: int, blob: Blob) -> PutResult:
        """See `BackupSession.put_chunk`. Whether the server had the chunk is not known."""
        index = self._writer(writer)
        index.check_chunk(size, blob)
        parameters = {"wid": writer, "digest": digest.hex(), "size": size, "encoded-size": len(blob)}
        body = (blob.header, blob.payload)
        await self._ask("POST", f"{index.prefix}_chunk", parameters, what="store chunk", body=body)
        self._known.add(digest, size)
        return PutResult(False, len(blob))

    async def append(self, writer: int, entries: Sequence[tuple[int, bytes]]) -> None:
        """See `BackupSession.append`. Entries gather until there are enough for a call."""
        index = self._writer(writer)
        for offset, digest in entries:
            size = self._known.size_of(digest)
            if size is None:
                why = f"chunk {digest.hex()} at {offset} was neither put nor is it known from the base"
                raise UsageError("write index", f"{self.snapshot}/{index.name}", why)
            index.add(offset, size, digest)
        if len(index.pending) >= ENTRIES_AT_ONCE:
            await self._send_entries(writer, index)

    async def _send_entries(self, number: int, index: IndexWriter) -> None:
        """Send everything that is pending; one call at a time, since a dynamic index takes entries in order only."""
        async with index.appending:
            while index.pending:
                batch, index.pending = index.pending[:ENTRIES_AT_ONCE], index.pending[ENTRIES_AT_ONCE:]
                document = {
                    "wid": number,
                    "digest-list": [digest.hex() for _, digest in batch],
                    "offset-list": [offset for offset, _ in batch],
                }
                where = f"{self.snapshot}/{index.name}"
                await self._ask("PUT", f"{index.prefix}_index", document=document, what="write index", where=where)

    async def close_index(self, writer: int, count: int, size: int, csum: bytes) -> None:
        """See `BackupSession.close_index`."""
        index = self._writer(writer)
        await in_cpu_thread(index.check_whole, count, size, csum)
        await self._send_entries(writer, index)
        # Of a reused index the server wants the number of entries that were rewritten.
        parameters = {"wid": writer, "chunk-count": index.appended, "size": size, "csum": csum.hex()}
        where = f"{self.snapshot}/{index.name}"
        await self._ask("POST", f"{index.prefix}_close", parameters, what="close index", where=where)
        del self._writers[writer]
        self._files.add_index(index.name, size, csum)

    async def put_blob(self, name: str, blob: Blob | Buffer) -> None:
        """See `BackupSession.put_blob`. The manifest is sent by `finish`."""
        parsed = named_blob(name, blob, f"{self.snapshot}/{name}")
        if name == MANIFEST_NAME:
            self._manifest = parsed
            return
        self._check_new(name)
        self._names.add(name)
        await self._send_blob(name, parsed)
        self._files.add_blob(name, parsed)

    async def put_log(self, blob: Blob | Buffer) -> None:
        """See `repository.sync.interface.LogSession.put_log`."""
        if self.finished or self._aborted:
            raise UsageError("write to", self._where, "the session is over")
        parsed = named_blob(CLIENT_LOG_NAME, blob, f"{self.snapshot}/{CLIENT_LOG_NAME}")
        await self._send_blob(CLIENT_LOG_NAME, parsed)

    async def _send_blob(self, name: str, blob: Blob) -> None:
        parameters: dict[str, Any] = {"file-name": name, "encoded-size": len(blob)}
        body, where = (blob.header, blob.payload), f"{self.snapshot}/{name}"
        await self._ask("POST", "blob", parameters, what="store blob", where=where, body=body)

    async def finish(self) -> None:
        """See `BackupSession.finish`.

        Raises:
            FinishUnknownError: the connection was lost, and for minutes it could not be found out what came of it.
        """
        manifest = self._finishable()
        # The server writes its own statistics when it finishes: their presence tells that it did.
        blob = await in_cpu_thread(lambda: manifest.with_unprotected({_STATISTICS: None}).encode())
        await self._send_blob(MANIFEST_NAME, blob)
        with trio.CancelScope(shield=True):
            # From here on the outcome is decided by the server, not by an impatient caller.
            try:
                with trio.fail_after(FINISH_TIMEOUT_S):
                    await self._ask("POST", "finish", what="finish")
            except (RemoteUnavailableError, RemoteAnswerError, trio.TooSlowError) as error:
                # A server that still holds the session would give nobody the snapshot to look at.
                await self._client.aclose()
                why = f"no answer within {FINISH_TIMEOUT_S:.0f} s" if isinstance(error, trio.TooSlowError) else ""
                await self._look_up(manifest, error, why or f"the connection was lost ({error})")
            self.finished = True

    def _finishable(self) -> Manifest:
        """The manifest, compared with what was stored."""
        if self.finished or self._aborted:
            raise UsageError("finish", self._where, "the session is over")
        if self._writers:
            names = ", ".join(index.name for index in self._writers.values())
            raise UsageError("finish", self._where, f"still being written: {names}")
        if self._manifest is None or not self._files:
            raise UsageError("finish", self._where, "no manifest, or no file, was stored")
        return self._files.check_manifest(self._manifest, self.snapshot)

    async def _look_up(self, manifest: Manifest, cause: BaseException, lost: str) -> None:
        """Find out whether the snapshot is finished although the answer was lost.

        A listing would not tell: between manifest and `finish` the snapshot looks complete. But as long as the session
        holds it nobody can open it for reading, and afterwards it is either there or gone.

        Raises:
            RemoteError: it is not.
            FinishUnknownError: no answer.
        """
        give_up_at = trio.current_time() + LOOK_UP_S
        pause_s = 0.2
        last: FleeceError | None = None
        while True:
            try:
                found = await opened_snapshot(self._server, self.snapshot, _MAX_MANIFEST_BLOB)
                if found.canonical() == manifest.canonical() and found.chunk_upload_stats is not None:
                    return
                why = f"{lost}, and what is there now is not what was to be finished"
                raise RemoteError("finish", self._where, why, f"'fleece forget {self._where}', and back it up again")
            except SnapshotNotFoundError:
                why = f"{lost}, and it was not finished"
                raise RemoteUnavailableError("finish", self._where, why, "back it up again") from cause
            except (RemoteUnavailableError, RemoteRefusedError, RemoteAnswerError) as error:
                last = error  # away, or the session is not dead yet
            if trio.current_time() + pause_s > give_up_at:
                why = f"{lost}, and whether it was finished could not be found out ({last})"
                hint = f"'fleece list {self.snapshot.group}' shows whether it is there"
                raise FinishUnknownError("finish", self._where, why, hint) from cause
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, 15.0)

    async def abort(self) -> None:
        """See `BackupSession.abort`: closing the connection makes the server throw everything away."""
        if not self.finished:
            self._aborted = True
            await self._client.aclose()

    async def _ask(
        self,
        method: str,
        endpoint: str,
        parameters: dict[str, Any] | None = None,
        *,
        what: str,
        where: str = "",
        body: Sequence[Buffer] | None = None,
        document: dict[str, Any] | None = None,
    ) -> Any:
        where = where or self._where
        try:
            return await ask(
                self._client, method, endpoint, parameters, what=what, where=where, body=body, document=document
            )
        except RemoteUnavailableError as error:
            raise RemoteUnavailableError(what, where, error.why, _LOST_HINT) from error

    def _writer(self, number: int) -> IndexWriter:
        if self.finished or self._aborted:
            raise UsageError("write to", self._where, "the session is over")
        try:
            return self._writers[number]
        except KeyError:
            raise UsageError("write to", self._where, f"there is no open index {number}") from None

    def _check_new(self, name: str) -> None:
        if self.finished or self._aborted:
            raise UsageError("write to", self._where, "the session is over")
        if name in (MANIFEST_NAME, CLIENT_LOG_NAME) or name in self._names:
            raise UsageError("write", f"{self.snapshot}/{name}", "there is one already, or the name is reserved")


@asynccontextmanager
async def open_backup(server: RemoteServer, snapshot: Snapshot) -> AsyncIterator[RemoteBackupSession]:
    """Write `snapshot` while the block runs; without `finish` the server throws it away at the end.

    Raises:
        RemoteRefusedError: the server says no.
        RemoteUnavailableError, RemoteCertificateError: no connection.
    """
    begun = finished = False
    # As the reference client, which always says these two.
    parameters = {**snapshot_parameters(snapshot), "debug": False, "benchmark": False}
    try:
        async with server.upgraded("backup", parameters, what="back up to", where=str(snapshot)) as client:
            begun = True
            session = RemoteBackupSession(client, server, snapshot)
            await session.begin()
            try:
                yield session
            finally:
                finished = session.finished
    finally:
        if begun and not finished:
            await _wait_until_gone(server, snapshot)


async def _wait_until_gone(server: RemoteServer, snapshot: Snapshot) -> None:
    """Give the server a moment to remove what was given up, so that another backup can start at once."""
    with trio.move_on_after(_GONE_S, shield=True), suppress(RemoteError):
        pause_s = 0.02
        while await is_listed(server, snapshot):
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)
