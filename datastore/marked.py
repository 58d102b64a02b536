"""The digests that a garbage collection has marked, packed: 32 bytes for each.

They tell which digests of the next index are new, so that each chunk is touched once, and keep the sweep from removing
a chunk that was marked although its age says otherwise (a clock that jumps).
"""

import mmap
from typing import TYPE_CHECKING, Final

from datastore.index_file import DIGEST_SIZE

if TYPE_CHECKING:
    from numpy import bool_, uint64
    from numpy.typing import NDArray

#: Digests kept at most (128 MB). Beyond that all are forgotten, and chunks may be touched more than once.
MAX_MARKED: Final = 4 << 20
_WORDS: Final = DIGEST_SIZE // 8
#: The set lies in this many parts by the first bits of a digest, so that adding to it copies a part at a time.
_PART_BITS: Final = 6


class MarkedDigests:
    """A growing set of digests: the first eight bytes of each in sorted arrays of numbers, the rest beside them.

    Digests come in through `add` and count after `take`. Used by one thread at a time; `in` by several, after `take`.
    """

    def __init__(self, *, limit: int = MAX_MARKED) -> None:
        import numpy as np

        self._limit = limit
        self._starts = np.arange(1, 1 << _PART_BITS, dtype=np.uint64) << np.uint64(64 - _PART_BITS)
        self._parts = [_Part() for _ in range(1 << _PART_BITS)]
        self._added: list[NDArray[uint64]] = []
        self.waiting = 0  #: digests added and not taken yet, with repetitions
        self.total = 0  #: digests added in all, with repetitions
        self.taken = 0  #: digests that `take` gave in all
        self.complete = True  #: False once digests were forgotten

    def add(self, digests: "NDArray[uint64]", repeated: int = 0) -> None:
        """Add digests, an array of shape (n, 4) of their bytes; `repeated` more are known to have been added before."""
        self.total += len(digests) + repeated
        self.waiting += len(digests)
        if len(digests):
            self._added.append(digests)

    def take(self) -> bytes:
        """The digests that are new since the last call, packed and in ascending order; they are in the set now."""
        import numpy as np

        if not self._added:
            return b""
        batch = np.concatenate(self._added)
        self._added, self.waiting = [], 0
        keys = batch[:, 0].view(">u8").astype(np.uint64)
        order = np.argsort(keys)
        keys, batch = keys[order], batch[order]
        same_key = keys[1:] == keys[:-1]
        if same_key.any():
            same = same_key & (batch[1:, 1:] == batch[:-1, 1:]).all(axis=1)
            if not np.array_equal(same, same_key):
                # Different digests with one prefix: equal ones must come to lie side by side.
                order = np.lexsort((batch[:, 3], batch[:, 2], batch[:, 1], keys))
                keys, batch = keys[order], batch[order]
                same = (keys[1:] == keys[:-1]) & (batch[1:, 1:] == batch[:-1, 1:]).all(axis=1)
            keep = np.concatenate([[True], ~same])
            keys, batch = keys[keep], batch[keep]
        ends = [*keys.searchsorted(self._starts).tolist(), len(keys)]
        fresh = np.concatenate([
            part.unknown(keys[start:end], batch[start:end, 1:])
            for part, start, end in zip(self._parts, [0, *ends[:-1]], ends, strict=True)
        ])  # fmt: skip
        keys, batch = keys[fresh], batch[fresh]
        if len(self) + len(keys) > self._limit:
            self.complete = False
            self._parts = [_Part() for _ in self._parts]
        ends = [*keys.searchsorted(self._starts).tolist(), len(keys)]
        for part, start, end in zip(self._parts, [0, *ends[:-1]], ends, strict=True):
            part.insert(keys[start:end], batch[start:end, 1:])
        self.taken += len(keys)
        packed: bytes = batch.tobytes()
        return packed

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, bytes) or len(digest) != DIGEST_SIZE:
            return False
        import numpy as np

        part = self._parts[digest[0] >> (8 - _PART_BITS)]
        return part.has(int.from_bytes(digest[:8], "big"), np.frombuffer(digest, np.uint64)[1:])

    def __len__(self) -> int:
        return sum(map(len, self._parts))


class _Part:
    """Some of the digests: the keys in ascending order, and the other 24 bytes of each beside them.

    They lie in mappings of their own: what the allocator gets back from one thread, another cannot use.
    """

    __slots__ = ("keys", "rests")

    def __init__(self) -> None:
        self.keys, self.rests = _mapped(0)

    def insert(self, keys: "NDArray[uint64]", rests: "NDArray[uint64]") -> None:
        """Take digests in that are not there; `keys` ascend."""
        import numpy as np

        if not len(keys):
            return
        places = self.keys.searchsorted(keys, "left") + np.arange(len(keys))
        kept = np.ones(len(self.keys) + len(keys), np.bool_)
        kept[places] = False
        all_keys, all_rests = _mapped(len(kept))
        all_keys[places], all_keys[kept] = keys, self.keys
        all_rests[places], all_rests[kept] = rests, self.rests
        self.keys, self.rests = all_keys, all_rests

    def unknown(self, keys: "NDArray[uint64]", rests: "NDArray[uint64]") -> "NDArray[bool_]":
        """Which of the digests are not there."""
        import numpy as np

        unknown = np.ones(len(keys), np.bool_)
        if not len(self.keys) or not len(keys):
            return unknown
        first = self.keys.searchsorted(keys, "left")
        here = np.flatnonzero(self.keys[np.minimum(first, len(self.keys) - 1)] == keys)
        here = here[first[here] < len(self.keys)]
        unknown[here] = (self.rests[first[here]] != rests[here]).any(axis=1)
        # Only made-up digests share eight bytes with several others.
        for number in here[unknown[here]]:
            unknown[number] = not self.has(int(keys[number]), rests[number])
        return unknown

    def has(self, key: int, rest: "NDArray[uint64]") -> bool:
        wanted = self.keys.dtype.type(key)
        first, last = (int(self.keys.searchsorted(wanted, side)) for side in ("left", "right"))
        return bool((self.rests[first:last] == rest).all(axis=1).any())

    def __len__(self) -> int:
        return len(self.keys)


def _mapped(count: int) -> "tuple[NDArray[uint64], NDArray[uint64]]":
    """Room for so many keys and rests."""
    import numpy as np

    if not count:
        return np.empty(0, np.uint64), np.empty((0, _WORDS - 1), np.uint64)
    words = np.frombuffer(mmap.mmap(-1, count * DIGEST_SIZE), np.uint64)
    return words[:count], words[count:].reshape(count, _WORDS - 1)
