"""Targets that are no VM: nothing is overwritten that somebody may want, nothing half-made stays."""

import errno
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from core.disks import DiskTarget
from core.errors import TargetError, UsageError
from core.units import GIB, MIB
from hypervisor import targets
from hypervisor.errors import DiskInUseError
from hypervisor.targets import FileTarget, NbdTarget, StreamTarget, open_target
from tests.hypervisor.disk_target_suite import CHUNK, SIZE, DiskTargetSuite, MakeTarget
from tests.support.loop_devices import loop_device
from tests.support.nbd_servers import held_by_qemu, nbdkit

DATA = random.Random(8).randbytes(CHUNK)
OLD = random.Random(9).randbytes(2 * CHUNK)


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, timeout=60, capture_output=True, text=True)


def raw_content(image: Path) -> bytes:
    """The content of a qcow2 image, by QEMU's own tool."""
    copy = image.with_suffix(".copy")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, copy)
    return copy.read_bytes()


class Boom(Exception):  # noqa: N818
    """The restore failed for a reason of its own."""


# -- the interface ---------------------------------------------------------------------------------------------------


class TestNewFile(DiskTargetSuite):
    @pytest.fixture
    def make_target(self, tmp_path: Path) -> MakeTarget:
        @asynccontextmanager
        async def make(size: int) -> AsyncIterator[tuple[DiskTarget, Callable[[], bytes]]]:
            async with open_target(str(tmp_path / "disk"), size) as target:
                yield target, (tmp_path / "disk").read_bytes

        return make


class TestOldFile(DiskTargetSuite):
    @pytest.fixture
    def make_target(self, tmp_path: Path) -> MakeTarget:
        @asynccontextmanager
        async def make(size: int) -> AsyncIterator[tuple[DiskTarget, Callable[[], bytes]]]:
            (tmp_path / "disk").write_bytes(OLD * 3)
            async with open_target(str(tmp_path / "disk"), size, force=True) as target:
                yield target, (tmp_path / "disk").read_bytes

        return make


class TestBlockDevice(DiskTargetSuite):
    @pytest.fixture
    def make_target(self, tmp_path: Path) -> MakeTarget:
        @asynccontextmanager
        async def make(size: int) -> AsyncIterator[tuple[DiskTarget, Callable[[], bytes]]]:
            backing = tmp_path / "device"
            backing.write_bytes((OLD * 3)[: size + 512])
            with loop_device(backing) as device:
                async with open_target(device, size, force=True) as target:
                    yield target, backing.read_bytes

        return make


class TestNbdExport(DiskTargetSuite):
    filters: tuple[str, ...] = ()  #: of nbdkit
    arguments: tuple[str, ...] = ()

    @pytest.fixture
    def make_target(self, tmp_path: Path) -> MakeTarget:
        @asynccontextmanager
        async def make(size: int) -> AsyncIterator[tuple[DiskTarget, Callable[[], bytes]]]:
            backing = tmp_path / "export"
            backing.write_bytes((OLD * 3)[: size + 512])
            async with (
                nbdkit("file", str(backing), *self.arguments, filters=self.filters) as server,
                open_target(str(server.address), size, force=True) as target,
            ):
                yield target, backing.read_bytes

        return make


class TestNbdExportWithoutZeroing(TestNbdExport):
    filters = ("nozero",)


class TestNbdExportWithLargeBlocks(TestNbdExport):
    filters = ("blocksize-policy",)
    arguments = ("blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-error-policy=error")

    @pytest.mark.parametrize("filters", [(), ("nozero",)])
    async def test_the_images_end_inside_a_block_leaves_the_rest_of_it(
        self, tmp_path: Path, filters: tuple[str, ...]
    ) -> None:
        backing = tmp_path / "export"
        backing.write_bytes(OLD)
        async with (
            nbdkit("file", str(backing), *self.arguments, filters=(*self.filters, *filters)) as server,
            open_target(str(server.address), CHUNK, force=True) as target,
        ):
            await target.write(0, DATA[:5000])
            await target.write(8192, DATA[:100])
            await target.zero(16384, 5000)
        expected = bytearray(OLD)
        expected[:5000], expected[8192:8292], expected[16384 : 16384 + 5000] = DATA[:5000], DATA[:100], bytes(5000)
        assert backing.read_bytes() == expected


