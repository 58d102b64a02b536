import errno
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pyfuse3 = pytest.importorskip("pyfuse3", reason="pyfuse3 is not installed")

from core.errors import FleeceError, FormatError, NotFoundError  # noqa: E402
from datastore.errors import (  # noqa: E402
    ChunkNotFoundError,
    CorruptChunkError,
    KeyNeededError,
    LockedError,
    SnapshotNotFoundError,
    StoreError,
)
from fusefs import inodes  # noqa: E402
from fusefs.errors import StaleError, errno_of  # noqa: E402
from fusefs.inodes import EntryTable, InodeTable  # noqa: E402
from fusefs.nodes import File  # noqa: E402
from fusefs.operations import LogOnce, Operations  # noqa: E402
from fusefs.tree import NamespaceFolder  # noqa: E402
from tests.fusefs.mounts import IMAGE, IMAGE_BLOCKS  # noqa: E402
from tests.fusefs.test_tree import at, tree_of  # noqa: E402

NAME = "vm/100/2026-01-01T00:00:00Z/drive-scsi0.img"
CONTEXT = cast(Any, None)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (StaleError("read", "x", "gone"), errno.ESTALE),
        (SnapshotNotFoundError("read", "x", "gone"), errno.ESTALE),
        (ChunkNotFoundError("read", "x", "gone"), errno.EIO),
        (CorruptChunkError("read", "x", "bad"), errno.EIO),
        (FormatError("read", "x", "bad"), errno.EIO),
        (NotFoundError("read", "x", "gone"), errno.ENOENT),
        (KeyNeededError("read", "x", "no key"), errno.EACCES),
        (LockedError("read", "x", "busy"), errno.EBUSY),
        (StoreError("read", "x", "io"), errno.EIO),
        (FleeceError("read", "x", "any"), errno.EIO),
        (PermissionError(errno.EACCES, "no"), errno.EACCES),
        (OSError("no number"), errno.EIO),
        (MemoryError(), errno.ENOMEM),
        (ZeroDivisionError(), errno.EIO),
    ],
)
def test_every_error_has_a_number(error: Exception, number: int) -> None:
    assert errno_of(error) == number


def test_an_error_is_logged_once_and_a_fault_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    log = LogOnce()
    for _ in range(3):
        log(FormatError("read", "vm/100", "bad"))
    assert caplog.messages == ["cannot read vm/100: bad"]
    try:
        raise ZeroDivisionError("a fault")
    except ZeroDivisionError as fault:
        log(fault)
    assert caplog.records[-1].exc_info is not None
    for number in range(2000):
        log(FormatError("read", str(number), "bad"))
    caplog.clear()
    log(FormatError("read", "vm/100", "bad"))
    assert len(caplog.messages) == 1


async def test_the_kernel_forgets_what_it_was_told_and_memory_goes(shared_store: Path) -> None:
    async with tree_of(shared_store) as root:
        operations = Operations(root, uid=0, gid=0)
        folder = await operations.lookup(1, b"vm", CONTEXT)
        await operations.lookup(1, b"vm", CONTEXT)
        assert len(operations.inodes) == 2
        await operations.forget([(folder.st_ino, 1)])
        assert (await operations.getattr(folder.st_ino, CONTEXT)).st_ino == folder.st_ino
        await operations.forget([(folder.st_ino, 1), (1, 1)])
        assert len(operations.inodes) == 1
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.getattr(folder.st_ino, CONTEXT)
        assert caught.value.errno == errno.ESTALE
        assert (await operations.lookup(1, b"vm", CONTEXT)).st_ino == folder.st_ino


async def test_attributes_are_those_of_a_read_only_backup(shared_store: Path) -> None:
    async with tree_of(shared_store) as root:
        operations = Operations(root, uid=7, gid=8)
        inode = 1
        for name in NAME.split("/"):
            entry = await operations.lookup(inode, name.encode(), CONTEXT)
            inode = entry.st_ino
        assert (entry.st_mode, entry.st_uid, entry.st_gid, entry.st_nlink) == (0o100444, 7, 8, 1)
        assert (entry.st_size, entry.st_blocks) == (len(IMAGE), IMAGE_BLOCKS)
        assert entry.st_mtime_ns == 1_767_225_600 * 10**9
        assert (await operations.getattr(1, CONTEXT)).st_mode == 0o40555


