"""Metadata of real files, by the C form and the Python form."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pxar import filesystem_python
from pxar.features import STORED_FLAGS, stored_flags
from pxar.filesystem import (
    DEFAULT,
    FAT_FLAGS,
    Features,
    describe,
    filesystem_type,
    is_virtual,
    list_folder,
    open_entry,
    scan,
    supported_features,
)
from pxar.format import FILENAME, HEADER, HEADER_SIZE
from pxar.metadata import Metadata, encode_metadata
from tests.pxar.filesystem.folders import (
    EXT4,
    FCAPS,
    READER,
    Folder,
    open_files,
    stat_of,
    zoo,
)
from tests.pxar.golden_streams import stream
from tests.support.file_systems import mounted

# --- what is there ---


def test_every_kind_of_entry_is_described_as_it_is(ext4: Path, form: str) -> None:
    expected = zoo(ext4)
    with Folder(ext4) as folder:
        names, types = list_folder(folder.fd)
        assert names == sorted(expected)
        results = scan(folder.fd, names, EXT4, types=types)
        assert results == scan(folder.fd, names, EXT4)
    for name, result in zip(names, results, strict=True):
        assert not isinstance(result, int), name
        mode, meta, size, dev, ino, nlink, rdev, target, warning = result
        found = (ext4 / os.fsdecode(name)).lstat()
        assert meta == encode_metadata(expected[name]), (Metadata.parse(meta), expected[name])
        assert (mode, size, dev, ino, nlink, rdev) == (
            *(found.st_mode, found.st_size, found.st_dev, found.st_ino, found.st_nlink, found.st_rdev),
        )
        assert (target, warning) == (b"to \xff nowhere" if name == b"symlink" else None, 0)


def test_a_tree_that_pbs_archived_has_the_same_metadata(golden: Path, ext4: Path, form: str) -> None:
    subprocess.run([sys.executable, golden / "make_tree.py", ext4], check=True, capture_output=True, timeout=120)
    archive = stream(golden / "store.tar", "host/tree-data/2026-01-01T00:00:00Z/root.mpxar.didx")
    linked: dict[int, list[bool]] = {}

    def compare(path: Path) -> None:
        with Folder(path) as folder:
            names, types = list_folder(folder.fd)
            for name, found in zip(names, scan(folder.fd, names, EXT4, types=types), strict=True):
                assert not isinstance(found, int), name
                item = HEADER.pack(FILENAME, HEADER_SIZE + len(name) + 1) + name + b"\0" + found[1]
                linked.setdefault(found[4], []).append(item in archive)
                if stat.S_ISDIR(found[0]) and name != b"excluded":  # its .pxarexclude is the walk's
                    compare(path / os.fsdecode(name))
        with Folder(path.parent) as folder:
            assert folder[path.name][1] in archive

    compare(ext4)
    assert len(linked) > 100
    assert all(any(found) for found in linked.values())  # only the first name of a file has metadata


def test_both_forms_say_the_same_of_a_system_and_open_no_device() -> None:
    for path in ("/", "/usr/bin", "/etc", "/dev"):
        with Folder(Path(path)) as folder:
            before, types = READER.list_folder(folder.fd)
            names = filesystem_python.list_folder(folder.fd)[0]
            # What changes in the meantime, as /proc does with each process, is not compared.
            if READER.list_folder(folder.fd)[0] == before:
                assert names == before
            first, python, last = (
                form.scan(folder.fd, before, EXT4, types, False) for form in (READER, filesystem_python, READER)
            )
            stable = [at for at, row in enumerate(first) if row == last[at]]
            assert len(stable) > len(before) / 2
            for at in stable:
                assert python[at] == first[at], before[at]


def test_names_come_sorted_with_what_they_are(tmpfs: Path, form: str) -> None:
    names = {b"%d" % number for number in range(5000)} | {b"\xff" * 255, b"a", b"a\x01", b"\n"}
    for name in names:
        (tmpfs / os.fsdecode(name)).touch()
    (tmpfs / "folder").mkdir()
    with Folder(tmpfs) as folder:
        list_folder(folder.fd)  # which leaves it at its end
        found, types = list_folder(folder.fd)
        assert found == sorted(names | {b"folder"})
        assert types == bytes(4 if name == b"folder" else 8 for name in found)
    with pytest.raises(NotADirectoryError), (tmpfs / "a").open("rb") as file:
        list_folder(file.fileno())


def test_flags_are_read_as_chattr_set_them(ext4: Path, form: str) -> None:
    wanted = {
        "a": Features.APPEND,
        "i": Features.IMMUTABLE,
        "d": Features.NODUMP,
        "A": Features.NOATIME,
        "S": Features.SYNC,
        "adi": Features.APPEND | Features.IMMUTABLE | Features.NODUMP,
    }
    for letters, flags in wanted.items():
        path = ext4 / letters
        path.touch()
        subprocess.run(["chattr", f"+{letters}", path], check=True, timeout=30)
        try:
            with Folder(ext4) as folder:
                assert folder.metadata(letters).stat.flags == flags
        finally:
            subprocess.run(["chattr", f"-{letters}", path], check=True, timeout=30)
    for letters, flags in (("D", Features.DIRSYNC), ("P", Features.PROJINHERIT)):
        (ext4 / letters).mkdir()
        subprocess.run(["chattr", f"+{letters}", ext4 / letters], check=True, timeout=30)
        with Folder(ext4) as folder:
            assert folder.metadata(letters).stat.flags == flags


def test_only_what_is_asked_for_is_read(ext4: Path, form: str) -> None:
    zoo(ext4)
    with Folder(ext4) as folder:
        assert folder.metadata("with:xattrs", 0) == Metadata(stat_of(ext4 / "with:xattrs"))
        assert folder.metadata("with:xattrs", Features.FCAPS).fcaps is None  # not without XATTRS
        assert folder.metadata("with:xattrs", Features.XATTRS).fcaps is None
        assert folder.metadata("with:xattrs", Features.XATTRS | Features.FCAPS).fcaps == FCAPS
        assert not folder.metadata("acl", Features.XATTRS).acl
        assert folder.metadata("folder", EXT4 | FAT_FLAGS) == folder.metadata("folder")  # ext4 knows no such ioctl


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_other_file_systems(kind: str, tmp_path: Path, form: str) -> None:
    with mounted(kind, tmp_path) as base, Folder(base) as folder:
        features = DEFAULT & supported_features(filesystem_type(folder.fd))
        path = base / "file"
        path.touch()
        os.setxattr(path, b"user.a", b"value")
        subprocess.run(["chattr", "+d", path], check=True, timeout=30)
        expected = Metadata(stat_of(path, Features.NODUMP), xattrs=((b"user.a", b"value"),))
        assert folder.metadata("file", features) == expected


# --- opening ---


def test_an_opened_entry_can_be_read_and_its_access_time_stays(ext4: Path, form: str) -> None:
    zoo(ext4)
    before = (ext4 / "plain").stat().st_atime_ns
    with Folder(ext4) as folder:
        for name in list_folder(folder.fd)[0]:
            found = open_entry(folder.fd, name, EXT4)
            assert not isinstance(found, int), name
            fd = found[9]
            try:
                assert found[:9] == folder[name]
                assert os.fstat(fd).st_ino == found[4]
                assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
                assert bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH) != (
                    stat.S_IFMT(found[0]) in (0o100000, 0o040000)
                )
                if name == b"plain":
                    assert os.read(fd, 100) == b"content"
                if stat.S_ISDIR(found[0]) or stat.S_ISREG(found[0]):
                    assert describe(fd, EXT4) == found[:9]
                else:
                    assert describe(fd, EXT4) == (*found[:7], None, 0)
            finally:
                os.close(fd)
    assert (ext4 / "plain").stat().st_atime_ns == before


def test_a_closed_descriptor_is_told_as_an_error(form: str) -> None:
    assert describe(-1, EXT4) == errno.EBADF
    assert scan(-1, [b"a"], EXT4) == [errno.EBADF]
    for ask in (list_folder, filesystem_type):
        with pytest.raises(OSError, match="Bad file descriptor"):
            ask(-1)


def test_nothing_stays_open(ext4: Path, form: str) -> None:
    zoo(ext4)
    (ext4 / "deep").mkdir()
    with Folder(ext4) as folder:
        before = open_files()
        names, types = list_folder(folder.fd)
        for hint in (types, None, bytes([8]) * len(names), bytes([10]) * len(names)):
            scan(folder.fd, [*names, b"missing"], EXT4, types=None if hint is None else hint + b"\x08")
        assert isinstance(open_entry(folder.fd, b"missing", EXT4), int)
        assert open_files() == before


@pytest.mark.parametrize("names", [[b""], [b"a/b"], [b"a", b"/"], [b"a\0b"]])
def test_what_is_no_name_of_an_entry_is_refused(names: list[bytes], tmp_path: Path, form: str) -> None:
    with Folder(tmp_path) as folder:
        with pytest.raises(ValueError, match=r"null byte|not empty and has no slash"):
            scan(folder.fd, names, 0)
        with pytest.raises(ValueError, match="one type per name"):
            scan(folder.fd, [b"a"], 0, types=b"")
        with pytest.raises(TypeError):
            scan(folder.fd, ["a"], 0)  # type: ignore[list-item]


# --- file systems ---


def test_the_table_of_file_systems() -> None:
    ids = {"ext4": 0xEF53, "btrfs": 0x9123683E, "tmpfs": 0x01021994, "fuse": 0x65735546, "msdos": 0x4D44, "nfs": 0x6969}
    read = Features.XATTRS | Features.ACL | Features.FCAPS | Features.QUOTA_PROJID | FAT_FLAGS
    assert {name: supported_features(magic) & read for name, magic in ids.items()} == {
        "ext4": Features.XATTRS | Features.ACL | Features.FCAPS | Features.QUOTA_PROJID,
        "btrfs": Features.XATTRS | Features.ACL | Features.FCAPS,
        "tmpfs": Features.ACL,
        "fuse": Features.XATTRS | FAT_FLAGS,
        "msdos": FAT_FLAGS,
        "nfs": Features.XATTRS | Features.ACL | Features.FCAPS,
    }
    assert not DEFAULT & (Features.NODUMP | Features.READ_ONLY | Features.TWO_SECOND_TIME)


def test_proc_and_sys_are_virtual_and_tmpfs_is_not(tmpfs: Path, form: str) -> None:
    for path, virtual in (("/proc", True), ("/sys", True), (tmpfs, False)):
        with Folder(Path(path)) as folder:
            assert is_virtual(filesystem_type(folder.fd)) is virtual


def test_stored_flags_take_each_bit_from_its_ioctl() -> None:
    assert stored_flags(0xFFFF_FFFF, 0xFF) == STORED_FLAGS == 0x3FF_E000
    assert stored_flags(0x20 | 0x20000000, 0x02) == 0x2000 | 0x1_0000 | 0x200_0000
