"""Sources that are no VM: raw and qcow2 files, block devices, NBD URIs; and everything that is not to be read."""

import fcntl
import gc
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from core.disks import Extent, ExtentState
from core.errors import SourceError, UsageError
from core.units import GIB, MIB
from hypervisor.errors import DiskInUseError
from hypervisor.extents import ExtentBuilder
from hypervisor.files import FileSource, NbdSource, open_source
from hypervisor.image_files import mounted_on
from tests.hypervisor.disk_source_suite import CHUNK, CONTENT, DiskSourceSuite, MakeSource
from tests.support.cache import ROOT
from tests.support.loop_devices import loop_device
from tests.support.nbd_servers import ScriptedServer, held_by_qemu, nbdkit

ZERO, DATA, CLEAN = ExtentState.ZERO, ExtentState.DATA, ExtentState.CLEAN


def write_sparse(path: Path, content: bytes) -> Path:
    """A file with holes where a chunk's quarter is zero."""
    with path.open("wb") as file:
        for offset in range(0, len(content), MIB):
            part = content[offset : offset + MIB]
            if any(part):
                file.seek(offset)
                file.write(part)
        file.truncate(len(content))
    return path


def qcow2_of(path: Path, content: bytes) -> Path:
    raw = write_sparse(path.with_suffix(".raw"), content)
    run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, path)
    return path


def children() -> set[str]:
    """Processes that any of our threads has started and that still run."""
    found: set[str] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found |= set(task.read_text().split())
    return found


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, timeout=60, capture_output=True, text=True)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - other processes have no event for us
            await trio.sleep(0.01)


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """No descriptor, child or socket folder more than before."""
    with tempfile.TemporaryDirectory(prefix="fl-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)

        def state() -> tuple[int, set[str], list[Path]]:
            gc.collect()
            return len(list(Path("/proc/self/fd").iterdir())), children(), list(Path(folder).iterdir())

        before = state()
        yield
        assert state() == before


class TestRawFile(DiskSourceSuite):
    @pytest.fixture
    def make_source(self, tmp_path: Path) -> MakeSource:
        return lambda content: open_source(str(write_sparse(tmp_path / "disk.raw", content)), "drive-disk0.img")


class TestQcow2File(DiskSourceSuite):
    @pytest.fixture
    def make_source(self, tmp_path: Path) -> MakeSource:
        return lambda content: open_source(str(qcow2_of(tmp_path / "disk.qcow2", content)), "drive-disk0.img")


class TestBlockDevice(DiskSourceSuite):
    @pytest.fixture
    def make_source(self, tmp_path: Path) -> MakeSource:
        @asynccontextmanager
        async def make(content: bytes) -> AsyncIterator[FileSource | NbdSource]:
            with loop_device(write_sparse(tmp_path / "disk.raw", content)) as device:
                async with open_source(device, "drive-disk0.img") as source:
                    yield source

        return make


class TestNbdUri(DiskSourceSuite):
    @pytest.fixture
    def make_source(self, tmp_path: Path) -> MakeSource:
        @asynccontextmanager
        async def make(content: bytes) -> AsyncIterator[FileSource | NbdSource]:
            async with (
                nbdkit("file", str(write_sparse(tmp_path / "disk.raw", content))) as server,
                open_source(str(server.address), "drive-disk0.img") as source,
            ):
                yield source

        return make


# -- the map ---------------------------------------------------------------------------------------------------------


def test_ranges_are_merged_to_whole_chunks() -> None:
    extents = ExtentBuilder(5 * CHUNK + 100)
    extents.add(CHUNK, ZERO)
    extents.add(CHUNK - 1, ZERO)
    extents.add(1, DATA)
    extents.add(2 * CHUNK, CLEAN)
    extents.add(CHUNK // 2, CLEAN)
    extents.add(CHUNK // 2, ZERO)
    extents.add(99, ZERO)
    extents.add(10**9, ZERO)
    assert extents.finish() == [
        Extent(0, CHUNK, ZERO),
        Extent(CHUNK, CHUNK, DATA),
        Extent(2 * CHUNK, 2 * CHUNK, CLEAN),
        Extent(4 * CHUNK, CHUNK, DATA),
        Extent(5 * CHUNK, 100, ZERO),
    ]


def test_what_nobody_described_must_be_read() -> None:
    extents = ExtentBuilder(3 * CHUNK)
    extents.add(CHUNK + 5, ZERO)
    assert extents.finish() == [Extent(0, CHUNK, ZERO), Extent(CHUNK, 2 * CHUNK, DATA)]


def test_merging_agrees_with_a_byte_by_byte_model() -> None:
    dice = random.Random(11)
    for _ in range(200):
        grain, size = 8, dice.randrange(1, 100)
        states = [dice.choice([ZERO, DATA, CLEAN]) for _ in range(size)]
        for index in range(1, size):
            if dice.random() < 0.7:
                states[index] = states[index - 1]
        extents = ExtentBuilder(size, grain)
        position = 0
        while position < size:
            length = 1
            while position + length < size and states[position + length] is states[position] and dice.random() < 0.9:
                length += 1
            extents.add(length, states[position])
            position += length
        told = [extent.state for extent in extents.finish() for _ in range(extent.length)]
        for start in range(0, size, grain):
            kinds = set(states[start : start + grain])
            assert set(told[start : start + grain]) == (kinds if len(kinds) == 1 else {DATA})


async def test_holes_of_a_raw_file_are_zero_by_whole_chunks(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(6 * CHUNK + 1000)
        file.seek(CHUNK + 70_000)
        file.write(b"x")
        file.seek(4 * CHUNK - 4096)
        file.write(b"x" * 8192)
    async with open_source(str(path), "a.img") as source:
        extents = await source.extents()
    assert extents == [
        Extent(0, CHUNK, ZERO),
        Extent(CHUNK, CHUNK, DATA),
        Extent(2 * CHUNK, CHUNK, ZERO),
        Extent(3 * CHUNK, 2 * CHUNK, DATA),
        Extent(5 * CHUNK, CHUNK + 1000, ZERO),
    ]


async def test_a_huge_empty_file_is_one_extent(tmp_path: Path) -> None:
    with (tmp_path / "disk.raw").open("wb") as file:
        file.truncate(1024 * GIB + 1)
    async with open_source(str(tmp_path / "disk.raw"), "a.img") as source:
        assert await source.extents() == [Extent(0, 1024 * GIB + 1, ZERO)]


async def test_what_a_qcow2_does_not_allocate_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "100G")
    async with open_source(str(path), "a.img") as source:
        assert await source.extents() == [Extent(0, 100 * GIB, ZERO)]


async def test_a_server_without_a_map_gives_one_extent_of_data() -> None:
    async with (
        nbdkit("memory", "64M", filters=["noextents"]) as server,
        open_source(str(server.address), "a.img") as source,
    ):
        assert await source.extents() == [Extent(0, 64 * MIB, DATA)]


# -- what is read, and as what ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 511, 513, CHUNK + 1])
async def test_a_raw_file_of_any_size_is_read_to_its_last_byte(tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    (tmp_path / "disk").write_bytes(content)
    async with open_source(str(tmp_path / "disk"), "a.img") as source:
        assert source.size == size
        assert source.plan.base is None
        assert source.plan.reason == "a file has no dirty bitmap"
        buffer = bytearray(size)
        await source.read_into(0, buffer)
    assert buffer == content
    assert source.warnings == []


async def test_a_raw_file_with_a_qcow2_header_is_read_as_it_is_with_a_warning(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"a file of the host" * 1000)
    disk = tmp_path / "guest.raw"
    # What a guest may write to its own disk: an image whose backing file is one of the host.
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", disk, "1M")
    content = disk.read_bytes()
    async with open_source(str(disk), "a.img") as source:
        assert source.size == len(content)
        buffer = bytearray(source.size)
        await source.read_into(0, buffer)
        assert buffer == content
        (warning,) = source.warnings
    assert "starts like a qcow2 image" in warning


async def test_the_format_can_be_given(tmp_path: Path) -> None:
    image = qcow2_of(tmp_path / "a.qcow2", CONTENT).rename(tmp_path / "without an end, with commas,=")
    async with open_source(str(image), "a.img", format="qcow2") as source:
        assert source.size == len(CONTENT)
    renamed = image.rename(tmp_path / "b.qcow2")
    async with open_source(str(renamed), "a.img", format="raw") as source:
        assert source.size == renamed.stat().st_size


@pytest.mark.parametrize("name", ["json:{}", "nbd:unix:x.raw", "file:x", "-c.raw"])
async def test_odd_names_are_only_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sparse(Path(name), CONTENT)
    async with open_source(name, "a.img") as source:
        assert source.size == len(CONTENT)
    qcow2_of(tmp_path / "plain.qcow2", CONTENT).rename(name + ".qcow2")
    async with open_source(name + ".qcow2", "a.img") as source:
        assert source.size == len(CONTENT)


async def test_a_qcow2_with_a_backing_file_is_read_whole(tmp_path: Path) -> None:
    base = qcow2_of(tmp_path / "base.qcow2", CONTENT)
    over = tmp_path / "over.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", over)
    async with open_source(str(over), "a.img") as source:
        buffer = bytearray(source.size)
        await source.read_into(0, buffer)
    assert buffer == CONTENT


@pytest.mark.parametrize("name", ["a.vmdk", "a.VDI", "a.vhdx", "a.qcow", "a.gz", "a.vma", "a.raw.zst"])
async def test_other_formats_are_refused_with_a_hint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(1024))
    with pytest.raises(UsageError) as caught:
        async with open_source(str(tmp_path / name), "a.img"):
            pass
    assert caught.value.hint
    async with open_source(str(tmp_path / name), "a.img", format="raw") as source:
        assert source.size == 1024


async def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'vmdk' is not supported"):
        async with open_source(str(tmp_path / "a"), "a.img", format="vmdk"):
            pass


async def test_a_file_that_is_no_qcow2_though_its_name_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.qcow2").write_bytes(bytes(100_000))
    with nothing_left_behind(), pytest.raises(SourceError, match="not in qcow2 format"):
        async with open_source(str(tmp_path / "a.qcow2"), "a.img"):
            pass


@pytest.mark.parametrize("cut", [0, 30, 72, 100, 200, 65536])
async def test_a_truncated_qcow2_is_an_error_or_reads_as_far_as_it_goes(tmp_path: Path, cut: int) -> None:
    image = qcow2_of(tmp_path / "a.qcow2", CONTENT)
    with image.open("r+b") as file:
        file.truncate(cut)
    with nothing_left_behind(), pytest.raises(SourceError):
        async with open_source(str(image), "a.img") as source:
            await source.extents()
            await source.read_into(0, bytearray(CHUNK))
            raise SourceError("notice", str(image), "QEMU takes the missing clusters for zeros")


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
async def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SourceError, match=r"empty|qcow2"):
        async with open_source(str(tmp_path / name), "a.img"):
            pass


async def test_an_empty_export_is_refused() -> None:
    async with nbdkit("memory", "0") as server:
        with pytest.raises(SourceError, match="it is empty"):
            async with open_source(str(server.address), "a.img"):
                pass


@pytest.mark.parametrize("name", ["thing", "thing.qcow2"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "missing", "character device"])
async def test_what_is_no_disk_is_refused_at_once(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            listener.bind(os.fspath(path))
        elif kind == "character device":
            path.symlink_to("/dev/zero")
        with trio.fail_after(60), nothing_left_behind(), pytest.raises(SourceError, match="cannot read"):
            async with open_source(os.fspath(path), "a.img"):
                pass


async def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "disk.raw", CONTENT)
    async with open_source(str(path), "a.img") as source:
        os.truncate(path, CHUNK + 100)
        with pytest.raises(SourceError, match=rf"became shorter while it was read: {CHUNK + 100} of \d+ bytes"):
            await source.read_into(CHUNK, bytearray(CHUNK))
        os.truncate(path, 0)
        with pytest.raises(SourceError, match="became shorter"):
            await source.extents()


async def test_a_file_that_changes_while_it_is_read_gives_a_warning(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "disk.raw", CONTENT)
    async with open_source(str(path), "a.img") as source:
        with path.open("r+b") as file:
            file.write(b"changed")
        os.utime(path, ns=(1, 1))
        assert source.warnings == []
    assert "was changed while it was read" in source.warnings[0]


# -- images in use ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_an_image_that_a_vm_writes_to_is_refused_unless_forced(tmp_path: Path, image_format: str) -> None:
    make = write_sparse if image_format == "raw" else qcow2_of
    path = make(tmp_path / f"disk.{image_format}", CONTENT)
    async with held_by_qemu(path, image_format):
        with (
            nothing_left_behind(),
            pytest.raises(DiskInUseError, match=r"it is in use by qemu-storage-\S+ \(pid \d+\)") as caught,
        ):
            async with open_source(str(path), "a.img"):
                pass
        assert caught.value.hint
        async with open_source(str(path), "a.img", force=True) as source:
            assert source.size == len(CONTENT)
    async with open_source(str(path), "a.img") as source:
        assert source.size == len(CONTENT)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_an_image_that_is_only_read_elsewhere_can_be_read_too(tmp_path: Path, image_format: str) -> None:
    make = write_sparse if image_format == "raw" else qcow2_of
    path = make(tmp_path / f"disk.{image_format}", CONTENT)
    async with (
        held_by_qemu(path, image_format, read_only=True),
        open_source(str(path), "a.img") as one,
        open_source(str(path), "b.img") as two,
    ):
        assert one.size == two.size == len(CONTENT)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_no_vm_starts_on_an_image_while_it_is_read(tmp_path: Path, image_format: str) -> None:
    make = write_sparse if image_format == "raw" else qcow2_of
    path = make(tmp_path / f"disk.{image_format}", CONTENT)
    write = ["qemu-io", "-f", image_format, "-c", "write 0 512", str(path)]
    async with open_source(str(path), "a.img"):
        done = await trio.run_process(write, capture_stdout=True, capture_stderr=True, check=False)
        assert b"lock" in done.stderr
        assert done.returncode
    await trio.run_process(write, capture_stdout=True)


async def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    path = write_sparse(tmp_path / "disk.raw", CONTENT)
    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    async with open_source(str(path), "a.img") as source:
        assert source.size == len(CONTENT)


# -- qemu-nbd as a child ---------------------------------------------------------------------------------------------


async def test_the_server_of_a_qcow2_ends_with_the_block(tmp_path: Path) -> None:
    path = qcow2_of(tmp_path / "a.qcow2", CONTENT)
    with nothing_left_behind():
        async with open_source(str(path), "a.img") as source:
            await source.read_into(0, bytearray(512))
        with pytest.raises(RuntimeError):
            async with open_source(str(path), "a.img"):
                raise RuntimeError
        with trio.CancelScope() as scope:
            async with open_source(str(path), "a.img"):
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        for wait_s in (0, 0.01, 0.03):
            with trio.move_on_after(wait_s):
                async with open_source(str(path), "a.img"):
                    await trio.sleep(0.05)


async def test_only_we_can_reach_the_server_of_a_qcow2(tmp_path: Path) -> None:
    path = qcow2_of(tmp_path / "a.qcow2", CONTENT)
    async with open_source(str(path), "a.img") as source:
        assert isinstance(source, NbdSource)
        folder = Path(source._pool.address.socket).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.stat().st_uid == os.geteuid()


async def test_a_dead_qemu_nbd_is_an_error(tmp_path: Path) -> None:
    path = qcow2_of(tmp_path / "a.qcow2", CONTENT)
    before = children()
    async with open_source(str(path), "a.img") as source:
        (child,) = children() - before
        os.kill(int(child), 9)
        with trio.fail_after(60), pytest.raises(SourceError, match="lost"):
            while True:
                await source.read_into(0, bytearray(CHUNK))


async def test_a_killed_reader_leaves_no_server_behind(tmp_path: Path) -> None:
    path = qcow2_of(tmp_path / "a.qcow2", CONTENT)
    script = f"""
import trio, os, pathlib
from hypervisor.files import open_source
async def main():
    async with open_source({os.fspath(path)!r}, "a.img") as source:
        await source.read_into(0, bytearray(512))
        children = [file.read_text() for file in pathlib.Path("/proc/self/task").glob("*/children")]
        print(*children, source._pool.address.socket, flush=True)
        os.kill(os.getpid(), 9)
trio.run(main)
"""
    done = await trio.run_process(
        [sys.executable, "-c", script], check=False, cwd=ROOT, capture_stdout=True, capture_stderr=True
    )
    assert done.returncode == -9, done.stderr.decode()
    child, socket_path = done.stdout.decode().split()

    def gone() -> bool:
        try:
            return b"qemu-nbd" not in Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            return True

    await until(gone)
    # A folder with nobody behind it is all that stays, until the next run.
    left = Path(socket_path).parent
    assert left.is_dir()
    async with open_source(str(path), "a.img") as source:
        assert isinstance(source, NbdSource)
        folder = Path(source._pool.address.socket).parent
        assert folder.parent == left.parent
        assert not left.exists()
        async with open_source(str(path), "b.img"):
            assert folder.is_dir()


async def test_qemu_nbd_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = qcow2_of(tmp_path / "a.qcow2", CONTENT)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SourceError, match="qemu-nbd: it is not installed; apt install qemu-utils"):
        async with open_source(str(path), "a.img"):
            pass


