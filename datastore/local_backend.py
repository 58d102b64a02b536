"""A datastore in a folder: see `datastore.interface.Backend`."""

from pathlib import Path

from datastore.files import Owner, SyncLevel
from datastore.local_chunks import LocalChunkStore
from datastore.local_meta import LocalMetaStore


class LocalBackend:
    """Chunks and all other files in the folder `base`."""

    def __init__(self, base: Path, owner: Owner, sync_level: SyncLevel) -> None:
        self.chunks = LocalChunkStore(base, owner, sync_level)
        self.meta = LocalMetaStore(base, owner, sync_level)

    def check_writable(self) -> None:
        """See `Backend.check_writable`: the folder itself says so, when it is written."""

    def close(self) -> None:
        """See `Backend.close`."""
        self.chunks.close()