class TestQcow2File(DiskTargetSuite):
    @pytest.fixture
    def make_target(self, tmp_path: Path) -> MakeTarget:
        @asynccontextmanager
        async def make(size: int) -> AsyncIterator[tuple[DiskTarget, Callable[[], bytes]]]:
            async with open_target(str(tmp_path / "disk.qcow2"), size) as target:
                yield target, lambda: raw_content(tmp_path / "disk.qcow2")

        return make


# -- new files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 513, CHUNK + 1, 2 * CHUNK])
async def test_a_new_file_is_private_sparse_and_exactly_as_long_as_the_image(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.raw"
    async with open_target(str(path), size) as target:
        assert target.reads_zero
        await target.write(size - 1, b"x")
        await target.zero(0, size - 1)
    status = path.stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == size
    assert status.st_blocks * 512 <= 64 * 1024


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
async def test_a_failed_restore_removes_the_file_it_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(Boom):
        async with open_target(str(tmp_path / name), SIZE) as target:
            await target.write(0, DATA)
            raise Boom
    with trio.CancelScope() as scope:
        async with open_target(str(tmp_path / name), SIZE) as target:
            await target.write(0, DATA)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert list(tmp_path.iterdir()) == []


async def test_a_failed_restore_does_not_remove_what_took_the_files_place(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with pytest.raises(Boom):
        async with open_target(str(path), SIZE) as target:
            await target.write(0, DATA)
            path.rename(tmp_path / "elsewhere")
            path.write_bytes(b"somebody else's")
            raise Boom
    assert path.read_bytes() == b"somebody else's"


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="No such file or directory"):
        async with open_target(str(tmp_path / "no/disk.raw"), SIZE):
            pass


async def test_a_size_that_the_file_system_cannot_have_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot have 9223372036854775807 bytes"):
        async with open_target(str(tmp_path / "disk.raw"), 2**63 - 1):
            pass
    assert list(tmp_path.iterdir()) == []


async def test_an_empty_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="the image is empty"):
        async with open_target(str(tmp_path / "disk.raw"), 0):
            pass


