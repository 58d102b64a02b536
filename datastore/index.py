"""What both kinds of index have in common."""

from typing import Protocol, runtime_checkable

from datastore.names import ArchiveKind


@runtime_checkable
class ArchiveIndex(Protocol):
    """The digests of one archive in order, opened for reading: a `FixedIndex` or a `DynamicIndex`.

    Everything is recomputed from the entries; nothing in the header but the sizes is trusted.
    """

    @property
    def where(self) -> str:
        """The archive as people name it: `vm/100/2026-01-02T03:04:05Z/drive-scsi0.img.fidx`."""
        ...

    @property
    def kind(self) -> ArchiveKind:
        """FIXED or DYNAMIC."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the image or stream."""
        ...

    @property
    def count(self) -> int:
        """Number of chunks, at least 1."""
        ...

    @property
    def csum(self) -> bytes:
        """SHA-256 over the entry area, computed at first use."""
        ...

    @property
    def digests(self) -> memoryview:
        """All digests in order, packed: `32 * count` bytes (a view of a fixed index, a copy of a dynamic one)."""
        ...

    def digest(self, number: int) -> bytes:
        """Digest of chunk `number`, 0 <= number < count."""
        ...

    def span(self, number: int) -> tuple[int, int]:
        """Offset and length in bytes of chunk `number` in the archive."""
        ...

    def find(self, offset: int) -> int:
        """Number of the chunk that holds byte `offset`, 0 <= offset < size."""
        ...
