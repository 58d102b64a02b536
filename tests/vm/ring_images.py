"""Reads the ring of numbers (`tests.support.ring`) out of whole images, quickly enough for thousands of slots.

A lost write shows only if its slot is not written again before the next backup. So the ring is larger than what the
guest writes in two rounds: its slots fill the whole disk, one block beside the other, and a chunk is dirty in some
rounds only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from tests.support.ring import BLOCK, Ring

#: Bytes of each disk of the ring.
SIZE: Final = 32 << 20
RING: Final = Ring(slots=SIZE // BLOCK)


def numbers(image: Path) -> list[int]:
    """The number in each slot of an image of `SIZE` bytes.

    Raises:
        AssertionError: a slot holds parts of several writes.
    """
    assert image.stat().st_size == SIZE
    blocks = np.fromfile(image, dtype="<u8").reshape(RING.slots, BLOCK // 8)
    torn = np.flatnonzero((blocks != blocks[:, :1]).any(axis=1))
    assert torn.size == 0, f"slots {torn[:10]} hold parts of several writes"
    found: list[int] = blocks[:, 0].tolist()
    return found


def assert_one_instant(images: Sequence[Path]) -> int:
    """The disks, in the order of writing, show one instant; the newest number of the first.

    Raises:
        AssertionError: they do not, or an older write is missing although a newer one is there.
    """
    newest = [RING.newest_of(numbers(image)) for image in images]
    behind = [newest[0] - number for number in newest]
    assert behind == sorted(behind), f"the disks hold {newest}, not in the order of writing"
    assert behind[-1] in (0, 1), f"the disks hold {newest}: not one instant"
    return newest[0]


def position(image: Path) -> int:
    """The newest number that the running guest has written to its (raw) disk."""
    first_words = np.memmap(image, dtype="<u8", mode="r").reshape(RING.slots, BLOCK // 8)[:, 0]
    return int(first_words.max())