# -- files that are there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
async def test_a_file_with_content_needs_force(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"x")
    with pytest.raises(TargetError, match="exists with 1 bytes; use --force"):
        async with open_target(str(path), SIZE):
            pass
    assert path.read_bytes() == b"x"


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
async def test_an_empty_file_is_filled_and_is_empty_again_after_a_failure(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch(mode=0o640)
    inode = path.stat().st_ino
    with pytest.raises(Boom):
        async with open_target(str(path), SIZE) as target:
            assert target.reads_zero
            await target.write(0, DATA)
            raise Boom
    assert path.read_bytes() == b""
    async with open_target(str(path), SIZE) as target:
        await target.write(0, DATA)
    content = path.read_bytes() if name == "disk.raw" else raw_content(path)
    assert content == DATA + bytes(SIZE - CHUNK)
    assert (path.stat().st_ino, path.stat().st_mode & 0o777) == (inode, 0o640)


@pytest.mark.parametrize("factor", [1, 3])
async def test_an_overwritten_file_has_the_images_length_and_content(tmp_path: Path, factor: int) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(OLD * factor)
    size = 2 * CHUNK + 5000
    async with open_target(str(path), size, force=True) as target:
        assert not target.reads_zero
        await target.write(0, DATA)
        await target.zero(CHUNK, size - CHUNK)
    assert path.read_bytes() == DATA + bytes(size - CHUNK)


@pytest.mark.parametrize("factor", [1, 3])
async def test_a_forced_restore_that_fails_before_its_first_byte_changes_nothing(tmp_path: Path, factor: int) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(OLD * factor)
    with pytest.raises(Boom):
        async with open_target(str(path), SIZE, force=True):
            raise Boom
    assert path.read_bytes() == OLD * factor


async def test_a_forced_restore_that_fails_later_removes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(OLD * 3)
    with pytest.raises(Boom):
        async with open_target(str(path), SIZE, force=True) as target:
            await target.write(0, DATA)
            raise Boom
    assert path.read_bytes() == DATA + (OLD * 3)[CHUNK:]


async def test_half_a_qcow2_over_an_old_one_does_not_look_whole(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    with pytest.raises(Boom):
        async with open_target(str(path), SIZE, force=True) as target:
            await target.write(0, DATA)
            raise Boom
    assert path.read_bytes() == b""


async def test_an_old_qcow2_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64M", path)
    async with open_target(str(path), SIZE, force=True) as target:
        await target.write(CHUNK, DATA)
        await target.zero(0, CHUNK)
    assert raw_content(path) == bytes(CHUNK) + DATA + bytes(SIZE - 2 * CHUNK)


async def test_missing_tools_leave_an_old_qcow2_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(OLD)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(TargetError, match="apt install qemu-utils"):
        async with open_target(str(path), SIZE, force=True):
            pass
    assert path.read_bytes() == OLD


async def test_holes_are_punched_into_an_old_file(tmpfs: Path) -> None:
    path = tmpfs / "disk.raw"
    path.write_bytes(OLD)
    async with open_target(str(path), 2 * CHUNK, force=True) as target:
        await target.zero(0, 2 * CHUNK)
    assert path.stat().st_blocks == 0
    assert path.read_bytes() == bytes(2 * CHUNK)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
async def test_where_no_hole_can_be_punched_zeros_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(targets, "fallocate", refuse)
    path = tmp_path / "disk.raw"
    path.write_bytes(OLD)
    async with open_target(str(path), 2 * CHUNK, force=True) as target:
        await target.zero(1000, 5 * MIB)
    assert path.read_bytes() == OLD[:1000] + bytes(5 * MIB) + OLD[1000 + 5 * MIB :]


async def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    async with open_target(str(tmp_path / "link"), CHUNK) as target:
        await target.write(0, DATA)
    assert (tmp_path / "real").read_bytes() == DATA
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "fifo", "character device", "dangling link"])
async def test_what_is_no_disk_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null" if kind == "character device" else tmp_path / "nothing")
    with trio.fail_after(60), pytest.raises(TargetError, match="cannot write to"):
        async with open_target(str(path), SIZE, force=True):
            pass
    assert path.exists() == (kind != "dangling link")


async def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="vmdk"):
        async with open_target(str(tmp_path / "disk.vmdk"), SIZE):
            pass
    assert list(tmp_path.iterdir()) == []
    async with open_target(str(tmp_path / "disk.img"), SIZE, format="qcow2"):
        pass
    assert (tmp_path / "disk.img").read_bytes()[:4] == b"QFI\xfb"


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
@pytest.mark.parametrize("mode", ["read", "write"])
async def test_an_image_that_a_vm_has_open_is_refused_with_force_too(tmp_path: Path, name: str, mode: str) -> None:
    path = tmp_path / name
    image_format = path.suffix[1:]
    run("qemu-img", "create", "-q", "-f", image_format, path, "16M")
    before = path.read_bytes()
    async with held_by_qemu(path, image_format, read_only=mode == "read"):
        with pytest.raises(DiskInUseError, match=r"it is in use by qemu-storage-\S+ \(pid \d+\)"):
            async with open_target(str(path), SIZE, force=True):
                pass
    assert path.read_bytes() == before


async def test_no_vm_starts_on_a_file_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    async with open_target(str(path), SIZE) as target:
        await target.write(0, DATA)
        done = await trio.run_process(
            ["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", path],
            check=False,
            capture_stderr=True,
            capture_stdout=True,
        )
        assert b"lock" in done.stderr


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        run("umount", place)


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
async def test_a_full_disk_is_an_error_with_a_hint_and_leaves_no_file(small_disk: Path, name: str) -> None:
    with pytest.raises(TargetError, match="No space left on device") as caught:
        async with open_target(str(small_disk / name), 16 * MIB) as target:
            for offset in range(0, 16 * MIB, CHUNK):
                await target.write(offset, DATA)
            await target.flush()
    assert "free some space" in caught.value.hint
    assert list(small_disk.iterdir()) == []


