"""What the machine could do without a datastore: bare loops of the fastest primitives, one thread per core.

    python bench/bare.py backup IMAGE FOLDER     read, SHA-256 in batches, zstd, CRC, one file per chunk into FOLDER
    python bench/bare.py restore FOLDER IMAGE    the way back: read, CRC, unzstd, SHA-256, write
    python bench/bare.py hash IMAGE              read and SHA-256 only
    python bench/bare.py tree TREE FOLDER        all files of a tree: list, open, read, find cuts, then as `backup`

Nothing else is done: no zero test, no index, no locks, no errors. Prints JSON: seconds, CPU seconds, MiB of memory.
`image_backup.py` and `detection_modes.py` hold Fleece against these.
"""

import argparse
import json
import mmap
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import zstandard
from isal import isal_zlib

from datastore import sha256
from datastore.chunker import Chunker

CHUNK = 4 << 20
#: Bytes of small files that cuts are looked for in together.
BLOCK = 256 << 10
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


def tree(source: Path, folder: Path, batch: int) -> None:
    """No metadata are read but what listing a folder tells, and files are in no order across folders."""
    folder.mkdir()
    waiting = deque([os.fspath(source)])
    busy = 1  # folders that are listed or wait for it
    names = count()

    def work() -> None:
        nonlocal busy
        compressor = zstandard.ZstdCompressor(level=1)
        area = mmap.mmap(-1, batch * CHUNK + 4 * CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_HUGEPAGE)
        room = memoryview(area)
        chunker = Chunker()
        filled = scanned = start = 0
        chunks: list[memoryview] = []

        def look() -> None:
            nonlocal scanned, start
            while cut := chunker.scan(room[scanned:filled]):
                scanned += cut
                chunks.append(room[start:scanned])
                start = scanned
            scanned = filled

        def store() -> None:
            nonlocal filled, scanned, start
            for chunk, digest in zip(chunks, sha256.digest_many(chunks), strict=True):
                frame = compressor.compress(chunk)
                crc = isal_zlib.crc32(frame)
                out = os.open(folder / f"{next(names):08}-{digest.hex()}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                os.writev(out, [crc.to_bytes(12, "little"), frame])
                os.close(out)
            chunks.clear()
            room[: filled - start] = room[start:filled]
            filled, scanned, start = filled - start, scanned - start, 0

        while True:
            try:
                path = waiting.popleft()
            except IndexError:
                if not busy:
                    break
                time.sleep(0.001)
                continue
            files = []
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        with lock:
                            busy += 1
                        waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        files.append(entry.name)
            directory = os.open(path, os.O_RDONLY)
            for name in files:
                fd = os.open(name, os.O_RDONLY, dir_fd=directory)
                while got := os.readv(fd, [room[filled : filled + CHUNK]]):
                    filled += got
                    if filled - scanned >= BLOCK:
                        look()
                        if len(chunks) >= batch or filled + CHUNK > len(room):
                            store()
                    if got < CHUNK:
                        break
                os.close(fd)
            os.close(directory)
            with lock:
                busy -= 1
        look()
        if filled > start:
            chunks.append(room[start:filled])
        store()

    lock = threading.Lock()
    in_threads(work)


def in_threads(work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(len(os.sched_getaffinity(0)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=["backup", "restore", "hash", "tree"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("--batch", type=int, default=16, help="chunks hashed together")
    arguments = parser.parse_args()
    sha256.digest_many([b"", b""])  # the choice of an implementation is not part of the loop
    start, cpu = time.perf_counter(), time.process_time()
    if arguments.loop == "hash":
        hash_only(arguments.source, arguments.batch)
    elif arguments.loop == "tree":
        tree(arguments.source, arguments.target, arguments.batch)
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
