"""What this machine's primitives can do: the figures every benchmark of ours is held against.

`fleece benchmark` and `bench/primitives.py` show them. One thread, chunks of 4 MiB, medians.
"""

import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from datastore import sha256
from datastore.codec import KEY_SIZE, ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode

#: Bytes of the chunks that are measured.
CHUNK_SIZE: Final = 4 << 20
_RUNS: Final = 5


@dataclass(frozen=True, slots=True)
class Primitive:
    """One primitive and its rate."""

    name: str  #: stable, for scripts: `sha256-lanes16`
    text: str  #: for people
    rate: float  #: bytes of plain data per second
    used: bool  #: Fleece uses it here (for full batches)

    def to_json(self) -> dict[str, Any]:
        """As `fleece benchmark --output json` prints it; the rate in MB/s (10^6 bytes)."""
        return {"name": self.name, "text": self.text, "mb-per-s": round(self.rate / 1e6, 1), "used": self.used}


def measure(runs: int = _RUNS) -> list[Primitive]:
    """Measure everything, each as the median of `runs` (three seconds in all on a slow machine)."""
    return list(measure_each(runs))


def measure_each(runs: int = _RUNS) -> Iterator[Primitive]:
    """As `measure`, one result at a time."""
    yield from _hashes(runs)
    yield from _checksums(runs)
    yield from _compression(runs)
    yield from _encryption(runs)
    yield from _zeros(runs)


def median_rate(work: Callable[[], object], size: int, runs: int = _RUNS) -> float:
    """Bytes per second of `work`, which handles `size` bytes: the median of `runs` after one that does not count.

    Measured in time of the calling thread, so that other processes on a busy machine count little.
    """
    work()
    seconds = []
    for _ in range(runs):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return size / max(sorted(seconds)[runs // 2], 1e-9)


def half_random(size: int = CHUNK_SIZE) -> bytes:
    """Bytes of which zstd can save about half: pages of 4 KiB, random and repetitive by turns."""
    page = 4096
    pattern = (b"fleece backs up virtual machines " * (page // 33 + 1))[:page]
    return b"".join(os.urandom(page) if number % 2 else pattern for number in range(size // page))


def _hashes(runs: int) -> Iterator[Primitive]:
    serving = sha256.implementation()
    pitch = CHUNK_SIZE + 192  # staggered, so that lanes do not meet in the same cache sets
    candidates = sha256.available()
    block = memoryview(os.urandom(pitch * max(candidate.lanes for candidate in candidates)))
    for candidate in candidates:
        chunks = [block[pitch * lane :][:CHUNK_SIZE] for lane in range(candidate.lanes)]
        rate = median_rate(
            lambda name=candidate.name, chunks=chunks: sha256.digest_many_with(name, chunks),  # type: ignore[misc]
            candidate.lanes * CHUNK_SIZE,
            runs,
        )
        side = f", {candidate.lanes} chunks side by side" if candidate.lanes > 1 else ", one chunk at a time"
        yield Primitive(f"sha256-{candidate.name}", f"SHA-256, {candidate.name}{side}", rate, candidate.name == serving)


def _checksums(runs: int) -> Iterator[Primitive]:
    from isal import isal_zlib

    data = os.urandom(CHUNK_SIZE)
    yield Primitive("crc32-isal", "CRC-32, isal", median_rate(lambda: isal_zlib.crc32(data), CHUNK_SIZE, runs), True)
    yield Primitive("crc32-zlib", "CRC-32, zlib", median_rate(lambda: zlib.crc32(data), CHUNK_SIZE, runs), False)


def _compression(runs: int) -> Iterator[Primitive]:
    import zstandard

    data = half_random()
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    frame = compressor.compress(data)
    rate = median_rate(lambda: compressor.compress(data), CHUNK_SIZE, runs)
    yield Primitive("zstd-compress", "zstd level 1, half incompressible: compress", rate, True)
    rate = median_rate(lambda: decompressor.decompress(frame), CHUNK_SIZE, runs)
    yield Primitive("zstd-decompress", "zstd level 1, half incompressible: decompress", rate, True)


def _encryption(runs: int) -> Iterator[Primitive]:
    # The codec's own path without compression, which is nearly all AES-GCM: the CRC is six times as quick.
    codec = ChunkCodec(CryptKey.from_raw(bytes(KEY_SIZE)), CryptMode.ENCRYPT)
    data = os.urandom(CHUNK_SIZE)
    blob = codec.encode(data, compress=False)
    rate = median_rate(lambda: codec.encode(data, compress=False), CHUNK_SIZE, runs)
    yield Primitive("aes-256-gcm-encrypt", "AES-256-GCM with CRC: encrypt", rate, True)
    rate = median_rate(
        lambda: codec.decode(blob, digest=None, size=None, crypt_mode=None, where="benchmark"), CHUNK_SIZE, runs
    )
    yield Primitive("aes-256-gcm-decrypt", "AES-256-GCM with CRC: decrypt", rate, True)


def _zeros(runs: int) -> Iterator[Primitive]:
    # The bytearray on the left: it compares memory; with the view on the left Python 3.11 compares item by item, at a
    # fiftieth of the rate.
    zeros, data = bytearray(CHUNK_SIZE), memoryview(bytearray(CHUNK_SIZE))
    yield Primitive(
        "zero-compare", "zero test: compare with zeros", median_rate(lambda: zeros == data, CHUNK_SIZE, runs), True
    )
