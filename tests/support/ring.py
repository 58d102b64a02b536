"""Reads the ring that the guest's program `ring` writes, and says whether disks show one instant.

Number n goes into slot n % slots of the first disk, then of the second. So at any instant the newest number of a disk
is that of the disk before it, or one less, and every slot holds the newest number of its own that is not above it.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Bytes that hold one number, repeated.
BLOCK: Final = 4096
Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Ring:
    """Where numbers are on each disk: slot i at `i * stride`."""

    slots: int = 64
    stride: int = BLOCK

    def command(self, *devices: str, start: int = 1, count: int = 0, told: str = "-") -> str:
        """The guest's command line; `count` 0 writes until killed, `told` is a file that gets the newest number."""
        return f"ring {self.slots} {self.stride} {start} {count} {told} {' '.join(devices)}"

    def numbers(self, read: Read) -> list[int]:
        """The number in each slot, 0 where nothing was written; `read(offset, length)` gives bytes of the disk.

        Raises:
            AssertionError: a slot holds parts of two writes.
        """
        found = []
        for slot in range(self.slots):
            words = set(struct.unpack(f"<{BLOCK // 8}Q", read(slot * self.stride, BLOCK)))
            assert len(words) == 1, f"slot {slot} holds parts of several writes: {sorted(words)}"
            found.append(words.pop())
        return found

    def newest(self, read: Read, *, start: int = 1) -> int:
        """The newest number of a disk that shows one instant of a writer that began at `start`; `start - 1` for none.

        Raises:
            AssertionError: an older write is missing although a newer one is there.
        """
        return self.newest_of(self.numbers(read), start=start)

    def newest_of(self, numbers: Sequence[int], *, start: int = 1) -> int:
        """As `newest`, of the number in each slot."""
        newest = max(*numbers, start - 1)
        for slot, number in enumerate(numbers):
            expected = newest - (newest - slot) % self.slots
            expected = expected if expected >= start else 0
            assert number == expected, f"slot {slot} holds {number}, with {newest} written it must hold {expected}"
        return newest

    def assert_one_instant(self, *reads: Read, start: int = 1) -> int:
        """Check that the disks, in the order of writing, show one instant; the first disk's newest number.

        Raises:
            AssertionError: they do not; the text has the numbers.
        """
        newest = [self.newest(read, start=start) for read in reads]
        behind = [newest[0] - number for number in newest]
        assert behind == sorted(behind), f"the disks hold {newest}, not in the order of writing"
        assert behind[-1] in (0, 1), f"the disks hold {newest}: not one instant"
        return newest[0]


def file_reader(path: Path) -> Read:
    """`read` for a raw image file; beyond its end there are zeros."""

    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length).ljust(length, b"\0")

    return read
