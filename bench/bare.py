"""What the machine could do without a datastore: bare loops of the fastest primitives, one thread per core.

    python bench/bare.py backup IMAGE FOLDER     read, SHA-256 in batches, zstd, CRC, one file per chunk into FOLDER
    python bench/bare.py restore FOLDER IMAGE    the way back: read, CRC, unzstd, SHA-256, write
    python bench/bare.py hash IMAGE              read and SHA-256 only

Nothing else is done: no zero test, no index, no locks, no errors. Prints JSON: seconds, CPU seconds, MiB of memory.
`image_backup.py` holds Fleece against these.
"""

import argparse
import json
import mmap
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard
from isal import isal_zlib

from datastore import sha256

CHUNK = 4 << 20
#: Between buffers, beyond a chunk: equal offsets modulo 4 KiB compete for the same cache sets.
SKEW = 4096 + 64


def buffers(count: int) -> list[memoryview]:
    """Chunk buffers in huge pages where there are any."""
    area = mmap.mmap(-1, count * (CHUNK + SKEW), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(area)
    return [view[number * (CHUNK + SKEW) :][:CHUNK] for number in range(count)]


class Counter:
    """Deals numbers out to threads, `batch` at a time."""

    def __init__(self, count: int, batch: int) -> None:
        self._numbers: Iterator[int] = iter(range(count))
        self._lock = threading.Lock()
        self._batch = batch

    def take(self) -> list[int]:
        with self._lock:
            return [number for _, number in zip(range(self._batch), self._numbers, strict=False)]


def backup(image: Path, folder: Path, batch: int) -> None:
    folder.mkdir()
    size = image.stat().st_size
    counter = Counter(-(-size // CHUNK), batch)

    def work() -> None:
        fd = os.open(image, os.O_RDONLY)
        compressor = zstandard.ZstdCompressor(level=1)
        mine = buffers(batch)
        while numbers := counter.take():
            chunks = [mine[place][: min(CHUNK, size - number * CHUNK)] for place, number in enumerate(numbers)]
            for number, chunk in zip(numbers, chunks, strict=True):
                os.preadv(fd, [chunk], number * CHUNK)
            for number, chunk, digest in zip(numbers, chunks, sha256.digest_many(chunks), strict=True):
                frame = compressor.compress(chunk)
                crc = isal_zlib.crc32(frame)
                out = os.open(folder / f"{number:08}-{digest.hex()}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                os.writev(out, [crc.to_bytes(12, "little"), frame])
                os.close(out)
        os.close(fd)

    in_threads(work)


def restore(folder: Path, image: Path, batch: int) -> None:
    names = sorted(folder.iterdir())
    counter = Counter(len(names), batch)
    target = os.open(image, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def work() -> None:
        decompressor = zstandard.ZstdDecompressor()
        mine = buffers(batch)
        while numbers := counter.take():
            chunks = []
            for place, number in enumerate(numbers):
                fd = os.open(names[number], os.O_RDONLY)
                data = memoryview(os.read(fd, CHUNK + 4096))
                os.close(fd)
                if isal_zlib.crc32(data[12:]) != int.from_bytes(data[:12], "little"):
                    raise SystemExit(f"{names[number]}: CRC")
                length = decompressor.stream_reader(data[12:], read_size=len(data)).readinto(mine[place])
                chunks.append(mine[place][:length])
            for number, digest, chunk in zip(numbers, sha256.digest_many(chunks), chunks, strict=True):
                if not names[number].name.endswith(digest.hex()):
                    raise SystemExit(f"{names[number]}: digest")
                os.pwrite(target, chunk, number * CHUNK)

    in_threads(work)
    os.close(target)


def hash_only(image: Path, batch: int) -> None:
    size = image.stat().st_size
    counter = Counter(-(-size // CHUNK), batch)

    def work() -> None:
        fd = os.open(image, os.O_RDONLY)
        mine = buffers(batch)
        while numbers := counter.take():
            chunks = [mine[place][: min(CHUNK, size - number * CHUNK)] for place, number in enumerate(numbers)]
            for number, chunk in zip(numbers, chunks, strict=True):
                os.preadv(fd, [chunk], number * CHUNK)
            sha256.digest_many(chunks)
        os.close(fd)

    in_threads(work)


def in_threads(work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(len(os.sched_getaffinity(0)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=["backup", "restore", "hash"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("--batch", type=int, default=16, help="chunks hashed together")
    arguments = parser.parse_args()
    sha256.digest_many([b"", b""])  # the choice of an implementation is not part of the loop
    start, cpu = time.perf_counter(), time.process_time()
    if arguments.loop == "hash":
        hash_only(arguments.source, arguments.batch)
    elif arguments.loop == "backup":
        backup(arguments.source, arguments.target, arguments.batch)
    else:
        restore(arguments.source, arguments.target, arguments.batch)
    result = {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "rss-mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
