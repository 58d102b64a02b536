"""The previous snapshot's file archive as the reference of change detection: which one may be used, and how it is read.

The metadata stream is read by the thread that walks the folders; the payload stream is known by its index only.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from core.errors import FleeceError
from datastore.codec import ChunkCodec
from datastore.errors import KeyNeededError
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest
from datastore.names import Snapshot
from repository.archive import open_archive_reader, open_cache
from repository.interface import Repository
from repository.locate import check_index
from repository.stored_bytes import StoredBytes

#: Bytes of decoded metadata chunks kept: the one being read, and some read ahead.
_CACHE_SIZE: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class StreamReference:
    """What a split archive of the previous snapshot gives."""

    archive: StoredBytes  #: the metadata stream
    payload: ArchiveIndex  #: of the payload stream; its chunks are known to the session


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
        previous_index: gives one of its indexes and makes the chunks known to the session, or None. It need not compare
            it with the manifest.
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
    async with AsyncExitStack() as stack:
        parsed = Manifest.parse(manifest, where=str(base), key=codec.key)
        try:
            await check_index(index, parsed.file(payload))
        except FleeceError:
            yield f"index {payload} of the previous snapshot is missing or damaged"
            return
        try:
            reader = await stack.enter_async_context(repository.reader(base))
            cache = await stack.enter_async_context(open_cache(_CACHE_SIZE))
            archive = StoredBytes(await open_archive_reader(reader, codec, parsed, metadata, cache))
        except FleeceError as error:
            reason = f"{metadata} of the previous snapshot cannot be read ({error.why})"
        yield reason or StreamReference(archive, index)


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
