"""How much all processes of this host have put into one cache, so that each notices what the others do.

A process knows what it has cached itself. What others cached it would only find by looking through 65536 folders, so
everybody adds what he caches to one number, and looks again when that has grown much without him. The number only
grows; nothing but the differences between two looks at it means anything, so it may be lost or damaged.
"""

import fcntl
import os
from pathlib import Path
from struct import Struct
from typing import Final

from datastore.files import FILE_MODE, Owner, make_folders

_NAME: Final = ".fleece/s3-cache-growth"
_NUMBER: Final = Struct("<Q")
_WRAP: Final = 1 << 64


class CacheGrowth:
    """The number of one cache folder; quick system calls, from one worker thread at a time."""

    def __init__(self, base: Path, owner: Owner) -> None:
        self._base, self._owner = base, owner
        self._seen: int | None = None
        self.foreign = 0  #: bytes that others have cached since `forget`

    def add(self, size: int) -> None:
        """Count `size` bytes that this process caches, and notice those of others. A folder without rights is fine."""
        try:
            total = self._add(size)
        except OSError:
            return  # nobody else can be told; each process keeps the limit for itself
        if self._seen is not None:
            self.foreign += (total - size - self._seen) % _WRAP
        self._seen = total

    def forget(self) -> None:
        """The folder is being looked through: what others have cached so far will be known."""
        self.foreign = 0

    def _add(self, size: int) -> int:
        make_folders(self._base, ".fleece", self._owner)
        fd = os.open(self._base / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            data = os.pread(fd, _NUMBER.size, 0)
            if not data:
                os.fchmod(fd, FILE_MODE)
                self._owner.own(fd)
            before = _NUMBER.unpack(data)[0] if len(data) == _NUMBER.size else 0
            total: int = (before + size) % _WRAP
            os.pwrite(fd, _NUMBER.pack(total), 0)
        finally:
            os.close(fd)
        return total
