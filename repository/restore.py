"""Restore: archives of a snapshot to disks, streams and files; every chunk is checked on the way."""

import hashlib
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Final

from core.buffers import Buffer
from core.disks import DiskTarget
from core.errors import FleeceError, FormatError, NotFoundError, TargetError
from core.limits import in_cpu_thread
from core.progress import Progress
from datastore.blob import BlobKind
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.manifest import Manifest
from datastore.names import CLIENT_LOG_NAME, MANIFEST_NAME, ArchiveKind, archive_kind
from repository.fetch import fetch
from repository.interface import FIXED_CHUNK_SIZE, Reader
from repository.locate import Archive, load_manifest, open_archive

__all__ = [
    "Sink",
    "load_manifest",
    "restore_blob",
    "restore_disk",
    "restore_log",
    "restore_manifest",
    "restore_stream",
]

#: Takes the next bytes of a stream.
Sink = Callable[[Buffer], Awaitable[None]]
#: Bytes zeroed by one call at most.
MAX_ZERO: Final = 1 << 30
_ZEROS: Final = bytes(FIXED_CHUNK_SIZE)
#: How a blob begins.
_MAGICS: Final = tuple(kind.value for kind in BlobKind)


async def restore_disk(
    reader: Reader,
    codec: ChunkCodec,
    manifest: Manifest,
    name: str,
    target: DiskTarget,
    progress: Progress | None = None,
    *,
    chunks: Collection[int] | None = None,
) -> None:
    """Write the disk image `name` (full file name), or those of its `chunks`, to `target` and make it durable.

    Chunks of zeros are left out where the target reads as zeros anyway; elsewhere they are written as zeros.

    Raises:
        TargetError: the target is smaller than the image, or cannot be written.
        CorruptChunkError, ChunkNotFoundError: a chunk is bad or missing; the message names archive, offset and digest.
        FormatError, KeyNeededError: as `open_archive`.

    Cancelled or failed, the target holds a part of the image.
    """
    archive = await open_archive(reader, codec, manifest, name)
    index = archive.index
    if index.kind is not ArchiveKind.FIXED:
        raise FormatError("restore", archive.where, "it is no disk image")
    if target.size < index.size:
        why = f"the target has {target.size} bytes, the image {index.size}"
        raise TargetError("restore", archive.where, why, "choose a target that is at least as large")
    size = index.size if chunks is None else sum(index.span(number)[1] for number in chunks)
    with (Progress() if progress is None else progress).task(name, size) as task:
        numbers = []
        for first, last, zero in _runs(archive, chunks):
            if not zero:
                numbers.append(range(first, last))
                continue
            offset, end = index.span(first)[0], sum(index.span(last - 1))
            if not target.reads_zero:
                for start in range(offset, end, MAX_ZERO):
                    await target.zero(start, min(MAX_ZERO, end - start))
            task.advance(end - offset)

        async def consume(number: int, data: Buffer | FleeceError) -> None:
            if isinstance(data, FleeceError):
                raise data
            await target.write(index.span(number)[0], data)
            task.advance(len(data))

        await fetch(reader, codec, archive, (number for run in numbers for number in run), consume)
        await target.flush()


async def restore_stream(
    reader: Reader,
    codec: ChunkCodec,
    manifest: Manifest,
    name: str,
    sink: Sink,
    progress: Progress | None = None,
) -> None:
    """Pass the whole archive `name` (full file name, an image or a stream) to `sink`, from the first byte to the last.

    Chunks are read ahead, `sink` is called for one at a time.

    Raises:
        CorruptChunkError, ChunkNotFoundError, FormatError, KeyNeededError: as `restore_disk`; everything before the
            bad chunk has been passed on.
    """
    archive = await open_archive(reader, codec, manifest, name)
    with (Progress() if progress is None else progress).task(name, archive.index.size) as task:
        passed_on = 0

        async def pass_zeros(until: int) -> None:
            nonlocal passed_on
            while passed_on < until:
                await sink(_ZEROS)
                task.advance(len(_ZEROS))
                passed_on += 1

        async def consume(number: int, data: Buffer | FleeceError) -> None:
            nonlocal passed_on
            if isinstance(data, FleeceError):
                raise data
            await pass_zeros(number)  # the chunks left out before this one
            await sink(data)
            task.advance(len(data))
            passed_on = number + 1

        numbers = (number for first, last, zero in _runs(archive) if not zero for number in range(first, last))
        await fetch(reader, codec, archive, numbers, consume, ordered=True)
        await pass_zeros(archive.index.count)


