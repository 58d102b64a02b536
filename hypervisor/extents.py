"""The map of a disk at the grain of the backup's chunks.

A disk image can have millions of small extents, but a backup only asks of each chunk whether it must be read. So
extents are merged to whole chunks while they come in, and memory follows the size of the disk, not its fragmentation.
"""

from typing import Final

from core.disks import Extent, ExtentState

#: Bytes of a chunk of a disk image.
CHUNK_SIZE: Final = 4 * 1024**2


class ExtentBuilder:
    """Collects neighbouring ranges from offset 0 to `size` and gives the extents of whole chunks.

    A chunk whose parts differ becomes DATA: it must be read as a whole.
    """

    def __init__(self, size: int, grain: int = CHUNK_SIZE) -> None:
        self._size, self._grain = size, grain
        self._offset = 0
        self._chunk: ExtentState | None = None  # what is known of the chunk that `_offset` lies in
        self._extents: list[Extent] = []

    @property
    def offset(self) -> int:
        """Where the next range starts."""
        return self._offset

    def add(self, length: int, state: ExtentState) -> None:
        """The next `length` bytes are in `state`; what lies beyond the end of the disk is ignored."""
        end = min(self._size, self._offset + length)
        while self._offset < end:
            start = self._offset // self._grain * self._grain
            if self._offset == start and end - start >= self._grain:
                whole = (end - start) // self._grain * self._grain
                self._emit(whole, state)
                self._offset += whole
                continue
            boundary = min(start + self._grain, self._size)
            if self._chunk is None or self._chunk is state:
                self._chunk = state
            else:
                self._chunk = ExtentState.DATA
            self._offset = min(end, boundary)
            if self._offset == boundary:
                self._emit(boundary - start, self._chunk)
                self._chunk = None

    def finish(self) -> list[Extent]:
        """All extents; whatever was not added counts as DATA."""
        self.add(self._size - self._offset, ExtentState.DATA)
        return self._extents

    def _emit(self, length: int, state: ExtentState) -> None:
        last = self._extents[-1] if self._extents else None
        if last is not None and last.state is state:
            self._extents[-1] = Extent(last.offset, last.length + length, state)
        else:
            self._extents.append(Extent(last.offset + last.length if last else 0, length, state))
