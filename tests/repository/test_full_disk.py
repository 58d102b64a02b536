"""A datastore on a file system that fills up."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.errors import StoreError
from datastore.names import Group
from datastore.store import Datastore
from hypervisor.files import open_source
from repository.backup import SnapshotWriter
from repository.local import LocalRepository, open_local
from repository.verify import verify
from tests.support.crash import leftovers

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 64 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def back_up(repo: LocalRepository, image: Path, ctime: int) -> None:
    async with repo.backup(Group.parse("vm/100").at(ctime)) as session, open_source(str(image), "disk.img") as source:
        writer = SnapshotWriter(session, ChunkCodec(), Progress())
        await writer.add_disk(source)
        await writer.finish()


async def test_a_full_disk_is_a_clear_error_and_harms_no_finished_snapshot(small_disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    (await Datastore.create(small_disk / "store")).close()
    repo = await open_local(small_disk / "store")
    image.write_bytes(os.urandom(20 * MIB))
    await back_up(repo, image, 1000)
    image.write_bytes(os.urandom(80 * MIB))
    with pytest.raises(StoreError, match="No space left on device; prune snapshots and collect garbage"):
        await back_up(repo, image, 2000)
    assert leftovers(small_disk / "store") == []
    snapshots = [info.snapshot for info in await repo.snapshots(unfinished=True)]
    assert [snapshot.ctime for snapshot in snapshots] == [1000]
    (result,) = await verify(repo, snapshots, ChunkCodec(), Progress())
    assert result.errors == []
    repo.close()


async def test_a_store_is_not_half_made_on_a_full_disk(small_disk: Path) -> None:
    with (small_disk / "filler").open("wb") as file, pytest.raises(OSError):
        while True:
            file.write(bytes(MIB))
            file.flush()
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(small_disk)], check=True)  # noqa: ASYNC221
    with pytest.raises(StoreError, match="No space left on device"):
        await Datastore.create(small_disk / "store")
    assert [entry.name for entry in small_disk.iterdir()] == ["filler"]