# -- block devices ---------------------------------------------------------------------------------------------------


async def test_a_device_that_is_too_small_is_refused_with_force_too(tmp_path: Path) -> None:
    (tmp_path / "device").write_bytes(bytes(CHUNK))
    with loop_device(tmp_path / "device") as device:
        with pytest.raises(TargetError, match=rf"it has {CHUNK} bytes .*, the image has {CHUNK + 1} ") as caught:
            async with open_target(device, CHUNK + 1, force=True):
                pass
        assert caught.value.hint
        async with open_target(device, CHUNK) as target:
            assert not target.reads_zero


@pytest.mark.parametrize("offset", [0, MIB - 1, 8 * MIB - 1, 7 * MIB, 7 * MIB - 1])
async def test_a_device_with_something_at_its_ends_needs_force(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "device"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(offset)
        file.write(b"\1")
    with loop_device(path) as device:
        if offset == 7 * MIB - 1:
            async with open_target(device, CHUNK):
                pass
            return
        with pytest.raises(TargetError, match="MiB is not zero"):
            async with open_target(device, CHUNK):
                pass
        async with open_target(device, CHUNK, force=True) as target:
            await target.write(0, DATA)
    assert path.read_bytes()[:CHUNK] == DATA


async def test_a_mounted_device_is_refused_with_force_too(tmp_path: Path) -> None:
    with (tmp_path / "device").open("wb") as file:
        file.truncate(8 * MIB)
    run("mke2fs", "-q", "-F", tmp_path / "device")
    (tmp_path / "mnt").mkdir()
    with loop_device(tmp_path / "device") as device:
        if run("mount", device, tmp_path / "mnt", check=False).returncode:
            pytest.skip("no file system can be mounted here")
        try:
            with pytest.raises(DiskInUseError, match="mounted or in use"):
                async with open_target(device, CHUNK, force=True):
                    pass
        finally:
            run("umount", tmp_path / "mnt")


async def test_what_is_open_without_locks_or_is_a_loop_device_is_refused_with_force_too(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(MIB))
    with loop_device(image) as device:
        with pytest.raises(DiskInUseError, match=rf"it is the loop device {device}"):
            async with open_target(str(image), MIB, force=True):
                raise AssertionError
        with (
            held_open(device, "r+b") as pid,
            pytest.raises(DiskInUseError, match=rf"in use by \S+ \(pid {pid}\)"),
        ):
            async with open_target(device, MIB, force=True):
                raise AssertionError
        with held_open(device, "rb"):  # who only reads is no reason
            async with open_target(device, MIB, force=True) as target:
                await target.write(0, b"x")


@contextmanager
def held_open(path: str, mode: str) -> Iterator[int]:
    """Another process has `path` open while the block runs; its id."""
    code = "import sys; f = open(*sys.argv[1:]); print(flush=True); sys.stdin.read()"
    line = [sys.executable, "-c", code, path, mode]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate()


async def test_two_restores_to_one_device_do_not_meet(tmp_path: Path) -> None:
    (tmp_path / "device").write_bytes(bytes(CHUNK))
    with loop_device(tmp_path / "device") as device:
        async with open_target(device, CHUNK):
            with pytest.raises(DiskInUseError):
                async with open_target(device, CHUNK, force=True):
                    pass


async def test_a_failed_restore_leaves_the_device_node(tmp_path: Path) -> None:
    (tmp_path / "device").write_bytes(bytes(CHUNK))
    with loop_device(tmp_path / "device") as device:
        with pytest.raises(Boom):
            async with open_target(device, CHUNK):
                raise Boom
        assert Path(device).is_block_device()


async def test_a_qcow2_on_a_device_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "device").write_bytes(OLD)
    with loop_device(tmp_path / "device") as device, pytest.raises(TargetError, match="not supported"):
        async with open_target(device, CHUNK, force=True, format="qcow2"):
            pass
    assert (tmp_path / "device").read_bytes() == OLD


# -- NBD exports -----------------------------------------------------------------------------------------------------


