"""Reading through shared memory: against a double that misbehaves, and against QEMU."""

import errno
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from core.disks import ReadPlan
from hypervisor import vhost_user
from hypervisor.discovery import Capabilities
from hypervisor.live_source import LiveSource
from hypervisor.nbd_client import NbdPool
from hypervisor.vhost_user import Shared, VhostUserError, VhostUserPool, open_vhost_user, queues_for
from tests.hypervisor.fleecing_bench import MIB, Bench
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.support.vhost_user_server import F_PROTOCOL_FEATURES, F_VERSION_1, HEADER, Request, VhostUserServer, serving

pytestmark = pytest.mark.skipif(not vhost_user.usable(), reason="shared memory is read on x86 only")

CONTENT = random.Random(1).randbytes(9 * MIB + 512 * 3)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_many_read_at_a_time_and_everything_arrives(tmp_path: Path) -> None:
    server = VhostUserServer(CONTENT)
    choose = random.Random(2)
    await trio.to_thread.run_sync(open_files)  # what threads need is open from here on
    before = open_files()
    with serving(server, tmp_path / "s") as path:
        async with open_vhost_user(Shared(path, 2)) as pool:
            assert pool.size == len(CONTENT)

            async def read(offset: int, size: int) -> None:
                buffer = bytearray(size)
                await pool.read_into(offset, buffer)
                assert buffer == CONTENT[offset : offset + size]

            async with trio.open_nursery() as nursery:
                for _ in range(60):
                    first, last = sorted(choose.randrange(len(CONTENT) // 512 + 1) * 512 for _ in range(2))
                    nursery.start_soon(read, first, last - first)
            await read(0, len(CONTENT))
    assert open_files() == before
    assert server.kicks == [0, 1]
    # No request is larger than a piece or crosses its end; a descriptor more often used than the ring is long.
    assert all(request.size <= MIB and request.sector % 2048 * 512 + request.size <= MIB for request in server.requests)
    assert len(server.requests) > 100


async def test_requests_go_on_when_the_indexes_begin_anew(tmp_path: Path) -> None:
    content = CONTENT[: 4 * 512]
    server = VhostUserServer(content)
    with serving(server, tmp_path / "s") as path:
        async with open_vhost_user(Shared(path, 1)) as pool:
            await pool.read_into(0, bytearray(512))
            queue = vars(pool)["_free"][0]
            # As after 65530 requests, on both sides.
            queue._made = queue._seen = 65530
            for place in (vhost_user._AVAILABLE, vhost_user._USED):
                struct.pack_into("<H", queue._memory, queue._start + place + 2, 65530)
            server._rings[0].taken = server._rings[0].done = 65530
            buffer = bytearray(512)
            for number in range(20):
                await pool.read_into(number % 4 * 512, buffer)
                assert buffer == content[number % 4 * 512 :][:512]
            assert queue._made == 14


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"features": F_PROTOCOL_FEATURES}, "another version"),
        ({"features": F_VERSION_1}, "another version"),
        ({"protocol": 1}, "one queue, or no configuration"),
        ({"protocol": 1 << 9}, "one queue, or no configuration"),
        ({"answers": {1: b""}}, "closed the connection"),
        ({"answers": {15: b""}}, "closed the connection"),
        ({"answers": {24: b""}}, "closed the connection"),
        ({"answers": {1: HEADER.pack(2, 5, 8) + bytes(8)}}, "makes no sense"),
        ({"answers": {1: HEADER.pack(1, 1, 8) + bytes(8)}}, "makes no sense"),
        ({"answers": {1: HEADER.pack(1, 5, 1 << 31)}}, "makes no sense"),
        ({"answers": {1: HEADER.pack(1, 5, 4) + bytes(4)}}, "makes no sense"),
        ({"answers": {24: HEADER.pack(24, 5, 12) + bytes(12)}}, "makes no sense"),
        ({"answers": {24: HEADER.pack(24, 5, 0)}}, "makes no sense"),
    ],
)
async def test_an_export_of_another_kind_is_refused(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    before = open_files()
    with serving(VhostUserServer(CONTENT, **change), tmp_path / "s") as path, pytest.raises(VhostUserError, match=why):
        async with open_vhost_user(Shared(path, 2)):
            pass
    assert open_files() == before


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(VhostUserError, match="No such file"):
        async with open_vhost_user(Shared(str(tmp_path / "none"), 1)):
            pass


async def test_without_a_descriptor_it_is_an_error_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("hypervisor.vhost_user.socket.socket", none_left)
    with pytest.raises(VhostUserError, match="Too many open files"):
        async with open_vhost_user(Shared("/nowhere", 1)):
            pass


async def test_silence_is_given_up(tmp_path: Path) -> None:
    mute = VhostUserServer(CONTENT, answers={1: b"\0"})
    with serving(mute, tmp_path / "s") as path, pytest.raises(VhostUserError, match="timed out"):
        async with open_vhost_user(Shared(path, 1), timeout_s=0.2):
            pass
    with serving(VhostUserServer(CONTENT, answer=lambda _: None), tmp_path / "t") as path:
        async with open_vhost_user(Shared(path, 1), timeout_s=0.2) as pool:
            with pytest.raises(VhostUserError, match="does not answer"):
                await pool.read_into(0, bytearray(512))
            with pytest.raises(VhostUserError, match="an earlier read failed"):
                await pool.read_into(0, bytearray(512))


def third_fails(state: int) -> Callable[[Request], int]:
    return lambda request: state if request.sector >= 4096 else 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"answer": third_fails(1)}, r"could not read it \(state 1\)"),
        ({"answer": third_fails(0xFF)}, r"could not read it \(state 255\)"),
        ({"answer": third_fails(-1)}, "closed the connection"),
        ({"used": lambda descriptor: descriptor + 1}, "a request that was not made"),
        ({"used": lambda _: 3 * 4}, "a request that was not made"),
        ({"used": lambda _: 0xFFFFFFFF}, "a request that was not made"),
        ({"step": 9}, "requests that were not made"),
        ({"step": 0x7001}, "requests that were not made"),
    ],
)
async def test_what_qemu_answers_is_checked(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    with serving(VhostUserServer(CONTENT, **change), tmp_path / "s") as path:
        async with open_vhost_user(Shared(path, 2)) as pool:
            with pytest.raises(VhostUserError, match=why):
                await pool.read_into(0, bytearray(9 * MIB))


async def test_an_answer_for_another_request_in_flight_is_no_way_to_swap_them(tmp_path: Path) -> None:
    def twice(descriptor: int) -> int:
        return 0

    with serving(VhostUserServer(CONTENT, used=twice), tmp_path / "s") as path:
        async with open_vhost_user(Shared(path, 1)) as pool:
            with pytest.raises(VhostUserError, match=r"was not made|could not read"):
                await pool.read_into(0, bytearray(4 * MIB))


async def test_a_cancelled_read_ends_soon(tmp_path: Path) -> None:
    with serving(VhostUserServer(CONTENT, answer=lambda _: None), tmp_path / "s") as path:
        async with open_vhost_user(Shared(path, 1)) as pool:
            with trio.move_on_after(0.1) as scope:
                await pool.read_into(0, bytearray(MIB))
            assert scope.cancelled_caught
            with pytest.raises(VhostUserError, match="an earlier read failed"):
                await pool.read_into(0, bytearray(512))


@pytest.mark.parametrize(("offset", "size"), [(1, 512), (0, 100), (-512, 512), (len(CONTENT), 512)])
async def test_only_whole_sectors_of_it_are_asked_for(offset: int, size: int, tmp_path: Path) -> None:
    server = VhostUserServer(CONTENT)
    with serving(server, tmp_path / "s") as path:
        async with open_vhost_user(Shared(path, 1)) as pool:
            with pytest.raises(VhostUserError, match="no whole sectors of it"):
                await pool.read_into(offset, bytearray(size))
            await pool.read_into(len(CONTENT), bytearray(0))
    assert server.requests == []


def test_memory_is_bounded_however_many_disks_there_are() -> None:
    assert [queues_for(disks) for disks in (1, 4, 5, 16, 17)] == [2, 2, 1, 1, 0]
    assert max(disks * queues_for(disks) * vhost_user._QUEUE_SIZE for disks in range(100)) < 70 * MIB


# --- as part of a disk's source ---


class Nbd(NbdPool):
    """Notes what is read over NBD."""

    def __init__(self, content: bytes) -> None:
        self.content, self.size = content, len(content)
        self.reads: list[tuple[int, int]] = []

    async def read_into(self, offset: int, buffer: Any, **_: Any) -> None:
        self.reads.append((offset, len(buffer)))
        buffer[:] = self.content[offset : offset + len(buffer)]


def source(nbd: Nbd, pool: VhostUserPool | None) -> LiveSource:
    able = Capabilities((10, 0, 0), "stock", compat=False)
    return LiveSource("drive-d0.img", nbd.size, ReadPlan(None, ""), changed=None, pool=nbd, able=able, shared=pool)


async def test_what_fails_is_read_over_nbd_and_so_is_all_that_follows(tmp_path: Path) -> None:
    nbd = Nbd(CONTENT)
    with serving(VhostUserServer(CONTENT, answer=third_fails(1)), tmp_path / "s") as path:
        async with open_vhost_user(Shared(path, 2)) as pool:
            disk = source(nbd, pool)
            for offset in (0, MIB, 2 * MIB, 0):
                buffer = bytearray(MIB)
                await disk.read_into(offset, buffer)
                assert buffer == CONTENT[offset : offset + MIB]
    assert nbd.reads == [(2 * MIB, MIB), (0, MIB)]


async def test_what_is_no_whole_sector_is_read_over_nbd(tmp_path: Path) -> None:
    content = CONTENT[: MIB + 700]
    nbd = Nbd(content)
    with serving(VhostUserServer(content), tmp_path / "s") as path:
        async with open_vhost_user(Shared(path, 2)) as pool:
            disk = source(nbd, pool)
            buffer = bytearray(len(content))
            await disk.read_into(0, buffer)
            assert buffer == content
            assert nbd.reads == [(0, len(content))]
            await disk.read_into(512, memoryview(buffer)[:512])
            assert len(nbd.reads) == 1


async def test_an_export_of_another_size_is_left_alone(tmp_path: Path) -> None:
    nbd = Nbd(CONTENT)
    with serving(VhostUserServer(CONTENT[:-512]), tmp_path / "s") as path:
        async with open_vhost_user(Shared(path, 2)) as pool:
            await source(nbd, pool).read_into(0, bytearray(512))
    assert nbd.reads == [(0, 512)]


# --- QEMU ---


async def test_a_disk_of_qemu_is_read_through_it(qemu: QemuBinary, tmpfs: Path) -> None:
    await read_disk_of_qemu(qemu, tmpfs, iothread=False)


async def test_a_disk_with_an_io_thread_is_read_through_it(backports: QemuBinary, tmpfs: Path) -> None:
    await read_disk_of_qemu(backports, tmpfs, iothread=True)  # before QEMU 9.1 there is no backup of such a VM


async def read_disk_of_qemu(qemu: QemuBinary, tmpfs: Path, *, iothread: bool) -> None:
    (tmpfs / "d0").write_bytes(CONTENT)
    (tmpfs / "w").mkdir()
    disks = [VmDisk(tmpfs / "d0", "d0", device_options="iothread=io0" if iothread else "")]
    more = ["-object", "iothread,id=io0"] if iothread else []
    async with RunningQemu.start(qemu, disks, extra=more) as vm, Bench(tmpfs / "w").view(vm) as view:
        disk = view.sources[0]
        shared = vars(disk)["_shared"]
        if qemu.version < (10, 0, 0):
            assert shared is None
            return
        vars_of_pool = vars(disk)["_pool"]
        await vm.qemu_io("d0", "write -P 0x33 0 2M")
        buffer = bytearray(len(CONTENT))

        async def refused(*_: object, **__: object) -> None:
            raise AssertionError("not over NBD")

        vars_of_pool.read_into = refused
        async with trio.open_nursery() as nursery:
            for offset in range(0, len(CONTENT), MIB):
                nursery.start_soon(disk.read_into, offset, memoryview(buffer)[offset : offset + MIB])
        assert buffer == CONTENT
        assert vars(disk)["_shared"] is shared
