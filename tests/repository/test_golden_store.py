"""A datastore that a real PBS wrote is listed, verified and restored; the same disks give the same store."""

import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.manifest import Manifest
from datastore.names import Group, Namespace, Snapshot
from hypervisor.files import open_source
from hypervisor.targets import open_target
from repository.backup import SnapshotWriter
from repository.local import LocalRepository, open_local
from repository.restore import restore_blob, restore_disk
from repository.verify import verify
from tests.support.golden_store import unpack_golden_store
from tests.support.stores import chunk_files

DEEP = Namespace.parse("a/b")
VM = Group.parse("vm/100")


@pytest.fixture
async def repo(golden: Path, store_folder: Path) -> AsyncIterator[LocalRepository]:
    unpack_golden_store(golden, store_folder)
    local = await open_local(store_folder)
    yield local
    local.close()


@pytest.fixture
def expected(golden: Path) -> dict[str, dict[str, Any]]:
    return json.loads((golden / "expected.json").read_text())  # type: ignore[no-any-return]


async def test_everything_in_it_is_listed(repo: LocalRepository, expected: dict[str, Any]) -> None:
    listed = [*await repo.snapshots(), *await repo.snapshots(DEEP)]
    assert sorted(info.snapshot.path for info in listed) == sorted(expected)
    for info in listed:
        wanted = expected[info.snapshot.path]
        files = {file.filename: file for file in info.files if file.filename in wanted}
        assert set(files) == set(wanted)
        for name, file in files.items():
            assert file.size == wanted[name]["size"]
            assert file.crypt_mode is not None
            assert file.crypt_mode.value == wanted[name]["crypt-mode"]
        assert info.verification is not None
        assert info.verification["state"] == "ok"
    assert [info.snapshot.time for info in listed if info.protected] == ["2026-01-01T00:00:00Z"]


async def test_all_of_it_passes_verification_without_any_key(repo: LocalRepository) -> None:
    snapshots = [info.snapshot for info in (*await repo.snapshots(), *await repo.snapshots(DEEP))]
    results = await verify(repo, snapshots, ChunkCodec(), Progress())
    assert [(result.snapshot, result.state, result.errors) for result in results] == [
        (one, "ok", []) for one in snapshots
    ]


@pytest.mark.parametrize("day", ["2026-01-01", "2026-01-02"])
async def test_its_images_are_restored_to_the_known_digests(
    repo: LocalRepository, expected: dict[str, Any], tmp_path: Path, day: str
) -> None:
    snapshot = Snapshot.parse(f"vm/100/{day}T00:00:00Z")
    codec = ChunkCodec()
    async with repo.reader(snapshot) as reader:
        manifest = Manifest.parse(await reader.manifest(), where=str(snapshot))
        for name, wanted in expected[str(snapshot)].items():
            if name.endswith(".fidx"):
                path = tmp_path / name
                async with open_target(str(path), wanted["size"]) as target:
                    await restore_disk(reader, codec, manifest, name, target, Progress())
                assert path.stat().st_blocks * 512 < wanted["size"]  # zero chunks are holes
                data = path.read_bytes()
            else:
                data = await restore_blob(reader, codec, manifest, name)
            assert hashlib.sha256(data).hexdigest() == wanted["content-sha256"]


async def test_the_same_disks_give_the_same_chunks_and_index_checksums(
    repo: LocalRepository, golden: Path, expected: dict[str, Any], tmp_path: Path, store_pool: Any
) -> None:
    base = store_pool.lend()
    try:
        ours = await open_local(base)
        codec = ChunkCodec()
        for stage, day in [(1, "2026-01-01"), (2, "2026-01-02")]:
            command = [sys.executable, str(golden / "make_disk.py"), str(tmp_path), "--stage", str(stage)]
            subprocess.run(command, check=True, timeout=60)  # noqa: ASYNC221 - a test with nothing beside it
            snapshot = Snapshot.parse(f"vm/100/{day}T00:00:00Z")
            async with ours.backup(snapshot) as session:
                writer = SnapshotWriter(session, codec, Progress())
                for name in ("drive-scsi0.img", "drive-scsi1.img"):
                    async with open_source(str(tmp_path / name), name) as source:
                        await writer.add_disk(source)
                manifest = await writer.finish()
            for file in manifest.files:
                assert file.csum.hex() == expected[str(snapshot)][file.filename]["csum"]
            for name in ("drive-scsi0.img.fidx", "drive-scsi1.img.fidx"):
                # All but the random UUID and the time of creation.
                theirs = (repo.store.base / snapshot.path / name).read_bytes()
                mine = (base / snapshot.path / name).read_bytes()
                assert (mine[:8], mine[32:]) == (theirs[:8], theirs[32:])
        chunks = {path.name for path in chunk_files(base)}
        assert chunks <= {path.name for path in chunk_files(repo.store.base)}
        results = await verify(ours, [info.snapshot for info in await ours.snapshots()], codec, Progress())
        assert [result.state for result in results] == ["ok", "ok"]
        ours.close()
    finally:
        store_pool.take_back(base)


async def test_a_backup_of_ours_continues_a_group_of_pbs(
    repo: LocalRepository, golden: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    for stage in (1, 2):
        command = [sys.executable, str(golden / "make_disk.py"), str(tmp_path), "--stage", str(stage)]
        subprocess.run(command, check=True, timeout=60)  # noqa: ASYNC221 - a test with nothing beside it
    name = "drive-scsi0.img"
    with (tmp_path / name).open("r+b") as file:
        file.seek(30 << 20)
        file.write(b"changed by us")
    async with repo.backup(VM.at(Snapshot.parse("vm/100/2026-01-03T00:00:00Z").ctime)) as session:
        assert session.base == Snapshot.parse("vm/100/2026-01-02T00:00:00Z")
        writer = SnapshotWriter(session, ChunkCodec(), Progress())
        async with open_source(str(tmp_path / name), name) as source:
            report = await writer.add_disk(source)
        await writer.finish()
    # Everything but the changed chunk was known from the snapshot of PBS.
    assert report.chunks_new == 1
    assert report.reused == (40 << 20) - (4 << 20)
