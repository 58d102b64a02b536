"""Disk images with file systems that the distribution's own tools and the kernel made, and what is in them.

Each is built once and kept in the cache, with a list of its entries as the kernel (of FAT the files that were put in,
of NTFS ntfs-3g) shows them: that is the oracle, so that a test needs no mount of its own.
"""

import hashlib
import json
import os
import random
import shutil
import stat
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diskfs.entries import Entry
from tests.support.cache import Unavailable, cached, once
from tests.support.file_systems import run_tool

#: Changed when what is below makes other images.
_VERSION: Final = 3
_MIB: Final = 1 << 20
#: Seconds after which XFS begins to write to its place what its log has, less some.
_XFS_WRITES_BACK_S: Final = 20.0
#: The command that makes each, bytes, options of the mount.
KERNEL_KINDS: Final = {
    "ext4": (["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root"], 64 * _MIB, ""),
    "ext4-1k": (["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", "inline_data"], 48 * _MIB, ""),
    "ext4-meta-bg": (
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-g", "256", "-I", "512", "-O",
         "meta_bg,^resize_inode,^flex_bg,inline_data,ea_inode"], 48 * _MIB, "",
    ),
    "ext4-bigalloc": (
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-I", "1024", "-O", "bigalloc", "-C", "16384"],
        48 * _MIB, "",
    ),
    "ext3": (["mke2fs", "-q", "-F", "-t", "ext3", "-b", "1024"], 48 * _MIB, ""),
    "ext2": (["mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024"], 48 * _MIB, ""),
    "xfs": (["mkfs.xfs", "-q", "-f", "-L", "data"], 320 * _MIB, ""),
    "xfs-16k": (["mkfs.xfs", "-q", "-f", "-b", "size=1k", "-n", "size=16k"], 320 * _MIB, ""),
    "xfs-1k": (["mkfs.xfs", "-q", "-f", "-b", "size=1k"], 320 * _MIB, ""),
    "btrfs": (["mkfs.btrfs", "-q", "-f", "-L", "pool"], 128 * _MIB, ""),
    "btrfs-zstd": (["mkfs.btrfs", "-q", "-f"], 128 * _MIB, "compress-force=zstd"),
    "btrfs-lzo": (["mkfs.btrfs", "-q", "-f"], 128 * _MIB, "compress-force=lzo"),
    "btrfs-zlib": (["mkfs.btrfs", "-q", "-f"], 128 * _MIB, "compress-force=zlib"),
}  # fmt: skip
#: Bytes and width of the table.
FAT_KINDS: Final = {"fat12": (2 * _MIB, 12), "fat16": (20 * _MIB, 16), "fat32": (40 * _MIB, 32)}
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 1, 2, 4, 0x10, 0x20


@dataclass(frozen=True)
class MadeImage:
    """One image."""

    path: Path
    entries: Mapping[bytes, Mapping[str, Any]]  #: by path from the root, with a leading slash


def made_image(kind: str) -> MadeImage:
    """The image `kind`, from the cache or built now.

    Raises:
        Unavailable: this machine cannot build it.
    """

    def build(folder: Path) -> None:
        image = folder / "disk.img"
        if kind == "ext4-dirty":
            found = _dirty(image, folder)
        elif kind == "xfs-dirty":
            found = _xfs_dirty(image, folder)
        elif kind in KERNEL_KINDS:
            found = _by_kernel(kind, image, folder / "mnt")
        elif kind in FAT_KINDS:
            found = _fat(kind, image, folder / "files")
        else:
            found = _ntfs(image, folder / "mnt")
        (folder / "entries.json").write_text(json.dumps(found))

    folder = cached(f"disk-images-{_VERSION}-{kind}", build)
    entries = json.loads((folder / "entries.json").read_text())
    return MadeImage(folder / "disk.img", {path.encode("latin-1"): entry for path, entry in entries.items()})


