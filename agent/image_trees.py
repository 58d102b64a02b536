"""Disk images of a snapshot that are looked into: joins `diskfs` with the stored disks of `repository`."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from agent.archive_listing import Found, Listed, found, list_entry, walk_nodes
from agent.find_index.schema import VOLUME
from agent.image_nodes import Group, ImageAccessor, VolumeDirectory
from agent.listing_output import put
from agent.snapshot_archives import OpenSnapshot, in_walk
from datastore.codec import ChunkCodec
from datastore.manifest import Manifest
from datastore.names import Snapshot, strip_archive_type
from diskfs.client import look_into
from diskfs.entries import Volume
from diskfs.process import Worker
from pxar.format import escaped
from pxar.patterns import MatchPattern
from repository.archive import ChunkCache
from repository.disks import SnapshotDisks, disk_files
from repository.interface import Reader


class Part(NamedTuple):
    """What `drive-scsi0.img/part1/etc` means."""

    name: str  #: the disk, without type
    path: bytes  #: from the image's root, without slashes at its ends


def image_part(manifest: Manifest, text: str) -> Part | None:
    """What a person means who writes `drive-scsi0.img/part1/etc`; None if that is no disk image of the snapshot."""
    archive, _, path = text.partition("/")
    for file in disk_files(manifest):
        if archive in (file, strip_archive_type(file)):
            return Part(strip_archive_type(file), os.fsencode(path).strip(b"/"))
    return None


@asynccontextmanager
async def open_image_tree(
    reader: Reader,
    codec: ChunkCodec,
    manifest: Manifest,
    name: str,
    cache: ChunkCache,
    warn: Callable[[str], None],
    worker: Worker | None = None,
    *,
    names_only: bool = False,
) -> AsyncIterator[ImageAccessor]:
    """What is on the disk `name`, while the block runs; used in worker threads that trio started.

    What could not be read on the way goes to `warn` at the end, and unless `names_only` that a file system was in use.
    `worker` is a process that was started before.

    Raises:
        NotFoundError, UsageError: there is no such disk.
        FormatError, KeyNeededError: it cannot be read.
    """
    disks = SnapshotDisks(reader, codec, manifest, cache)
    number = disks.number(name)
    await disks.open(number)  # that the key is missing is told before anything else
    where = f"{manifest.snapshot} {disks.names[number]}"
    async with look_into(disks, number, where, worker) as image:
        accessor = ImageAccessor(image, where=where)
        try:
            yield accessor
        finally:
            accessor.warn(warn, names_only=names_only)


@asynccontextmanager
async def open_image_of(
    opened: OpenSnapshot, name: str, worker: Worker | None = None, *, names_only: bool = False
) -> AsyncIterator[ImageAccessor]:
    """As `open_image_tree`, of a snapshot that is open."""
    for file in disk_files(opened.manifest):
        if name in (file, strip_archive_type(file)):
            opened.needs_key(opened.manifest.file(file))  # which also says what was given in its place
    async with open_image_tree(
        opened.reader, opened.codec, opened.manifest, name, opened.cache, opened.progress.warn, worker,
        names_only=names_only,
    ) as accessor:  # fmt: skip
        yield accessor


def walk_image(accessor: ImageAccessor) -> Iterator[tuple[bytes, Any, bool]]:
    """Everything on a disk: path, node, whether a directory; to be gone through in a thread, while the tree is open.

    Paths begin with a slash and the volume: `/part1/etc/fstab`. What cannot be read is left out and complained about.

    Raises:
        DiskFsError: the partition table is damaged.
        FleeceError: the disk cannot be read.
    """
    return walk_nodes(accessor.root, b"/")


async def find_in_image(
    opened: OpenSnapshot, name: str, pattern: MatchPattern, letters: frozenset[str], add: Callable[[Found], None]
) -> None:
    """Pass what matches `pattern`, and is of one of the kinds `letters`, on the disk `name` to `add`.

    A pattern counts from the root of the image or from that of a file system on it.

    Raises:
        FormatError, KeyNeededError, NotFoundError: it cannot be read.
    """
    async with open_image_of(opened, name, names_only=True) as accessor:

        def walk() -> None:
            root = 0  # bytes of the path of the volume
            for path, item, is_directory in walk_image(accessor):
                if isinstance(item, VolumeDirectory | Group):
                    root = len(path)
                within = path[root:]
                if pattern.matches(path, is_directory) or (within and pattern.matches(within, is_directory)):
                    one = found(opened.snapshot, name, path, item)
                    if one.letter in letters:
                        add(one)

        await in_walk(walk)


def index_entries(accessor: ImageAccessor, snapshot: Snapshot, name: str) -> Iterator[Found]:
    """Everything on a disk for an index of names; to be gone through in a thread, while the tree is open.

    Volumes and volume groups have the size `VOLUME`: patterns count from them, too.

    Raises:
        FormatError, FleeceError: as `walk_image`.
    """
    for path, item, _ in walk_image(accessor):
        one = found(snapshot, name, path, item)
        yield one._replace(size=VOLUME) if isinstance(item, VolumeDirectory | Group) else one


def image_names(opened: OpenSnapshot) -> list[str]:
    """Names of the disk images of a snapshot."""
    return [strip_archive_type(file) for file in disk_files(opened.manifest)]


def list_image(accessor: ImageAccessor, path: bytes, recursive: bool, itself: bool) -> Iterator[Listed | Volume]:
    """As `archive_listing.list_entry`; what is on the disk itself, at the empty path, as volumes.

    Raises:
        NotFoundError, UsageError, FleeceError: as there.
    """
    if path.strip(b"/.") or recursive or itself:
        yield from list_entry(accessor, path, recursive, itself)
    else:
        yield from accessor.root.volumes()  # type: ignore[attr-defined]


def volume_line(volume: Volume) -> str:
    """A volume for people."""
    name = escaped(volume.name)
    kind = volume.kind if not volume.label else f"{volume.kind} '{escaped(os.fsencode(volume.label))}'"
    return f"{name:<16} {volume.size:>15}  {kind}" + (f"  ({volume.problem})" if volume.problem else "")


def volume_document(volume: Volume) -> dict[str, Any]:
    """The same for programs."""
    document: dict[str, Any] = {}
    put(document, "path", b"/" + volume.name)
    return document | {
        "type": "d",
        "size": volume.size,
        "file-system": volume.kind,
        "label": volume.label,
        "problem": volume.problem or None,
    }
