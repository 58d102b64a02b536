"""Looking whether a snapshot is there, for those who lost a connection or were refused."""

from core.errors import FormatError
from datastore.errors import SnapshotNotFoundError
from datastore.manifest import Manifest
from datastore.names import MANIFEST_NAME, Snapshot
from repository.interface import SnapshotInfo
from repository.remote.connection import RemoteServer, download
from repository.remote.errors import RemoteAnswerError, RemoteRefusedError
from repository.remote.listing import group_parameters, parse_snapshots, snapshot_parameters


async def listed(server: RemoteServer, snapshot: Snapshot) -> SnapshotInfo | None:
    """The snapshot as the server lists it, finished or not.

    Raises:
        RemoteError: the server cannot be asked.
    """
    where = str(snapshot)
    data = await server.call("GET", "/snapshots", group_parameters(snapshot.group), what="look for", where=where)
    infos = parse_snapshots(data, snapshot.group.ns, where)
    return next((info for info in infos if info.snapshot.ctime == snapshot.ctime), None)


async def is_listed(server: RemoteServer, snapshot: Snapshot) -> bool:
    """True if the server lists it, finished or not. Errors as `listed`."""
    return await listed(server, snapshot) is not None


async def opened_snapshot(server: RemoteServer, snapshot: Snapshot, limit: int) -> Manifest:
    """The manifest of a snapshot, read in a reader session, which no snapshot gives that is still being written.

    Raises:
        SnapshotNotFoundError: it is not there.
        RemoteRefusedError: it cannot be opened (now).
        RemoteUnavailableError: no connection.
        RemoteAnswerError: it is no manifest.
    """
    where = str(snapshot)
    try:
        async with server.upgraded("reader", snapshot_parameters(snapshot), what="open", where=where) as client:
            raw = await download(
                client, "download", {"file-name": MANIFEST_NAME}, what="read", where=where, limit=limit
            )
    except RemoteRefusedError:
        if await is_listed(server, snapshot):
            raise
        raise SnapshotNotFoundError("open", where, "there is no such snapshot") from None
    try:
        return Manifest.parse(raw, where=where)
    except FormatError as error:
        raise RemoteAnswerError("read", where, error.why) from error