async def restore_blob(reader: Reader, codec: ChunkCodec, manifest: Manifest, name: str) -> bytes:
    """The content of the small file `name` (full file name).

    Raises:
        NotFoundError: the manifest does not list it, or the file is gone.
        FormatError: it is not what the manifest says, or broken.
        KeyNeededError: it is encrypted and the key is not there.
    """
    entry = manifest.file(name)
    where = f"{reader.snapshot}/{name}"
    if archive_kind(name) is not ArchiveKind.BLOB:
        raise FormatError("restore", where, "it is no small file")
    raw = await reader.read_blob(name, limit=entry.size)
    if len(raw) != entry.size:
        raise FormatError("read blob", where, f"wrong size ({len(raw)} != {entry.size})")

    def decode() -> bytes:
        csum = hashlib.sha256(raw).digest()
        if csum != entry.csum:
            raise FormatError("read blob", where, f"wrong checksum ({csum.hex()} != {entry.csum.hex()})")
        # The master key's blob is listed with the backup's crypt mode although it is plain: the manifest's csum vouches
        # for the bytes, so what they are is told by themselves.
        return codec.decode_blob(raw, crypt_mode=None, where=where)

    return await in_cpu_thread(decode)


async def restore_log(reader: Reader, codec: ChunkCodec) -> bytes:
    """The content of the log that came with a snapshot, which no manifest lists.

    PBS pushes a log as a blob in a blob (docs/sync.md); what it says is the same.

    Raises:
        NotFoundError: there is none.
        FormatError: it is broken.
        KeyNeededError: it is encrypted and the key is not there.
    """
    where = f"{reader.snapshot}/{CLIENT_LOG_NAME}"
    try:
        raw = await reader.read_blob(CLIENT_LOG_NAME)
    except NotFoundError as error:
        hint = "'fleece upload-log' stores one"
        raise NotFoundError("restore", where, "no log came with the backup", hint) from error

    def decode() -> bytes:
        data = codec.decode_blob(raw, crypt_mode=None, where=where)
        return codec.decode_blob(data, crypt_mode=None, where=where) if data.startswith(_MAGICS) else data

    return await in_cpu_thread(decode)


async def restore_manifest(reader: Reader) -> bytes:
    """The content of the manifest: JSON text as it was stored.

    Raises:
        FormatError: it is broken.
    """
    raw = await reader.manifest()
    where = f"{reader.snapshot}/{MANIFEST_NAME}"
    return await in_cpu_thread(lambda: ChunkCodec().decode_blob(raw, crypt_mode=CryptMode.NONE, where=where))


def _runs(archive: Archive, chunks: Collection[int] | None = None) -> Iterator[tuple[int, int, bool]]:
    """Neighbouring chunks `first` .. `last - 1` (of `chunks`) that are all full chunks of zeros, or all not."""
    index = archive.index
    numbers = range(index.count) if chunks is None else sorted(chunks)
    first, last, state = 0, 0, False
    for number in numbers:
        zero = index.digest(number) == archive.zero and index.span(number)[1] == FIXED_CHUNK_SIZE
        if zero is not state or number != last:
            if last > first:
                yield first, last, state
            first, state = number, zero
        last = number + 1
    if last > first:
        yield first, last, state
