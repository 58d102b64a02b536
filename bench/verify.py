"""Verify of a whole datastore against a bare loop: read, CRC, unzstd, SHA-256 in lanes, one thread per core.

    python bench/verify.py [--size 2GiB] [--rounds 3] [--folder DIR] [--output json]

The image is random in half of every 4 MiB, zeros in the other. Both run on the same chunk files, by turns, in processes
of their own and without their start. Goal: 0.8 of the bare loop.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.units import parse_size  # noqa: E402

CHUNK = 4 << 20
GOAL = 0.8


async def _make(base: Path, size: int) -> None:
    from datastore.codec import ChunkCodec
    from datastore.names import Group
    from datastore.store import Datastore
    from hypervisor.files import open_source
    from repository.backup import SnapshotWriter
    from repository.local import LocalRepository

    image = base.with_name("image.raw")
    with image.open("wb") as file:
        for _ in range(size // CHUNK):
            file.write(os.urandom(CHUNK // 2) + bytes(CHUNK // 2))
    store = await Datastore.create(base)
    repository = LocalRepository(store, str(base))
    async with (
        repository.backup(Group.parse("vm/1").at(1000)) as session,
        open_source(str(image), "disk.img") as source,
    ):
        writer = SnapshotWriter(session, ChunkCodec())
        await writer.add_disk(source)
        await writer.finish()
    store.close()
    image.unlink()


async def _ours(base: Path) -> float:
    from datastore import sha256
    from datastore.codec import ChunkCodec
    from repository.local import open_local
    from repository.verify import choose, verify

    sha256.digest_many([b"", b""])  # the choice of an implementation is not part of it
    repository = await open_local(base)
    try:
        begun = time.perf_counter()
        results = await verify(repository, await choose(repository), ChunkCodec())
        seconds = time.perf_counter() - begun
    finally:
        repository.close()
    if [result.state for result in results] != ["ok"]:
        raise SystemExit("the store is damaged")
    return seconds


def _bare(base: Path) -> float:
    import zstandard
    from isal import isal_zlib

    from bench.bare import Counter, buffers, in_threads
    from datastore import sha256

    sha256.digest_many([b"", b""])
    names = sorted(path for path in base.glob(".chunks/*/*"))
    names = [path for path in names if path.stat().st_size > CHUNK // 4]  # without the zero chunk
    begun = time.perf_counter()
    counter = Counter(len(names), 16)

    def work() -> None:
        decompressor = zstandard.ZstdDecompressor()
        mine = buffers(16)
        while numbers := counter.take():
            chunks = []
            for place, number in enumerate(numbers):
                fd = os.open(names[number], os.O_RDONLY)
                data = memoryview(os.read(fd, CHUNK + 4096))
                os.close(fd)
                if isal_zlib.crc32(data[12:]) != int.from_bytes(data[8:12], "little"):
                    raise SystemExit(f"{names[number]}: CRC")
                length = decompressor.stream_reader(data[12:], read_size=len(data)).readinto(mine[place])
                chunks.append(mine[place][:length])
            for number, digest in zip(numbers, sha256.digest_many(chunks), strict=True):
                if names[number].name != digest.hex():
                    raise SystemExit(f"{names[number]}: digest")

    in_threads(work)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2GiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the store (default: in memory, /dev/shm)")
    parser.add_argument("--output", choices=["text", "json"], default="text")
    parser.add_argument("--run", choices=["ours", "bare"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(trio.run(_ours, options.folder) if options.run == "ours" else _bare(options.folder))
        return
    parent = options.folder or Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fleece-bench-verify-", dir=parent if parent.is_dir() else None))
    base, size = folder / "store", parse_size(options.size)
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    try:
        trio.run(_make, base, size)
        for _ in range(options.rounds):
            for name, found in seconds.items():
                command = [sys.executable, __file__, "--run", name, "--folder", str(base)]
                answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
                found.append(float(answer.stdout))
    finally:
        shutil.rmtree(folder)
    ours, bare = (statistics.median(seconds[name]) for name in ("ours", "bare"))
    row = {
        "MB/s": round(size / ours / 1e6),
        "bare MB/s": round(size / bare / 1e6),
        "ratio": round(bare / ours, 2),
        "goal": GOAL,
    }
    print(json.dumps(row) if options.output == "json" else ", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
