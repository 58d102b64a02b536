"""The folders of a datastore: made, looked at and removed.

Layout: docs/formats.md, "Layout".
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from core.errors import UsageError, os_reason
from datastore.errors import StoreError
from datastore.files import FOLDER_MODE, Owner, create_file, make_folder, remove_tree
from datastore.local_chunks import CHUNK_FOLDER_MODE, fill_chunk_folder
from datastore.names import BackupType

#: In the cache folder of a bucket: whose cache it is.
S3_STATE: Final = ".fleece/s3.json"
#: User and group of a new store made by root, where they exist: PBS's `backup`.
BACKUP_ID: Final = 34


@dataclass(frozen=True, slots=True)
class Made:
    """What a creation has to take back if it fails: what was not there before."""

    folders: Sequence[Path]  #: the store's own and those above it, from below
    trees: Sequence[Path]  #: of the store's own folders
    lock: Path | None

    @classmethod
    def missing(cls, path: Path) -> Self:
        """What a creation in `path` will make."""
        lock = path / ".lock"
        return cls(
            [folder for folder in (path, *path.parents) if not folder.exists()],
            [tree for tree in (path / ".chunks", path / ".fleece") if not os.path.lexists(tree)],
            None if os.path.lexists(lock) else lock,
        )

    def undo(self) -> None:
        """Remove it; folders that are in use by others stay."""
        for tree in self.trees:
            remove_tree(tree)
        if self.lock is not None:
            self.lock.unlink(missing_ok=True)
        for folder in self.folders:
            try:
                folder.rmdir()
            except OSError:
                return


def make_store(path: Path) -> Made:
    """Make the files of an empty store in the folder `path`.

    Raises:
        UsageError: the folder is not empty, lies in another datastore, or is one already.
        OSError: no space, no rights.
    """
    if path.is_dir():
        if (path / ".chunks").exists() and not (path / ".chunks" / "ffff").exists():
            why = "an earlier creation was interrupted there"
            raise UsageError("create datastore", str(path), why, f"remove {path}/.chunks and {path}/.lock")
        if (path / ".chunks").exists():
            raise _exists_already(path)
        names = sorted(entry.name for entry in path.iterdir())
        if foreign := [name for name in names if not name.startswith(".") and name != "lost+found"]:
            raise UsageError("create datastore", str(path), f"the folder is not empty: {', '.join(foreign[:3])}")
    elif path.exists():
        raise UsageError("create datastore", str(path), "it is no folder")
    for parent in path.resolve().parents:
        if (parent / ".chunks").is_dir() and (parent / ".lock").exists():
            raise UsageError("create datastore", str(path), f"it lies inside the datastore {parent}")
    made = Made.missing(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.chmod(path, FOLDER_MODE)  # noqa: PTH101 - beside chown, which pathlib lacks
        if os.geteuid() == 0 and _backup_user_exists():
            os.chown(path, BACKUP_ID, BACKUP_ID)
        owner = Owner.of(path)
        # PBS's order: the chunk folder, then the lock file, then the 65536 folders.
        if not make_folder(path / ".chunks", owner, CHUNK_FOLDER_MODE):
            raise _exists_already(path)
        create_file(path / ".lock", b"", owner)
        fill_chunk_folder(path / ".chunks", owner)
    except UsageError:
        raise  # somebody else has begun a store here since we looked: nothing of it is ours
    except BaseException:
        made.undo()
        raise
    return made


def _exists_already(path: Path) -> UsageError:
    return UsageError("create datastore", str(path), "it is a datastore already", "'fleece datastore list' shows it")


def _backup_user_exists() -> bool:
    import grp
    import pwd

    try:
        return pwd.getpwnam("backup").pw_uid == BACKUP_ID and grp.getgrnam("backup").gr_gid == BACKUP_ID
    except KeyError:
        return False


def remove_store(base: Path) -> None:
    """Delete the store in the folder `base`, snapshots first and chunks last; foreign files stay.

    Raises:
        OSError: a file cannot be removed.
    """
    for name in (*(kind.value for kind in BackupType), "ns", ".chunks", ".fleece"):
        remove_tree(base / name)
    for name in (".gc-status", ".lock"):
        (base / name).unlink(missing_ok=True)
    # It may hold foreign files, be a mount point, or lie in a folder that is not ours: the store is gone in any case.
    with suppress(OSError):
        base.rmdir()


def check_layout(path: Path) -> None:
    """See to it that the folder `path` holds a datastore.

    Raises:
        StoreError: it does not, or there is no right to read it.
    """
    hint = "'fleece datastore create' makes one"
    try:
        if not path.is_dir():
            why = "there is no such folder" if not path.exists() else "it is no folder"
            raise StoreError("open datastore", str(path), why, hint)
        chunks = path / ".chunks"
        if not chunks.is_dir() or not (path / ".lock").is_file():
            raise StoreError(
                "open datastore", str(path), "the folder is no datastore (.chunks and .lock are needed)", hint
            )
        if not os.access(chunks, os.R_OK | os.X_OK):
            raise StoreError(
                "open datastore",
                str(path),
                "no right to read its chunks",
                "run as root or as the owner of the datastore",
            )
        missing = [name for name in ("0000", "7fff", "ffff") if not (chunks / name).is_dir()]
    except OSError as error:
        raise StoreError("open datastore", str(path), os_reason(error)) from error
    if missing:
        why = f"its layout is foreign: {chunks / missing[0]} is missing"
        raise StoreError("open datastore", str(path), why, "was it copied without its empty folders?")
