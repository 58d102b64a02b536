"""Disks of snapshots on offer over NBD, from every kind of repository; and those of VMs that are refused."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.nbd_holder import Offer
from agent.nbd_offers import backup_offer
from core.errors import NotFoundError, SourceError, UsageError
from datastore.codec import ChunkCodec
from datastore.errors import LockedError, SnapshotNotFoundError
from datastore.names import ROOT
from hypervisor.nbd_client import NbdAddress, open_nbd
from repository.interface import FIXED_CHUNK_SIZE, Repository
from repository.local import LocalRepository, open_local
from tests.support.nbd_servers import NEEDS_NBDKIT_PYTHON
from tests.support.pbs_double import PbsDouble
from tests.support.remote import remote
from tests.support.s3_stores import s3_place, s3_store
from tests.support.snapshots import write_snapshot

pytestmark = NEEDS_NBDKIT_PYTHON

CHUNK = FIXED_CHUNK_SIZE
#: Data, two chunks of zeros, data, a piece of a chunk.
IMAGE = os.urandom(CHUNK) + bytes(2 * CHUNK) + os.urandom(CHUNK) + os.urandom(1000)
FILES = {
    "drive-scsi0.img.fidx": IMAGE,
    "drive-scsi1.img.fidx": os.urandom(5000),
    "qemu-server.conf.blob": b"name: web\n",
}


@pytest.fixture(params=["local", "s3", "server"])
async def repo(request: pytest.FixtureRequest, store_folder: Path) -> AsyncIterator[Repository]:
    if request.param == "local":
        local = await open_local(store_folder, name="test")
        yield local
        local.close()
    elif request.param == "s3":
        async with s3_store(store_folder, *s3_place(request)) as store:
            yield LocalRepository(store, "test")
    else:
        async with remote(PbsDouble()) as repository:
            yield repository


@asynccontextmanager
async def offer(repo: Repository, *archives: str, text: str = "vm/100/latest") -> AsyncIterator[Offer]:
    @asynccontextmanager
    async def opening() -> AsyncIterator[Repository]:
        yield repo

    async with backup_offer(opening(), text, archives, ns=ROOT, codec=ChunkCodec(), cache_size=4 * CHUNK) as found:
        yield found


async def content(address: NbdAddress, offset: int = 0, length: int | None = None) -> bytes:
    async with open_nbd(address) as pool:
        data = bytearray(pool.size - offset if length is None else length)
        await pool.read_into(offset, data)
        return bytes(data)


async def test_all_disks_of_a_snapshot_are_served_byte_for_byte(repo: Repository) -> None:
    snapshot = await write_snapshot(repo, "vm/100", 1000, FILES, chunk_size=CHUNK)
    async with offer(repo) as found:
        assert {disk.name: disk.size for disk in found.disks} == {
            "drive-scsi0.img": len(IMAGE),
            "drive-scsi1.img": 5000,
        }
        assert found.source == {"type": "backup", "repository": repo.name, "ns": "", "snapshot": str(snapshot)}
        for disk in found.disks:
            assert await content(disk.address) == FILES[f"{disk.name}.fidx"]
            assert disk.regions == [(0, disk.size)]
        # Zeros are told, so that nobody has to read them.
        async with open_nbd(found.disks[0].address, connections=1, contexts=("base:allocation",)) as pool:
            assert await pool.block_status(0, len(IMAGE), "base:allocation") == [
                (0, CHUNK, 0),
                (CHUNK, 2 * CHUNK, 3),
                (3 * CHUNK, CHUNK + 1000, 0),
            ]


@pytest.mark.parametrize("repo", ["local"], indirect=True)
async def test_the_snapshot_cannot_be_removed_meanwhile(repo: Repository) -> None:
    snapshot = await write_snapshot(repo, "vm/100", 1000, FILES, chunk_size=CHUNK)
    async with offer(repo, "drive-scsi1.img.fidx", text=str(snapshot)) as found:
        assert [disk.name for disk in found.disks] == ["drive-scsi1.img"]
        with pytest.raises(LockedError):
            await repo.forget(snapshot)
    await repo.forget(snapshot)


@pytest.mark.parametrize("repo", ["local"], indirect=True)
async def test_a_damaged_chunk_is_an_error_of_its_range(repo: Repository, store_folder: Path) -> None:
    await write_snapshot(repo, "vm/100", 1000, FILES, chunk_size=CHUNK)
    (damaged,) = [path for path in store_folder.glob(".chunks/*/*") if _holds(path, IMAGE[3 * CHUNK : 4 * CHUNK])]
    raw = bytearray(damaged.read_bytes())
    raw[100] ^= 1
    damaged.write_bytes(raw)
    async with offer(repo, "drive-scsi0.img") as found:
        address = found.disks[0].address
        with pytest.raises(SourceError, match="Input/output error"):
            await content(address, 3 * CHUNK + 5, 1)
        assert await content(address, 0, 3 * CHUNK) == IMAGE[: 3 * CHUNK]
        assert await content(address, 4 * CHUNK) == IMAGE[4 * CHUNK :]


def _holds(path: Path, data: bytes) -> bool:
    """Whether the chunk file has `data`, which cannot be compressed."""
    return data in path.read_bytes()


@pytest.mark.parametrize("repo", ["local"], indirect=True)
async def test_what_is_no_disk_of_the_snapshot_is_refused(repo: Repository) -> None:
    await write_snapshot(repo, "vm/100", 1000, FILES, chunk_size=CHUNK)
    await write_snapshot(repo, "vm/101", 1000, {"x.conf.blob": b"1"})
    cases: list[tuple[str, tuple[str, ...], type[Exception], str]] = [
        (
            "vm/100/latest",
            ("drive-scsi9.img",),
            NotFoundError,
            "no archive of that name; its disk images are drive-scsi0",
        ),
        ("vm/100/latest", ("qemu-server.conf",), UsageError, "it is no disk image"),
        ("vm/100/latest", ("drive-scsi0.img", "drive-scsi0.img.fidx"), UsageError, "it is named twice"),
        ("vm/101/latest", (), NotFoundError, "it has no disk image"),
        ("vm/102/latest", (), SnapshotNotFoundError, "no finished snapshot"),
        ("vm/100/1999-01-01T00:00:00Z", (), SnapshotNotFoundError, "cannot"),
    ]
    for text, archives, kind, why in cases:
        with pytest.raises(kind, match=why):
            async with offer(repo, *archives, text=text):
                raise AssertionError
