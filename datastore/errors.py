"""Errors of the datastore.

FleeceError
├── FormatError
│   └── CorruptChunkError   a chunk's bytes do not match its CRC or digest
├── NotFoundError
│   ├── SnapshotNotFoundError
│   └── ChunkNotFoundError
├── BusyError
│   └── LockedError         a lock of the datastore is held by somebody else
├── KeyNeededError          encrypted or signed with a key that was not given, or another one
│   └── PassphraseError     a key's passphrase is missing or wrong
├── OwnerError              the group belongs to somebody else
├── ProtectedError          the snapshot must not be removed
└── StoreError              the store's files cannot be read or written (full, read-only, foreign layout, ...)
"""

from core.errors import BusyError, FleeceError, FormatError, NotFoundError


class CorruptChunkError(FormatError):
    """A chunk's bytes do not match its CRC, its digest or its length."""


class SnapshotNotFoundError(NotFoundError):
    """There is no such snapshot, or it is unfinished."""


class ChunkNotFoundError(NotFoundError):
    """A chunk that an index names is not in the chunk store."""


class LockedError(BusyError):
    """A lock of the datastore is held by somebody else."""


class KeyNeededError(FleeceError):
    """The data is encrypted or signed with a key that was not given, or with another one."""


class PassphraseError(KeyNeededError):
    """The passphrase of a key is missing or wrong."""


class OwnerError(FleeceError):
    """The group belongs to somebody else."""


class ProtectedError(FleeceError):
    """The snapshot is protected and must not be removed."""


class StoreError(FleeceError):
    """The store's files cannot be read or written."""
