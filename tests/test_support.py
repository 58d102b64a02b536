"""The doubles that other tests lean on do what they promise."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.apt import sources_for
from tests.support.cache import Unavailable, cached, once
from tests.support.guest import SmallGuest, newc_archive
from tests.support.qemu_binaries import QemuBinary
from tests.support.ring import BLOCK, Ring, file_reader
from tests.support.running import QmpRefused, RunningQemu, RunningStorageDaemon, VmDisk
from tests.support.stores import chunk_files, open_pool

MIB = 1 << 20


def raw_disk(path: Path, size: int = 64 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_sources_of_both_forms_are_found_with_their_keys(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://a.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://b.example/debian bookworm main contrib  # ours\n"
        "deb-src http://c.example/debian bookworm main\n"
    )
    (tmp_path / "sources.list.d/d.sources").write_text(
        "Types: deb deb-src\n# comment\nURIs: http://d.example/debian\nSuites: bookworm bookworm-updates\n"
        "Components: main\nSigned-By:\n -----BEGIN-----\n .\n key\n\n"
        "Enabled: no\nTypes: deb\nURIs: http://e.example/debian\nSuites: bookworm\nComponents: main\n"
    )
    (tmp_path / "sources.list.d/f.sources").write_text("Types: deb\nURIs: http://f.example\nSuites: trixie\n")
    assert sources_for("bookworm", ["bookworm", "bookworm-backports"], tmp_path) == (
        "Types: deb\nSuites: bookworm bookworm-backports\nTargets: Packages\nURIs: http://b.example/debian\n"
        "Components: main contrib\nSigned-By: /k.gpg\nArchitectures: amd64\n\n"
        "Types: deb\nSuites: bookworm bookworm-backports\nTargets: Packages\nURIs: http://d.example/debian\n"
        "Components: main\nSigned-By: \n -----BEGIN-----\n .\n key\n"
    )


def test_machine_without_the_release_offers_no_sources(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://a.example/ubuntu noble main\n")
    assert sources_for("bookworm", ["bookworm"], tmp_path) == ""


def test_cache_entry_whose_build_fails_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEECE_CACHE", str(tmp_path))
    builds: list[Path] = []

    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        builds.append(folder)
        if len(builds) == 1:
            raise Unavailable("no network")

    with pytest.raises(Unavailable, match="no network"):
        cached("thing", build)
    assert not (tmp_path / "thing").exists()
    assert (cached("thing", build) / "half").read_text() == "x"
    cached("thing", build)
    assert len(builds) == 2


def test_what_is_unavailable_is_asked_for_once() -> None:
    asked: list[int] = []

    @once
    def get() -> str:
        asked.append(1)
        raise Unavailable("no source offers it")

    for _ in range(2):
        with pytest.raises(Unavailable, match="no source offers it"):
            get()
    assert len(asked) == 1


def test_a_quarter_of_the_rounds_is_enough_on_the_older_qemu(
    qemu: QemuBinary, rounds: Callable[[int], int], backports: QemuBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEECE_TEST_LONG", raising=False)
    assert rounds(20) == (20 if qemu == backports else 5)
    assert rounds(10) == (10 if qemu == backports else 3)
    monkeypatch.setenv("FLEECE_TEST_LONG", "1")
    assert rounds(20) == 20


def test_newc_archive_is_laid_out_as_the_kernel_reads_it() -> None:
    archive = newc_archive([("bin/sh", 0o120777, b"busybox")])
    assert archive[:6] == b"070701"
    fields = [int(archive[at : at + 8], 16) for at in range(6, 110, 8)]
    assert fields == [1, 0o120777, 0, 0, 1, 0, 7, 0, 0, 0, 0, 7, 0]
    # Header and name, then the content, each padded to four bytes.
    assert archive[110:128] == b"bin/sh\0\0\0\0busybox"[:7] + bytes(3) + b"busybox\0"
    assert archive[-14:].startswith(b"TRAILER!!!")
    assert len(archive) % 4 == 0


def ring_disk(path: Path, ring: Ring, newest: int) -> Path:
    with path.open("wb") as file:
        for number in range(1, newest + 1):
            file.seek(number % ring.slots * ring.stride)
            file.write(struct.pack("<Q", number) * (BLOCK // 8))
    return path


@pytest.mark.parametrize("newest", [0, 1, 3, 4, 5, 17])
def test_ring_of_one_instant_is_accepted(tmp_path: Path, newest: int) -> None:
    ring = Ring(slots=4, stride=2 * BLOCK)
    first = file_reader(ring_disk(tmp_path / "a", ring, newest))
    second = file_reader(ring_disk(tmp_path / "b", ring, max(newest - 1, 0)))
    assert ring.assert_one_instant(first, second) == newest


def test_ring_of_two_instants_is_refused(tmp_path: Path) -> None:
    ring = Ring(slots=4)
    late, early = (file_reader(ring_disk(tmp_path / name, ring, n)) for name, n in (("a", 9), ("b", 7)))
    for disks in ((late, early), (early, late)):
        with pytest.raises(AssertionError, match="disks hold"):
            ring.assert_one_instant(*disks)


def test_ring_that_lost_an_older_write_is_refused(tmp_path: Path) -> None:
    ring = Ring(slots=4)
    path = ring_disk(tmp_path / "a", ring, 9)
    with path.open("r+b") as file:
        file.seek(3 * BLOCK)
        file.write(struct.pack("<Q", 3) * (BLOCK // 8))
    with pytest.raises(AssertionError, match="slot 3 holds 3, with 9 written it must hold 7"):
        ring.newest(file_reader(path))


async def test_without_a_guest_the_test_writes_to_every_kind_of_disk(qemu: QemuBinary, tmp_path: Path) -> None:
    disks = [
        VmDisk(raw_disk(tmp_path / "0"), "disk0"),
        VmDisk(raw_disk(tmp_path / "1"), "disk1", bus="virtio-scsi"),
        VmDisk(raw_disk(tmp_path / "2"), "disk2", bus="ide"),
        VmDisk(raw_disk(tmp_path / "3"), "disk3", bus="nvme"),
        VmDisk(raw_disk(tmp_path / "4"), "disk4", form="drive"),
    ]
    async with RunningQemu.start(qemu, disks) as vm:
        for number, disk in enumerate(disks):
            await vm.qemu_io(disk.id, f"write -P {number + 1} 1M 64k")
            assert (await vm.block_info(disk.id))["inserted"]["file"] == str(disk.path)
            with pytest.raises(AssertionError, match="verification failed"):
                await vm.qemu_io(disk.id, "read -P 0x77 1M 64k")
        assert await vm.exports() == []
        with pytest.raises(QmpRefused, match="nowhere"):
            await vm.execute("blockdev-del", {"node-name": "nowhere"})
    for number, disk in enumerate(disks):
        assert disk.path.read_bytes()[MIB : MIB + 65536] == bytes([number + 1]) * 65536


async def test_killed_qemu_is_gone_at_once(qemu: QemuBinary, tmp_path: Path) -> None:
    async with RunningQemu.start(qemu, [VmDisk(raw_disk(tmp_path / "0"))]) as vm:
        await vm.kill()
        assert not vm.alive()
        assert not Path(f"/proc/{vm.pid}").exists()
        with pytest.raises(EOFError):
            await vm.execute("query-status")


async def test_qemu_that_outlives_its_time_is_ended(qemu: QemuBinary, tmp_path: Path) -> None:
    async with RunningQemu.start(qemu, [VmDisk(raw_disk(tmp_path / "0"))], lifetime_s=1) as vm:
        await vm.process.wait()
        assert not Path(f"/proc/{vm.pid}").exists()


async def test_storage_daemon_has_the_nodes_it_was_given(qemu: QemuBinary, tmp_path: Path) -> None:
    disk = VmDisk(raw_disk(tmp_path / "0"))
    async with RunningStorageDaemon.start(qemu, [disk.blockdev()]) as daemon:
        assert await daemon.nodes() == {"fmt-disk0"}
        await daemon.execute("block-dirty-bitmap-add", {"node": "fmt-disk0", "name": "b"})
        assert [bitmap["name"] for bitmap in await daemon.bitmaps("fmt-disk0")] == ["b"]
        await daemon.quit()
        assert not daemon.alive()


@pytest.mark.guest
async def test_guest_writes_both_disks_in_order(qemu: QemuBinary, guest: SmallGuest, tmp_path: Path) -> None:
    ring = Ring(slots=16, stride=MIB)
    disks = [VmDisk(raw_disk(tmp_path / "0"), "disk0"), VmDisk(raw_disk(tmp_path / "1"), "disk1", bus="nvme")]
    async with RunningQemu.start(qemu, disks, guest=guest) as vm:
        assert vm.guest is not None
        assert await vm.guest.run("false") == (1, "")
        assert await vm.guest.check("echo one; echo two") == "one\ntwo"
        await vm.guest.check(ring.command("/dev/vda", "/dev/nvme0n1", count=100))
        await vm.guest.check(ring.command("/dev/vda", "/dev/nvme0n1", start=101) + " >/dev/null 2>&1 &")
        await vm.execute("stop")
        newest = ring.assert_one_instant(*(file_reader(disk.path) for disk in disks))
    assert newest >= 100


def test_pools_of_killed_runs_are_removed_and_those_in_use_stay(tmpfs: Path) -> None:
    with open_pool(tmpfs) as pool:
        (used,) = tmpfs.iterdir()
        left, young = used.with_name(f"{used.name}-left"), used.with_name(f"{used.name}-young")
        for folder in (left, young):
            (folder / "store-1").mkdir(parents=True)
        for folder in (used, left):
            os.utime(folder, (1, 1))
        with open_pool(tmpfs):
            assert not left.exists()
            assert young.exists()
        assert used.exists()
        base = pool.lend()
        (base / ".chunks/12ab/chunk").write_bytes(b"x")
        assert [path.name for path in chunk_files(base)] == ["chunk"]
        pool.take_back(base)
        assert chunk_files(pool.lend()) == []
