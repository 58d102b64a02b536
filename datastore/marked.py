"""The digests that a garbage collection has marked, packed: 32 bytes for each.

They tell which digests of the next index are new, so that each chunk is touched once, and keep the sweep from removing
a chunk that was marked although its age says otherwise (a clock that jumps).
"""

from typing import TYPE_CHECKING, Final

from datastore.index_file import DIGEST_SIZE

if TYPE_CHECKING:
    from numpy import bool_, intp, uint64
    from numpy.typing import NDArray

#: Digests kept at most (128 MB). Beyond that all are forgotten, and chunks may be touched more than once.
MAX_MARKED: Final = 4 << 20
_WORDS: Final = DIGEST_SIZE // 8


class MarkedDigests:
    """A growing set of digests: the first eight bytes of each as a sorted array of numbers, the rest beside it.

    Digests come in through `add` and count after `take`. Used by one thread at a time; `in` by several, after `take`.
    """

    def __init__(self, *, limit: int = MAX_MARKED) -> None:
        import numpy as np

        self._limit = limit
        self._keys: NDArray[uint64] = np.empty(0, np.uint64)
        self._rests: NDArray[uint64] = np.empty((0, _WORDS - 1), np.uint64)
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
        first = self._keys.searchsorted(keys, "left")
        fresh = ~self._known(keys, batch[:, 1:], first)
        keys, batch, first = keys[fresh], batch[fresh], first[fresh]
        if len(self._keys) + len(keys) > self._limit:
            self.complete = False
            self._keys, self._rests = keys, np.ascontiguousarray(batch[:, 1:])
        else:
            self._keys = np.insert(self._keys, first, keys)
            self._rests = np.insert(self._rests, first, batch[:, 1:], axis=0)
        self.taken += len(keys)
        return batch.tobytes()

    def _known(self, keys: "NDArray[uint64]", rests: "NDArray[uint64]", first: "NDArray[intp]") -> "NDArray[bool_]":
        import numpy as np

        known = np.zeros(len(keys), np.bool_)
        if not len(self._keys):
            return known
        here = np.flatnonzero(self._keys[np.minimum(first, len(self._keys) - 1)] == keys)
        here = here[first[here] < len(self._keys)]
        known[here] = (self._rests[first[here]] == rests[here]).all(axis=1)
        # Only made-up digests share eight bytes with several others.
        for number in here[~known[here]]:
            known[number] = self._has(int(keys[number]), rests[number])
        return known

    def _has(self, key: int, rest: "NDArray[uint64]") -> bool:
        wanted = self._keys.dtype.type(key)
        first, last = (int(self._keys.searchsorted(wanted, side)) for side in ("left", "right"))
        return bool((self._rests[first:last] == rest).all(axis=1).any())

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, bytes) or len(digest) != DIGEST_SIZE:
            return False
        import numpy as np

        return self._has(int.from_bytes(digest[:8], "big"), np.frombuffer(digest, np.uint64)[1:])

    def __len__(self) -> int:
        return len(self._keys)
