"""Exports as files: read through the page cache and past it, and gone however the block ends."""

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from core.limits import in_io_thread
from hypervisor.errors import NbdDeviceError
from hypervisor.nbd_address import NbdAddress
from hypervisor.nbd_files import is_mounted, mounted_file, open_handle
from tests.support.fuse import NEEDS_FUSE
from tests.support.nbd_servers import nbdkit
from tests.support.waiting import until

MIB = 1024**2
SIZE = 4 * MIB

pytestmark = [NEEDS_FUSE, pytest.mark.fuse]


async def test_the_file_has_the_bytes_of_the_export(tmp_path: Path) -> None:
    path = tmp_path / "drive 0.img"
    async with nbdkit("pattern", f"size={SIZE}") as server, mounted_file(server.address, path, SIZE):
        data = await in_io_thread(path.read_bytes)
        assert len(data) == SIZE
        assert data[MIB : MIB + 8] == MIB.to_bytes(8, "big")
        with pytest.raises(PermissionError if os.geteuid() else OSError):
            await in_io_thread(path.write_bytes, b"1")
        with open_handle(path) as handle:
            assert await in_io_thread(os.pread, handle, 4096, 2 * MIB) == data[2 * MIB : 2 * MIB + 4096]
    assert not path.exists()


async def test_holes_that_are_punched_reach_the_server(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    async with nbdkit("memory", f"size={SIZE}") as server, mounted_file(server.address, path, SIZE, read_only=False):

        def use() -> bytes:
            with open_handle(path, read_only=False) as handle:
                memory = mmap.mmap(-1, MIB)  # on whole pages, as O_DIRECT may want
                memory.write(b"\x07" * MIB)
                assert os.pwrite(handle, memory, 0) == MIB
            subprocess.run(["fallocate", "-p", "-o", "65536", "-l", "65536", str(path)], check=True, timeout=60)
            return path.read_bytes()

        assert await in_io_thread(use) == (b"\x07" * 65536 + bytes(65536) + b"\x07" * (MIB - 131072)).ljust(SIZE, b"\0")


async def test_a_file_that_is_there_and_a_size_that_is_wrong_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"mine")
    async with nbdkit("memory", f"size={SIZE}") as server:
        with pytest.raises(NbdDeviceError, match=r"cannot make the file .*: File exists"):
            async with mounted_file(server.address, path, SIZE):
                raise AssertionError
        assert path.read_bytes() == b"mine"
        path.unlink()
        with pytest.raises(NbdDeviceError, match=f"it has {SIZE} bytes, not {SIZE + 1}"):
            async with mounted_file(server.address, path, SIZE + 1):
                raise AssertionError
    assert not path.exists()


async def test_no_server_is_an_error_with_the_words_of_nbdfuse(tmp_path: Path) -> None:
    with pytest.raises(NbdDeviceError, match="nbd_connect_uri: connect: No such file"):
        async with mounted_file(NbdAddress.unix(tmp_path / "none", ""), tmp_path / "disk", SIZE):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []


async def test_who_has_the_file_open_does_not_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    async with nbdkit("memory", f"size={SIZE}") as server:
        with trio.move_on_after(60) as scope:
            async with mounted_file(server.address, path, SIZE):
                handle = await in_io_thread(os.open, path, os.O_RDONLY)
                scope.cancel()
                await trio.sleep_forever()
        assert not path.exists()
        with pytest.raises(OSError, match=r"not connected|aborted|Bad address|Input/output"):
            await in_io_thread(os.pread, handle, 512, MIB)
        os.close(handle)


async def test_without_nbdfuse_it_says_which_package_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NbdDeviceError, match="nbdfuse is not installed; apt install it with the package libnbd-bin"):
        async with mounted_file(NbdAddress.unix("/run/x", ""), tmp_path / "disk", SIZE):
            raise AssertionError
    assert not (tmp_path / "disk").exists()


async def test_a_killed_process_leaves_no_mount(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    code = f"""
import trio
from pathlib import Path
from hypervisor.nbd_address import NbdAddress
from hypervisor.nbd_files import mounted_file
async def main(socket):
    async with mounted_file(NbdAddress.unix(socket, ""), Path({str(path)!r}), {SIZE}):
        print("ready", flush=True)
        await trio.sleep_forever()
trio.run(main, SOCKET)
"""
    async with nbdkit("memory", f"size={SIZE}") as server:
        program = code.replace("SOCKET", repr(server.address.socket))
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220
            assert process.stdout is not None
            assert await trio.to_thread.run_sync(process.stdout.readline) == "ready\n"
            assert is_mounted(path)
            process.send_signal(signal.SIGKILL)
            await until(lambda: not is_mounted(path))
