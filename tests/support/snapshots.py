"""Snapshots written with the bare session interface, for tests that need some."""

import hashlib
from collections.abc import Mapping

from datastore.codec import ChunkCodec
from datastore.manifest import Manifest, ManifestFile
from datastore.names import Group, Snapshot
from repository.interface import BackupSession, Repository

CODEC = ChunkCodec()
#: Small chunks keep tests quick.
CHUNK = 64 << 10


async def put_image(session: BackupSession, name: str, data: bytes, *, chunk_size: int | None = None) -> ManifestFile:
    """Store `data` as the fixed index `name`, by default in chunks of `CHUNK`."""
    chunk_size = chunk_size or CHUNK
    writer = await session.open_index(name, size=len(data), chunk_size=chunk_size)
    pieces = [data[offset : offset + chunk_size] for offset in range(0, len(data), chunk_size)]
    digests = CODEC.digest_many(pieces)
    for piece, digest in zip(pieces, digests, strict=True):
        if not session.knows(digest):
            await session.put_chunk(writer, digest, len(piece), CODEC.encode(piece))
    await session.append(writer, [(number * chunk_size, digest) for number, digest in enumerate(digests)])
    csum = hashlib.sha256(b"".join(digests)).digest()
    await session.close_index(writer, len(digests), len(data), csum)
    return ManifestFile(name, CODEC.mode, len(data), csum)


async def put_file(session: BackupSession, name: str, data: bytes) -> ManifestFile:
    """Store `data` as the blob `name`."""
    blob = CODEC.encode_blob(data)
    await session.put_blob(name, blob)
    return ManifestFile(name, CODEC.mode, len(blob), hashlib.sha256(bytes(blob)).digest())


async def put_all(session: BackupSession, files: Mapping[str, bytes], *, chunk_size: int | None = None) -> None:
    """Store `files` (full file names) and the manifest; `finish` is the caller's."""
    manifest = Manifest.new(session.snapshot)
    for name, data in files.items():
        if name.endswith(".fidx"):
            manifest.add(await put_image(session, name, data, chunk_size=chunk_size))
        else:
            manifest.add(await put_file(session, name, data))
    await session.put_blob("index.json.blob", manifest.encode(CODEC))


async def write_snapshot(
    repo: Repository, group: str | Group, ctime: int, files: Mapping[str, bytes], *, chunk_size: int | None = None
) -> Snapshot:
    """One finished snapshot with `files`."""
    group = Group.parse(group) if isinstance(group, str) else group
    snapshot = group.at(ctime)
    async with repo.backup(snapshot) as session:
        await put_all(session, files, chunk_size=chunk_size)
        await session.finish()
    return snapshot


async def read_image(repo: Repository, snapshot: Snapshot, name: str) -> bytes:
    """The bytes of an image, every chunk checked."""
    async with repo.reader(snapshot) as reader:
        index = await reader.open_index(name)
        data = bytearray()
        for number in range(index.count):
            digest, size = index.digest(number), index.span(number)[1]
            blob = await reader.read_chunk(digest)
            data += CODEC.decode(blob, digest=digest, size=size, crypt_mode=CODEC.mode, where=index.where)
        return bytes(data)
