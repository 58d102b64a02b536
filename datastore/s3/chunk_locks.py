"""Chunk locks for tasks: held across requests, which serialise upload, renaming, adoption and removal of one chunk.

The locks are those of `datastore.locks.ChunkLocks` (R37): a table in this process and a byte of one file between
processes. They cost no descriptor and no file for each chunk, and vanish with the process.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from datastore.locks import ChunkLocks, chunk_busy

#: Seconds to wait for a chunk that somebody uploads, as PBS: an upload may wait for its endpoint for long.
CHUNK_WAIT_S: Final = 3 * 3600.0
#: Seconds between two looks at a chunk that is held, at first and at most.
_FIRST_PAUSE_S: Final = 0.002
_LONGEST_PAUSE_S: Final = 0.1


@asynccontextmanager
async def hold(locks: ChunkLocks, digest: bytes, *, wait_s: float = CHUNK_WAIT_S) -> AsyncIterator[None]:
    """Hold the chunk `digest` while the block runs.

    Raises:
        LockedError: somebody else holds it for longer than `wait_s`.
        StoreError: the file of the locks cannot be used.
    """
    give_up = trio.current_time() + wait_s
    pause_s = _FIRST_PAUSE_S
    while not locks.try_acquire(digest):
        if trio.current_time() >= give_up:
            raise chunk_busy(digest)
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    try:
        yield
    finally:
        locks.release(digest)