def differences(entry: Entry, wanted: Mapping[str, Any], content: bytes, xattrs: Mapping[bytes, bytes]) -> list[str]:
    """Where what was read of an entry is not what it must be; only what `wanted` has is compared."""
    target = None if entry.target is None else entry.target.decode("latin-1")
    have = {
        "mode": entry.mode, "uid": entry.uid, "gid": entry.gid, "mtime": entry.mtime_ns, "links": entry.links,
        "size": entry.size, "target": target, "rdev": None if entry.rdev is None else list(entry.rdev),
        "sha256": hashlib.sha256(content).hexdigest(),
        "xattrs": {name.decode("latin-1"): value.hex() for name, value in xattrs.items()},
    }  # fmt: skip
    return [f"{key}: {have[key]!r}, not {value!r}" for key, value in wanted.items() if have[key] != value]


@contextmanager
def _loop(image: Path) -> Iterator[str]:
    done = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise Unavailable(f"no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=30)


@once
def _root() -> None:
    if os.geteuid() != 0:
        raise Unavailable("only root can mount a file system to fill it")


def _sized(image: Path, size: int) -> None:
    with image.open("wb") as file:
        file.truncate(size)


def _mount(command: list[str | Path], point: Path, **options: str) -> None:
    try:
        run_tool(command, **options)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"it cannot be mounted: {error.stderr.strip()}") from error


def _by_kernel(kind: str, image: Path, point: Path) -> dict[str, Any]:
    _root()
    command, size, options = KERNEL_KINDS[kind]
    _sized(image, size)
    run_tool([*command, image])
    point.mkdir()
    with _loop(image) as device:
        _mount(["mount", *(["-o", options] if options else []), device, point], point)
        try:
            fill(point)
            if kind == "btrfs":
                _subvolumes(point)
            if kind == "xfs-1k":
                _xfs_trees(point)
            if kind == "ext4-meta-bg":  # attributes with inodes of their own
                os.setxattr(point / "etc/tiny", "user.huge", random.Random(6).randbytes(60_000))
                os.setxattr(point / "etc/small", "user.huge", random.Random(7).randbytes(3_000))
            subprocess.run(["sync", "--file-system", point], check=True, timeout=60)
            # What the kernel shows of it once it is all on the disk.
            subprocess.run(["mount", "-o", "remount,ro", point], check=True, timeout=60)
            found = dict(_entries(point))
            if kind == "btrfs":
                del found["/snapshots/one/nested"]["mtime"]  # the time at which the kernel was asked
        finally:
            subprocess.run(["umount", point], check=True, timeout=60)
    point.rmdir()
    return found


def _xfs_trees(point: Path) -> None:
    """What has blocks of its own for its extents: attributes in many places; and a target of two blocks."""
    draw = random.Random(8)
    (point / "etc/attributes").touch()
    for number in range(60):
        os.setxattr(point / "etc/attributes", f"user.first{number}", draw.randbytes(9000))
    for number in range(0, 60, 2):
        os.removexattr(point / "etc/attributes", f"user.first{number}")
    for number in range(60):
        os.setxattr(point / "etc/attributes", f"user.second{number}", draw.randbytes(3000))
    (point / "etc/link1023").symlink_to("t" * 1023)


