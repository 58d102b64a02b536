"""kill -9 of a VM's backup into a bucket in the middle of its uploads: the next commands find everything consistent."""

import os
import time
from pathlib import Path

import pytest

from agent.registry import Registry, S3Place
from agent.s3_endpoints import EndpointRegistry, section_of
from datastore.files import Owner
from datastore.fixed_index import FixedIndex
from datastore.s3.keys import StoreKeys
from datastore.s3.state import CacheState
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import VmDisk
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_faults import ALWAYS, Kind
from tests.support.s3_service import ACCESS_KEY, BUCKET, REGION, SECRET
from tests.vm.lab import CHUNK, MIB, Lab, PlayedGuest, until

pytestmark = pytest.mark.qemu

STORE = "cloud"
DAY_S = 86_400
#: What is on its way to the bucket when the command is killed, and whether it gets there.
POINTS: tuple[tuple[str, str, Kind, int], ...] = (
    ("a chunk that arrives", "/.chunks/", "lost", 2),
    ("an index that does not arrive", ".fidx", "deaf", 0),
    ("the manifest, which arrives", "/index.json.blob", "lost", 0),
)


@pytest.fixture
def bucket(lab: Lab, s3_emulator: S3Emulator) -> S3Emulator:
    """The lab's repository lies in this bucket; its folder is the cache."""
    state = lab.fleece.home / "state"
    state.mkdir()
    endpoints = EndpointRegistry(state / "s3-endpoints.toml", state / "secrets")
    values = {
        "endpoint": "127.0.0.1", "port": s3_emulator.port, "path-style": True, "allow-http": True, "region": REGION,
        "access-key": ACCESS_KEY,
    }  # fmt: skip
    endpoints.add("emu", section_of(values), SECRET)
    CacheState(STORE, BUCKET, "emu", complete=True).write(lab.fleece.repo, Owner.of(lab.fleece.repo))
    Registry(state / "datastores.toml").add(STORE, lab.fleece.repo, s3=S3Place("emu", BUCKET))
    return s3_emulator


def chunk_files(cache: Path) -> list[Path]:
    """The chunk files of the cache, markers included, but for the folders that nobody has written to."""
    used = [entry.path for entry in os.scandir(cache / ".chunks") if entry.stat().st_mtime_ns]
    return [Path(folder, name) for folder in used for name in os.listdir(folder)]  # noqa: PTH208


def empty_cache(cache: Path) -> None:
    """Leave markers only, so that what is read comes from the bucket."""
    for file in chunk_files(cache):
        os.truncate(file, 0)


def age(cache: Path, bucket: S3Emulator) -> None:
    """Let three days pass for everything that is stored."""
    then = time.time() - 3 * DAY_S
    for file in chunk_files(cache):
        os.utime(file, (then, then))
    with bucket.lock:
        for stored in bucket.bucket.objects.values():
            stored.last_modified = then


def snapshots_there(bucket: S3Emulator) -> set[str]:
    """The snapshots of which the bucket has a manifest."""
    names = (key.split("/.cnt/")[1] for key in bucket.bucket.objects if key.endswith("/index.json.blob"))
    return {name.rpartition("/")[0] for name in names}


def missing(cache: Path, bucket: S3Emulator) -> list[str]:
    """The chunks that an index of the cache names and the bucket does not have."""
    keys = StoreKeys(STORE)
    indexes = [FixedIndex.from_bytes(path.read_bytes(), where=path.name) for path in cache.glob("vm/*/*/*.fidx")]
    named = {index.digest(number) for index in indexes for number in range(index.count)}
    return [digest.hex() for digest in named if keys.chunk(digest) not in bucket.bucket.objects]


@pytest.mark.timeout(300)
async def test_killed_while_it_uploads_the_bucket_is_consistent_and_the_next_run_is_right(
    distribution: QemuBinary, lab: Lab, bucket: S3Emulator
) -> None:
    size = 6 * CHUNK
    cache = lab.fleece.repo
    async with lab.vm(distribution, [VmDisk(lab.raw("a", size), "disk0")], lifetime_s=300) as vm:
        guest = PlayedGuest(vm, {"disk0": size})
        patterns = iter(range(1, 256))

        async def write_all() -> None:
            for offset in range(0, size, CHUNK):
                await guest.write("disk0", next(patterns), offset, MIB)

        await write_all()
        first = await lab.backup(vm)
        listed, images = [first.document["snapshot"]], {first.document["snapshot"]: guest.images()}
        for what, key, kind, skip in POINTS:
            await write_all()
            fault = bucket.plan("PUT", kind, key=key, skip=skip, times=ALWAYS)
            async with lab.fleece.start("vm", "backup", *lab.arguments(vm)) as running:
                await until(lambda: fault.met > 0)  # noqa: B023
                await running.kill()
            bucket.faults.clear()
            assert len(lab.finished()) == len(listed), what
            # Garbage collection first, in the worst case: the killed run's chunks are old, and nothing else is cached.
            age(cache, bucket)
            empty_cache(cache)
            collected = await lab.fleece.json("gc")
            assert collected["missing-chunks"] == 0, what
            assert missing(cache, bucket) == [], what
            report = await lab.try_backup(vm)
            assert report.code in (0, 3), (what, report)
            assert all("killed" in warning for warning in report.document["warnings"]), (what, report)
            assert report.archives["drive-disk0.img"]["mode"] == "incremental", what
            listed.append(report.document["snapshot"])
            images[listed[-1]] = guest.images()
            assert snapshots_there(bucket) == set(listed), what
        empty_cache(cache)
        await lab.assert_verifies()
        await lab.assert_restores(listed[-1], images[listed[-1]])
    # Another host finds the same, and no chunk too many is left once they are old.
    await lab.fleece.json("datastore", "refresh", STORE)
    assert await lab.snapshots() == listed
    age(cache, bucket)
    await lab.fleece.json("gc")
    assert missing(cache, bucket) == []
    distinct = {
        bytes(image["drive-disk0.img"][at : at + CHUNK]) for image in images.values() for at in range(0, size, CHUNK)
    }
    left = [key for key in bucket.bucket.objects if "/.chunks/" in key]
    assert len(left) == len(distinct) + 1  # the chunk of zeros, with which access times are tried
