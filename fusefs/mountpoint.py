"""Is a folder fit to be mounted on? Asked before anything else is done, so that the answer is a clear error."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from core.errors import os_reason
from fusefs.errors import MountError


def check_mountpoint(mountpoint: Path, store: Path | None) -> Path:
    """Return the real path of `mountpoint` if one can mount there.

    Args:
        mountpoint: an existing, empty folder.
        store: the datastore's folder if it is a local one; neither may lie inside the other, by whatever name.

    Raises:
        MountError: missing, no folder, not empty, left over from a mount that died, or over the datastore.
    """
    where = str(mountpoint)
    try:
        real = Path(os.path.realpath(mountpoint, strict=True))
        is_folder = stat.S_ISDIR(real.stat().st_mode)
        if is_folder:
            with os.scandir(real) as entries:
                empty = next(entries, None) is None
    except FileNotFoundError as error:
        raise MountError("mount on", where, "the folder does not exist", f"make it: mkdir -p {where}") from error
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            why = "a former mount there ended without unmounting"
            raise MountError("mount on", where, why, f"clear it with: fusermount3 -u {where} (or umount)") from error
        raise MountError("mount on", where, os_reason(error)) from error
    if not is_folder:
        raise MountError("mount on", where, "it is not a folder")
    if store is not None:
        _check_apart(real, store, where)
    if not empty:
        raise MountError("mount on", where, "the folder is not empty", "choose an empty one, or unmount what is there")
    return real


def check_fuse() -> None:
    """See whether this host can do FUSE at all.

    Raises:
        MountError: no /dev/fuse, no rights to it, or no helper for users.
    """
    device = Path("/dev/fuse")
    if not device.exists():
        hint = "load the module with: modprobe fuse (in a container the host has to allow it)"
        raise MountError("use", str(device), "it does not exist", hint)
    if not os.access(device, os.R_OK | os.W_OK):
        raise MountError("use", str(device), f"user {os.getuid()} may not read and write it")


def _check_apart(mountpoint: Path, store: Path, where: str) -> None:
    # Compared by device and inode, so that bind mounts and links do not hide it.
    try:
        base = Path(os.path.realpath(store, strict=True))
        same_as_store, same_as_mountpoint = base.stat(), mountpoint.stat()
    except OSError as error:
        raise MountError("find the datastore", str(store), os_reason(error)) from error
    for folder in _upwards(mountpoint):
        if os.path.samestat(folder.stat(), same_as_store):
            inside = "is the datastore itself" if folder == mountpoint else f"lies inside the datastore {store}"
            raise MountError("mount on", where, f"it {inside}", "choose a folder elsewhere")
    for folder in _upwards(base):
        if os.path.samestat(folder.stat(), same_as_mountpoint):
            why = f"the datastore {store} lies inside it and would be hidden"
            raise MountError("mount on", where, why, "choose a folder elsewhere")


def _upwards(folder: Path) -> Iterator[Path]:
    yield folder
    yield from folder.parents
