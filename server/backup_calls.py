"""The calls of the backup protocol and what they check (spec 8.2 to 8.9)."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from core.errors import FleeceError, UsageError
from core.limits import in_cpu_thread, in_io_thread
from datastore.blob import MAX_ENCODED_CHUNK, Blob
from datastore.fixed_index import FixedIndex
from datastore.manifest import Manifest
from datastore.names import MANIFEST_NAME, ArchiveKind, archive_kind
from datastore.reader import open_snapshot_index
from datastore.session import LocalBackupSession
from repository.interface import FIXED_CHUNK_SIZE
from repository.local import LocalRepository
from server.chunk_check import chunk_checker
from server.errors import ApiError
from server.routing import Call, Endpoint, Routes
from server.schema import ARCHIVE, CSUM, DIGEST, Array, Integer, Parameter, optional
from server.store_files import download
from server.tasks import Task

MAX_WRITERS: Final = 256
#: Bytes of entries of all fixed indexes of a session: images of 64 TiB.
MAX_FIXED_ENTRIES: Final = 512 << 20

_WID: Final = Parameter(Integer(1, MAX_WRITERS))
_NAME: Final = Parameter(ARCHIVE)
_CHUNK: Final = {
    "wid": _WID,
    "digest": Parameter(DIGEST),
    "size": Parameter(Integer(1, 16 << 20)),
    "encoded-size": Parameter(Integer(13, MAX_ENCODED_CHUNK)),
}
_LISTS: Final = {
    "wid": _WID,
    "digest-list": Parameter(Array(DIGEST)),
    "offset-list": Parameter(Array(Integer(0))),
}


def _close(least: int) -> dict[str, Parameter]:
    count = Parameter(Integer(least))
    return {"wid": _WID, "chunk-count": count, "size": count, "csum": Parameter(CSUM)}


@dataclass(slots=True)
class _Writer:
    """An index as the client sees it."""

    kind: ArchiveKind
    name: str
    number: int  #: of the session's writer
    size: int = 0  #: of a fixed one as announced, of a dynamic one so far
    count: int = 0  #: elements appended, repeated ones too
    base_size: int | None = None  #: bytes of the image whose index it began with
    last_put: bool = False  #: the last position of a fixed one was written
    closed: bool = False  #: of no use any more, but still open

    @property
    def word(self) -> str:
        return "fixed" if self.kind is ArchiveKind.FIXED else "dynamic"

    @property
    def incremental(self) -> bool:
        """It began with the entries of the previous snapshot."""
        return self.base_size is not None

    @property
    def expected(self) -> int:
        """Chunks of the whole index."""
        return -(-self.size // FIXED_CHUNK_SIZE) if self.kind is ArchiveKind.FIXED else self.count


class BackupCalls:
    """See `server.h2_session.Session`."""

    def __init__(
        self,
        repository: LocalRepository,
        session: LocalBackupSession,
        finish: Callable[[], Awaitable[None]],
        task: Task,
        *,
        debug: bool = False,
    ) -> None:
        """`finish` finishes the session and lets go of its locks."""
        self._store = repository.store
        self._session = session
        self._finish = finish
        self._task = task
        self._debug = debug
        self._writers: dict[int, _Writer] = {}
        self._next = 1
        self._opening: Final = trio.Lock()
        self._changing = 0  #: calls at work that write into the snapshot
        self._learned: set[str] = set()  #: indexes whose chunks are known
        self._entries = 0
        self._files = 0
        self._manifest: bytes | None = None
        self._finishing = False
        self.finished = False
        self._chunks = self._plain = self._stored = self._duplicates = 0

    def log(self, text: str) -> None:
        """See `Session.log`."""
        if self._debug:
            self._task.log(text)

    def routes(self) -> Routes:
        """See `Session.routes`."""
        fixed, dynamic = ArchiveKind.FIXED, ArchiveKind.DYNAMIC
        opening = {"archive-name": _NAME, "size": Parameter(Integer(1)), "reuse-csum": optional(CSUM)}
        blob = {"file-name": _NAME, "encoded-size": Parameter(Integer(12, MAX_ENCODED_CHUNK))}
        return Routes(
            [
                Endpoint("GET", "/previous_backup_time", self._previous_time),
                Endpoint("GET", "/previous", self._previous, {"archive-name": _NAME}, raw=True),
                Endpoint("POST", "/fixed_index", self._open_fixed, opening),
                Endpoint("PUT", "/fixed_index", lambda call: self._append(call, fixed), _LISTS),
                Endpoint("POST", "/fixed_chunk", lambda call: self._chunk(call, fixed), _CHUNK, raw=True),
                Endpoint("POST", "/fixed_close", lambda call: self._close(call, fixed), _close(0)),
                Endpoint("POST", "/dynamic_index", self._open_dynamic, {"archive-name": _NAME}),
                Endpoint("PUT", "/dynamic_index", lambda call: self._append(call, dynamic), _LISTS),
                Endpoint("POST", "/dynamic_chunk", lambda call: self._chunk(call, dynamic), _CHUNK, raw=True),
                Endpoint("POST", "/dynamic_close", lambda call: self._close(call, dynamic), _close(1)),
                Endpoint("POST", "/blob", self._blob, blob, raw=True),
                Endpoint("POST", "/finish", self._finish_call),
                Endpoint("POST", "/speedtest", self._speedtest, raw=True),
            ]
        )

    # The previous snapshot.

    async def _previous_time(self, call: Call) -> object:
        return None if self._session.base is None else self._session.base.ctime

    async def _previous(self, call: Call) -> object:
        if self._session.base is None:
            raise ApiError("no valid previous backup")
        self._check_open()
        name = call["archive-name"]
        answer, index = await download(self._store, self._session.base, name)
        if index is not None and name not in self._learned:
            self._learned.add(name)
            self._session.learn(index)
            self._task.log(f"register chunks in '{name}' from previous backup '{self._session.base}'.")
        return answer

    # Indexes.

    async def _open_fixed(self, call: Call) -> object:
        async with self._opening:  # clients pipeline; of two that open the same name at a time one is refused
            return await self._opened_fixed(call)

    async def _opened_fixed(self, call: Call) -> int:
        name, size, reuse = call["archive-name"], call["size"], call["reuse-csum"]
        self._check_name(name, ArchiveKind.FIXED)
        entries = 32 * -(-size // FIXED_CHUNK_SIZE)
        if self._entries + entries > MAX_FIXED_ENTRIES:
            raise ApiError(f"the images of one backup may have {MAX_FIXED_ENTRIES // 32 * 4 >> 20} TiB")
        base_size = None if reuse is None else await self._check_reuse(name, size, bytes.fromhex(reuse))
        csum = None if reuse is None else bytes.fromhex(reuse)
        number = await self._session.open_index(name, size=size, reuse_csum=csum, learn=False)
        self._entries += entries
        self._task.log(f'created new fixed index {self._next} ("{self._session.snapshot}/{name}")')
        return self._register(_Writer(ArchiveKind.FIXED, name, number, size, base_size=base_size))

    async def _check_reuse(self, name: str, size: int, csum: bytes) -> int:
        """Bytes of the image whose index can be reused."""
        base = self._session.base
        if base is None:
            raise ApiError("cannot reuse index - no valid previous backup exists")
        try:
            index = await in_io_thread(open_snapshot_index, self._store, base, name)
        except FleeceError:
            raise ApiError("cannot reuse index - no previous backup exists for archive") from None
        if index.csum != csum:
            why = f"expected csum ({csum.hex()}) doesn't match last backup's ({index.csum.hex()})"
            raise ApiError(f"{why}, cannot do incremental backup")
        if not isinstance(index, FixedIndex) or index.count != -(-size // FIXED_CHUNK_SIZE):
            raise ApiError("clone_data_from failed - index sizes not equal")
        return index.size

    async def _open_dynamic(self, call: Call) -> object:
        name = call["archive-name"]
        async with self._opening:
            self._check_name(name, ArchiveKind.DYNAMIC)
            number = await self._session.open_index(name)
            self._task.log(f'created new dynamic index {self._next} ("{self._session.snapshot}/{name}")')
            return self._register(_Writer(ArchiveKind.DYNAMIC, name, number))

    def _check_name(self, name: str, kind: ArchiveKind) -> None:
        try:
            right = archive_kind(name) is kind
        except UsageError:
            right = False
        if not right:
            raise ApiError(f"wrong archive extension: '{name}'")
        self._check_open()
        if self._next > MAX_WRITERS:
            raise ApiError(f"more than {MAX_WRITERS} index writers in one backup")

    def _register(self, writer: _Writer) -> int:
        wid = self._next
        self._next += 1
        self._writers[wid] = writer
        return wid

    def _writer(self, wid: int, kind: ArchiveKind) -> _Writer:
        writer = self._writers.get(wid)
        if writer is None or writer.kind is not kind:
            word = "fixed" if kind is ArchiveKind.FIXED else "dynamic"
            raise ApiError(f"{word} writer '{wid}' not registered")
        return writer

    def _check_open(self) -> None:
        if self.finished:
            raise ApiError("backup already marked as finished.")
        if self._finishing:
            raise ApiError("backup is already in the process of finishing.")

    @contextmanager
    def _change(self) -> Iterator[None]:
        """`finish` is refused while the block runs."""
        self._check_open()
        self._changing += 1
        try:
            yield
        finally:
            self._changing -= 1

    async def _chunk(self, call: Call, kind: ArchiveKind) -> object:
        self._check_open()
        writer = self._writer(call["wid"], kind)
        digest, size = bytes.fromhex(call["digest"]), call["size"]
        _check_length(call)
        blob = _parse(call.body)
        if kind is ArchiveKind.FIXED and size > FIXED_CHUNK_SIZE:
            raise ApiError(f"fixed writer '{writer.name}' - got large chunk ({size} > {FIXED_CHUNK_SIZE}")
        blob = await chunk_checker().check(blob, digest, size)
        with self._change():
            duplicate, stored = await self._session.put_chunk(writer.number, digest, size, blob)
        self._chunks += 1
        self._plain += size
        self._stored += stored
        self._duplicates += duplicate
        return call["digest"]

    async def _append(self, call: Call, kind: ArchiveKind) -> object:
        self._check_open()
        digests, offsets = call["digest-list"], call["offset-list"]
        if len(digests) != len(offsets):
            raise ApiError(f"offset list has wrong length ({len(offsets)} != {len(digests)})")
        if not digests:
            return None  # whatever the writer, as in PBS
        writer = self._writer(call["wid"], kind)
        refused: ApiError | None = None
        entries: list[tuple[int, bytes]] = []
        end = writer.size
        for text, offset in zip(digests, offsets, strict=True):
            digest = bytes.fromhex(text)
            size = self._session.known_size(digest)
            what = f"{writer.word} writer '{writer.name}' append chunk failed"
            if size is None:
                refused = ApiError(f"no such chunk {text}")
            elif writer.closed:
                refused = ApiError(f"{what} - already closed")
            elif kind is ArchiveKind.DYNAMIC:
                if offset != end:
                    refused = ApiError(f"{what} - got strange chunk offset ({end} != {offset})")
            elif reason := _misplaced(offset, size, writer.size):
                refused = ApiError(f"{what} - {reason}")
            if refused is not None or size is None:
                break
            entries.append((offset, digest))
            end += size
        # What came before the fault stays, as in PBS.
        await self._session.append(writer.number, entries)
        writer.count += len(entries)
        if writer.incremental and any(offset + FIXED_CHUNK_SIZE >= writer.size for offset, _ in entries):
            writer.last_put = True
        if kind is ArchiveKind.DYNAMIC:
            writer.size = end
        if refused is not None:
            raise refused
        return None

    async def _close(self, call: Call, kind: ArchiveKind) -> object:
        self._check_open()
        writer = self._writer(call["wid"], kind)
        count, size, csum = call["chunk-count"], call["size"], bytes.fromhex(call["csum"])
        what = f"{writer.word} writer '{writer.name}' close failed"
        if writer.closed:
            raise ApiError(f"{what} - already closed")
        if kind is ArchiveKind.FIXED and writer.count != count:
            raise ApiError(f"{what} - received wrong number of chunk ({writer.count} != {count})")
        if not writer.incremental:
            if writer.expected != count:
                raise ApiError(f"{what} - unexpected chunk count ({writer.expected} != {count})")
            if writer.size != size:
                raise ApiError(f"{what} - unexpected file size ({writer.size} != {size})")
        elif writer.base_size != writer.size and not writer.last_put:
            # It would be listed, but never restored.
            raise ApiError(f"{what} - the last chunk is still that of an image of {writer.base_size} bytes")
        writer.closed = True
        try:
            await self._session.close_index(writer.number, writer.expected, writer.size, csum)
        except (UsageError, FleeceError) as error:
            wrong = isinstance(error, UsageError) or "never set" in error.why
            raise ApiError(f"{what} - got unexpected checksum" if wrong else f"{what} - {error}") from error
        del self._writers[call["wid"]]
        self._files += 1
        self._task.log(f"{writer.word} index '{writer.name}': {writer.count} chunks, {writer.size} bytes")
        return None

    # Blobs, and the end.

    async def _blob(self, call: Call) -> object:
        self._check_open()
        name = call["file-name"]
        _check_length(call)
        if not name.endswith(".blob") or len(name) == len(".blob"):
            raise ApiError(f"wrong blob file extension: '{name}'")
        blob = _parse(call.body)
        try:
            blob.check(where=name)
        except FleeceError:
            raise ApiError("Data blob has wrong CRC checksum.") from None
        if name == MANIFEST_NAME:
            # Kept until `finish` adds what only the server knows; the manifest appears last, on every backend.
            if self._manifest is None:
                self._files += 1
            self._manifest = bytes(blob)
        else:
            with self._change():
                await self._session.put_blob(name, blob, for_client=True)
            self._files += 1
        self._plain += len(blob)  # as PBS counts: of blobs, what is encoded
        self._task.log(f'add blob "{self._session.snapshot}/{name}" ({len(blob)} bytes, comp: {len(blob)})')
        return None

    async def _finish_call(self, call: Call) -> object:
        async with self._opening:
            self._check_open()
        if self._changing:
            raise ApiError("other requests are still being answered - unable to finish backup")
        if self._writers:
            raise ApiError("found open index writer - unable to finish backup")
        if not self._files:
            raise ApiError("backup does not contain valid files (file count == 0)")
        self._finishing = True
        where = self._store.base / self._session.snapshot.path / MANIFEST_NAME
        if self._manifest is None:
            why = f"unable to load blob '\"{where}\"' - No such file or directory (os error 2)"
            raise ApiError(f"unable to update manifest blob - {why}")
        stats = {
            "count": self._chunks,
            "size": self._plain,
            "compressed_size": self._stored,
            "duplicates": self._duplicates,
        }
        given = self._manifest

        def completed() -> bytes:
            manifest = Manifest.parse(given, where=str(self._session.snapshot))
            return bytes(manifest.with_unprotected({"chunk_upload_stats": stats}).encode())

        try:
            blob = await in_cpu_thread(completed)
        except FleeceError as error:
            raise ApiError(f"unable to update manifest blob - {error}") from error
        await self._session.put_blob(MANIFEST_NAME, blob)
        await self._finish()
        for warning in self._session.warnings:
            self._task.warn(warning)
        self.finished = True
        return None

    async def _speedtest(self, call: Call) -> object:
        return None


def _misplaced(offset: int, size: int, total: int) -> str:
    """Why a chunk cannot lie at `offset` of a fixed image; empty if it can."""
    end = offset + size
    if end > total:
        return f"chunk data exceeds size ({end} >= {total})"
    if size != FIXED_CHUNK_SIZE and end != total:
        return f"invalid chunk size {size} at {offset}"
    if offset % FIXED_CHUNK_SIZE:
        return f"got unaligned chunk (pos = {offset})"
    return ""


def _check_length(call: Call) -> None:
    if len(call.body) != call["encoded-size"]:
        raise ApiError(f"got blob with unexpected length ({len(call.body)} != {call['encoded-size']})")


def _parse(body: bytes) -> Blob:
    try:
        return Blob.parse(body, where="upload")
    except FleeceError as error:
        reason = "wrong magic" if len(body) >= 12 and "magic" in error.why else error.why
        raise ApiError(f"unable to parse raw blob - {reason}") from None
