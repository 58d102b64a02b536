"""Errors of the mount, and the one boundary where errors become numbers for the kernel.

FleeceError
└── MountError      the mount cannot be made: the mountpoint, /dev/fuse, or an option is not fit
"""

import errno

from core.errors import BusyError, FleeceError, NotFoundError
from datastore.errors import ChunkNotFoundError, KeyNeededError, OwnerError, SnapshotNotFoundError, StoreError
from diskfs.errors import ImageLibraryError


class MountError(FleeceError):
    """The mount cannot be made."""


class StaleError(FleeceError):
    """A snapshot was removed while one of its files or folders was in use."""


#: The first class that fits decides.
_ERRNO: tuple[tuple[type[Exception], int], ...] = (
    (StaleError, errno.ESTALE),
    (SnapshotNotFoundError, errno.ESTALE),  # the kernel holds an inode of it
    (ChunkNotFoundError, errno.EIO),
    (NotFoundError, errno.ENOENT),
    (KeyNeededError, errno.EACCES),
    (OwnerError, errno.EACCES),
    (BusyError, errno.EBUSY),
    (StoreError, errno.EIO),
    (ImageLibraryError, errno.EOPNOTSUPP),
    (FleeceError, errno.EIO),
    (MemoryError, errno.ENOMEM),
)


def errno_of(error: Exception) -> int:
    """The number that tells the kernel about `error`; EIO for everything that has no better one."""
    for kind, number in _ERRNO:
        if isinstance(error, kind):
            return number
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO
