"""Disks served by nbdkit: what a client reads, and what becomes of it when something on the way fails or dies."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from core.errors import FormatError, SourceError, UsageError
from hypervisor.errors import DiskInUseError, NbdServerError
from hypervisor.nbd_client import NbdPool, open_nbd
from hypervisor.nbd_endpoint import Endpoint
from hypervisor.nbd_server import serve_disk, serve_overlay
from tests.support.nbd_servers import NEEDS_NBDKIT_PYTHON
from tests.support.waiting import until

MIB = 1024**2

pytestmark = NEEDS_NBDKIT_PYTHON


@dataclass
class MemoryDisk:
    """Bytes, of which some cannot be read and some need not."""

    content: bytes
    bad: tuple[int, int] = (0, 0)
    holes: Sequence[tuple[int, int]] = ()  #: begin and end
    hold: trio.Event | None = None
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.content)

    async def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        if self.hold is not None:
            await self.hold.wait()
        if offset < self.bad[1] and offset + length > self.bad[0]:
            raise FormatError("read chunk", "vm/100/disk.img", "its CRC is wrong")
        return self.content[offset : offset + length]

    def zeros(self, offset: int, length: int) -> list[tuple[int, bool]]:
        parts = []
        end = offset + length
        while offset < end:
            inside = [stop for start, stop in self.holes if start <= offset < stop]
            stop = min([end, *inside, *(start for start, _ in self.holes if start > offset and not inside)])
            parts.append((stop - offset, bool(inside)))
            offset = stop
        return parts


async def read(pool: NbdPool, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await pool.read_into(offset, buffer)
    return bytes(buffer)


async def test_every_byte_is_served_also_of_a_size_that_is_no_sector() -> None:
    disk = MemoryDisk(os.urandom(3 * MIB + 77))
    async with serve_disk(disk, where="disk") as address, open_nbd(address, connections=4) as pool:
        assert (pool.size, pool.read_only) == (disk.size, True)
        assert await read(pool, 0, disk.size) == disk.content
        assert await read(pool, disk.size - 1, 1) == disk.content[-1:]
        assert await read(pool, 513, 1000) == disk.content[513:1513]


async def test_many_readers_are_answered_at_the_same_time() -> None:
    disk = MemoryDisk(os.urandom(MIB), hold=trio.Event())
    async with serve_disk(disk, where="disk") as address, open_nbd(address, connections=2) as pool:
        found: dict[int, bytes] = {}

        async def one(number: int) -> None:
            found[number] = await read(pool, number * 65536, 65536)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0)
            nursery.start_soon(one, 1)
            await until(lambda: len(disk.reads) == 2)
            assert disk.hold is not None
            disk.hold.set()
        assert found == {0: disk.content[:65536], 1: disk.content[65536:131072]}


async def test_what_is_known_to_be_zeros_is_told() -> None:
    disk = MemoryDisk(bytes(8 * MIB), holes=[(MIB, 3 * MIB), (7 * MIB, 8 * MIB)])
    async with (
        serve_disk(disk, where="disk") as address,
        open_nbd(address, connections=1, contexts=("base:allocation",)) as pool,
    ):
        assert await pool.block_status(0, disk.size, "base:allocation") == [
            (0, MIB, 0),
            (MIB, 2 * MIB, 3),
            (3 * MIB, 4 * MIB, 0),
            (7 * MIB, MIB, 3),
        ]


async def test_a_disk_that_is_copied_from_by_qemu_gives_nobody_a_map() -> None:
    """Where the question for it fails, as when the server is away, `block-stream` takes the range for copied."""
    disk = MemoryDisk(os.urandom(2 * MIB) + bytes(MIB), holes=[(2 * MIB, 3 * MIB)])
    async with (
        serve_disk(disk, where="disk", extents=False) as address,
        open_nbd(address, contexts=("base:allocation",)) as pool,
    ):
        assert not pool.has_context("base:allocation")
        assert await read(pool, 0, disk.size) == disk.content


async def test_a_chunk_that_is_bad_is_an_error_of_its_range_only_and_logged_once_in_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = MemoryDisk(os.urandom(4 * MIB), bad=(MIB, MIB + 1))
    async with serve_disk(disk, where="disk") as address, open_nbd(address, connections=1) as pool:
        for _ in range(3):
            with pytest.raises(SourceError, match="Input/output error"):
                await read(pool, MIB, 4096)
        assert [one.getMessage() for one in caplog.records] == ["cannot read chunk vm/100/disk.img: its CRC is wrong"]
        assert await read(pool, 0, MIB) == disk.content[:MIB]
        assert await read(pool, MIB + 4096, 4096) == disk.content[MIB + 4096 : MIB + 8192]


async def test_an_overlay_takes_writes_and_forgets_them() -> None:
    disk = MemoryDisk(os.urandom(MIB))
    before = disk.content
    for _ in range(2):
        async with (
            serve_disk(disk, where="disk", overlay=True) as address,
            open_nbd(address, writable=True) as pool,
        ):
            assert await read(pool, 0, disk.size) == before
            await pool.write(65536, b"new" * 1000)
            assert await read(pool, 65536, 3000) == b"new" * 1000
            assert await read(pool, 68536, 1000) == before[68536:69536]
    assert disk.content == before


async def test_a_client_that_still_reads_does_not_hold_up_the_end() -> None:
    disk = MemoryDisk(os.urandom(MIB), hold=trio.Event())
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery, serve_disk(disk, where="disk") as address:

            async def client() -> None:
                with pytest.raises(SourceError):
                    async with open_nbd(address) as pool:
                        await read(pool, 0, 4096)

            nursery.start_soon(client)
            await until(lambda: disk.reads)


async def test_the_end_of_nbdkit_is_an_error() -> None:
    disk = MemoryDisk(os.urandom(MIB))
    with pytest.raises(NbdServerError, match=r"cannot serve vm/100/latest disk: nbdkit ended with exit code -9"):
        async with serve_disk(disk, where="vm/100/latest disk") as address:
            (pid,) = _pids_with(address.socket)
            os.kill(pid, signal.SIGKILL)
            await trio.sleep_forever()


async def test_without_nbdkit_or_its_plugin_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NbdServerError, match="nbdkit is not installed; apt install nbdkit nbdkit-plugin-python"):
        async with serve_disk(MemoryDisk(b"1"), where="disk"):
            raise AssertionError
    words = "nbdkit: error: cannot open plugin 'python': nbdkit-python-plugin.so: cannot open shared object file"
    (tmp_path / "nbdkit").write_text(f'#!/bin/sh\necho "{words}" >&2\nexit 1\n')
    (tmp_path / "nbdkit").chmod(0o755)
    with pytest.raises(NbdServerError, match=r"plugin for Python is not installed; apt install nbdkit-plugin-python$"):
        async with serve_disk(MemoryDisk(b"1"), where="disk"):
            raise AssertionError


async def test_a_killed_process_leaves_no_server_behind(tmp_path: Path) -> None:
    code = """
