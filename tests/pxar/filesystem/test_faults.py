"""Files that change, hide or cannot be read while their metadata are read."""

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pxar.filesystem import (
    DEFAULT,
    Features,
    describe,
    filesystem_type,
    is_virtual,
    list_folder,
    open_entry,
    scan,
    supported_features,
)
from pxar.metadata import Metadata
from tests.pxar.filesystem.folders import (
    EXT4,
    Folder,
    as_nobody,
    stat_of,
    zoo,
)
from tests.support.faulty_files import LOST, faulty_files

# --- what changes or hides ---


def test_wrong_types_cost_time_only_and_a_fifo_does_not_hold_us_up(ext4: Path, form: str) -> None:
    zoo(ext4)
    with Folder(ext4) as folder:
        names, _ = list_folder(folder.fd)
        right = scan(folder.fd, names, EXT4)
        for hint in (1, 2, 4, 6, 8, 10, 12, 14):
            assert scan(folder.fd, names, EXT4, types=bytes([hint]) * len(names)) == right
            for name, expected in zip(names, right, strict=True):
                found = open_entry(folder.fd, name, EXT4, type=hint)
                assert not isinstance(found, int)
                os.close(found[9])
                assert found[:9] == expected


def test_entries_that_change_their_kind_all_the_time_are_described_as_one_of_them(tmpfs: Path, form: str) -> None:
    (tmpfs / "file").write_bytes(b"12345")
    os.mkfifo(tmpfs / "fifo")
    (tmpfs / "link").symlink_to("target")
    (tmpfs / "folder").mkdir()
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for kind in ("file", "fifo", "link", "folder"):
                (tmpfs / kind).rename(tmpfs / "entry")
                (tmpfs / "entry").rename(tmpfs / kind)

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen = set()
    try:
        with Folder(tmpfs) as folder:
            for round_ in range(300):
                for result in scan(folder.fd, [b"entry"] * 20, EXT4, types=bytes([(1, 4, 8, 10)[round_ % 4]]) * 20):
                    if isinstance(result, int):
                        assert result in (errno.ENOENT, errno.ESTALE, errno.ELOOP)
                        continue
                    assert stat.S_IFMT(result[0]) == stat.S_IFMT(Metadata.parse(result[1]).stat.mode)
                    assert (result[7] == b"target") == stat.S_ISLNK(result[0])
                    seen.add(stat.S_IFMT(result[0]))
    finally:
        stop.set()
        swapping.join()
    assert seen  # how many of the kinds depends on the machine


def test_a_vanished_entry_is_told_and_the_others_are_read(ext4: Path, form: str) -> None:
    (ext4 / "here").touch()
    with Folder(ext4) as folder:
        for types in (None, b"\x08\x08", b"\x0a\x08", b"\x04\x08"):
            gone, here = scan(folder.fd, [b"gone", b"here"], EXT4, types=types)
            assert gone == errno.ENOENT
            assert not isinstance(here, int)


def test_without_rights_what_is_unreadable_is_told_and_the_rest_is_read(ext4: Path, form: str) -> None:
    (ext4 / "unreadable").touch(0o600)
    (ext4 / "closed").mkdir(0o700)
    (ext4 / "of root").touch(0o644)  # O_NOATIME is refused here
    (ext4 / "link").symlink_to("target")
    names = [b"unreadable", b"closed", b"of root", b"link"]
    with Folder(ext4) as folder:
        right = scan(folder.fd, names, EXT4)
        found = as_nobody(lambda: scan(folder.fd, names, EXT4, types=b"\x08\x04\x08\x0a"))
    assert found == repr([errno.EACCES, errno.EACCES, right[2], right[3]])


def test_without_search_permission_every_entry_is_told(ext4: Path, form: str) -> None:
    (ext4 / "entry").touch()
    with Folder(ext4) as folder:
        ext4.chmod(0o744)
        found = as_nobody(lambda: (list_folder(folder.fd)[0], scan(folder.fd, [b"entry"], EXT4)))
    assert found == repr(([b"entry"], [errno.EACCES]))


