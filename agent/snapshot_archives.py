"""A snapshot opened to look at what is in its archives: their directories and catalog, hardly ever contents."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import trio

from agent.documents import find_snapshot, parse_selection
from core.errors import FormatError, NotFoundError
from core.progress import Progress
from datastore.catalog import Catalog, CatalogEntry
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import SnapshotNotFoundError
from datastore.index import ArchiveIndex
from datastore.keyfile import need_key
from datastore.manifest import Manifest, ManifestFile
from datastore.names import CATALOG_NAME, MASTER_KEY_NAME, Namespace, Snapshot, strip_archive_type
from pxar.accessor import ArchiveAccessor
from repository.archive import ChunkCache, open_archive_reader
from repository.interface import Reader, Repository, SnapshotInfo
from repository.locate import check_index, load_readable, signature_doubt
from repository.stored_bytes import StoredBytes, archive_stream_names

T = TypeVar("T")


class ContentStream(NamedTuple):
    """The stream that holds the contents of an archive's files."""

    stored: StoredBytes
    chunks: ArchiveIndex


@dataclass
class OpenSnapshot:
    """A snapshot being read; made by `open_snapshot`."""

    snapshot: Snapshot
    reader: Reader
    codec: ChunkCodec
    manifest: Manifest
    cache: ChunkCache
    progress: Progress
    given_key: CryptKey | None = None  #: may be another one than the snapshot's, which `codec` is without then
    _catalog: list[Catalog | None] = field(default_factory=list)

    @property
    def archives(self) -> dict[str, ManifestFile]:
        """What was backed up, by name without type: `root.pxar` (also of a split one), `disk.img`, `vm.conf`.

        Of a split archive the entry is that of its metadata stream. Catalog and wrapped key are no archives.
        """
        found = {}
        for file in self.manifest.files:
            name = strip_archive_type(file.filename)
            if name.endswith(".ppxar") or file.filename in (CATALOG_NAME, MASTER_KEY_NAME):
                continue
            if name.endswith(".mpxar"):
                name = f"{name.removesuffix('.mpxar')}.pxar"
            found[name] = file
        return found

    @property
    def file_archives(self) -> list[str]:
        """Names of the file archives in it: `root.pxar`, in the manifest's order."""
        return [name for name in self.archives if name.endswith(".pxar")]

    def file_archive(self, text: str) -> str:
        """The file archive that a person calls `text`: `root`, `root.pxar`, `root.mpxar.didx`.

        Raises:
            NotFoundError: there is none of that name.
        """
        stem = strip_archive_type(text)
        for extension in (".pxar", ".mpxar", ".ppxar"):
            stem = stem.removesuffix(extension)
        name = f"{stem}.pxar"
        if name in self.archives:
            return name
        have = ", ".join(self.file_archives)
        why = (
            "it is no file archive"
            if strip_archive_type(text) in self.archives
            else "the snapshot has none of that name"
        )
        hint = f"its file archives are {have}" if have else "it has no file archives"
        raise NotFoundError("look into", self.where(text), why, hint)

    def where(self, name: str) -> str:
        """The archive `name` for messages."""
        return f"{self.snapshot} {name}"

    async def accessor(self, name: str) -> ArchiveAccessor:
        """The file archive `name` (`root.pxar`) without the contents of a split one.

        Raises:
            FormatError, KeyNeededError, NotFoundError: it cannot be read.
        """
        archive, _ = archive_stream_names(self.manifest, name)
        stream = await self.stream(archive)
        return await in_walk(lambda: ArchiveAccessor(stream.stored, where=self.where(name)))

    async def with_contents(self, name: str) -> tuple[ArchiveAccessor, ContentStream]:
        """The file archive `name` and the stream of its contents.

        Raises:
            FormatError, KeyNeededError, NotFoundError: one of its streams cannot be read.
        """
        archive_name, payload_name = archive_stream_names(self.manifest, name)
        archive = await self.stream(archive_name)
        payload = None if payload_name is None else await self.stream(payload_name)
        stored = None if payload is None else payload.stored
        accessor = await in_walk(lambda: ArchiveAccessor(archive.stored, stored, where=self.where(name)))
        return accessor, archive if payload is None else payload

    async def index(self, entry: ManifestFile) -> ArchiveIndex:
        """An index without its chunks, for which no key is needed.

        Raises:
            FormatError, NotFoundError: it is not what the manifest says, or gone.
        """
        index = await self.reader.open_index(entry.filename, size=entry.size)
        await check_index(index, entry)
        return index

    async def catalog_of(self, name: str) -> tuple[Catalog, CatalogEntry] | None:
        """The catalog and in it the directory of the file archive `name`; None for what must be read itself.

        Split archives have no catalog: their metadata stream is one. A catalog that is of no use is a warning.

        Raises:
            KeyNeededError: it is encrypted and the key is not there.
        """
        filename, payload = archive_stream_names(self.manifest, name)
        if payload is not None or all(file.filename != CATALOG_NAME for file in self.manifest.files):
            return None
        try:
            if not self._catalog:
                self._catalog.append(None)
                stream = await self.stream(CATALOG_NAME)
                self._catalog[0] = await in_walk(lambda: Catalog(stream.stored, where=self.where("catalog.pcat1")))
            catalog = self._catalog[0]
            if catalog is None:
                return None
            directory = await in_walk(lambda: catalog.lookup(catalog.root, filename.encode()))
        except (FormatError, NotFoundError) as error:
            self.progress.warn(f"{error}; the archive itself is read")
            return None
        return None if directory is None or directory.kind != b"d" else (catalog, directory)

    def needs_key(self, entry: ManifestFile) -> None:
        """Make sure that the key is there with which a file of the snapshot is encrypted.

        Raises:
            KeyNeededError: it is not; says which one is, and which one was given.
        """
        if entry.crypt_mode is CryptMode.ENCRYPT and self.codec.key is None:
            where = f"{self.snapshot}/{entry.filename}"
            raise need_key("read", where, self.manifest.fingerprint, self.given_key)

    async def stream(self, filename: str) -> ContentStream:
        """The archive `filename`, which has an index, as one stream.

        Raises:
            FormatError, KeyNeededError, NotFoundError: it cannot be read.
        """
        self.needs_key(self.manifest.file(filename))
        reader = await open_archive_reader(self.reader, self.codec, self.manifest, filename, self.cache)
        return ContentStream(StoredBytes(reader), reader.archive.index)


