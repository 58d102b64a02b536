"""What a session has written of a snapshot so far, and the checks that sessions of every kind make of it.

A manifest names the size and checksum of each of its files; a session that keeps its own account of what it wrote
refuses one that says anything else, before the snapshot is listed.
"""

import hashlib
from dataclasses import dataclass

from core.buffers import Buffer
from core.errors import UsageError
from datastore.blob import MAX_ENCODED_CHUNK, Blob
from datastore.manifest import Manifest, ManifestFile
from datastore.names import ArchiveKind, Snapshot, archive_kind


@dataclass(frozen=True, slots=True)
class _File:
    size: int
    csum: bytes


class WrittenFiles(dict[str, _File]):
    """The files by their names, as a manifest has to list them."""

    def add_index(self, name: str, size: int, csum: bytes) -> None:
        """Take note of a closed index: bytes of its archive, and its checksum."""
        self[name] = _File(size, csum)

    def add_blob(self, name: str, blob: Blob) -> None:
        """Take note of a blob. Hashes it."""
        csum = hashlib.sha256(blob.header)
        csum.update(blob.payload)
        self[name] = _File(len(blob), csum.digest())

    def add_kept(self, file: ManifestFile) -> None:
        """Take note of a file that was there, and is the one that a manifest lists."""
        self[file.filename] = _File(file.size, file.csum)

    def check_manifest(self, blob: Blob, snapshot: Snapshot) -> Manifest:
        """The manifest in `blob`, if it is that of `snapshot` and lists only what was written.

        Raises:
            FormatError: it is none.
            UsageError: it is another one.
        """
        where = str(snapshot)
        manifest = Manifest.parse(bytes(blob), where=where)
        if (manifest.type, manifest.id, manifest.ctime) != (snapshot.group.type, snapshot.group.id, snapshot.ctime):
            raise UsageError("finish", where, "the manifest is that of another snapshot")
        for file in manifest.files:
            if self.get(file.filename) != _File(file.size, file.csum):
                raise UsageError("finish", where, f"the manifest's {file.filename} is not what was stored")
        return manifest


def named_blob(name: str, blob: Blob | Buffer, where: str) -> Blob:
    """The blob that is to be stored as `name`: whole, and not too long for any store.

    Raises:
        UsageError: a name that is none of a blob, or too many bytes.
        FormatError: no blob, or its CRC is wrong.
    """
    if archive_kind(name) is not ArchiveKind.BLOB:
        raise UsageError("store blob", where, "its name does not end in .blob")
    parsed = blob if isinstance(blob, Blob) else Blob.parse(blob, where=where)
    if len(parsed) > MAX_ENCODED_CHUNK:
        raise UsageError("store blob", where, f"{len(parsed)} bytes; a blob has at most {MAX_ENCODED_CHUNK}")
    parsed.check(where=where)
    return parsed


def check_extent(found: tuple[int, int], announced: tuple[int, int], where: str) -> None:
    """Compare chunks and bytes of an index with what whoever closes it believes.

    Raises:
        UsageError: they differ.
    """
    if found != announced:
        why = f"it has {found[0]} chunks of {found[1]} bytes, announced are {announced[0]} of {announced[1]}"
        raise UsageError("close index", where, why)


def check_csum(found: bytes, announced: bytes, where: str) -> None:
    """The same of its checksum.

    Raises:
        UsageError: they differ.
    """
    if found != announced:
        raise UsageError("close index", where, f"its checksum is {found.hex()}, announced is {announced.hex()}")
