"""What is in a datastore: its tree of namespaces, groups and snapshots in a local folder, complete on every backend.

Layout: docs/formats.md, "Layout". Reading only: quick system calls; a listing of the whole store runs in one thread.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.errors import FleeceError, FormatError, UsageError, os_reason
from datastore.blob import MAX_ENCODED_BLOB
from datastore.crypt_mode import CryptMode
from datastore.errors import SnapshotNotFoundError, StoreError
from datastore.files import read_file, store_errors
from datastore.manifest import Manifest
from datastore.names import (
    MANIFEST_NAME,
    MAX_NAMESPACE_DEPTH,
    PROTECTED_NAME,
    ROOT,
    ArchiveKind,
    BackupType,
    Group,
    Namespace,
    Snapshot,
    is_safe_id,
    is_time,
    parse_time,
)

#: Bytes of an `owner` file and of group notes that are read.
MAX_TEXT: Final = 1 << 16
_SUFFIXES: Final = tuple(kind.value for kind in ArchiveKind)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a snapshot: what its manifest says, or that it is there without being listed."""

    filename: str
    size: int | None
    crypt_mode: CryptMode | None
    csum: bytes | None = None  #: as the manifest has it


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """What a listing says of one snapshot."""

    snapshot: Snapshot
    finished: bool
    protected: bool
    owner: str | None
    files: tuple[FileEntry, ...]
    manifest: Manifest | None  #: None if unfinished or unreadable