async def test_an_export_that_is_too_small_is_refused_with_force_too() -> None:
    async with nbdkit("memory", "4M") as server:
        with pytest.raises(TargetError, match="the image has"):
            async with open_target(str(server.address), CHUNK + 1, force=True):
                pass


@pytest.mark.parametrize(("data", "refused"), [("@0 1", True), ("@8388607 1", True), ("@2000000 1", False)])
async def test_an_export_with_something_at_its_ends_needs_force(data: str, refused: bool) -> None:
    async with nbdkit("data", f"data={data}", "size=8M") as server:
        if refused:
            with pytest.raises(TargetError, match=r"MiB is not zero.*--force"):
                async with open_target(str(server.address), CHUNK):
                    pass
        async with open_target(str(server.address), CHUNK, force=refused) as target:
            assert isinstance(target, NbdTarget)
            await target.write(0, DATA)


async def test_a_server_that_dies_during_the_restore_is_an_error() -> None:
    async with nbdkit("memory", "16M") as server:
        with trio.fail_after(60), pytest.raises(TargetError, match="lost"):
            async with open_target(str(server.address), SIZE) as target:
                await target.write(0, DATA)
                await server.kill()
                await target.write(0, DATA)


# -- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket"])
async def test_a_stream_gets_every_byte_in_order(kind: str) -> None:
    read_end, write_end = os.pipe() if kind == "pipe" else (end.detach() for end in socket.socketpair())
    received = bytearray()

    def receive() -> None:
        with os.fdopen(read_end, "rb", buffering=0) as stream:
            while piece := stream.read(65536):
                received.extend(piece)

    async def send() -> None:
        target = StreamTarget(write_end)
        await target.write(DATA)
        await target.zero(CHUNK + 3)
        await target.write(memoryview(DATA)[:777])
        await target.flush()
        target.close()
        os.close(write_end)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, receive)
            nursery.start_soon(send)
    assert received == DATA + bytes(CHUNK + 3) + DATA[:777]


@pytest.mark.parametrize("kind", ["pipe", "socket"])
async def test_a_stream_whose_reader_went_away_is_an_error(kind: str) -> None:
    read_end, write_end = os.pipe() if kind == "pipe" else (end.detach() for end in socket.socketpair())
    os.close(read_end)
    target = StreamTarget(write_end)
    with pytest.raises(TargetError, match="who reads it went away"):
        await target.write(DATA)
    target.close()
    os.close(write_end)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
async def test_a_write_to_a_stream_that_nobody_reads_can_be_cancelled(kind: str) -> None:
    read_end, write_end = os.pipe() if kind == "pipe" else (end.detach() for end in socket.socketpair())
    target = StreamTarget(write_end)
    with trio.move_on_after(0.1) as scope:
        await target.write(DATA)
    assert scope.cancelled_caught
    assert os.get_blocking(write_end)
    target.close()
    os.close(write_end)
    os.close(read_end)


async def test_a_stream_into_a_file_keeps_what_is_before_it(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"head")
    target = StreamTarget(fd)
    await target.write(b"a" * 600)
    await target.zero(400)
    await target.flush()
    target.close()
    os.close(fd)
    assert (tmp_path / "out").read_bytes() == b"head" + b"a" * 600 + bytes(400)


async def test_a_stream_into_a_full_disk_is_an_error_with_a_hint() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(TargetError, match="No space left on device; free some space"):
        await StreamTarget(fd).write(DATA)
    os.close(fd)


def test_a_terminal_is_no_target_for_an_image() -> None:
    leader, terminal = os.openpty()
    try:
        with pytest.raises(TargetError, match="it is a terminal; redirect"):
            StreamTarget(terminal)
    finally:
        os.close(leader)
        os.close(terminal)


async def test_a_huge_target_costs_no_time(tmpfs: Path) -> None:
    async with open_target(str(tmpfs / "disk.raw"), 1024 * GIB) as target:
        assert isinstance(target, FileTarget)
        await target.zero(0, 1024 * GIB)
    assert (tmpfs / "disk.raw").stat().st_blocks == 0
