"""The frozen view of a live disk as a `DiskSource`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from core.disks import DiskSource, Extent, ExtentState, ReadPlan
from core.errors import SourceError
from hypervisor.discovery import Capabilities
from hypervisor.errors import FleecingError
from hypervisor.live_source import LiveSource
from hypervisor.nbd_client import NbdPool
from tests.hypervisor.disk_source_suite import CHUNK, CONTENT, DiskSourceSuite, MakeSource
from tests.hypervisor.fleecing_bench import MIB, Bench
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk


class TestLiveSource(DiskSourceSuite):
    """The suite of all sources."""

    @pytest.fixture
    def make_source(self, qemu: QemuBinary, tmpfs: Path) -> MakeSource:
        @asynccontextmanager
        async def make(content: bytes) -> AsyncIterator[DiskSource]:
            with (tmpfs / "d0").open("wb") as file:
                for offset in range(0, len(content), 65536):
                    part = content[offset : offset + 65536]
                    if any(part):
                        file.seek(offset)
                        file.write(part)
                file.truncate(len(content))
            (tmpfs / "w").mkdir(exist_ok=True)
            async with (
                RunningQemu.start(qemu, [VmDisk(tmpfs / "d0", "d0")]) as vm,
                Bench(tmpfs / "w").view(vm) as view,
            ):
                yield view.sources[0]

        return make

    async def test_zeros_are_known_without_reading_where_qemu_can_be_trusted(
        self, make_source: MakeSource, qemu: QemuBinary
    ) -> None:
        async with make_source(CONTENT) as source:
            extents = await source.extents()
            states = [extent.state for extent in extents]
            assert (ExtentState.ZERO in states) == (qemu.version >= (8, 2, 0))
            # Given up in QEMU, but whoever reads it all the same gets what is there.
            buffer = bytearray(b"\xaa" * CHUNK)
            await source.read_into(CHUNK, buffer)
            assert buffer == bytes(CHUNK)


class Pool(NbdPool):
    """Notes what is asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.trims: list[tuple[int, int]] = []

    async def trim(self, offset: int, length: int) -> None:
        self.trims.append((offset, length))


def source_over(pool: Pool, changed: list[Extent] | None) -> LiveSource:
    able = Capabilities((7, 2, 0), "stock", compat=True)
    plan = ReadPlan(5 if changed is not None else None, "")
    return LiveSource("drive-d0.img", pool.size, plan, changed=changed, pool=pool, able=able)


async def test_no_trim_ever_cuts_a_cluster_even_at_the_end_of_the_disk() -> None:
    size = 9 * MIB + 70_000 // 512 * 512
    pool = Pool(size)
    source = source_over(pool, None)
    await source.discard(8 * MIB, size - 8 * MIB)
    await source.discard(65536 + 512, 200_000)
    await source.discard(65536, 512)
    assert pool.trims == [(8 * MIB, MIB + 65536), (2 * 65536, 2 * 65536)]
    assert all(offset % 65536 == length % 65536 == 0 for offset, length in pool.trims)


async def test_what_is_clean_is_given_up_before_anything_is_read() -> None:
    pool = Pool(6000 * MIB)
    clean, data = ExtentState.CLEAN, ExtentState.DATA
    changed = [Extent(0, 4000 * MIB, clean), Extent(4000 * MIB, 4 * MIB, data), Extent(4004 * MIB, 1996 * MIB, clean)]
    source = source_over(pool, changed)
    assert list(await source.extents()) == changed
    assert pool.trims == [(0, 4000 * MIB), (4004 * MIB, 1996 * MIB)]


async def test_without_the_base_nothing_is_clean_and_nothing_given_up() -> None:
    pool = Pool(8 * MIB)
    source = source_over(pool, [Extent(0, 8 * MIB, ExtentState.CLEAN)])
    assert list(await source.extents(incremental=False)) == [Extent(0, 8 * MIB, ExtentState.DATA)]
    assert pool.trims == []


def test_an_export_of_another_size_is_refused() -> None:
    able = Capabilities((10, 0, 0), "stock", compat=False)
    with pytest.raises(FleecingError, match="its size changed from 5 to 8 B at this moment"):
        LiveSource("drive-d0.img", 5, ReadPlan(None, ""), changed=None, pool=Pool(8), able=able)


async def test_a_given_up_chunk_cannot_be_read_again(qemu: QemuBinary, tmpfs: Path) -> None:
    (tmpfs / "d0").write_bytes(b"\x05" * 8 * MIB)
    (tmpfs / "w").mkdir()
    async with RunningQemu.start(qemu, [VmDisk(tmpfs / "d0", "d0")]) as vm, Bench(tmpfs / "w").view(vm) as view:
        (source,) = view.sources
        await source.extents()
        await source.discard(0, CHUNK)
        with pytest.raises(SourceError, match="its frozen view broke"):
            await source.read_into(0, bytearray(CHUNK))
        buffer = bytearray(CHUNK)
        await source.read_into(CHUNK, buffer)
        assert buffer == b"\x05" * CHUNK
