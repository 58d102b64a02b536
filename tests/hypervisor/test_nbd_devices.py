"""`/dev/nbdX` on a kernel that is made of files: which device is taken, how it is freed, and that no other is touched.

The same on a real kernel, in a guest: tests/vm/test_nbd_devices.py.
"""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from core.errors import BusyError
from hypervisor.errors import NbdDeviceError
from hypervisor.nbd_address import NbdAddress
from hypervisor.nbd_devices import device_number, newest, parse_reservations
from hypervisor.unix_socket import process_start_time
from tests.support.fake_nbd import FakeNbd
from tests.support.waiting import until

ADDRESS = NbdAddress.unix("/run/fleece/nbd,1", "drive,0")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNbd]:
    fake = FakeNbd(tmp_path / "kernel")
    monkeypatch.setenv("PATH", fake.path)
    yield fake
    fake.end_all()


# -- the file of reservations -----------------------------------------------------------------------------------------


def test_reservations_count_for_a_minute() -> None:
    assert parse_reservations(b"0 1000\n1 941\n2 940\n3 939\n", 1000) == {0: 1000, 1: 941}


@pytest.mark.parametrize(
    "line",
    [b"", b"0", b"x 1000", b"-1 1000", b"1 1000 2", b" 1 1000", b"1 1000 ", b"1  1000", b"1 1e3", b"99999999 1000",
     b"1 1061", b"1 9999999999999", b"1\x00 1000", "\u0661 1000".encode(), b"../1 1000", b"1 1000\r"],
)  # fmt: skip
def test_lines_of_another_form_are_left_out(line: bytes) -> None:
    assert parse_reservations(b"5 1000\n" + line + b"\n6 999", 1000) == {5: 1000, 6: 999}


def test_the_search_starts_at_the_newest_reservation_even_if_it_has_expired() -> None:
    assert newest(b"3 10\n7 20\nrubbish\n1 15\n") == 7
    assert newest(b"") == newest(b"rubbish") == 0


@pytest.mark.parametrize(("text", "number"), [
    ("/dev/nbd0", 0), ("nbd12", 12), ("/dev/nbd1048575", 1048575), ("/dev/nbd1048576", None), ("/dev/nbd01", None),
    ("/dev/nbd", None), ("/dev/sda", None), ("/dev/nbd1p1", None), ("/dev/../dev/nbd1", None), ("nbd1\n", None),
    ("nbd\u0661", None), ("", None),
])  # fmt: skip
def test_only_digits_name_a_device(text: str, number: int | None) -> None:
    assert device_number(text) == number


# -- which device -----------------------------------------------------------------------------------------------------


async def test_a_device_is_connected_and_freed(kernel: FakeNbd) -> None:
    async with kernel.host().connected(ADDRESS) as device:
        assert (device.number, device.size) == (0, 1024**2)
        assert kernel.user(0) == device.child.pid
        assert kernel.reservations.read_text() == "0 1000000\n"
        (use,) = kernel.host().in_use()
        assert (use.number, use.size, use.read_only, use.served_by(device.child.pid)) == (0, 1024**2, True, True)
    assert kernel.user(0) is None
    assert kernel.calls() == ["connect 0", "disconnect 0"]
    assert kernel.reservations.read_text() == ""
    line = kernel.command_lines()[0]
    assert "--read-only" in line
    assert "discard" not in line
    # Names of any kind are no options of QEMU's.
    assert (
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=/run/fleece/nbd,,1,file.export=drive,,0"
        in line
    )


async def test_discards_reach_the_server_only_where_that_was_wanted(kernel: FakeNbd) -> None:
    async with kernel.host().connected(ADDRESS, read_only=False, discard=True):
        pass
    line = kernel.command_lines()[0]
    assert "--discard=unmap" in line
    assert "--read-only" not in line


async def test_what_is_in_use_reserved_or_missing_is_passed_over(kernel: FakeNbd) -> None:
    kernel.take(2)
    kernel.reservations.parent.mkdir()
    kernel.reservations.write_text("1 999990\n3 999941\n0 999940\n")
    with pytest.raises(NbdDeviceError, match="all 4 are in use, reserved or missing"):
        (kernel.root / "dev/nbd0").unlink()
        async with kernel.host().connected(ADDRESS):
            raise AssertionError
    (kernel.root / "dev/nbd0").write_text("43:0")
    async with kernel.host().connected(ADDRESS) as device:
        assert device.number == 0
        assert kernel.reservations.read_text() == "0 1000000\n1 999990\n3 999941\n"
    assert kernel.user(2) == 1
    assert all("disconnect 2" not in call and "connect 2" not in call for call in kernel.calls())


