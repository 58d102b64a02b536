"""The previous snapshot's file archive as the reference of change detection: which one may be used, and how it is read.

The metadata stream is read by the thread that walks the folders; the payload stream is known by its index only.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import FleeceError
from datastore.codec import ChunkCodec
from datastore.errors import KeyNeededError
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest
from datastore.names import Snapshot
from repository.fetch import read_batch
from repository.interface import Reader, Repository
from repository.locate import Archive, open_archive

#: Decoded chunks kept: the one being read, the one before, and those read ahead.
_KEPT: Final = 4
#: Chunks read ahead while one is used.
_AHEAD: Final = 2


@dataclass(frozen=True, slots=True)
class StreamReference:
    """What a split archive of the previous snapshot gives."""

    archive: "StoredBytes"  #: the metadata stream
    payload: ArchiveIndex  #: of the payload stream; its chunks are known to the session


class StoredBytes:
    """A stored stream that a worker thread reads, started by `trio.to_thread`; a `pxar.sinks.ReferenceBytes`."""

    def __init__(self, reader: Reader, codec: ChunkCodec, archive: Archive) -> None:
        self.size: Final = archive.index.size
        self._reader, self._codec, self._archive = reader, codec, archive
        self._chunks: OrderedDict[int, Buffer] = OrderedDict()
        self._start = self._end = 0  # of the chunk used last
        self._view = memoryview(b"")

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes from `offset` on: `length` of them, or fewer at the end of the stream; a view where that saves a copy.

        Raises:
            FleeceError: a chunk of this range cannot be read.
        """
        if self._start <= offset and offset + length <= self._end:
            return self._view[offset - self._start : offset - self._start + length]
        pieces: list[Buffer] = []
        end = min(offset + length, self.size)
        while offset < end:
            self._use(self._archive.index.find(offset))
            piece = self._view[offset - self._start : end - self._start]
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _use(self, number: int) -> None:
        chunk = self._chunks.get(number)
        if chunk is None:
            last = min(number + _AHEAD, self._archive.index.count)
            wanted = [near for near in range(number, last) if near not in self._chunks]
            results = trio.from_thread.run(read_batch, self._reader, self._codec, self._archive, wanted)
            for near, result in results:
                if not isinstance(result, FleeceError):
                    self._chunks[near] = result
                elif near == number:
                    raise result
            chunk = self._chunks[number]
        self._chunks.move_to_end(number)
        while len(self._chunks) > _KEPT:
            self._chunks.popitem(last=False)
        self._start, size = self._archive.index.span(number)
        self._end = self._start + size
        self._view = memoryview(chunk).cast("B")


@asynccontextmanager
async def open_reference(
    repository: Repository,
    base: Snapshot | None,
    manifest: bytes | None,
    previous_index: Callable[[str], Awaitable[ArchiveIndex | None]],
    codec: ChunkCodec,
    name: str,
) -> AsyncIterator[StreamReference | str]:
    """The archive `name` (`root`) of the snapshot `base`, open while the block runs; or why it cannot be the reference.

    Whatever is wrong with it is a reason to read everything, not an error.

    Args:
        repository: where `base` is.
        base: the newest finished snapshot of the group that is not known bad.
        manifest: its manifest blob as stored.
        previous_index: gives one of its indexes and makes the chunks known to the session, or None.
        codec: mode and key of the new backup; they must be those of the old one.
        name: without extension.
    """
    reason = _unusable(base, manifest, codec, name)
    if base is None or manifest is None or reason:
        yield reason
        return
    metadata, payload = f"{name}.mpxar.didx", f"{name}.ppxar.didx"
    index = await previous_index(payload)
    if index is None:
        yield f"index {payload} of the previous snapshot is missing or damaged"
        return
    opening = repository.reader(base)
    try:
        reader = await opening.__aenter__()
    except FleeceError as error:
        yield f"the previous snapshot cannot be read ({error.why})"
        return
    try:
        parsed = Manifest.parse(manifest, where=str(base), key=codec.key)
        try:
            archive = await open_archive(reader, codec, parsed, metadata)
        except FleeceError as error:
            yield f"{metadata} of the previous snapshot cannot be read ({error.why})"
            return
        yield StreamReference(StoredBytes(reader, codec, archive), index)
    finally:
        with trio.CancelScope(shield=True):
            await opening.__aexit__(None, None, None)


def _unusable(base: Snapshot | None, manifest: bytes | None, codec: ChunkCodec, name: str) -> str:
    """Why the archive `name` of `base` is no reference; empty if it is one as far as its manifest tells."""
    if base is None or manifest is None:
        return "no previous snapshot that is good"
    try:
        parsed = Manifest.parse(manifest, where=str(base), key=codec.key)
    except KeyNeededError:
        return "key changed"
    except FleeceError as error:
        return f"manifest of {base} is unreadable ({error.why})"
    listed = {file.filename: file for file in parsed.files}
    files = [listed.get(f"{name}.mpxar.didx"), listed.get(f"{name}.ppxar.didx")]
    if parsed.fingerprint != (codec.key.fingerprint if codec.key is not None else None):
        return "key changed"
    if codec.key is not None and parsed.signature is None:
        return "the signature of the previous snapshot was removed"
    for file in files:
        if file is None:
            old = f"{name}.pxar.didx" in listed
            return "the previous snapshot has it in mode legacy" if old else "it is not in the previous snapshot"
        if file.crypt_mode is not codec.mode:
            return f"crypt mode changed from {file.crypt_mode.value} to {codec.mode.value}"
    return ""