def _dirty(image: Path, folder: Path) -> dict[str, Any]:
    """An ext4 as it is on the disk while it is mounted: the last changes are in its journal only."""
    _root()
    live, point = folder / "live.img", folder / "mnt"
    _sized(live, 32 * _MIB)
    run_tool(["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", live])
    point.mkdir()
    with _loop(live) as device:
        _mount(["mount", "-o", "commit=1000", device, point], point)
        try:
            (point / "old").mkdir()
            for number in range(50):
                (point / f"old/file{number}").write_text(f"{number}")
            subprocess.run(["fsfreeze", "-f", point], check=True, timeout=60)
            subprocess.run(["fsfreeze", "-u", point], check=True, timeout=60)
            for number in range(0, 50, 2):
                (point / f"old/file{number}").unlink()
            (point / "new").mkdir()
            for number in range(80):
                with (point / f"new/file{number}").open("w") as file:
                    file.write(f"new {number}")
                    os.fsync(file.fileno())
            # A directory's block that is freed, which revokes what the journal has of it.
            for number in range(200):
                (point / f"new/a name that is long enough to fill blocks {number}").touch()
            handle = os.open(point, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
            subprocess.run(["cp", "--sparse=always", live, image], check=True, timeout=60)
        finally:
            subprocess.run(["umount", point], check=True, timeout=60)
    live.unlink()
    return _recovered(image, folder, point)


def _xfs_dirty(image: Path, folder: Path) -> dict[str, Any]:
    """The same of an XFS, whose log has everything first."""
    _root()
    point = folder / "mnt"
    for _ in range(5):
        if _xfs_changed(image, folder / "live.img", point) < _XFS_WRITES_BACK_S:
            return _recovered(image, folder, point)
        point.rmdir()
    raise Unavailable("this machine is slower than the kernel writes back")


def _xfs_changed(image: Path, live: Path, point: Path) -> float:
    """Copy an XFS at `live` to `image` just after changes; how many seconds these took."""
    _sized(live, 320 * _MIB)
    run_tool(["mkfs.xfs", "-q", "-f", live])
    point.mkdir()
    draw = random.Random(4)
    with _loop(live) as device:
        _mount(["mount", device, point], point)
        try:
            (point / "old/gone").mkdir(parents=True)
            for number in range(300):
                (point / f"old/file{number}").write_text(f"{number}")
                (point / f"old/gone/file{number}").write_text(f"{number}")
            for flag in ("-f", "-u"):
                subprocess.run(["fsfreeze", flag, point], check=True, timeout=60)
            begin = time.monotonic()
            for number in range(0, 300, 2):
                (point / f"old/file{number}").unlink()
            shutil.rmtree(point / "old/gone")
            (point / "old/file1").write_text("changed")
            (point / "new").mkdir()
            for number in range(400):
                (point / f"new/a name that is long enough to fill blocks {number}").write_text(f"{number}")
            with (point / "pieces").open("wb") as file:
                for number in range(300):
                    os.pwrite(file.fileno(), draw.randbytes(4096), number * 16384)
            for length in (5, 300, 1000):
                (point / f"link{length}").symlink_to("x" * length)
            for length in (10, 3000, 30_000):
                os.setxattr(point / "old/file1", f"user.of{length}", draw.randbytes(length))
            os.mknod(point / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
            os.link(point / "old/file3", point / "new/hard")
            subprocess.run(["sync", "--file-system", point], check=True, timeout=60)
            subprocess.run(["cp", "--sparse=always", live, image], check=True, timeout=60)
            took = time.monotonic() - begin
        finally:
            subprocess.run(["umount", point], check=True, timeout=60)
    live.unlink()
    return took


def _recovered(image: Path, folder: Path, point: Path) -> dict[str, Any]:
    """What is in a copy of `image` when the kernel has replayed its journal."""
    recovered = folder / "recovered.img"
    subprocess.run(["cp", "--sparse=always", image, recovered], check=True, timeout=60)
    with _loop(recovered) as device:
        _mount(["mount", device, point], point)
        try:
            found = dict(_entries(point))
        finally:
            subprocess.run(["umount", point], check=True, timeout=60)
    recovered.unlink()
    point.rmdir()
    return found


def _subvolumes(point: Path) -> None:
    for command in (
        ["subvolume", "create", "@home"], ["subvolume", "create", "@home/nested"],
    ):  # fmt: skip
        run_tool(["btrfs", *command[:2], point / command[2]])
    (point / "@home/alice").write_text("alice")
    (point / "@home/nested/deep").write_text("deep")
    (point / "snapshots").mkdir()
    run_tool(["btrfs", "subvolume", "snapshot", "-r", point / "@home", point / "snapshots/one"])
    (point / "@home/alice").write_text("alice, changed")


def fill(folder: Path) -> None:
    """Everything that a file system can hold."""
    draw = random.Random(5)
    for name in ("etc", "many", "deep/a/b/c/d", "empty", "sp ace"):
        (folder / name).mkdir(parents=True)
    etc, deep = folder / "etc", folder / "deep"
    (etc / "fstab").write_text("UUID=1 / ext4\n")
    os.chown(etc / "fstab", 12, 34567)
    (etc / "fstab").chmod(0o4751)
    os.link(etc / "fstab", etc / "hard")
    for length in (5, 59, 60, 200):
        (etc / f"link{length}").symlink_to("x" * length)
    os.mknod(etc / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(etc / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 200000))
    os.mkfifo(etc / "fifo")
    os.mknod(etc / "sock", stat.S_IFSOCK | 0o644)
    for number in range(900):
        (folder / f"many/file-with-a-long-name-{number}").write_text(f"{number}")
    for number in range(0, 900, 3):
        (folder / f"many/file-with-a-long-name-{number}").unlink()
    with (deep / "a/b/c/d/sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(5 * _MIB)
        file.write(draw.randbytes(100_000))
        file.truncate(9 * _MIB)
    with (deep / "pieces").open("wb") as file:
        for number in range(300):
            file.seek(number * 16384)
            file.write(draw.randbytes(3000))
    # Allocated and never written, before and behind what is; and after a hole.
    with (deep / "preallocated").open("w+b") as file:
        file.truncate(8 * _MIB)
        os.pwrite(file.fileno(), b"A" * 4096, 0)
        os.posix_fallocate(file.fileno(), 3 * _MIB, _MIB)
        os.pwrite(file.fileno(), b"B" * 5000, 3 * _MIB + 70_000)
    (deep / "text").write_text("the quick brown fox " * 20_000)
    (deep / "big").write_bytes(draw.randbytes(2 * _MIB))
    (etc / "tiny").write_text("tiny")
    (etc / "small").write_text("s" * 140)
    Path(os.fsdecode(os.fsencode(etc) + b"/lat\xe9")).write_text("latin")
    (etc / "café ☃").write_text("utf-8")
    os.setxattr(etc / "tiny", "user.a", b"1")
    os.setxattr(etc / "tiny", "trusted.b", b"2" * 100)
    os.setxattr(etc / "small", "user.large", draw.randbytes(600))
    os.setxattr(etc / "fstab", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    rows = [(_USER_OBJ, 6, -1), (_USER, 4, 1000), (_GROUP_OBJ, 4, -1), (_MASK, 6, -1), (_OTHER, 4, -1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, may, who & 0xFFFFFFFF) for tag, may, who in rows)
    os.setxattr(etc / "small", "system.posix_acl_access", acl)
    os.setxattr(folder / "empty", "system.posix_acl_default", acl)
    os.utime(etc / "tiny", ns=(0, -150_000_000_000_000_123_456))
    os.utime(etc / "small", ns=(0, 4_100_000_000_987_654_321))


def _entries(folder: Path, *, plain: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and all that is to be compared of each entry; `plain`: no owners, permissions and attributes."""
    root = os.fsencode(folder)
    for where, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(where, name)  # noqa: PTH118 - bytes
            found = os.lstat(path)
            entry: dict[str, Any] = {"mtime": found.st_mtime_ns}
            if stat.S_ISREG(found.st_mode):
                content = Path(os.fsdecode(path)).read_bytes()
                entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                entry["links"] = found.st_nlink
            if stat.S_ISLNK(found.st_mode):
                entry["target"] = os.readlink(path).decode("latin-1")  # noqa: PTH115 - bytes
            if not plain:
                entry |= {"mode": found.st_mode, "uid": found.st_uid, "gid": found.st_gid}
                if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
                    entry["rdev"] = [os.major(found.st_rdev), os.minor(found.st_rdev)]
                entry["xattrs"] = {
                    attribute: os.getxattr(path, attribute, follow_symlinks=False).hex()
                    for attribute in os.listxattr(path, follow_symlinks=False)
                    if not attribute.startswith("trusted.SGI_ACL")  # XFS shows its ACLs twice
                }
            yield path[len(root) :].decode("latin-1"), entry


def _fat(kind: str, image: Path, files: Path) -> dict[str, Any]:
    size, width = FAT_KINDS[kind]
    draw = random.Random(3)
    (files / "Sub Dir/deeper").mkdir(parents=True)
    (files / "hello.txt").write_text("hello")
    (files / "UPPER.TXT").write_text("upper")
    (files / "unicodé ☃.dat").write_text("unicode")
    (files / "Sub Dir/deeper/empty").touch()
    for number in range(120):
        (files / f"Sub Dir/file number {number}.bin").write_bytes(draw.randbytes(number * 50))
    for path in files.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    _sized(image, size)
    run_tool(["mkfs.vfat", "-F", str(width), "-n", "ESP", image])
    run_tool(
        ["mcopy", "-s", "-m", "-i", image, *sorted(files.iterdir()), "::/"], LC_ALL="C.UTF-8", TZ="UTC"
    )  # fmt: skip
    # Free clusters between others, and a file that goes back and forth through them.
    for number in range(0, 120, 2):
        run_tool(["mdel", "-i", image, f"::/Sub Dir/file number {number}.bin"])
        (files / f"Sub Dir/file number {number}.bin").unlink()
    (files / "scattered.bin").write_bytes(draw.randbytes(300_000))
    run_tool(["mcopy", "-m", "-i", image, files / "scattered.bin", "::/"], LC_ALL="C.UTF-8", TZ="UTC")
    found = dict(_entries(files, plain=True))
    for entry in found.values():
        del entry["mtime"]
    found["/hello.txt"]["mtime"] = 1_700_000_000 * 10**9
    found["/hello.txt"]["mode"] = stat.S_IFREG | 0o644
    return found


def _ntfs(image: Path, point: Path) -> dict[str, Any]:
    _root()
    draw = random.Random(1)
    _sized(image, 24 * _MIB)
    run_tool(["mkntfs", "-q", "-F", "-L", "Windows", image])
    point.mkdir()
    with _loop(image) as device:
        _mount(["ntfs-3g", "-o", "compression,streams_interface=none", device, point], point)
        try:
            (point / "Users/me").mkdir(parents=True)
            (point / "many").mkdir()
            (point / "packed").mkdir()
            os.setxattr(point / "packed", "system.ntfs_attrib", struct.pack("<I", 0x800))
            (point / "Users/me/hello.txt").write_text("hello")
            os.link(point / "Users/me/hello.txt", point / "Users/me/hard.txt")
            (point / "Users/me/café ☃.txt").write_text("utf-16")
            for number in range(400):
                (point / f"many/a file with a long name {number}.txt").write_text(f"{number}")
            for number in range(0, 400, 3):
                (point / f"many/a file with a long name {number}.txt").unlink()
            (point / "packed/text").write_text("the quick brown fox " * 20_000)
            (point / "packed/noise").write_bytes(draw.randbytes(200_000))
            (point / "Users/link").symlink_to("me/café ☃.txt")
            (point / "Users/far").symlink_to("/somewhere/" + "x" * 700)
            # So many names that they take records of their own; in the first one content is the last of all.
            (point / "names").mkdir()
            (point / "names/0").write_text("small")
            for number in range(1, 80):
                os.link(point / "names/0", point / f"names/{'x' * (number % 40)}{number}")
            with (point / "Users/sparse").open("wb") as file:
                file.write(b"begin")
                file.seek(3 * _MIB)
                file.write(b"end")
                file.truncate(5 * _MIB)
            (point / "Users/big").write_bytes(draw.randbytes(2 * _MIB))
            found = dict(_entries(point, plain=True))
        finally:
            subprocess.run(["umount", point], check=True, timeout=60)
    point.rmdir()
    return found


def partitioned(target: Path, parts: list[Path | bytes]) -> list[int]:
    """Write a disk with an MBR and up to four partitions, made of images or of bytes; where each begins, in bytes."""
    starts, rows, at = [], b"", _MIB
    with target.open("wb") as disk:
        for part in parts:
            size = part.stat().st_size if isinstance(part, Path) else -(-len(part) // _MIB) * _MIB
            starts.append(at)
            rows += struct.pack("<B3xB3xII", 0, 0x83, at // 512, size // 512)
            if isinstance(part, Path):
                with part.open("rb") as source:
                    for offset in range(0, size, _MIB):
                        piece = source.read(_MIB)
                        if piece.count(0) != len(piece):
                            os.pwrite(disk.fileno(), piece, at + offset)
            else:
                os.pwrite(disk.fileno(), part, at)
            at += size
        disk.truncate(at)
        os.pwrite(disk.fileno(), rows.ljust(64, b"\0") + b"\x55\xaa", 446)
    return starts