async def test_the_search_goes_round_from_the_newest(kernel: FakeNbd) -> None:
    kernel.reservations.parent.mkdir()
    kernel.reservations.write_text("0 999800\n2 999900\n")
    async with kernel.host().connected(ADDRESS) as first, kernel.host().connected(ADDRESS) as second:
        assert (first.number, second.number) == (2, 3)
        async with kernel.host().connected(ADDRESS) as third:
            assert third.number == 0


async def test_a_node_that_is_another_device_is_passed_over(kernel: FakeNbd) -> None:
    (kernel.root / "dev/nbd0").write_text("8:0")
    async with kernel.host().connected(ADDRESS) as device:
        assert device.number == 1


async def test_a_device_that_somebody_was_quicker_to_take_is_not_touched(kernel: FakeNbd) -> None:
    # It is connected between the look and the try: size and process are not there yet.
    (kernel.root / "sys/block/nbd0/pid").write_text("1\n")
    async with kernel.host().connected(ADDRESS) as device:
        assert device.number == 1
    assert kernel.calls() == ["connect 0", "connect 1", "disconnect 1"]
    assert kernel.user(0) == 1


async def test_any_other_failure_is_final_and_reserves_nothing(kernel: FakeNbd) -> None:
    kernel.behave("fails", 0, "Failed to blk_new_open 'nbd': Connection refused")
    with pytest.raises(
        NbdDeviceError, match=r"cannot connect .*/nbd0: qemu-nbd: Failed to blk_new_open 'nbd': Connection"
    ):
        async with kernel.host().connected(ADDRESS):
            raise AssertionError
    assert kernel.calls() == ["connect 0"]
    assert not kernel.reservations.exists()


async def test_without_the_kernel_module_it_says_how_to_load_it(kernel: FakeNbd) -> None:
    (kernel.root / "sys/module/nbd/parameters/nbds_max").unlink()
    with pytest.raises(NbdDeviceError, match="the kernel module nbd is not loaded; as root: modprobe nbd nbds_max=16"):
        async with kernel.host().connected(ADDRESS):
            raise AssertionError
    assert kernel.host().in_use() == []
    assert kernel.calls() == []


async def test_a_module_that_tells_nonsense_is_an_error(kernel: FakeNbd) -> None:
    (kernel.root / "sys/module/nbd/parameters/nbds_max").write_text("many\n")
    with pytest.raises(NbdDeviceError, match="does not tell how many there are"):
        async with kernel.host().connected(ADDRESS):
            raise AssertionError


async def test_without_qemu_nbd_it_says_what_to_install(kernel: FakeNbd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(kernel.root))
    with pytest.raises(NbdDeviceError, match="cannot run qemu-nbd: it is not installed; apt install qemu-utils"):
        async with kernel.host().connected(ADDRESS):
            raise AssertionError


# -- the lock ---------------------------------------------------------------------------------------------------------


async def test_two_that_race_get_one_device_each(kernel: FakeNbd) -> None:
    found: list[int] = []
    all_there = trio.Event()

    async def one() -> None:
        async with kernel.host().connected(ADDRESS) as device:
            found.append(device.number)
            if len(found) == kernel.devices:
                all_there.set()
            await all_there.wait()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(kernel.devices):
                nursery.start_soon(one)
    assert sorted(found) == [0, 1, 2, 3]
    assert [kernel.user(number) for number in range(4)] == [None] * 4