async def test_wrong_requests_have_the_numbers_that_posix_has(shared_store: Path) -> None:
    async with tree_of(shared_store) as root:
        operations = Operations(root, uid=0, gid=0)
        folder = await operations.lookup(1, b"vm", CONTEXT)
        inode = 1
        for name in NAME.split("/"):
            inode = (await operations.lookup(inode, name.encode(), CONTEXT)).st_ino

        async def number(call: Any) -> int:
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await call
            return cast(int, caught.value.errno)

        assert await number(operations.lookup(1, b"none", CONTEXT)) == errno.ENOENT
        assert await number(operations.lookup(inode, b"none", CONTEXT)) == errno.ENOTDIR
        assert await number(operations.opendir(inode, CONTEXT)) == errno.ENOTDIR
        assert await number(operations.open(folder.st_ino, 0, CONTEXT)) == errno.EISDIR
        assert await number(operations.open(inode, 1, CONTEXT)) == errno.EROFS
        assert await number(operations.readlink(inode, CONTEXT)) == errno.EINVAL
        assert await number(operations.getattr(12345, CONTEXT)) == errno.ESTALE


async def test_a_fault_of_ours_is_an_input_output_error_and_not_the_end(
    shared_store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with tree_of(shared_store) as root:
        operations = Operations(root, uid=0, gid=0)

        async def broken(self: NamespaceFolder) -> None:
            raise ZeroDivisionError("a fault")

        monkeypatch.setattr(NamespaceFolder, "children", broken)
        with caplog.at_level(logging.CRITICAL), pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.lookup(1, b"vm", CONTEXT)
        assert caught.value.errno == errno.EIO


async def test_a_cached_read_is_a_view_of_the_chunk_and_no_copy(shared_store: Path) -> None:
    async with tree_of(shared_store) as root:
        operations = Operations(root, uid=0, gid=0)
        node = await at(root, NAME)
        assert isinstance(node, File)
        operations.inodes.remember(node)
        handle = (await operations.open(node.inode, 0, CONTEXT)).fh
        assert bytes(await operations.read(handle, 1000, 5000)) == IMAGE[1000:6000]
        first, second = await operations.read(handle, 0, 4096), await operations.read(handle, 4096, 4096)
        assert isinstance(first, memoryview)
        assert isinstance(second, memoryview)
        assert first.obj is second.obj
        assert bytes(await operations.read(handle, len(IMAGE) - 3, 4096)) == b"end"
        assert bytes(await operations.read(handle, len(IMAGE) + 5, 4096)) == b""
        await operations.release(handle)
        assert operations.handles == {}


def test_a_number_that_belongs_to_another_path_is_refused() -> None:
    root = cast(Any, SimpleNamespace(inode=1, path=b""))
    table = InodeTable(root)
    table.remember(cast(Any, SimpleNamespace(inode=9, path=b"vm/100")))
    with pytest.raises(StaleError):
        table.known(cast(Any, SimpleNamespace(inode=9, path=b"vm/101")))


def test_entries_keep_their_numbers_when_the_kernel_had_forgotten_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes, "_ARCHIVES", 4)
    table = EntryTable()

    class Archive:
        def __init__(self, number: int) -> None:
            self.inode, self.path = 100 + number, b"%d" % number

    archives = [cast(Any, Archive(number)) for number in range(5)]
    row = (56, 0, 0o100644, 0, 0, 0, 0, None)

    def told(number: int) -> int:
        entries = table.of(archives[number])
        entries.remember(row)
        return entries.inode(row)

    def forgotten(*all_told: int) -> None:
        for inode in all_told:
            entries = table.find(inode)
            assert entries is not None
            entries.forget(inode, 1)

    first = [told(number) for number in range(4)]
    assert len(set(first)) == 4
    forgotten(*first)
    assert len(table) == 0
    assert [told(number) for number in (3, 2, 0, 1)] == [first[number] for number in (3, 2, 0, 1)]
    with pytest.raises(FleeceError, match="in use already"):
        told(4)
    forgotten(*first)
    # There are no others than that of the one that was not used for longest.
    assert told(4) == first[3]
    assert [told(number) for number in (0, 1, 2)] == first[:3]
    with pytest.raises(FleeceError, match="in use already"):
        told(3)
