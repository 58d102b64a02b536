"""What `s3.py` measures in processes of their own. Reads what to do as JSON from its input, prints what it took."""

import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.image_backup import peak_rss_mib  # noqa: E402
from core.nursery import open_nursery  # noqa: E402
from datastore.codec import ChunkCodec  # noqa: E402
from datastore.files import Owner  # noqa: E402
from datastore.gc import collect_garbage  # noqa: E402
from datastore.names import BackupType, Group  # noqa: E402
from datastore.s3.client import S3Client  # noqa: E402
from datastore.s3.endpoint import Endpoint  # noqa: E402
from datastore.s3.keys import StoreKeys  # noqa: E402
from datastore.s3.lifecycle import create_store  # noqa: E402
from datastore.s3.link import EndpointLink  # noqa: E402
from datastore.s3.opening import S3Settings, open_store  # noqa: E402
from datastore.s3.state import CacheState  # noqa: E402
from repository.local import LocalRepository  # noqa: E402

SIZE = 4 << 20
STORE = "bench"
GROUP = Group(BackupType.HOST, "bench")
ARCHIVE = "drive-scsi0.img"
Job = dict[str, Any]


def _settings(job: Job) -> S3Settings:
    return S3Settings(
        STORE,
        Endpoint(**job["endpoint"]),
        job["bucket"],
        Path(job["cache"]),
        min_free=0,
        parallel=job.get("parallel", 8),
        delete_guard_s=job.get("guard-s", 300.0),
    )


async def _each(keys: list[str], parallel: int, work: Callable[[int], Awaitable[object]]) -> dict[str, Any]:
    """Work through `keys`, so many at once; seconds and CPU seconds."""
    started, used = time.perf_counter(), time.process_time()
    numbers = iter(range(len(keys)))

    async def worker() -> None:
        for number in numbers:
            await work(number)

    async with open_nursery() as nursery:
        for _ in range(parallel):
            nursery.start_soon(worker)
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - used}


async def upload(job: Job) -> dict[str, Any]:
    """Objects of 4 MiB as chunks are sent: in two pieces, put if absent."""
    keys = job["keys"]
    bodies = [memoryview(os.urandom(SIZE)) for _ in range(16)]
    async with EndpointLink.open(Endpoint(**job["endpoint"]), parallel=job["parallel"]) as link:
        client = S3Client(link, job["bucket"])
        await client.delete_many(keys)

        async def send(number: int) -> None:
            body = bodies[number % len(bodies)]
            await client.put(keys[number], (body[:12], body[12:]), if_absent=True)

        return await _each(keys, job["parallel"], send)


async def download(job: Job) -> dict[str, Any]:
    """Objects of 4 MiB, thrown away."""
    async with EndpointLink.open(Endpoint(**job["endpoint"]), parallel=job["parallel"]) as link:
        client = S3Client(link, job["bucket"])
        await client.head_bucket()

        async def receive(number: int) -> None:
            found = await client.get(job["keys"][number])
            assert found is not None
            assert len(found.data) == SIZE

        return await _each(job["keys"], job["parallel"], receive)


async def fill(job: Job) -> dict[str, Any]:
    """An object of 1 KiB for each chunk file of the cache folder, which becomes an empty marker."""
    keys, digests = StoreKeys(STORE), []
    for folder in os.scandir(f"{job['cache']}/.chunks"):
        for file in os.scandir(folder.path):
            digests.append(bytes.fromhex(file.name))
            os.truncate(file.path, 0)
    await adopt(job)
    if job.get("upload", True):
        async with EndpointLink.open(Endpoint(**job["endpoint"]), parallel=16) as link:
            client = S3Client(link, job["bucket"])

            async def send(number: int) -> None:
                digest = digests[number]
                await client.put(keys.chunk(digest), (digest * 32,), if_absent=True)

            await _each([""] * len(digests), 16, send)
    return {}


async def adopt(job: Job) -> dict[str, Any]:
    """Make the folder of a local store the cache of the bucket."""
    settings = _settings(job)
    state = CacheState(settings.name, settings.bucket, settings.endpoint.id, complete=True)
    state.write(settings.cache, Owner.of(settings.cache))
    async with open_store(settings) as store:
        await store.s3.in_use.take()
    return {}


async def collect(job: Job) -> dict[str, Any]:
    """Collect garbage."""
    async with open_store(_settings(job)) as store:
        started = time.perf_counter()
        report = await collect_garbage(store, allow_empty=job["delete"])
        seconds = time.perf_counter() - started
        requests = store.counters.totals().requests
        found = report.status
    return {
        "seconds": seconds,
        "kept": found.disk_chunks,
        "pending": found.pending_chunks,
        "removed": found.removed_chunks,
        "requests": {method.value: count for method, count in requests.items()},
    }


async def back_up(job: Job) -> dict[str, Any]:
    """Make the store, and a backup of an image."""
    from hypervisor.files import open_source
    from repository.backup import SnapshotWriter

    await create_store(_settings(job))
    async with open_store(_settings(job)) as store, open_source(job["image"], ARCHIVE) as source:
        started = time.perf_counter()
        async with LocalRepository(store, "bench").backup(GROUP.at(int(time.time()))) as session:
            writer = SnapshotWriter(session, ChunkCodec())
            await writer.add_disk(source)
            await writer.finish()
        return {"seconds": time.perf_counter() - started}


def mount(job: Job) -> None:
    """Serve the image of the backup until a signal; prints a line when it is there."""
    from fusefs.mount import OneArchive, serve

    async def work() -> None:
        async with open_store(_settings(job)) as store:
            await serve(
                LocalRepository(store, "bench"),
                Path(job["mountpoint"]),
                archive=OneArchive(GROUP, ARCHIVE),
                ready=lambda: print("ready", flush=True),
            )

    trio.run(work)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    if job["what"] == "mount":
        return mount(job)
    works: dict[str, Callable[[Job], Awaitable[dict[str, Any]]]] = {
        "upload": upload,
        "download": download,
        "adopt": adopt,
        "fill": fill,
        "collect": collect,
        "back-up": back_up,
    }
    found = trio.run(works[job["what"]], job)
    # Not the peak of `used`, which counts the parent's memory before this program began.
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "mib": peak_rss_mib(os.getpid()), **found}))
    return None


if __name__ == "__main__":
    main()
