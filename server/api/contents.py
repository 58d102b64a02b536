"""Files of snapshots over plain REST (spec 6.6)."""

from collections.abc import AsyncGenerator
from typing import Final

from core.buffers import Buffer
from core.errors import FleeceError, UsageError
from core.limits import in_cpu_thread, in_io_thread
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.errors import SnapshotNotFoundError
from datastore.index import ArchiveIndex
from datastore.names import ArchiveKind, Snapshot, archive_kind
from datastore.reader import LocalReader, open_reader, open_snapshot_index
from repository.local import LocalRepository
from server.access.roles import Privilege
from server.answers import RAW, Answer, raw
from server.api.snapshots import manifest_entry, opened
from server.errors import ApiError
from server.routing import Call, Endpoint
from server.schema import ARCHIVE, SNAPSHOT, Parameter
from server.state import snapshot
from server.store_files import file_answer, unreadable

_P = Privilege


async def download(call: Call) -> object:
    """`GET /admin/datastore/{store}/download`: the file as stored."""
    wanted = snapshot(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_READ, own=_P.DATASTORE_BACKUP, checked=wanted.group)
    name = _checked_name(call["file-name"])
    path = repository.store.base / wanted.path / name
    return await file_answer(path, ApiError("File open failed: No such file or directory (os error 2)"))


def _checked_name(name: str) -> str:
    try:
        archive_kind(name)
    except UsageError:
        raise ApiError(f"unknown archive type: {name!r}") from None
    return name


async def download_decoded(call: Call) -> object:
    """`GET /admin/datastore/{store}/download-decoded`: the content of an index or a blob."""
    wanted = snapshot(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_READ, own=_P.DATASTORE_BACKUP, checked=wanted.group)
    name = _checked_name(call["file-name"])
    entry = await manifest_entry(repository, wanted)
    if any(file.filename == name and file.crypt_mode is CryptMode.ENCRYPT for file in entry.files):
        raise ApiError(f"cannot decode '{name}' - is encrypted")
    codec = ChunkCodec()
    where = f"{wanted}/{name}"
    if archive_kind(name) is ArchiveKind.BLOB:
        try:
            stored = await in_io_thread(repository.store.read_file, wanted, name)
        except SnapshotNotFoundError:
            raise ApiError(f"unable to read '{name}' - No such file or directory (os error 2)") from None
        return raw(await in_cpu_thread(lambda: codec.decode_blob(stored, crypt_mode=None, where=where)))
    try:
        index = await in_io_thread(open_snapshot_index, repository.store, wanted, name)
    except FleeceError as error:
        raise unreadable(repository.store, wanted, name, error) from error
    return Answer(content_type=RAW, stream=_decoded(repository, wanted, index, codec, where))


async def _decoded(
    repository: LocalRepository, wanted: Snapshot, index: ArchiveIndex, codec: ChunkCodec, where: str
) -> AsyncGenerator[Buffer, None]:
    async with open_reader(repository.store, wanted) as reader:
        for number in range(index.count):
            yield await _chunk(reader, index, number, codec, where)


async def _chunk(reader: LocalReader, index: ArchiveIndex, number: int, codec: ChunkCodec, where: str) -> Buffer:
    digest = index.digest(number)
    blob = await reader.read_chunk(digest)
    size = index.span(number)[1]
    return await in_cpu_thread(
        lambda: codec.decode(blob, digest=digest, size=size, crypt_mode=CryptMode.NONE, where=where)
    )


async def upload_log(call: Call) -> None:
    """`POST /admin/datastore/{store}/upload-backup-log`."""
    wanted = snapshot(call.values)
    # Only the owner: no right on the datastore is enough to put a log into somebody's backup.
    call.state.full_or_own(call.caller, call["store"], wanted.group.ns, own=_P.DATASTORE_BACKUP)
    repository = await call.state.stores.get(call["store"])
    await call.state.check_owner(call.caller, repository, wanted.group)
    try:
        await repository.upload_log(wanted, call.body)
    except SnapshotNotFoundError:
        raise ApiError(f"snapshot {wanted} - ENOENT: No such file or directory") from None
    except UsageError as error:
        raise ApiError("backup already contains a log." if "already" in error.why else str(error)) from None
    except FleeceError as error:
        if "CRC" in error.why:
            raise ApiError("Data blob has wrong CRC checksum.") from None
        if "magic" in error.why:
            raise ApiError("unable to parse raw blob - wrong magic") from None
        raise


_BASE: Final = "/admin/datastore/{store}"
_FILE: Final = {**SNAPSHOT, "file-name": Parameter(ARCHIVE)}
ENDPOINTS: Final = (
    Endpoint("GET", f"{_BASE}/download", download, _FILE, raw=True),
    Endpoint("GET", f"{_BASE}/download-decoded", download_decoded, _FILE, raw=True),
    Endpoint("POST", f"{_BASE}/upload-backup-log", upload_log, SNAPSHOT, raw=True),
)
