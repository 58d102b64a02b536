"""File archives of a snapshot as the REST interface shows them: opened, looked up, and streamed from a thread.

Walking through an archive is synchronous and has a thread of its own. It may be hostile or damaged: the errors of
`pxar` and `datastore` come out as they are.
"""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import trio
import zstandard

from core.buffers import Buffer
from core.errors import FleeceError
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.manifest import Manifest
from datastore.names import Snapshot
from datastore.reader import open_reader
from pxar.accessor import ArchiveAccessor, Directory, FileNode, Hardlink, Node
from pxar.export import write_content
from pxar.extract_report import ExtractReport
from pxar.format import Kind
from pxar.tar_stream import write_tar
from pxar.zip_stream import write_zip
from repository.archive import open_archive_reader, open_cache
from repository.locate import load_manifest
from repository.stored_bytes import StoredBytes, open_streams
from server.errors import ApiError
from server.state import ServerState

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
#: Bytes of decoded chunks that one request keeps.
_CACHE: Final = 32 << 20
#: Bytes of names and paths in one answer: several hundred thousand entries.
MAX_LISTING: Final = 64 << 20
_KINDS: Final = {
    Kind.SYMLINK: "Symlink",
    Kind.SOCKET: "Socket",
    Kind.FIFO: "Fifo",
    Kind.BLOCK: "Device",
    Kind.CHARACTER: "Device",
}


@dataclass(slots=True)
class Budget:
    """What an answer may still hold."""

    left: int = MAX_LISTING

    def take(self, name: bytes, path: bytes) -> None:
        """Count an entry.

        Raises:
            ApiError: it is too much.
        """
        self.left -= len(name) + len(path) * 4 // 3 + 100
        if self.left < 0:
            raise ApiError("the directory has more entries than one answer can hold")


def check_readable(manifest: Manifest, name: str) -> None:
    """See to it that no key is needed for an archive.

    Raises:
        ApiError: it is encrypted.
    """
    for file in manifest.files:
        if file.filename == name and file.crypt_mode is CryptMode.ENCRYPT:
            raise ApiError(f"cannot decode '{name}' - is encrypted")


@asynccontextmanager
async def open_stream(state: ServerState, store: str, snapshot: Snapshot, name: str) -> AsyncIterator[StoredBytes]:
    """The stream behind the dynamic index `name`, while the block runs.

    Raises:
        ApiError: it is encrypted.
        FleeceError: it is not there or cannot be read.
    """
    repository = await state.stores.get(store)
    async with state.walks, open_reader(repository.store, snapshot) as reader, open_cache(_CACHE) as cache:
        codec = ChunkCodec()
        manifest = await load_manifest(reader, codec)
        check_readable(manifest, name)
        yield StoredBytes(await open_archive_reader(reader, codec, manifest, name, cache))


@asynccontextmanager
async def open_archive(state: ServerState, store: str, snapshot: Snapshot, name: str) -> AsyncIterator["OpenArchive"]:
    """The file archive whose index is `name`, with its contents, while the block runs; errors as `open_stream`."""
    repository = await state.stores.get(store)
    async with state.walks, open_reader(repository.store, snapshot) as reader:
        codec = ChunkCodec()
        manifest = await load_manifest(reader, codec)
        check_readable(manifest, name)
        async with open_streams(reader, codec, manifest, name, cache_size=_CACHE) as streams:
            where = f"{snapshot}/{name}"
            yield await in_walk(lambda: OpenArchive(ArchiveAccessor(streams.archive, streams.payload, where=where)))


async def in_walk(work: Callable[[], T]) -> T:
    """Run `work`, which reads streams, in a thread; cancelled, it ends with its next read."""
    return await trio.to_thread.run_sync(work)


@dataclass(slots=True)
class OpenArchive:
    """One file archive; its methods read, and belong to a thread."""

    accessor: ArchiveAccessor

    def wanted(self, path: bytes) -> "Directory | FileNode":
        """The folder or file at `path`; hard links are followed.

        Raises:
            ApiError: nothing, or something of another kind.
        """
        node: Node | None = self.accessor.lookup(path)
        if node is None:
            shown = path.strip(b"/").decode("utf-8", "replace")
            raise ApiError(f"error opening '\"{shown}\"'")
        if isinstance(node, Hardlink):
            node = node.follow()
        if not isinstance(node, Directory | FileNode):
            raise ApiError(f"cannot download file of type {_KINDS[node.kind]}")
        return node

    def write(self, path: bytes, put: Callable[[Buffer], object], tick: Callable[[], None], *, as_tar: bool) -> None:
        """Hand the file at `path` to `put`, or the folder as a zip archive or a compressed tar archive.

        Raises:
            ApiError: as `wanted`.
            FleeceError: it cannot be read to its end.
        """
        node = self.wanted(path)

        def progress(report: ExtractReport) -> None:
            tick()

        if isinstance(node, FileNode):
            write_content(self.accessor, node, put, progress=progress)
            return
        prefix = b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
        # The folder's own name stands before everything in it, as in what PBS makes.
        folder = prefix.rpartition(b"/")[2]
        if not as_tar:
            write_zip(self.accessor, put, start=node, prefix=prefix, folder=folder, progress=progress)
            return
        packer = zstandard.ZstdCompressor().compressobj()

        def pack(data: Buffer) -> None:
            if packed := packer.compress(data):
                put(packed)

        write_tar(self.accessor, pack, start=node, prefix=prefix, folder=folder, progress=progress)
        put(packer.flush())


class _GoneError(Exception):
    """Nobody reads the answer any more."""


async def content(
    state: ServerState, store: str, snapshot: Snapshot, name: str, path: bytes, *, as_tar: bool
) -> AsyncGenerator[Buffer, None]:
    """What `OpenArchive.write` writes, as the stream of an answer; nothing is open before it is asked for.

    Raises:
        trio.BrokenResourceError: it cannot be read to its end; the log says why.
    """
    send, receive = trio.open_memory_channel[Buffer](1)
    failed: list[Exception] = []
    gone = trio.Event()

    async def produce(*, task_status: "trio.TaskStatus[None]") -> None:
        async with send, open_archive(state, store, snapshot, name) as archive:
            await in_walk(lambda: archive.wanted(path))
            task_status.started()

            def put(data: Buffer) -> None:
                if len(data):
                    trio.from_thread.run(send.send, data)

            def tick() -> None:
                if gone.is_set():
                    raise _GoneError

            try:
                await in_walk(lambda: archive.write(path, put, tick, as_tar=as_tar))
            except (_GoneError, trio.BrokenResourceError):
                pass
            except (ApiError, FleeceError) as error:
                _LOG.warning("%s/%s could not be sent to its end: %s", snapshot, name, error)
                failed.append(error)
            except Exception as error:
                _LOG.exception("%s/%s could not be sent to its end", snapshot, name)
                failed.append(error)

    # Not in a nursery of its own: the sender of an answer would be within it.
    try:
        await state.background(produce)
    except (ApiError, FleeceError) as error:
        _LOG.warning("%s/%s could not be sent: %s", snapshot, name, error)
        raise trio.BrokenResourceError from error
    try:
        async with receive:
            async for piece in receive:
                yield piece
    finally:
        gone.set()
    if failed:
        raise trio.BrokenResourceError


async def check_content(state: ServerState, store: str, snapshot: Snapshot, name: str, path: bytes) -> None:
    """See to it that `content` can begin.

    Raises:
        ApiError, FleeceError: as `open_archive` and `OpenArchive.wanted`.
    """
    async with open_archive(state, store, snapshot, name) as archive:
        await in_walk(lambda: archive.wanted(path))
