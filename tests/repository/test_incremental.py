"""On which previous snapshot a backup counts, what it then reads, and why it reads everything otherwise."""

import pytest

from core.disks import Extent
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.manifest import Manifest
from repository.interface import FIXED_CHUNK_SIZE as CHUNK
from repository.planning import plan_disks
from repository.report import ArchiveReport, Mode
from tests.support.sessions import (
    MemoryDisk,
    MemoryRepository,
    chunks_of,
)

from .test_backup import CLEAN, DATA, GROUP, IMG, KEY, OTHER_KEY, back_up, expected_digests, image_digests


class TestIncremental:
    OLD = chunks_of("abcd", tail=100)
    NEW = chunks_of("aXcd", tail=100)
    DIRTY = (Extent(0, CHUNK, CLEAN), Extent(CHUNK, 65536, DATA), Extent(CHUNK + 65536, 3 * CHUNK - 65436, CLEAN))

    async def second(
        self,
        *,
        base: int | None = 1000,
        codec: ChunkCodec | None = None,
        first_codec: ChunkCodec | None = None,
        data: bytes | None = None,
        repository: MemoryRepository | None = None,
        name: str = IMG,
    ) -> tuple[ArchiveReport, MemoryDisk, MemoryRepository]:
        repository = repository or MemoryRepository()
        if not repository.stored:
            await back_up(repository, MemoryDisk(IMG, self.OLD), ctime=1000, codec=first_codec)
        new = self.NEW if data is None else data
        extents = self.DIRTY if data is None else [Extent(0, len(new), CLEAN)]
        disk = MemoryDisk(name, new, extents=extents, base=base, reason="" if base else "VM restarted")
        (report,), _ = await back_up(repository, disk, ctime=2000, codec=codec)
        return report, disk, repository

    async def test_only_the_dirty_chunk_is_read(self) -> None:
        report, disk, repository = await self.second()
        assert disk.read == [(CHUNK, CHUNK)]
        assert image_digests(repository, 2000) == expected_digests(self.NEW)
        assert (report.mode, report.reason) == (Mode.INCREMENTAL, None)
        assert (report.read, report.dirty) == (CHUNK, 65536)
        assert (report.new, report.chunks_new, report.reused) == (CHUNK, 1, len(self.NEW) - CHUNK)
        assert disk.discarded == [(CHUNK, CHUNK)]

    async def test_unchanged_disk_reads_and_stores_nothing(self) -> None:
        report, disk, repository = await self.second(data=self.OLD)
        assert disk.read == []
        assert (report.read, report.new, report.stored, report.dirty) == (0, 0, 0, 0)
        assert image_digests(repository, 2000) == expected_digests(self.OLD)

    async def test_full_read_uploads_nothing_that_the_previous_snapshot_has(self) -> None:
        report, disk, _ = await self.second(base=None)
        assert len(disk.read) == 5
        assert (report.mode, report.reason, report.dirty) == (Mode.FULL, "VM restarted", None)
        assert (report.new, report.chunks_new) == (CHUNK, 1)

    @pytest.mark.parametrize(
        ("base", "reason"), [(999, "a newer snapshot"), (1001, "previous snapshot gone or failed verification")]
    )
    async def test_bitmap_of_another_snapshot_means_a_full_read(self, base: int, reason: str) -> None:
        report, disk, repository = await self.second(base=base)
        assert report.reason is not None
        assert report.reason.startswith(reason)
        assert len(disk.read) == 5
        assert image_digests(repository, 2000) == expected_digests(self.NEW)

    async def test_snapshot_that_failed_verification_is_no_base(self) -> None:
        repository = MemoryRepository()
        await back_up(repository, MemoryDisk(IMG, self.OLD), ctime=1000)
        repository.failed_verification.add(GROUP.at(1000))
        report, _, _ = await self.second(repository=repository)
        assert report.reason == "previous snapshot gone or failed verification"

    async def test_changed_size_means_a_full_read(self) -> None:
        data = self.OLD + b"more"
        report, disk, repository = await self.second(data=data)
        assert report.reason == "size changed"
        assert len(disk.read) == 5
        assert image_digests(repository, 2000) == expected_digests(data)

    async def test_disk_that_the_previous_snapshot_lacks_is_read_in_full(self) -> None:
        report, disk, _ = await self.second(name="drive-scsi7.img")
        assert report.reason == "disk is not in the previous snapshot"
        assert len(disk.read) == 5

    @pytest.mark.parametrize(
        ("first", "second", "reason"),
        [
            (None, ChunkCodec(KEY, CryptMode.ENCRYPT), "key changed"),
            (ChunkCodec(KEY, CryptMode.ENCRYPT), None, "key changed"),
            (ChunkCodec(KEY, CryptMode.ENCRYPT), ChunkCodec(OTHER_KEY, CryptMode.ENCRYPT), "key changed"),
            (ChunkCodec(KEY, CryptMode.SIGN_ONLY), ChunkCodec(KEY, CryptMode.ENCRYPT), "crypt mode changed"),
            (ChunkCodec(KEY, CryptMode.SIGN_ONLY), None, "key changed"),
        ],
    )
    async def test_other_key_or_mode_means_a_full_read(
        self, first: ChunkCodec | None, second: ChunkCodec | None, reason: str
    ) -> None:
        report, disk, repository = await self.second(first_codec=first, codec=second)
        assert report.reason is not None
        assert report.reason.startswith(reason)
        assert len(disk.read) == 5
        digests = (second or ChunkCodec()).digest_many(
            [self.NEW[at : at + CHUNK] for at in range(0, len(self.NEW), CHUNK)]
        )
        assert image_digests(repository, 2000) == digests

    async def test_same_key_reads_only_the_dirty_chunk_of_an_encrypted_disk(self) -> None:
        codec = ChunkCodec(KEY, CryptMode.ENCRYPT)
        report, disk, _ = await self.second(first_codec=codec, codec=codec)
        assert (report.mode, disk.read) == (Mode.INCREMENTAL, [(CHUNK, CHUNK)])

    async def test_altered_manifest_is_no_base_for_a_signed_backup(self) -> None:
        codec = ChunkCodec(KEY, CryptMode.SIGN_ONLY)
        repository = MemoryRepository()
        await back_up(repository, MemoryDisk(IMG, self.OLD), ctime=1000, codec=codec)
        files = repository.stored[GROUP.at(1000)].files
        files["index.json.blob"] = bytes(files["index.json.blob"][:8]) + bytes(4) + files["index.json.blob"][12:]
        report, _, _ = await self.second(repository=repository, codec=codec)
        assert report.reason is not None
        assert "is unreadable" in report.reason

    @pytest.mark.parametrize("mode", [CryptMode.ENCRYPT, CryptMode.SIGN_ONLY])
    async def test_manifest_whose_signature_was_removed_is_no_base_for_a_signed_backup(self, mode: CryptMode) -> None:
        codec = ChunkCodec(KEY, mode)
        repository = MemoryRepository()
        await back_up(repository, MemoryDisk(IMG, self.OLD), ctime=1000, codec=codec)
        files = repository.stored[GROUP.at(1000)].files
        manifest = Manifest.parse(files["index.json.blob"], where="x")
        manifest.signature = None
        files["index.json.blob"] = bytes(manifest.encode())
        report, disk, _ = await self.second(repository=repository, codec=codec)
        assert report.reason == "the signature of the previous snapshot was removed"
        assert len(disk.read) == 5

    async def test_dry_run_says_the_same_and_writes_nothing(self) -> None:
        repository = MemoryRepository()
        await back_up(repository, MemoryDisk(IMG, self.OLD), ctime=1000)
        before = dict(repository.chunks)
        disks = [
            MemoryDisk(IMG, self.NEW, extents=self.DIRTY, base=1000),
            MemoryDisk("drive-scsi1.img", self.NEW, reason="no dirty bitmap"),
        ]
        plans = await plan_disks(repository, GROUP, disks, ChunkCodec())
        assert [plan.to_json() for plan in plans] == [
            {"name": IMG, "size": len(self.NEW), "mode": "incremental", "reason": None, "read": CHUNK, "dirty": 65536},
            {
                "name": "drive-scsi1.img",
                "size": len(self.NEW),
                "mode": "full",
                "reason": "no dirty bitmap",
                "read": len(self.NEW),
                "dirty": None,
            },
        ]
        assert disks[0].read == disks[1].read == []
        assert repository.chunks == before

    async def test_dry_run_of_an_empty_group_plans_a_full_read(self) -> None:
        disk = MemoryDisk(IMG, self.NEW, extents=self.DIRTY, base=1000)
        (plan,) = await plan_disks(MemoryRepository(), GROUP, [disk], ChunkCodec())
        assert (plan.reason, plan.read) == ("previous snapshot gone or failed verification", len(self.NEW))
