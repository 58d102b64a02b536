"""Requests and bytes of a store since its counters were last set back, in a file of 4096 bytes as PBS 4.2 keeps it.

PBS maps such a file into the memory of all its processes. Slots of 32 bytes hold one number each, so that no two
numbers share a cache line there. Here several processes add what they have counted under a lock of the file.
"""

import fcntl
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Final, Self

from core.errors import FormatError
from datastore.files import FILE_MODE, Owner, make_folders, read_file, store_errors

#: Relative to the cache folder.
COUNTERS_NAME: Final = ".fleece/s3-counters"
SIZE: Final = 4096
#: The first bytes of SHA-256 of `Proxmox shared request counters v1.0`.
MAGIC: Final = bytes.fromhex("e06e58fc1a4db405")
#: The order of the numbers, under the names of PBS's thresholds.
NAMES: Final = ("s3-get", "s3-delete", "s3-put", "s3-head", "s3-post", "s3-upload", "s3-download")
_SLOT: Final = Struct("<Q24x")
_MAGIC_SLOT: Final = Struct("8s24x")
_WRAP: Final = 1 << 64


@dataclass(frozen=True, slots=True)
class CounterValues:
    """What the file says, by the names of `NAMES`."""

    counts: Mapping[str, int]
    thresholds: Mapping[str, int]  #: 0: none

    @classmethod
    def empty(cls) -> Self:
        """Nothing counted, no thresholds."""
        return cls(dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0))

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> Self:
        """Read the content of a file.

        Raises:
            FormatError: another length or magic.
        """
        if len(data) != SIZE:
            raise FormatError("read the counters", where, f"{len(data)} bytes, not {SIZE}")
        magic = _MAGIC_SLOT.unpack_from(data)[0]
        if magic != MAGIC:
            raise FormatError("read the counters", where, f"it begins with {magic.hex()}, not {MAGIC.hex()}")
        values = [_SLOT.unpack_from(data, _SLOT.size * (1 + number))[0] for number in range(2 * len(NAMES))]
        return cls(dict(zip(NAMES, values, strict=False)), dict(zip(NAMES, values[len(NAMES) :], strict=True)))

    def pack(self) -> bytes:
        """The `SIZE` bytes that `parse` reads back."""
        numbers = [*(self.counts[name] for name in NAMES), *(self.thresholds[name] for name in NAMES)]
        slots = [_MAGIC_SLOT.pack(MAGIC), *(_SLOT.pack(number % _WRAP) for number in numbers)]
        return b"".join(slots).ljust(SIZE, b"\0")

    def plus(self, counts: Mapping[str, int]) -> Self:
        """The same with `counts` added."""
        return type(self)({name: self.counts[name] + counts.get(name, 0) for name in NAMES}, self.thresholds)


class CounterFile:
    """The file of one cache folder; quick system calls."""

    def __init__(self, base: Path, owner: Owner) -> None:
        self._base, self._owner, self._path = base, owner, base / COUNTERS_NAME

    def read(self) -> CounterValues:
        """What was counted; nothing without a file.

        Raises:
            FormatError: no such file.
            StoreError: unreadable.
        """
        with store_errors("read", self._path):
            try:
                data = read_file(self._path, limit=SIZE)
            except FileNotFoundError:
                return CounterValues.empty()
        return CounterValues.parse(data, where=str(self._path))

    def add(self, counts: Mapping[str, int]) -> CounterValues:
        """Add what this process has counted; a damaged file begins anew.

        Returns:
            the sums.

        Raises:
            StoreError: it cannot be written.
        """
        return self._change(lambda values: values.plus(counts))

    def reset(self) -> None:
        """Begin to count anew; thresholds stay. Errors as `add`."""
        self._change(lambda values: CounterValues(dict.fromkeys(NAMES, 0), values.thresholds))

    def set_thresholds(self, thresholds: Mapping[str, int]) -> None:
        """Set the thresholds; those not named are none. Errors as `add`."""
        wanted = {name: thresholds.get(name, 0) for name in NAMES}
        self._change(lambda values: CounterValues(values.counts, wanted))

    def _change(self, change: Callable[[CounterValues], CounterValues]) -> CounterValues:
        with store_errors("write", self._path):
            make_folders(self._base, ".fleece", self._owner)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                data = os.pread(fd, SIZE + 1, 0)
                if not data:
                    os.fchmod(fd, FILE_MODE)
                    self._owner.own(fd)
                try:
                    before = CounterValues.parse(data, where=str(self._path))
                except FormatError:
                    before = CounterValues.empty()
                values = change(before)
                os.pwrite(fd, values.pack(), 0)
                os.ftruncate(fd, SIZE)
            finally:
                os.close(fd)
        return values
