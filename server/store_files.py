"""Files of snapshots as answers: streamed, never whole in memory."""

import os
import stat
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

from core.buffers import Buffer
from core.errors import FleeceError, UsageError
from core.limits import in_io_thread
from datastore.index import ArchiveIndex
from datastore.names import ArchiveKind, Snapshot, archive_kind
from datastore.reader import open_snapshot_index
from datastore.store import Datastore
from server.answers import RAW, Answer
from server.errors import ApiError

_PIECE: Final = 1 << 20
_WORDS: Final = {ArchiveKind.FIXED: "fixed", ArchiveKind.DYNAMIC: "dynamic"}


async def file_answer(path: Path, missing: ApiError) -> Answer:
    """The file as an answer.

    Raises:
        ApiError: `missing`, if there is no such regular file.
    """

    def opened() -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise missing from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise missing
        return descriptor

    # Opened when the first piece is asked for, so that an answer that nobody reads holds no descriptor.
    os.close(await in_io_thread(opened))

    async def pieces() -> AsyncGenerator[Buffer, None]:
        descriptor = await in_io_thread(opened)
        try:
            offset = 0
            while piece := await in_io_thread(os.pread, descriptor, _PIECE, offset):
                offset += len(piece)
                yield piece
        finally:
            os.close(descriptor)

    return Answer(content_type=RAW, stream=pieces())


async def download(store: Datastore, snapshot: Snapshot, name: str) -> tuple[Answer, ArchiveIndex | None]:
    """A file of a snapshot as an answer of the upgraded protocols; of an index the opened index too.

    Raises:
        ApiError: no such file (404 for blobs, 400 for indexes), or a name without a known type.
    """
    path = store.base / snapshot.path / name
    try:
        kind = archive_kind(name)
    except UsageError:
        raise ApiError(f'unknown archive type: "{name}"') from None
    if kind is ArchiveKind.BLOB:
        return await file_answer(path, ApiError(f'open file "{path}" failed - not found', 404)), None
    why = "No such file or directory (os error 2)"
    answer = await file_answer(path, ApiError(f'Unable to open {_WORDS[kind]} index "{path}" - {why}'))
    return answer, await in_io_thread(open_snapshot_index, store, snapshot, name)


def unreadable(store: Datastore, snapshot: Snapshot, name: str, error: FleeceError) -> ApiError:
    """The refusal for an index that cannot be opened."""
    path = store.base / snapshot.path / name
    why = str(error)
    word = _WORDS.get(archive_kind(name), "dynamic")
    if isinstance(error, LookupError):
        why = f'Unable to open {word} index "{path}" - No such file or directory (os error 2)'
    return ApiError(f"unable to read {word} index '\"{path}\"' - {why}")