# -- devices and servers ---------------------------------------------------------------------------------------------


async def test_a_mounted_device_is_read_with_a_warning(tmp_path: Path) -> None:
    image = tmp_path / "fs.raw"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    run("mke2fs", "-q", "-F", image)
    mountpoint = tmp_path / "a mount"
    mountpoint.mkdir()
    with loop_device(image) as device:
        if run("mount", device, mountpoint, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        try:
            async with open_source(device, "a.img") as source:
                assert source.plan.reason == "a block device has no dirty bitmap"
                (warning,) = source.warnings
                assert f"mounted for writing on {mountpoint}" in warning
            run("mount", "-o", "remount,ro", mountpoint)
            async with open_source(device, "a.img") as source:
                assert source.warnings == []
        finally:
            run("umount", mountpoint)


def test_the_root_file_systems_device_counts_as_mounted() -> None:
    number = Path("/").stat().st_dev
    if os.major(number) == 0:
        pytest.skip("/ is on no block device")
    assert "/" in mounted_on(number)


async def test_a_server_with_one_client_at_a_time_can_be_read(tmp_path: Path) -> None:
    path, socket_path = write_sparse(tmp_path / "disk.raw", CONTENT), tmp_path / "s"
    process = await trio.lowlevel.open_process(["qemu-nbd", "-r", "-f", "raw", f"--socket={socket_path}", str(path)])
    try:
        await until(socket_path.exists)
        with trio.fail_after(60):
            async with open_source(f"nbd+unix:///?socket={socket_path}", "a.img") as source:
                buffer = bytearray(len(CONTENT))
                await source.read_into(0, buffer)
                assert buffer == CONTENT
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


async def test_a_map_of_nonsense_is_a_source_error() -> None:
    def nonsense(request: object) -> bytes:
        return struct.pack(">I", 0xDEADBEEF) * 20

    async with ScriptedServer(answer=nonsense).serving() as address, open_source(str(address), "a.img") as source:
        with pytest.raises(SourceError):
            await source.extents()