@asynccontextmanager
async def open_snapshot(
    repository: Repository, snapshot: Snapshot, codec: ChunkCodec, cache: ChunkCache, progress: Progress
) -> AsyncIterator[OpenSnapshot]:
    """Read `snapshot` while the block runs; with the key of `codec` if it is that of the snapshot.

    Raises:
        SnapshotNotFoundError, LockedError, FormatError: it cannot be read.
    """
    async with repository.reader(snapshot) as reader:
        given = codec.key
        manifest, codec = await load_readable(reader, codec)
        doubt = signature_doubt(manifest, codec, given)
        # What is encrypted with another key is an error of its own, or left out.
        if doubt is not None and (manifest.lost_signature or not _is_encrypted(manifest)):
            progress.warn(doubt)
        yield OpenSnapshot(snapshot, reader, codec, manifest, cache, progress, given)


def _is_encrypted(manifest: Manifest) -> bool:
    return any(file.crypt_mode is CryptMode.ENCRYPT for file in manifest.files)


class Selected(NamedTuple):
    """A snapshot that is meant."""

    named: bool  #: it was named itself
    info: SnapshotInfo | None  #: as it is listed, if it was


class Selection(NamedTuple):
    """The snapshots that are meant, each once, in the order in which they are looked into."""

    snapshots: dict[Snapshot, Selected]
    namespaces: list[Namespace]  #: of which it has every snapshot


async def select_snapshots(
    repository: Repository, named: Sequence[str], ns: Namespace, *, everything: bool, recursive: bool
) -> Selection:
    """The snapshots that `named` means.

    Args:
        repository: where they lie.
        named: snapshots and groups; of groups every snapshot. Without any it is the namespace.
        ns: the namespace.
        everything: of a namespace every snapshot, not only the newest of each group.
        recursive: also the namespaces below.

    Raises:
        UsageError: neither a snapshot nor a group.
        SnapshotNotFoundError: there is none.
    """
    selected: dict[Snapshot, Selected] = {}
    for text in named:
        one = parse_selection(text, ns)
        if isinstance(one, str):
            snapshot = await find_snapshot(repository, one, ns)
            selected[snapshot] = Selected(True, selected[snapshot].info if snapshot in selected else None)
        elif one is not None:
            infos = await repository.snapshots(ns, one)
            if not infos:
                raise SnapshotNotFoundError("look into", text, "the group has no finished snapshot")
            for info in infos:
                selected.setdefault(info.snapshot, Selected(False, info))
    if named:
        return Selection(selected, [])
    namespaces = await repository.namespaces(ns) if recursive else [ns]
    for namespace in namespaces:
        if everything:
            selected |= {info.snapshot: Selected(False, info) for info in await repository.snapshots(namespace)}
        else:
            newest = [group.latest for group in await repository.groups(namespace)]
            selected |= dict.fromkeys((one for one in newest if one is not None), Selected(False, None))
    return Selection(selected, namespaces if everything else [])


async def in_walk(work: Callable[[], T]) -> T:
    """Run `work`, which reads streams, in a thread of its own; cancelled, it ends with its next read."""
    return await trio.to_thread.run_sync(work)
