"""fallocate(2), which Python has only without modes: giving space back and writing zeros without sending them."""

import ctypes
import errno
import os
from typing import Final

KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
ZERO_RANGE: Final = 0x10


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2). Threads go on meanwhile.

    Raises:
        OSError: what the system says.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give the range up; False if the file knows no such thing, so that there is no need to try again."""
    try:
        fallocate(fd, KEEP_SIZE | PUNCH_HOLE, offset, length)
    except OSError as error:
        return error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EPERM, errno.ENODEV)
    return True
