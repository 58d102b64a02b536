"""SHA-256 of many chunks at once.

hashlib does one stream at a time. Chunks are independent of each other, so vector lanes or two interleaved streams
(`_sha256.c`) do several in the same time: 16 lanes of AVX-512 make nine times hashlib's rate on a CPU without SHA
extensions, and still 1.7 times on one with them (`bench/primitives.py`). Which of them serves is measured once, at the
first use, because no CPU flag tells it; hashlib is always among them and serves alone where the C part is not built.

`FLEECE_SHA256` forces one: `auto` (the default), `hashlib`, `lanes16`, `lanes8`, `sha-ni-x2`.
"""

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from core.buffers import Buffer
from core.errors import UsageError

try:
    from datastore import _sha256
except ImportError:  # no compiler where it was installed
    _sha256 = None  # type: ignore[assignment]

HASHLIB: Final = "hashlib"
_ENVIRONMENT: Final = "FLEECE_SHA256"
#: Longest suffix that the C part takes; keyed digests have 32 bytes.
_MAX_NATIVE_SUFFIX: Final = 64
#: The measurement gives one buffer of this many bytes to every lane: 1 ms and less each. With 32 KiB the winner was
#: another one than with chunks of 4 MiB.
_PROBE_SIZE: Final = 128 << 10
#: The first run of each warms up the CPU's vector units, the quickest of the others counts.
_PROBE_RUNS: Final = 3


class Implementation(NamedTuple):
    """One way to hash, and how fast it is here."""

    name: str
    lanes: int  #: buffers it takes to be at full rate
    rate: float  #: bytes per second with all lanes in use, 0 if not measured

    def rate_for(self, count: int) -> float:
        """Bytes per second with `count` buffers at hand."""
        return self.rate * min(count, self.lanes) / self.lanes


_lock: Final = threading.Lock()
_measured: list[Implementation] = []


def digest_many(chunks: Sequence[Buffer], *, suffix: bytes = b"") -> list[bytes]:
    """SHA-256 of each of `chunks`, followed by `suffix`, in order.

    Runs in the calling thread without the GIL. Batches of 16 are best; lengths may differ. Buffers at equal offsets
    modulo 4 KiB compete for the same cache sets: whoever allocates them should stagger them.

    Raises:
        UsageError: `FLEECE_SHA256` names something that this machine does not have.
    """
    name = _choose(len(chunks), suffix)
    if name == HASHLIB:
        return _with_hashlib(chunks, suffix)
    packed = _sha256.digest_many(name, chunks, suffix)
    return [packed[start : start + 32] for start in range(0, len(packed), 32)]


def implementation(count: int = 16) -> str:
    """Name of what serves batches of `count` chunks here."""
    return _choose(count, b"")


def available() -> list[Implementation]:
    """What this machine can run, hashlib first, without measuring."""
    found = [Implementation(HASHLIB, 1, 0.0)]
    if _sha256 is not None:
        found += [Implementation(name, lanes, 0.0) for name, lanes in _sha256.variants()]
    return found


def digest_many_with(name: str, chunks: Sequence[Buffer], *, suffix: bytes = b"") -> list[bytes]:
    """As `digest_many`, by the implementation `name`; for measurements and tests.

    Raises:
        ValueError: this machine does not have it, or the suffix has more than 64 bytes.
    """
    if name == HASHLIB:
        return _with_hashlib(chunks, suffix)
    if _sha256 is None:
        raise ValueError(f"this machine has no variant {name}")
    packed = _sha256.digest_many(name, chunks, suffix)
    return [packed[start : start + 32] for start in range(0, len(packed), 32)]


def measure(size: int = _PROBE_SIZE, runs: int = _PROBE_RUNS) -> list[Implementation]:
    """Time every available implementation on one buffer of `size` bytes per lane, best of `runs`.

    Thread time, not wall-clock time: on a busy machine (and while other threads of ours hash too) it is what a core can
    do.
    """
    candidates = available()
    # One block in pieces, each a little further on, so that they do not meet in the same cache sets.
    pitch = size + 192
    block = memoryview(b"\xa5" * (pitch * max(candidate.lanes for candidate in candidates)))
    results = []
    for candidate in candidates:
        buffers = [block[pitch * lane :][:size] for lane in range(candidate.lanes)]
        seconds = []
        for _ in range(runs + 1):
            start = time.thread_time()
            digest_many_with(candidate.name, buffers)
            seconds.append(time.thread_time() - start)
        results.append(candidate._replace(rate=candidate.lanes * size / max(min(seconds[1:]), 1e-9)))
    return results


def _choose(count: int, suffix: bytes) -> str:
    forced = os.environ.get(_ENVIRONMENT, "auto")
    if len(suffix) > _MAX_NATIVE_SUFFIX:
        return HASHLIB
    if forced != "auto":
        names = [candidate.name for candidate in available()]
        if forced not in names:
            why = f"this machine has {', '.join(names)}"
            raise UsageError("hash with", f"{_ENVIRONMENT}={forced}", why)
        return forced
    if count < 2 or _sha256 is None:
        return HASHLIB
    if not _measured:
        with _lock:
            if not _measured:
                _measured.extend(measure())
    return max(_measured, key=lambda candidate: candidate.rate_for(count)).name


def _with_hashlib(chunks: Sequence[Buffer], suffix: bytes) -> list[bytes]:
    if _sha256 is not None:
        _sha256.clear_registers()  # see `datastore.checksums`
    digests = []
    for chunk in chunks:
        state = hashlib.sha256(chunk)
        state.update(suffix)
        digests.append(state.digest())
    return digests
