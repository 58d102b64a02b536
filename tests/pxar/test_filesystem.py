"""Metadata of real files, by the C form and the Python form."""

import errno
import fcntl
import os
import resource
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pxar import filesystem, filesystem_python
from pxar.features import CHATTR_BITS, STORED_FLAGS, stored_flags
from pxar.filesystem import (
    DEFAULT,
    FAT_FLAGS,
    Features,
    Scanned,
    acl_values,
    describe,
    filesystem_type,
    is_virtual,
    list_folder,
    open_entry,
    scan,
    set_flags,
    set_projid,
    supported_features,
)
from pxar.format import FILENAME, HEADER, HEADER_SIZE
from pxar.metadata import NO_PERMISSIONS, Acl, DefaultAcl, Metadata, Stat, encode_metadata
from tests.pxar.golden_streams import stream
from tests.support.faulty_files import LOST, faulty_files
from tests.support.file_systems import mounted, mounted_image

EXT4 = DEFAULT & supported_features(0xEF53)
READER = vars(filesystem)["_reader"]  # the C part where it is built
NOBODY = 65534
FCAPS = struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0)


@pytest.fixture(params=["c", "python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each form of the calls, one after the other."""
    if request.param == "python":
        monkeypatch.setattr(filesystem, "_reader", filesystem_python)
    elif READER is filesystem_python:
        pytest.skip("the C part is not built")
    return str(request.param)


@pytest.fixture(scope="session")
def ext4_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("ext4", tmp_path_factory.mktemp("file-system")) as point:
        yield point


@pytest.fixture
def ext4(ext4_root: Path, request: pytest.FixtureRequest) -> Path:
    """An empty folder on ext4 with projects."""
    folder = ext4_root / str(len(list(ext4_root.iterdir())))
    folder.mkdir()
    return folder


class Folder:
    """A folder and the calls on it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def __getitem__(self, name: bytes | str) -> Scanned:
        """What scan says of `name`."""
        result = self.result(name)
        assert not isinstance(result, int), os.strerror(abs(result))
        return result

    def result(self, name: bytes | str, features: int = EXT4, *, skip_e2big: bool = False) -> Scanned | int:
        return scan(self.fd, [os.fsencode(name)], features, skip_e2big=skip_e2big)[0]

    def metadata(self, name: bytes | str, features: int = EXT4) -> Metadata:
        result = self.result(name, features)
        assert not isinstance(result, int), os.strerror(abs(result))
        return Metadata.parse(result[1])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def acl(*entries: tuple[int, int, int]) -> bytes:
    return b"\2\0\0\0" + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NO_ID = 0xFFFF_FFFF


def stat_of(path: Path, flags: int = 0) -> Stat:
    found = path.lstat()
    return Stat(found.st_mode, flags, found.st_uid, found.st_gid, *divmod(found.st_mtime_ns, 10**9))


# --- what is there ---


def zoo(base: Path) -> dict[bytes, Metadata]:
    """One of everything in `base`, and what an archive shall say of it."""
    expected: dict[bytes, Metadata] = {}

    def add(path: Path, flags: int = 0, **attributes: object) -> None:
        expected[os.fsencode(path.name)] = Metadata(stat_of(path, flags), **attributes)  # type: ignore[arg-type]

    for name in (b"plain", b"\xff\xfe\n", b"n" * 255, b"with:xattrs"):
        (base / os.fsdecode(name)).write_bytes(b"content")
    plain = base / "plain"
    os.chown(plain, 12, 4_000_000_000)
    plain.chmod(0o6751)
    os.utime(plain, ns=(0, -1_500_000_000))
    add(plain)
    add(base / os.fsdecode(b"\xff\xfe\n"))
    add(base / ("n" * 255))

    path = base / "with:xattrs"
    for name, value in ((b"user.b", b"\0b\xff"), (b"user.a", b""), (b"trusted.t", b"t"), (b"security.NTACL", b"n")):
        os.setxattr(path, name, value)
    os.setxattr(path, b"security.other", b"not stored")
    os.setxattr(path, b"security.capability", FCAPS)
    order = [os.fsencode(name) for name in os.listxattr(path)]
    kept = [name for name in order if not name.startswith(b"security.") or name == b"security.NTACL"]
    add(path, xattrs=tuple((name, os.getxattr(path, name)) for name in kept), fcaps=FCAPS)

    path = base / "acl"
    path.touch(0o640)
    entries = [(1, 6, NO_ID), (2, 7, 500), (2, 4, 20), (4, 5, NO_ID), (8, 1, 9), (8, 2, 3), (0x10, 4, NO_ID)]
    os.setxattr(path, b"system.posix_acl_access", acl(*entries, (0x20, 0, NO_ID)))
    add(path, acl=Acl(users=((20, 4), (500, 7)), groups=((3, 2), (9, 1)), group_obj=5))

    path = base / "folder"
    path.mkdir(0o750)
    entries = [(1, 7, NO_ID), (2, 3, 77), (4, 5, NO_ID), (0x10, 1, NO_ID), (0x20, 2, NO_ID)]
    os.setxattr(path, b"system.posix_acl_default", acl(*entries))
    add(path, acl=Acl(default=DefaultAcl(7, 5, 2, 1), default_users=((77, 3),)))
    path = base / "simple default"
    path.mkdir()
    os.setxattr(path, b"system.posix_acl_default", acl((1, 7, NO_ID), (4, 0, NO_ID), (0x20, 1, NO_ID)))
    add(path, acl=Acl(default=DefaultAcl(7, 0, 1, NO_PERMISSIONS)))

    (base / "symlink").symlink_to(b"to \xff nowhere")
    os.mkfifo(base / "fifo", 0o600)
    with socket.socket(socket.AF_UNIX) as unix, Folder(base) as folder:
        unix.bind(f"/proc/self/fd/{folder.fd}/socket")
    os.mknod(base / "block", stat.S_IFBLK | 0o640, os.makedev(259, 1_000_000))
    os.mknod(base / "character", stat.S_IFCHR | 0o600, os.makedev(240, 77))
    for special in ("symlink", "fifo", "socket", "block", "character"):
        os.utime(base / special, ns=(0, 5_000_000_000_123_456_789), follow_symlinks=False)
        add(base / special)
    return expected


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
            names, types = READER.list_folder(folder.fd)
            assert filesystem_python.list_folder(folder.fd)[0] == names
            native = READER.scan(folder.fd, names, EXT4, types, False)
            assert filesystem_python.scan(folder.fd, names, EXT4, types, False) == native


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


def as_nobody(work: Callable[[], object]) -> str:
    """What `work` returns (its text) in a child process without any rights."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(writing, repr(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(child, 0)
    return text


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


# --- restoring ---


def test_flags_are_set_within_the_mask_and_others_stay(ext4: Path) -> None:
    (ext4 / "file").touch()
    subprocess.run(["chattr", "+S", ext4 / "file"], check=True, timeout=30)
    with Folder(ext4) as folder, (ext4 / "file").open("rb") as file:
        everything = Features.NOATIME | Features.NODUMP | Features.IMMUTABLE
        set_flags(file.fileno(), everything, Features.NOATIME)
        assert folder.metadata("file").stat.flags == Features.SYNC | Features.NOATIME
        set_flags(file.fileno(), everything, STORED_FLAGS & ~(Features.NOATIME | Features.SYNC))
        assert folder.metadata("file").stat.flags == Features.SYNC | everything
        set_flags(file.fileno(), 0, Features.IMMUTABLE | Features.SYNC)
        assert folder.metadata("file").stat.flags == Features.NOATIME | Features.NODUMP


def test_attributes_of_fat_have_an_ioctl_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a double: few kernels that tests run on have FAT."""
    attributes = {"fat": 0x30}  # archive, and that it is a folder

    def ioctl(_: int, request: int, data: bytes) -> bytes:
        if request == 0x8004_7210:
            return attributes["fat"].to_bytes(4, "little")
        if request == 0x4004_7211:
            attributes["fat"] = int.from_bytes(data, "little")
            return data
        raise OSError(errno.ENOTTY, "no chattr")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    set_flags(0, Features.HIDDEN | Features.IMMUTABLE, STORED_FLAGS)
    assert attributes["fat"] == 0x12
    set_flags(0, Features.SYSTEM, Features.SYSTEM)
    assert attributes["fat"] == 0x16


def test_flags_that_a_file_system_has_not_are_left_alone_and_refusals_are_told(tmpfs: Path, ext4: Path) -> None:
    with Folder(Path("/proc")) as folder:
        set_flags(folder.fd, Features.IMMUTABLE, STORED_FLAGS)
    (ext4 / "file").touch(0o666)
    with (ext4 / "file").open("rb") as file:
        found = as_nobody(lambda: _errno_of(lambda: set_flags(file.fileno(), Features.IMMUTABLE, Features.IMMUTABLE)))
    assert found in (str(errno.EPERM), str(errno.EACCES))


def _errno_of(work: Callable[[], object]) -> int | None:
    try:
        work()
    except OSError as error:
        return error.errno
    return None


def test_projects_of_ext4_are_read(tmp_path: Path, form: str) -> None:
    # Setting them takes a kernel with quotas, reading does not.
    if not all(shutil.which(tool) for tool in ("mke2fs", "debugfs")):
        pytest.skip("no tools for ext4")
    image, source = tmp_path / "image", tmp_path / "source"
    source.mkdir()
    for name in ("none", "some"):
        (source / name).touch()
    (source / "folder").mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    make = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "project,quota", "-I", "256", "-d", str(source), str(image)]
    subprocess.run(make, check=True, timeout=60)
    for name, project in (("some", 77), ("folder", 4_000_000_000)):
        change = ["debugfs", "-w", "-R", f"set_inode_field {name} projid {project}", str(image)]
        subprocess.run(change, check=True, capture_output=True, timeout=60)
    with mounted_image("ext4", image, tmp_path / "point", "-o", "ro") as point, Folder(point) as folder:
        assert [folder.metadata(name).projid for name in ("none", "some", "folder")] == [None, 77, 4_000_000_000]
        assert folder.metadata("some", EXT4 & ~Features.QUOTA_PROJID).projid is None


def test_a_project_is_set_and_read_again(tmp_path: Path, form: str) -> None:
    with mounted("xfs", tmp_path) as base, Folder(base) as folder:
        (base / "file").touch()
        subprocess.run(["chattr", "+d", base / "file"], check=True, timeout=30)
        with (base / "file").open("rb") as file:
            set_projid(file.fileno(), 77)
            assert folder.metadata("file").projid == 77
            assert folder.metadata("file").stat.flags == Features.NODUMP
            set_projid(file.fileno(), 0)
            assert folder.metadata("file").projid is None


def test_a_file_system_without_projects_says_so() -> None:
    with Folder(Path("/proc")) as folder, pytest.raises(OSError) as raised:
        set_projid(folder.fd, 1)
    assert raised.value.errno in filesystem.UNSUPPORTED


PERMISSIONS = st.integers(0, 7)
NAMED = st.dictionaries(st.integers(0, 0xFFFF_FFFE), PERMISSIONS, max_size=4).map(lambda d: tuple(sorted(d.items())))


@st.composite
def acls(draw: st.DrawFn) -> Acl:
    """ACLs as a file system can hold them."""
    users, groups = draw(NAMED), draw(NAMED)
    group_obj = draw(PERMISSIONS) if users or groups else None
    if not draw(st.booleans()):
        return Acl(users, groups, group_obj)
    default_users, default_groups = draw(NAMED), draw(NAMED)
    mask = draw(PERMISSIONS) if default_users or default_groups else draw(PERMISSIONS | st.just(NO_PERMISSIONS))
    default = DefaultAcl(draw(PERMISSIONS), draw(PERMISSIONS), draw(PERMISSIONS), mask)
    return Acl(users, groups, group_obj, default, default_users, default_groups)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(acls(), st.integers(0, 0o777))
def test_restored_acls_are_read_again_as_they_were_stored(ext4: Path, form: str, stored: Acl, mode: int) -> None:
    path = ext4 / "folder"
    path.mkdir(exist_ok=True)
    path.chmod(0o777)
    values = acl_values(mode, stored)
    os.setxattr(path, b"system.posix_acl_access", values.access)
    for name in os.listxattr(path):
        if name == "system.posix_acl_default":
            os.removexattr(path, name)
    if values.default is not None:
        os.setxattr(path, b"system.posix_acl_default", values.default)
    with Folder(ext4) as folder:
        found = folder.metadata("folder")
    assert found.acl == stored
    assert found.stat.mode & 0o777 == mode
    assert not values.guessed


def test_what_an_acl_lacks_is_filled_in_from_the_mode(ext4: Path) -> None:
    (ext4 / "folder").mkdir()
    lacking = Acl(
        users=((5, 7),), default=DefaultAcl(NO_PERMISSIONS, NO_PERMISSIONS, NO_PERMISSIONS, NO_PERMISSIONS),
        default_groups=((6, 6),),
    )  # fmt: skip
    values = acl_values(0o751, lacking)
    assert values.guessed
    os.setxattr(ext4 / "folder", b"system.posix_acl_access", values.access)
    assert values.default is not None
    os.setxattr(ext4 / "folder", b"system.posix_acl_default", values.default)
    with Folder(ext4) as folder:
        found = folder.metadata("folder")
    assert found.acl == Acl(users=((5, 7),), group_obj=5, default=DefaultAcl(7, 5, 1, 5), default_groups=((6, 6),))
    assert found.stat.mode & 0o777 == 0o751


def test_every_stored_flag_has_a_name_and_a_bit() -> None:
    assert len(CHATTR_BITS) == 10
    assert sum(CHATTR_BITS) | FAT_FLAGS == STORED_FLAGS
