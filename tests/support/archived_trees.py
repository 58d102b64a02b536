"""Snapshots of file archives from plain dictionaries, without a file system, a command or any read file."""

import stat
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from datastore.catalog import CatalogWriter
from datastore.codec import ChunkCodec
from datastore.names import CATALOG_NAME, Snapshot
from pxar.encoder import ArchiveEncoder
from pxar.metadata import Metadata, Stat, encode_metadata
from repository.backup import SnapshotWriter
from repository.interface import Repository
from repository.stream_backup import StreamBackup, StreamSpec

#: Names with directories, or with (content, modification time in Unix seconds) of files; in the order of the archive.
Tree: TypeAlias = "Mapping[bytes, Tree | tuple[bytes, int]]"
_AVERAGE = 64 << 10


async def store_trees(
    repository: Repository, snapshot: Snapshot, trees: Mapping[str, Tree], *, catalog: bool = False,
    codec: ChunkCodec | None = None,
) -> Snapshot:  # fmt: skip
    """Write `snapshot` with an archive for each of `trees` (`root`): split ones, or self-contained with a catalog."""

    def write(streams: Sequence[StreamBackup]) -> None:
        by_name = {stream.filename: stream for stream in streams}
        names = CatalogWriter(by_name[CATALOG_NAME].write) if catalog else None
        for stem, tree in trees.items():
            if names is None:
                encoder = ArchiveEncoder(by_name[f"{stem}.mpxar.didx"], by_name[f"{stem}.ppxar.didx"])
            else:
                names.start_archive(f"{stem}.pxar.didx".encode())
                encoder = ArchiveEncoder(by_name[f"{stem}.pxar.didx"])
            encoder.begin(_meta(stat.S_IFDIR, 0))
            _fill(encoder, names, tree)
            encoder.finish()
        if names is not None:
            names.finish()

    files = [f"{stem}.{kind}.didx" for stem in trees for kind in (["pxar"] if catalog else ["mpxar", "ppxar"])]
    specs = [StreamSpec(file, _AVERAGE) for file in [*files, *([CATALOG_NAME] if catalog else [])]]
    async with repository.backup(snapshot) as session:
        writer = SnapshotWriter(session, ChunkCodec() if codec is None else codec)
        await writer.add_streams("trees", specs, write)
        await writer.finish()
    return snapshot


def _fill(encoder: ArchiveEncoder, names: CatalogWriter | None, tree: Tree) -> None:
    for name, one in tree.items():
        if isinstance(one, tuple):
            content, mtime = one
            encoder.begin_file(name, _meta(stat.S_IFREG, mtime), len(content))
            encoder.content.write(content)
            encoder.end_file()
            if names is not None:
                names.file(name, len(content), mtime)
            continue
        encoder.directory(name, _meta(stat.S_IFDIR, 0))
        if names is not None:
            names.start_directory(name)
        _fill(encoder, names, one)
        encoder.end_directory()
        if names is not None:
            names.end_directory()


def _meta(kind: int, mtime: int) -> bytes:
    return encode_metadata(Metadata(Stat(kind | 0o755, 0, 0, 0, mtime, 0)))
