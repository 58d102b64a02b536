"""How fast each disk source can be read, against the machine's own limits.

    python bench/disk_sources.py [--size MIB] [--folder FOLDER] [--rounds N]

An image of random bytes is made in FOLDER (default /dev/shm) and read through every source into reused 4 MiB buffers,
with 1, 2 and 4 reads in flight. The limits are measured in the same run: a bare loop of `preadv` in two threads for
files, `nbdcopy` to null for NBD. Prints one line each: median MiB/s.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import trio

from core.disks import DiskSource
from core.units import MIB
from hypervisor.files import open_source

CHUNK = 4 * MIB
IN_FLIGHT = (1, 2, 4)
Open = Callable[[], AbstractAsyncContextManager[DiskSource]]


async def read_all(source: DiskSource, in_flight: int) -> float:
    """Seconds for the whole disk."""
    send, receive = trio.open_memory_channel[int](0)

    async def worker(receive: trio.MemoryReceiveChannel[int]) -> None:
        buffer = memoryview(bytearray(CHUNK))
        async for offset in receive:
            await source.read_into(offset, buffer[: source.size - offset])

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(in_flight):
            nursery.start_soon(worker, receive.clone())
        receive.close()
        async with send:
            for offset in range(0, source.size, CHUNK):
                await send.send(offset)
    return time.perf_counter() - start


def bare_preadv(path: Path, threads: int) -> float:
    """Seconds of a loop that does nothing but read."""
    offsets, lock = iter(range(0, path.stat().st_size, CHUNK)), threading.Lock()
    fd = os.open(path, os.O_RDONLY)

    def work() -> None:
        buffer = bytearray(CHUNK)
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            os.preadv(fd, [buffer], offset)

    start = time.perf_counter()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    os.close(fd)
    return time.perf_counter() - start


@contextmanager
def server(command: list[str], socket: Path) -> Iterator[str]:
    """A child that listens on `socket`; yields the URI of its export `x`."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        yield f"nbd+unix:///x?socket={socket}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def served_by_qemu(image: Path, socket: Path) -> Iterator[str]:
    """A raw image, read-only, as an export of a qemu-storage-daemon at `socket`; yields its URI."""
    node = f"driver=file,node-name=f,filename={image},read-only=on"
    export = ["--nbd-server", f"addr.type=unix,addr.path={socket}", "--export", "type=nbd,id=e,node-name=f,name=x"]
    with server(["qemu-storage-daemon", "--blockdev", node, *export], socket) as uri:
        yield uri


def nbdcopy(uri: str) -> float:
    start = time.perf_counter()
    subprocess.run(["nbdcopy", uri, "null:"], check=True)
    return time.perf_counter() - start


def report(name: str, size: int, seconds: list[float]) -> None:
    print(f"{name:44} {size / MIB / statistics.median(seconds):7.0f} MiB/s", flush=True)


async def measure(name: str, size: int, rounds: int, opened: Open) -> None:
    async with opened() as source:
        for in_flight in IN_FLIGHT:
            report(f"{name}, {in_flight} in flight", size, [await read_all(source, in_flight) for _ in range(rounds)])


def source_of(spec: str) -> Open:
    @asynccontextmanager
    async def opened() -> AsyncIterator[DiskSource]:
        async with open_source(spec, "bench.img") as source:
            yield source

    return opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    size, rounds = given.size * MIB, given.rounds
    folder = Path(tempfile.mkdtemp(prefix="fleece-bench-", dir=given.folder))
    try:
        raw, qcow2, socket = folder / "disk.raw", folder / "disk.qcow2", folder / "s"
        with raw.open("wb") as file:
            for _ in range(size // CHUNK):
                file.write(os.urandom(CHUNK))
        report("limit: preadv in 2 threads", size, [bare_preadv(raw, 2) for _ in range(rounds)])
        trio.run(measure, "raw file", size, rounds, source_of(str(raw)))

        command = ["nbdkit", "-f", "-e", "x", "-U", str(socket), "--filter=exportname", "file", str(raw)]
        with server(command, socket) as uri:
            report("limit: nbdcopy from nbdkit file", size, [nbdcopy(uri) for _ in range(rounds)])
            trio.run(measure, "NBD URI, nbdkit file", size, rounds, source_of(uri))
        socket.unlink(missing_ok=True)

        with served_by_qemu(raw, socket) as uri:
            report("limit: nbdcopy from QEMU", size, [nbdcopy(uri) for _ in range(rounds)])
            trio.run(measure, "NBD URI, QEMU", size, rounds, source_of(uri))
        socket.unlink(missing_ok=True)

        convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(qcow2)]
        subprocess.run(convert, check=True)
        trio.run(measure, "qcow2 file", size, rounds, source_of(str(qcow2)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
