"""A packed set of digests, each with the plain size of its chunk: what a backup session knows to be there."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from core.buffers import Buffer
from core.errors import FleeceError
from datastore.dynamic_index import DynamicIndex
from datastore.index import ArchiveIndex
from datastore.index_file import DIGEST_SIZE
from datastore.names import ArchiveKind

if TYPE_CHECKING:
    from numpy import uint8, uint32, uint64
    from numpy.typing import NDArray

_PREFIX: Final = 8
_MAX_SIZE: Final = (1 << 32) - 1
#: Additions wait in a dict of at most this many entries (150 bytes each), or a sixteenth of the packed ones.
_PENDING: Final = 16_384


class DigestSet:
    """A set of digests with a chunk size each; 36 bytes per digest where there are many of them.

    The bulk lies in three arrays sorted by digest (first 8 bytes as a number, the other 24, size); additions gather in
    a dict that is merged in when it has grown. A small set never imports NumPy. The first size given for a digest
    stays. Used by one thread at a time.
    """

    def __init__(self) -> None:
        self._pending: dict[bytes, int] = {}
        self._keys: NDArray[uint64] | None = None
        self._rests: NDArray[uint8] | None = None
        self._sizes: NDArray[uint32] | None = None

    def add(self, digest: bytes, size: int) -> None:
        """Add `digest` (32 bytes) of a chunk with `size` plain bytes.

        Raises:
            FleeceError: not a digest, or not a size.
        """
        if len(digest) != DIGEST_SIZE or not 0 <= size <= _MAX_SIZE:
            raise FleeceError("remember the chunk", repr(digest.hex()), f"no digest, or {size} is no size")
        if digest in self._pending or self._packed_size(digest) is not None:
            return
        self._pending[bytes(digest)] = size
        if len(self._pending) > max(_PENDING, self._packed_count // 16):
            self._merge()

    def add_packed(self, digests: Buffer, sizes: int | Sequence[int]) -> None:
        """Add many: `digests` packed (32 bytes each), `sizes` one for all or one per digest.

        Raises:
            FleeceError: not whole digests, another number of sizes, or what is no size.
        """
        view = memoryview(digests).cast("B")
        count = len(view) // DIGEST_SIZE
        if len(view) % DIGEST_SIZE or (not isinstance(sizes, int) and len(sizes) != count):
            raise FleeceError("remember chunks", f"of {len(view)} bytes of digests", "lengths do not fit")
        if len(self._pending) + count <= _PENDING:
            self._add_few(bytes(view), [sizes] * count if isinstance(sizes, int) else sizes)
            return
        import numpy as np

        wide = np.full(count, sizes, np.int64) if isinstance(sizes, int) else np.asarray(sizes, np.int64)
        if count and not (wide.min() >= 0 and wide.max() <= _MAX_SIZE):
            raise FleeceError("remember chunks", f"of {len(view)} bytes of digests", "a size among them is no size")
        added = wide.astype(np.uint32)
        # What was there first stays: pending ones go in before.
        self._merge()
        self._insert(np.frombuffer(view, np.uint8).reshape(count, DIGEST_SIZE), added)

    def _add_few(self, digests: bytes, sizes: Sequence[int]) -> None:
        if sizes and not (min(sizes) >= 0 and max(sizes) <= _MAX_SIZE):
            raise FleeceError("remember chunks", f"of {len(digests)} bytes of digests", "a size among them is no size")
        # Backwards: of two sizes of one digest the first one stays.
        places = range(len(digests) - DIGEST_SIZE, -1, -DIGEST_SIZE)
        added = dict(zip((digests[place : place + DIGEST_SIZE] for place in places), reversed(sizes), strict=True))
        if self._keys is not None:
            added = {digest: size for digest, size in added.items() if self._packed_size(digest) is None}
        added.update(self._pending)
        self._pending = added

    def add_index(self, index: ArchiveIndex) -> None:
        """Add every chunk of `index`."""
        if index.kind is ArchiveKind.FIXED:
            last = index.count - 1
            self.add_packed(index.digests[: DIGEST_SIZE * last], index.span(0)[1])
            self.add(index.digest(last), index.span(last)[1])
        else:
            lengths = (
                index.lengths()
                if isinstance(index, DynamicIndex)
                else [index.span(number)[1] for number in range(index.count)]
            )
            self.add_packed(index.digests, lengths)

    def size_of(self, digest: bytes) -> int | None:
        """Plain bytes of the chunk `digest`, None if it is not in the set."""
        size = self._pending.get(digest)
        return self._packed_size(digest) if size is None else size

    def ascending(self) -> Iterator[tuple[bytes, int]]:
        """Every digest with its size, in ascending order; nothing may be added meanwhile."""
        if self._keys is None:
            yield from sorted(self._pending.items())
            return
        self._merge()
        keys, rests, sizes = self._keys, self._rests, self._sizes
        assert keys is not None
        assert rests is not None
        assert sizes is not None
        for key, rest, size in zip(keys, rests, sizes, strict=True):
            yield int(key).to_bytes(_PREFIX, "big") + rest.tobytes(), int(size)

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, bytes) and self.size_of(digest) is not None

    def __len__(self) -> int:
        return len(self._pending) + self._packed_count

    @property
    def _packed_count(self) -> int:
        return 0 if self._keys is None else len(self._keys)

    def _packed_size(self, digest: bytes) -> int | None:
        keys, rests, sizes = self._keys, self._rests, self._sizes
        if keys is None or rests is None or sizes is None or len(digest) != DIGEST_SIZE:
            return None
        key = keys.dtype.type(int.from_bytes(digest[:_PREFIX], "big"))
        first, last = (int(keys.searchsorted(key, side)) for side in ("left", "right"))
        if first == last:
            return None
        # One candidate as a rule; only made-up digests share eight bytes.
        rest = digest[_PREFIX:]
        found = bisect_left(range(last), rest, first, key=lambda number: rests[number].tobytes())
        return int(sizes[found]) if found < last and rests[found].tobytes() == rest else None

    def _merge(self) -> None:
        if not self._pending:
            return
        import numpy as np

        digests = np.frombuffer(b"".join(self._pending), np.uint8).reshape(-1, DIGEST_SIZE)
        sizes = np.fromiter(self._pending.values(), np.uint32, len(self._pending))
        self._pending = {}
        self._insert(digests, sizes)

    def _insert(self, digests: "NDArray[uint8]", sizes: "NDArray[uint32]") -> None:
        import numpy as np

        keys = np.ascontiguousarray(digests[:, :_PREFIX]).view(">u8").ravel().astype(np.uint64)
        rests = digests[:, _PREFIX:]
        if self._keys is not None and self._rests is not None and self._sizes is not None:
            keys = np.concatenate([self._keys, keys])
            rests = np.concatenate([self._rests, rests])
            sizes = np.concatenate([self._sizes, sizes])
        # Stable: of equal digests the older one comes first.
        order = np.argsort(keys, kind="stable")
        keys, rests, sizes = keys[order], rests[order], sizes[order]
        same_key = keys[1:] == keys[:-1]
        if same_key.any():
            same = same_key & (rests[1:] == rests[:-1]).all(axis=1)
            if not np.array_equal(same, same_key):
                # Different digests with one prefix: order by all 32 bytes, so that lookups stay a binary search.
                words = np.ascontiguousarray(rests).view(">u8").reshape(-1, 3)
                order = np.lexsort((words[:, 2], words[:, 1], words[:, 0], keys))
                keys, rests, sizes = keys[order], rests[order], sizes[order]
                same = (keys[1:] == keys[:-1]) & (rests[1:] == rests[:-1]).all(axis=1)
            keep = np.concatenate([[True], ~same])
            keys, rests, sizes = keys[keep], rests[keep], sizes[keep]
        self._keys, self._rests, self._sizes = keys, np.ascontiguousarray(rests), sizes
