"""What a repository or a backup session offers besides its interface, for syncs.

Everything here is asked for with `isinstance`; a repository without it works as well, as far as that goes.
"""

from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

from core.buffers import Buffer
from datastore.blob import Blob
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest, ManifestFile
from datastore.names import Snapshot
from repository.interface import BackupSession


@runtime_checkable
class ActsAs(Protocol):
    """A repository where somebody else than this program decides who writes: a server."""

    @property
    def auth_id(self) -> str:
        """The auth id that new groups belong to there."""
        ...


@runtime_checkable
class HasVersion(Protocol):
    """A repository on a server of some version."""

    async def version(self) -> tuple[int, ...]:
        """The version, `(4, 1, 1)`."""
        ...


@runtime_checkable
class LogSession(Protocol):
    """A session that takes the log of the client that made the snapshot along."""

    async def put_log(self, blob: Blob | Buffer) -> None:
        """Store the encoded blob as `client.log.blob`, which no manifest lists."""
        ...


@runtime_checkable
class TestedBase(Protocol):
    """A session that can tell whether what its base refers to is really there."""

    async def missing_chunks(self, index: ArchiveIndex) -> list[bytes]:
        """The chunks of an index of the base that are not in the store; the others are touched."""
        ...


class ResyncSession(BackupSession, Protocol):
    """A snapshot that is there being written once more: only `finish` changes what is there."""

    async def keep(self, file: ManifestFile) -> bool:
        """True if the file that is there is exactly this one; it stays then."""
        ...

    async def mend_chunk(self, writer: int, digest: bytes, size: int, blob: Blob) -> bool:
        """As `put_chunk`, but one that is there and is damaged is set aside and replaced; True if it was stored."""
        ...


@runtime_checkable
class ResyncTarget(Protocol):
    """A repository in which a finished snapshot can be brought up to date."""

    async def replace_manifest(self, snapshot: Snapshot, manifest: Manifest) -> None:
        """Write another manifest of the same files.

        Raises:
            SnapshotNotFoundError, LockedError.
            FleeceError: it lists other files than the one that is there, or cannot be written.
        """
        ...

    def resync(self, snapshot: Snapshot) -> AbstractAsyncContextManager[ResyncSession]:
        """Write `snapshot`, which is there, once more while the block runs; without `finish` it stays as it is.

        Raises:
            SnapshotNotFoundError: it is not there.
            LockedError: it is being read, or a backup of the group is running.
        """
        ...