def test_a_leased_file_is_waited_for(tmpfs: Path, form: str) -> None:
    path = tmpfs / "leased"
    path.touch()
    # The kernel asks the holder by a signal to give the lease up.
    holder = """if True:
        import fcntl, os, signal, sys
        fd = os.open(sys.argv[1], os.O_RDWR)
        signal.signal(signal.SIGIO, lambda *_: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK))
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        print("held", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", holder, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with Folder(tmpfs) as folder:
            found = folder[b"leased"]
        assert stat.S_ISREG(found[0])
        process.stdin.close()


def test_out_of_descriptors_is_told(tmpfs: Path, form: str) -> None:
    (tmpfs / "file").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Folder(tmpfs) as folder:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            found = folder.result("file")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == errno.EMFILE


def test_more_names_of_xattrs_than_the_kernel_lists(tmpfs: Path, form: str) -> None:
    path = tmpfs / "file"
    path.touch()
    try:
        for number in range(300):
            os.setxattr(path, f"trusted.{number:03}{'x' * 240}", b"v")
    except OSError as error:
        pytest.skip(f"no such extended attributes here: {error}")
    with Folder(tmpfs) as folder:
        assert folder.result("file") == -errno.E2BIG
        found = folder.result("file", skip_e2big=True)
        assert not isinstance(found, int)
        assert Metadata.parse(found[1]) == Metadata(stat_of(path))
        assert found[8] == errno.E2BIG
        opened = open_entry(folder.fd, b"file", EXT4, skip_e2big=True)
        assert not isinstance(opened, int)
        assert describe(opened[9], EXT4, skip_e2big=True) == found
        assert describe(opened[9], EXT4) == -errno.E2BIG
        os.close(opened[9])


def test_errors_of_a_file_system_are_told_apart(tmp_path: Path, form: str) -> None:
    def xattrs(name: bytes, *, skip_e2big: bool = False) -> object:
        found = folder.result(name, DEFAULT, skip_e2big=skip_e2big)
        return found if isinstance(found, int) else (dict(Metadata.parse(found[1]).xattrs), found[8])

    with faulty_files(tmp_path / "point") as point, Folder(point) as folder:
        assert is_virtual(filesystem_type(folder.fd)) is False
        assert supported_features(filesystem_type(folder.fd)) & (Features.ACL | Features.FCAPS | Features.XATTRS) == (
            Features.XATTRS
        )
        assert {name: folder.result(name) for name in LOST} == LOST
        assert list(xattrs(b"order")[0]) == [b"user.z", b"trusted.b", b"user.a"]  # type: ignore[index]
        large = {b"user.1": b"x" * 1024, b"user.2": b"y" * 1025, b"security.NTACL": b"z" * 65536, b"user.3": b"3"}
        assert xattrs(b"large") == (large, 0)
        assert xattrs(b"gone") == xattrs(b"ignored") == ({b"user.kept": b"kept"}, 0)
        assert xattrs(b"too-big") == -errno.E2BIG
        assert xattrs(b"too-big", skip_e2big=True) == ({b"user.first": b"1"}, errno.E2BIG)
        assert xattrs(b"too-long") == -errno.E2BIG
        assert xattrs(b"too-long", skip_e2big=True) == ({b"user.first": b"1"}, errno.E2BIG)
        assert xattrs(b"broken") == xattrs(b"broken-list") == -errno.EIO
        assert xattrs(b"broken", skip_e2big=True) == -errno.EIO
        assert xattrs(b"no-list") == xattrs(b"plain") == ({}, 0)
        assert xattrs(b"big-list") == -errno.E2BIG
        assert xattrs(b"big-list", skip_e2big=True) == ({}, errno.E2BIG)
        assert len(xattrs(b"many")[0]) == 200  # type: ignore[index]


def test_a_name_that_is_listed_twice_is_one(tmp_path: Path, form: str) -> None:
    with faulty_files(tmp_path / "point") as point, Folder(point) as folder:
        names, kinds = list_folder(folder.fd)
        assert names == sorted(set(os.listdir(os.fsencode(point))))  # noqa: PTH208 - names are bytes
        assert len(os.listdir(point)) == len(names) + 1 == len(kinds) + 1  # noqa: PTH208