async def test_a_lock_that_is_held_is_waited_for_ten_seconds(kernel: FakeNbd, autojump_clock: trio.abc.Clock) -> None:
    (kernel.root / "run").mkdir()
    lock = os.open(kernel.root / "run/lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(BusyError, match=r"another program has held .*/run/lock for 10 s"):
            async with kernel.host().connected(ADDRESS):
                raise AssertionError
        assert 10 <= trio.current_time() < 11
    finally:
        os.close(lock)
    assert kernel.calls() == []


async def test_a_lock_file_that_somebody_left_is_no_obstacle(kernel: FakeNbd) -> None:
    (kernel.root / "run").mkdir()
    (kernel.root / "run/lock").write_text("12345\n")
    async with kernel.host().connected(ADDRESS) as device:
        assert device.number == 0


async def test_reservations_that_cannot_be_written_leave_no_device(kernel: FakeNbd) -> None:
    kernel.reservations.mkdir(parents=True)
    with pytest.raises(NbdDeviceError, match="cannot read the reservations in"):
        async with kernel.host().connected(ADDRESS):
            raise AssertionError
    assert kernel.user(0) is None


# -- the end ----------------------------------------------------------------------------------------------------------


async def test_a_cancelled_block_frees_the_device(kernel: FakeNbd) -> None:
    with trio.CancelScope() as scope:
        async with kernel.host().connected(ADDRESS):
            scope.cancel()
            await trio.sleep_forever()
    assert kernel.user(0) is None


async def test_a_program_that_hears_nothing_is_killed(kernel: FakeNbd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypervisor.nbd_devices._FREE_TIMEOUT_S", 60)  # a busy machine is slow to start programs
    monkeypatch.setattr("hypervisor.nbd_devices._OBEY_TIMEOUT_S", 0.2)
    monkeypatch.setattr("hypervisor.nbd_devices.STOP_TIMEOUT_S", 0.2)
    kernel.behave("deaf", 0)
    async with kernel.host().connected(ADDRESS) as device:
        pid = device.child.pid
    assert kernel.calls() == ["connect 0", "disconnect 0"]
    assert device.child.code == -signal.SIGKILL
    assert process_start_time(pid) is None


async def test_a_device_that_is_somebody_elses_by_now_is_left_to_him(kernel: FakeNbd) -> None:
    async with kernel.host().connected(ADDRESS) as device:
        device.child.terminate()
        await device.child.wait()
        kernel.take(0)
    assert kernel.user(0) == 1
    assert kernel.calls() == ["connect 0"]


async def test_a_killed_holder_takes_its_program_along(kernel: FakeNbd) -> None:
    code = f"""
import trio
from pathlib import Path
from hypervisor.nbd_address import NbdAddress
from tests.support.fake_nbd import FakeNbd
FakeNbd.__post_init__ = lambda self: None
async def main():
    async with FakeNbd(Path({str(kernel.root)!r})).host().connected(NbdAddress.unix("/x", "")) as device:
        print(device.child.pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        pid = int(await trio.to_thread.run_sync(process.stdout.readline))
        assert kernel.user(0) == pid
        process.kill()
        await until(lambda: kernel.user(0) is None)
    # Its reservation expires by itself.
    assert kernel.reservations.read_text() == "0 1000000\n"
    kernel.times.append(1_000_060)
    async with kernel.host().connected(ADDRESS) as device:
        assert device.number == 0


async def test_what_a_killed_holder_left_is_freed_by_the_process_it_wrote_down(kernel: FakeNbd) -> None:
    host = kernel.host()
    async with host.connected(ADDRESS) as device:
        child = device.child
        assert child.start_time is not None
        # Another process of that number, one that serves nothing, and another device: nothing happens.
        assert not await host.free_left(0, child.pid, child.start_time + 1)
        assert not await host.free_left(0, os.getpid(), process_start_time(os.getpid()) or 0)
        assert not await host.free_left(1, child.pid, child.start_time)
        assert not await host.free_left(0, 2**22 + 1, 5)
        assert kernel.calls() == ["connect 0"]
        assert await host.free_left(0, child.pid, child.start_time)
        assert kernel.user(0) is None


# -- who uses it ------------------------------------------------------------------------------------------------------


def test_mounts_swap_and_devices_above_are_told(kernel: FakeNbd) -> None:
    block = kernel.root / "sys/block/nbd1"
    assert kernel.host().used_for(1) == []
    (block / "nbd1p2/holders").mkdir(parents=True)
    (block / "nbd1p2/dev").write_text("43:18\n")
    (block / "nbd1p2/holders/dm-3").mkdir()
    (kernel.root / "mounts").write_text(
        "22 1 43:16 / /mnt/disk ro - ext4 /dev/nbd1 ro\n23 1 43:0 / /other ro - ext4 /dev/nbd0 ro\nrubbish\n"
    )
    (kernel.root / "swaps").write_text("Filename\tType\tSize\n/dev/nbd1p2 partition 1 0 -2\n\n")
    assert kernel.host().used_for(1) == [
        "dm-3 is made of nbd1p2", "nbd1 is mounted on /mnt/disk", "nbd1p2 is swap space",
    ]  # fmt: skip
