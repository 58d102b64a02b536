"""Reading a snapshot of a remote repository: the reader protocol of PBS.

The connection holds the snapshot's shared lock. Lost, it is made again with the next question, and the indexes that
were opened are asked for once more, since a server gives only chunks of indexes that it gave over this connection.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from core.errors import FleeceError, NotFoundError, UsageError
from core.limits import in_cpu_thread
from core.nursery import open_nursery
from datastore.blob import MAX_ENCODED_BLOB, MAX_ENCODED_CHUNK, Blob
from datastore.digests import DigestSet
from datastore.errors import ChunkNotFoundError, SnapshotNotFoundError
from datastore.index import ArchiveIndex
from datastore.manifest import MAX_MANIFEST_SIZE, Manifest
from datastore.names import MANIFEST_NAME, ArchiveKind, Snapshot, archive_kind
from repository.remote.connection import RemoteServer, download
from repository.remote.errors import RemoteAnswerError, RemoteError, RemoteRefusedError, RemoteUnavailableError, precise
from repository.remote.http2 import Http2Client
from repository.remote.indexes import index_limit, parse_index
from repository.remote.listing import snapshot_parameters
from repository.remote.looking import listed
from repository.remote.rest import Parameters

#: Seconds that a lost server is waited for.
PATIENCE_S: Final = 120.0
#: Seconds of the first wait; each is twice as long as the one before, up to the second value.
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 15.0
#: Chunks on their way for one call of `read_chunks`.
_CHUNKS_AT_ONCE: Final = 16
#: Bytes, besides a 64th of its size, that a chunk may have more than its plain data: its header, and what a bad
#: compression adds where a writer keeps it.
_SLACK: Final = 4 << 10


class RemoteReader:
    """See `repository.interface.Reader`. Made by `open_reader`; any number of tasks."""

    def __init__(self, server: RemoteServer, snapshot: Snapshot, nursery: trio.Nursery) -> None:
        self.snapshot: Final = snapshot
        self._server, self._nursery = server, nursery
        self._where = str(snapshot)
        self._client: Http2Client | None = None
        self._scope = trio.CancelScope()
        self._connecting = trio.Lock()
        self._indexes: dict[str, tuple[int, bytes]] = {}  #: opened ones: limit, and SHA-256 of the file
        self._readable = DigestSet()  #: chunks that the server gives
        self._sizes: dict[str, int] | None = None  #: of the files that the manifest lists

    async def manifest(self) -> bytes:
        """See `Reader.manifest`."""
        return bytes(await self._file(MANIFEST_NAME, MAX_MANIFEST_SIZE + (64 << 10)))

    async def open_index(self, name: str, *, size: int | None = None) -> ArchiveIndex:
        """See `Reader.open_index`. Without `size` the manifest is asked for it, to bound what the server may send."""
        where = f"{self.snapshot}/{name}"
        if archive_kind(name) is ArchiveKind.BLOB:
            raise UsageError("read index", where, "a blob is no index")
        limit = index_limit(await self._listed_size(name) if size is None else size)
        raw = await self._file(name, limit)

        def parse() -> tuple[ArchiveIndex, bytes]:
            return parse_index(raw, name, where, size), hashlib.sha256(raw).digest()

        index, digest = await in_cpu_thread(parse)
        self._indexes[name] = (limit, digest)
        self._readable.add_index(index)
        return index

    async def _listed_size(self, name: str) -> int | None:
        if self._sizes is None:
            try:
                manifest = Manifest.parse(await self.manifest(), where=f"{self.snapshot}/{MANIFEST_NAME}")
                self._sizes = {file.filename: file.size for file in manifest.files}
            except RemoteError:
                raise
            except FleeceError:
                self._sizes = {}
        return self._sizes.get(name, 0)

    async def read_blob(self, name: str, *, limit: int = MAX_ENCODED_BLOB) -> bytes:
        """See `Reader.read_blob`."""
        if archive_kind(name) is not ArchiveKind.BLOB:
            raise UsageError("read blob", f"{self.snapshot}/{name}", "its name does not end in .blob")
        return bytes(await self._file(name, limit))

    async def read_chunk(self, digest: bytes) -> Blob:
        """See `Reader.read_chunk`: only chunks of indexes that were opened."""
        where = f"{self.snapshot}, chunk {digest.hex()}"
        size = self._readable.size_of(digest)
        if size is None:
            raise ChunkNotFoundError("read", where, "no index that was opened names it")

        def missing(error: RemoteRefusedError) -> FleeceError:
            # Not registered (401), which means another index than the one we saw, or not in the store.
            return ChunkNotFoundError("read", where, error.why)

        limit = min(MAX_ENCODED_CHUNK, size + (size >> 6) + _SLACK)
        raw = await self._ask("chunk", {"digest": digest.hex()}, "read chunk", where, limit, missing)
        return Blob.parse(raw, where=where)

    async def read_chunks(self, digests: Sequence[bytes]) -> list[Blob]:
        """See `Reader.read_chunks`: they are on their way at the same time."""
        if len(digests) == 1:
            return [await self.read_chunk(digests[0])]
        blobs: list[Blob | None] = [None] * len(digests)
        waiting = iter(range(len(digests)))

        async def read() -> None:
            for position in waiting:
                blobs[position] = await self.read_chunk(digests[position])

        async with open_nursery() as nursery:
            for _ in range(min(_CHUNKS_AT_ONCE, len(digests))):
                nursery.start_soon(read)
        return [blob for blob in blobs if blob is not None]

    def disk_order(self, digests: Sequence[bytes]) -> list[int]:
        """See `Reader.disk_order`: the server's disk is its own affair."""
        return list(range(len(digests)))

    async def connect(self) -> Http2Client:
        """The connection, made again if it was lost.

        Raises:
            SnapshotNotFoundError: the snapshot is not there, or unfinished.
            LockedError: it is being written or removed.
            RemoteError: the server says no, or cannot be reached.
        """
        async with self._connecting:
            if self._client is not None and self._client.broken is None:
                return self._client
            self._scope.cancel()
            client: Http2Client = await self._nursery.start(self._keep_connection)
            await self._register(client)
            self._client = client
            return client

    async def _keep_connection(self, *, task_status: "trio.TaskStatus[Http2Client]") -> None:
        with trio.CancelScope() as self._scope:
            parameters: Parameters = {**snapshot_parameters(self.snapshot), "debug": False}
            try:
                async with self._server.upgraded("reader", parameters, what="read", where=self._where) as client:
                    task_status.started(client)
                    await trio.sleep_forever()
            except RemoteRefusedError as error:
                raise await self._reason(error) from error

    async def _reason(self, error: RemoteRefusedError) -> FleeceError:
        """Why the server does not open the snapshot, as a local datastore would say it."""
        hint = f"'fleece list {self.snapshot.group}' shows what there is"
        try:
            info = await listed(self._server, self.snapshot)
        except RemoteError:
            return precise(error)
        except SnapshotNotFoundError:
            info = None  # not even the namespace
        if info is None:
            return SnapshotNotFoundError("read", self._where, "there is no such snapshot", hint)
        if not info.finished:
            why = f"it is unfinished (no {MANIFEST_NAME})"
            return SnapshotNotFoundError("read", self._where, why, hint)
        return precise(error)

    async def _register(self, client: Http2Client) -> None:
        """Open again what was open on the connection before.

        Raises:
            RemoteAnswerError: an index is another one now.
        """
        for name, (limit, digest) in self._indexes.items():
            where = f"{self.snapshot}/{name}"
            raw = await download(client, "download", {"file-name": name}, what="read", where=where, limit=limit)
            if await in_cpu_thread(lambda data: hashlib.sha256(data).digest(), raw) != digest:
                raise RemoteAnswerError("read index", where, "it is another one than before")

    async def _file(self, name: str, limit: int) -> bytearray:
        where = f"{self.snapshot}/{name}"

        def missing(error: RemoteRefusedError) -> FleeceError:
            if error.status in (401, 403):
                return error
            kind = SnapshotNotFoundError if name.endswith(ArchiveKind.BLOB.value) else NotFoundError
            return kind("read", where, error.why)

        return await self._ask("download", {"file-name": name}, "read", where, limit, missing)

    async def _ask(
        self,
        endpoint: str,
        parameters: Parameters,
        what: str,
        where: str,
        limit: int,
        missing: Callable[[RemoteRefusedError], FleeceError],
    ) -> bytearray:
        """Ask, connecting again as often as needed; `missing` makes the error for a file that the server refuses.

        A refusal of the connection itself says nothing of the file, and is raised as it is.
        """
        pause_s = _FIRST_PAUSE_S
        give_up_at: float | None = None
        while True:
            try:
                client = await self.connect()
                try:
                    return await download(client, endpoint, parameters, what=what, where=where, limit=limit)
                except RemoteRefusedError as error:
                    if (found := missing(error)) is error:
                        raise
                    raise found from error
            except RemoteUnavailableError:
                # Patience begins with the failure: what came before may have taken hours.
                give_up_at = trio.current_time() + PATIENCE_S if give_up_at is None else give_up_at
                if trio.current_time() + pause_s > give_up_at:
                    raise
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


@asynccontextmanager
async def open_reader(server: RemoteServer, snapshot: Snapshot) -> AsyncIterator[RemoteReader]:
    """Read `snapshot` while the block runs. Errors as `RemoteReader.connect`."""
    async with open_nursery() as nursery:
        reader = RemoteReader(server, snapshot, nursery)
        await reader.connect()
        yield reader
        nursery.cancel_scope.cancel()
