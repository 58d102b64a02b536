"""Chunks that were stored while an old delete might still hit them are looked for when that is over (R31)."""

import logging
from typing import TYPE_CHECKING

from core.limits import in_io_thread
from datastore.blob import Blob
from datastore.s3.chunk_locks import hold

if TYPE_CHECKING:
    from datastore.s3.chunks import S3ChunkStore

_LOG = logging.getLogger(__name__)


async def settle_unknown(chunks: "S3ChunkStore") -> None:
    """Look for chunks whose hour is over, and store those again that are gone.

    Raises:
        S3Error: the bucket cannot be asked.
        StoreError: the list cannot be read or written.
    """
    due = await in_io_thread(chunks.unknown.due)
    for digest in due:
        async with hold(chunks.locks, digest):
            if await chunks.client.head(chunks.keys.chunk(digest)) is not None:
                continue
            local = await in_io_thread(chunks.read_cached, digest)
            if isinstance(local, Blob):
                await chunks.client.put(chunks.keys.chunk(digest), (local.header, local.payload))
                _LOG.warning("chunk %s was lost to a late delete, and is stored again", digest.hex())
            else:
                _LOG.error("chunk %s was lost to a late delete; the next backup stores it again", digest.hex())
                await chunks.forget(digest)
    if due:
        await in_io_thread(chunks.unknown.settle, due)
