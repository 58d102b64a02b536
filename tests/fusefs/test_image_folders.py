"""Disk images as folders of a mount."""

import errno
import os
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import trio

from repository.local import open_local
from tests.fusefs.mounts import FIRST, error_of, mounted, names, write
from tests.support.disk_images import MadeImage, partitioned

pytestmark = pytest.mark.fuse


def test_file_systems_of_an_image_lie_beside_it(
    fuse: None, store_folder: Path, tmp_path: Path, made: Callable[[str], MadeImage]
) -> None:
    ext4, fat = made("ext4-1k"), made("fat12")
    image = tmp_path / "disk.raw"
    with ext4.path.open("rb") as file:
        beginning = file.read(2 << 20)
    starts = partitioned(image, [ext4.path, fat.path, b"unknown" * 1000, beginning])
    # The superblock of the last one says that its blocks are huge.
    with image.open("r+b") as changed:
        os.pwrite(changed.fileno(), b"\xff\xff", starts[3] + 1024 + 24)
        os.pwrite(changed.fileno(), b"\1", starts[1] + 37)  # Linux had the FAT mounted

    async def fill() -> None:
        repo = await open_local(store_folder)
        await write(repo, "vm/100", FIRST, {"drive-scsi0.img.fidx": image.read_bytes()})
        repo.close()

    trio.run(fill)
    with mounted(store_folder, tmp_path / "mnt") as mount:
        snapshot = tmp_path / "mnt/vm/100/latest"
        assert names(snapshot) == ["drive-scsi0.img"]
        disk = snapshot / "drive-scsi0.img.d"
        assert names(disk) == ["VOLUMES", "part1", "part2", "part4"]
        volumes = (disk / "VOLUMES").read_text().splitlines()
        assert volumes[0].split("\t") == ["part1", str(48 << 20), "ext4"]
        assert volumes[2].split("\t")[2:] == ["unknown", "", "nothing that is known is in it"]
        cut_off, in_use = volumes[4:]
        assert cut_off.startswith("# vm/100/")
        assert f"part4 has {2 << 20} bytes, its file system" in cut_off
        assert "drive-scsi0.img/part2: it was in use: unless" in in_use
        root = os.fsencode(disk / "part1")
        found: dict[bytes, bytes] = {}
        for where, folders, files in os.walk(root):
            found |= {os.path.join(where, name)[len(root) :]: name for name in folders + files}  # noqa: PTH118
        assert sorted(found) == sorted(ext4.entries)
        wrong = {}
        for path, wanted in ext4.entries.items():
            there = Path(os.fsdecode(root + path))
            status = there.lstat()
            have = {
                "mode": status.st_mode, "uid": status.st_uid, "gid": status.st_gid, "mtime": status.st_mtime_ns,
                "links": status.st_nlink, "rdev": [os.major(status.st_rdev), os.minor(status.st_rdev)],
            }  # fmt: skip
            if "sha256" in wanted:
                have["sha256"] = sha256(there.read_bytes()).hexdigest()
            if "target" in wanted:
                have["target"] = str(there.readlink())
            if any(have[key] != wanted[key] for key in have if key in wanted):
                wrong[path] = have
        assert wrong == {}
        small = ext4.entries[b"/etc/small"]["xattrs"]
        assert {name: os.getxattr(disk / "part1/etc/small", name).hex() for name in small} == small
        assert (disk / "part2/hello.txt").read_text() == "hello"
        assert error_of(lambda: names(disk / "part4")) == errno.EIO
        assert error_of(lambda: (disk / "part3").stat()) == errno.ENOENT
        assert error_of(lambda: (disk / "part1/etc/fstab").open("r+b")) == errno.EROFS
        assert subprocess.run(["stat", disk / "part1/etc/fstab"], capture_output=True, timeout=60).returncode == 0
    assert any("drive-scsi0.img/part4: its file system (ext4) is damaged" in line for line in mount.errors())
    with mounted(store_folder, tmp_path / "mnt", "--archive", "vm/100/latest", "drive-scsi0.img", "-o", "images"):
        assert names(tmp_path / "mnt") == ["drive-scsi0.img", "drive-scsi0.img.d"]
        assert (tmp_path / "mnt/drive-scsi0.img.d/part1/etc/fstab").read_text() == "UUID=1 / ext4\n"