import sys, trio
from hypervisor.nbd_endpoint import Endpoint
from hypervisor.nbd_server import serve_disk, serve_overlay
class Disk:
    size = 1 << 20
    async def read(self, offset, length): return bytes(length)
    def zeros(self, offset, length): return [(length, False)]
async def main():
    async with serve_disk(Disk(), where="disk") as address:
        print(address.socket, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = await trio.to_thread.run_sync(process.stdout.readline)
        (pid,) = _pids_with(line.strip())
        process.kill()
        await until(lambda: not Path(f"/proc/{pid}").exists() or not _pids_with(line.strip()))


def _pids_with(word: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"--unix={word}" in words:
                found.append(int(folder.name))
    return found


# -- where clients find it, and what they write -----------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_disk_is_served_on_a_port_of_this_host(host: str) -> None:
    disk = MemoryDisk(os.urandom(MIB))
    at = Endpoint(host=host)
    assert at.is_local
    async with serve_disk(disk, where="disk", at=at) as address:
        assert str(address).startswith(f"nbd://[{host}]:" if ":" in host else f"nbd://{host}:")
        async with open_nbd(address) as pool:
            assert await read(pool, 0, MIB) == disk.content
        port = int(str(address).rpartition(":")[2])
        with pytest.raises(NbdServerError, match="Address already in use"):
            async with serve_disk(disk, where="disk", at=Endpoint(host=host, port=port)):
                raise AssertionError


async def test_a_disk_is_served_at_a_socket_that_only_its_user_may_use(tmp_path: Path) -> None:
    disk = MemoryDisk(os.urandom(MIB))
    path = tmp_path / "web.nbd"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()  # of a server that was killed
    async with serve_disk(disk, where="disk", at=Endpoint(path)) as address:
        assert path.stat().st_mode & 0o777 == 0o600
        async with open_nbd(address) as pool:
            assert await read(pool, 0, MIB) == disk.content
        with pytest.raises(NbdServerError, match="Address already in use"):
            async with serve_disk(disk, where="disk", at=Endpoint(path)):
                raise AssertionError
        assert path.exists()
    assert not path.exists()


async def test_a_server_that_ends_leaves_no_client_waiting(tmp_path: Path) -> None:
    disk = MemoryDisk(os.urandom(MIB))
    with pytest.raises(NbdServerError, match="ended"):
        async with serve_disk(disk, where="disk", at=Endpoint(tmp_path / "s")) as address:
            (child,) = [pid for pid in map(int, children_of(os.getpid())) if "nbdkit" in name_of(pid)]
            os.kill(child, signal.SIGKILL)
            with pytest.raises(SourceError):
                while True:
                    async with open_nbd(address) as pool:
                        await read(pool, 0, 1)
            await trio.sleep_forever()


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


async def test_with_keys_only_who_has_one_can_read(tmp_path: Path) -> None:
    disk = MemoryDisk(os.urandom(MIB))
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{os.urandom(32).hex()}\n")
    async with serve_disk(disk, where="disk", at=Endpoint(tls_psk=keys)) as address:
        assert str(address).startswith("nbds://127.0.0.1:")
        with_key = str(address).replace("//", "//alice@") + f"?tls-psk-file={keys}"
        done = await trio.run_process(["nbdinfo", "--size", with_key], capture_stdout=True)
        assert int(done.stdout) == MIB
        refused = await trio.run_process(
            ["nbdinfo", "--size", str(address).replace("nbds", "nbd")], capture_stderr=True, check=False
        )
        assert refused.returncode
    with pytest.raises(NbdServerError, match="keys of TLS"):
        async with serve_disk(disk, where="disk", at=Endpoint(tls_psk=tmp_path / "none")):
            raise AssertionError


async def test_an_overlay_in_a_file_keeps_what_was_written(tmp_path: Path) -> None:
    disk = MemoryDisk(os.urandom(MIB), holes=[])
    overlay = tmp_path / "try, once.qcow2"
    async with (
        serve_overlay(disk, overlay, "vm/1 a b/c?", where="disk") as address,
        open_nbd(address, writable=True) as pool,
    ):
        assert await read(pool, 0, MIB) == disk.content
        await pool.write(65536, b"new!" * 1024)
        await pool.flush()
        with pytest.raises(DiskInUseError, match="in use"):
            async with serve_overlay(disk, overlay, "vm/1 a b/c?", where="disk"):
                raise AssertionError
    expected = disk.content[:65536] + b"new!" * 1024 + disk.content[65536 + 4096 :]
    async with (
        serve_overlay(disk, overlay, "vm/1 a b/c?", where="disk", at=Endpoint()) as address,
        open_nbd(address) as pool,
    ):
        assert await read(pool, 0, MIB) == expected
    with pytest.raises(UsageError, match=r"it was made for vm/1 a b/c\?; this is vm/1 other"):
        async with serve_overlay(disk, overlay, "vm/1 other", where="disk"):
            raise AssertionError
    foreign = tmp_path / "foreign.qcow2"
    await trio.run_process(["qemu-img", "create", "-q", "-f", "qcow2", str(foreign), "1M"])
    with pytest.raises(UsageError, match="it was made for no backup"):
        async with serve_overlay(disk, foreign, "vm/1", where="disk"):
            raise AssertionError