class StoreTree:
    """Reads the tree below the folder `base`."""

    def __init__(self, base: Path) -> None:
        self.base: Final = base

    def namespace_exists(self, ns: Namespace) -> bool:
        """True if the namespace's folder is there."""
        return (self.base / ns.path).is_dir()

    def namespaces(self, parent: Namespace = ROOT, *, depth: int | None = None) -> Iterator[Namespace]:
        """`parent` and the namespaces below it, depth first; names that are none are passed over.

        Raises:
            SnapshotNotFoundError: `parent` is not there.
            StoreError: a folder is unreadable.
        """
        if not self.namespace_exists(parent):
            raise SnapshotNotFoundError("list namespace", repr(str(parent)), "it does not exist")
        left = MAX_NAMESPACE_DEPTH - len(parent.components)
        yield from self._namespaces(parent, left if depth is None else min(depth, left))

    def _namespaces(self, ns: Namespace, depth: int) -> Iterator[Namespace]:
        yield ns
        if depth > 0:
            for name in self._folders(f"{ns.path}/ns".lstrip("/")):
                if is_safe_id(name):
                    yield from self._namespaces(Namespace((*ns.components, name)), depth - 1)

    def groups(self, ns: Namespace = ROOT) -> list[Group]:
        """The groups of one namespace in PBS's order; links and other names are passed over.

        Raises:
            SnapshotNotFoundError: the namespace is not there.
            StoreError: a folder is unreadable.
        """
        if not self.namespace_exists(ns):
            raise SnapshotNotFoundError("list namespace", repr(str(ns)), "it does not exist")
        groups = [
            Group(kind, name, ns)
            for kind in BackupType
            for name in self._folders(f"{ns.path}/{kind.value}".lstrip("/"))
            if is_safe_id(name)
        ]
        return sorted(groups, key=lambda group: group.sort_key)

    def snapshots(self, group: Group, *, unfinished: bool = False) -> list[Snapshot]:
        """The snapshots of a group, oldest first; without those that have no manifest unless `unfinished`."""
        found = []
        for name in self._folders(group.path):
            if not is_time(name):
                continue
            try:
                snapshot = Snapshot(group, parse_time(name), name)
            except UsageError:
                continue  # looks like a time, but is none
            if unfinished or self.is_finished(snapshot):
                found.append(snapshot)
        return sorted(found, key=lambda snapshot: (snapshot.ctime, snapshot.time))

    def latest(self, group: Group) -> Snapshot | None:
        """The newest finished snapshot of a group."""
        return next((s for s in reversed(self.snapshots(group, unfinished=True)) if self.is_finished(s)), None)

    def exists(self, snapshot: Snapshot) -> bool:
        """True if the snapshot's folder is there, finished or not."""
        return (self.base / snapshot.path).is_dir()

    def is_finished(self, snapshot: Snapshot) -> bool:
        """True if the snapshot has a manifest, or if that cannot be told: what is unfinished may be removed."""
        try:
            found = (self.base / snapshot.path / MANIFEST_NAME).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return stat.S_ISREG(found.st_mode)

    def is_protected(self, snapshot: Snapshot) -> bool:
        """True if the snapshot must not be removed.

        Raises:
            StoreError: it cannot be told.
        """
        with store_errors("look at", f"{snapshot}/{PROTECTED_NAME}"):
            try:
                (self.base / snapshot.path / PROTECTED_NAME).lstat()
            except FileNotFoundError:
                return False
            return True

    def read_manifest(self, snapshot: Snapshot) -> bytes:
        """The snapshot's manifest blob as stored.

        Raises:
            SnapshotNotFoundError: no such snapshot, or it is unfinished.
            StoreError: unreadable.
        """
        return self.read_file(snapshot, MANIFEST_NAME)

    def read_file(self, snapshot: Snapshot, name: str, limit: int = MAX_ENCODED_BLOB) -> bytes:
        """The blob file `name` of a snapshot as stored.

        Raises:
            FormatError: it has more than `limit` bytes.
            SnapshotNotFoundError, StoreError: as `read_manifest`.
        """
        where = f"{snapshot}/{name}"
        with store_errors("read", where):
            try:
                return read_file(self.base / snapshot.path / name, limit=limit)
            except FileNotFoundError:
                missing = not self.exists(snapshot)
            except OSError as error:
                if error.errno == errno.EFBIG:
                    raise FormatError("read blob", where, f"wrong size ({os_reason(error)})") from error
                raise
        why = "there is no such snapshot" if missing else "it is unfinished or lacks this file"
        raise SnapshotNotFoundError("read", where, why, "'fleece list' shows what there is")

    def group_owner(self, group: Group) -> str | None:
        """Who may write the group: the first line of its `owner` file, None if there is none."""
        text = self._text(f"{group.path}/owner")
        return None if text is None else text.partition("\n")[0].rstrip()

    def listed_owner(self, group: Group) -> str | None:
        """As `group_owner`, but an unreadable file does not spoil a listing: None."""
        try:
            return self.group_owner(group)
        except StoreError:
            return None

    def listed_notes(self, group: Group) -> str:
        """The group's notes; empty if they cannot be read, which does not spoil a listing."""
        try:
            return self._text(f"{group.path}/notes") or ""
        except StoreError:
            return ""

    def usage(self) -> tuple[int, int, int]:
        """Bytes in all, used and available on the file system of the store.

        Raises:
            StoreError: it cannot be asked.
        """
        with store_errors("ask for the space of", self.base):
            found = os.statvfs(self.base)
        return (
            found.f_blocks * found.f_frsize,
            (found.f_blocks - found.f_bfree) * found.f_frsize,
            found.f_bavail * found.f_frsize,
        )

    def gc_status(self) -> dict[str, Any] | None:
        """What the last garbage collection wrote; None if there is nothing, or nothing that can be read."""
        try:
            status = json.loads(self._text(".gc-status") or "null")
        except (ValueError, RecursionError, StoreError):
            return None
        return status if isinstance(status, dict) else None

    def entry(self, snapshot: Snapshot) -> SnapshotEntry:
        """Everything a listing says of `snapshot`; an unreadable manifest is left out, not an error.

        Raises:
            SnapshotNotFoundError: not there.
            StoreError: its folder is unreadable.
        """
        with store_errors("list", str(snapshot)):
            try:
                with os.scandir(self.base / snapshot.path) as entries:
                    names = {
                        entry.name
                        for entry in entries
                        if entry.is_file(follow_symlinks=False) or entry.name == PROTECTED_NAME
                    }
            except FileNotFoundError as error:
                raise SnapshotNotFoundError("list", str(snapshot), os_reason(error)) from error
        manifest, raw = None, b""
        if MANIFEST_NAME in names:
            try:
                raw = self.read_manifest(snapshot)
                manifest = Manifest.parse(raw, where=str(snapshot))
            except FleeceError:
                manifest = None
        listed = {} if manifest is None else {file.filename: file for file in manifest.files}
        # PBS's order: what the manifest lists, the manifest, then what is there besides.
        files = [FileEntry(file.filename, file.size, file.crypt_mode, file.csum) for file in listed.values()]
        if MANIFEST_NAME in names:
            signed = manifest is not None and manifest.signature is not None
            size = len(raw) or None
            files.append(FileEntry(MANIFEST_NAME, size, CryptMode.SIGN_ONLY if signed else CryptMode.NONE))
        extra = sorted(
            name for name in names if name.endswith(_SUFFIXES) and name not in listed and name != MANIFEST_NAME
        )
        files += [FileEntry(name, None, None) for name in extra if is_safe_id(name)]
        return SnapshotEntry(
            snapshot,
            finished=MANIFEST_NAME in names,
            protected=PROTECTED_NAME in names,
            owner=self.listed_owner(snapshot.group),
            files=tuple(files),
            manifest=manifest,
        )

    def _folders(self, relative: str) -> list[str]:
        with store_errors("list", relative or str(self.base)):
            try:
                if relative and (self.base / relative).is_symlink():
                    return []  # what a link leads to is no part of the store
                with os.scandir(self.base / relative) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
            except FileNotFoundError:
                return []

    def _text(self, relative: str) -> str | None:
        with store_errors("read", relative):
            try:
                return read_file(self.base / relative, limit=MAX_TEXT).decode(errors="replace")
            except FileNotFoundError:
                return None
