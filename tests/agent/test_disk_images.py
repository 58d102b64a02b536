"""`fleece ls`, `find` and `restore` of what is on disk images."""

import os
import stat
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from tests.agent.conftest import Fleece
from tests.support.disk_images import MadeImage, partitioned


@pytest.fixture
def disk(stored: Fleece, tmp_path: Path, made: Callable[[str], MadeImage]) -> MadeImage:
    """A snapshot with a disk: FAT, ext4, something unknown. Gives what is in the ext4."""
    ext4 = made("ext4")
    image = tmp_path / "disk.raw"
    partitioned(image, [made("fat16").path, ext4.path, b"nobody knows what this is" * 4000])
    (tmp_path / "note").write_text("note")
    done = stored(
        "backup", f"drive-scsi0.img:{image}", f"note.conf:{tmp_path / 'note'}", "--backup-type", "vm",
        "--backup-id", "100",
    )  # fmt: skip
    assert done.code == 0, done
    return ext4


def test_a_disk_is_listed_and_searched_as_archives_are(stored: Fleece, disk: MadeImage) -> None:
    volumes = stored.json("ls", "vm/100/latest", "drive-scsi0.img")
    assert [(one["path"], one["file-system"], one["label"], one["problem"]) for one in volumes] == [
        ("/part1", "fat", "ESP", None),
        ("/part2", "ext4", "root", None),
        ("/part3", "unknown", "", "nothing that is known is in it"),
    ]
    etc = {one["path"]: one for one in stored.json("ls", "vm/100/latest", "drive-scsi0.img/part2/etc")}
    assert etc["/part2/etc/fstab"]["mode"] == "4751"
    assert (etc["/part2/etc/fstab"]["uid"], etc["/part2/etc/fstab"]["gid"]) == (12, 34567)
    assert etc["/part2/etc/hard"] | {"path": "", "type": ""} == etc["/part2/etc/fstab"] | {
        "path": "", "type": "", "target": "/part2/etc/fstab",
    }  # fmt: skip
    assert (etc["/part2/etc/null"]["major"], etc["/part2/etc/null"]["minor"]) == (1, 3)
    assert etc["/part2/etc/link60"]["target"] == "x" * 60
    # A pattern counts from the root of a file system too; what is unknown is a warning.
    found = stored("find", "/etc/fstab", "vm/100/latest", "--images")
    assert found.code == 3
    assert found.out.splitlines()[0].endswith("drive-scsi0.img/part2/etc/fstab")
    assert "drive-scsi0.img/part3: left out: nothing that is known is in it" in found.err
    every = stored("ls", "vm/100/latest", "drive-scsi0.img/part2", "--recursive")
    assert every.code == 0
    assert len(every.out.splitlines()) == len(disk.entries)
    for path, why in (("part3", "nothing that is known is in it"), ("part4/etc", "the archive has no such entry")):
        refused = stored("ls", "vm/100/latest", f"drive-scsi0.img/{path}")
        assert refused.code == 1
        assert why in refused.err


def test_that_a_file_system_was_in_use_is_said_once_by_what_reads_it_and_not_by_what_looks_for_names(
    stored: Fleece, tmp_path: Path, made: Callable[[str], MadeImage]
) -> None:
    image = tmp_path / "disk.raw"
    (start,) = partitioned(image, [made("fat12").path])
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), b"\1", start + 37)
    done = stored("backup", f"d.img:{image}", "--backup-type", "vm", "--backup-id", "100")
    assert done.code == 0, done
    for command in (
        ("ls", "vm/100/latest", "d.img/part1", "--recursive"),
        ("restore", "vm/100/latest", "d.img/part1", tmp_path / "out"),
    ):
        said = stored(*command)
        assert said.code == 3, said
        assert said.err.count("d.img/part1: it was in use: unless it was frozen for the backup or unmounted") == 1
    assert (tmp_path / "out/hello.txt").read_text() == "hello"
    found = stored("find", "/hello.txt", "--all-snapshots", "--images")
    assert (found.code, len(found.out.splitlines())) == (0, 1), found


def test_files_of_two_backups_of_a_disk_are_compared(
    stored: Fleece, tmp_path: Path, made: Callable[[str], MadeImage]
) -> None:
    image = tmp_path / "disk.raw"
    (start,) = partitioned(image, [made("fat12").path])
    snapshots = []
    place = image.read_bytes().index(b"hello", start)
    for day, content in (("01", b"hello"), ("02", b"HELLO")):  # changed by somebody who hides it
        with image.open("r+b") as file:
            os.pwrite(file.fileno(), content, place)
        when = ("--backup-id", "7", "--backup-time", f"2026-01-{day}T00:00:00Z")
        done = stored.json("backup", f"d.img:{image}", "--backup-type", "vm", *when)
        snapshots.append(done["snapshot"])
    assert stored.json("diff", *snapshots, "d.img/part1") == []
    (change,) = stored.json("diff", *snapshots, "d.img/part1", "--content")
    assert (change["path"], change["change"], change["what"]) == ("/part1/hello.txt", "changed", ["content"])


def test_everything_of_a_file_system_is_restored_as_the_kernel_showed_it(
    stored: Fleece, disk: MadeImage, tmpfs: Path
) -> None:
    target = tmpfs / "all"
    done = stored("restore", "vm/100/latest", "drive-scsi0.img/part2", target)
    assert done.code == 0, done
    assert {path for path in disk.entries if not path.startswith(b"/lost+found")} == {
        os.fsencode(path)[len(os.fsencode(target)) :] for path in target.rglob("*") if path.name != "lost+found"
    }
    wrong = {}
    for path, wanted in disk.entries.items():
        there = Path(os.fsdecode(os.fsencode(target) + path))
        found = there.lstat()
        compared = {
            "mode": found.st_mode, "uid": found.st_uid, "gid": found.st_gid, "mtime": found.st_mtime_ns,
        }  # fmt: skip
        if stat.S_ISREG(found.st_mode):
            compared |= {"size": found.st_size, "links": found.st_nlink}
        if any(compared[key] != wanted[key] for key in compared):
            wrong[path] = compared
    assert wrong == {}
    assert (target / "etc/fstab").stat().st_ino == (target / "etc/hard").stat().st_ino
    assert os.getxattr(target / "etc/small", "system.posix_acl_access") == bytes.fromhex(
        disk.entries[b"/etc/small"]["xattrs"]["system.posix_acl_access"]
    )
    sparse = target / "deep/a/b/c/d/sparse"
    assert sparse.stat().st_blocks * 512 < 1 << 20
    assert sha256(sparse.read_bytes()).hexdigest() == disk.entries[b"/deep/a/b/c/d/sparse"]["sha256"]


def test_parts_of_a_file_system_go_to_a_file_a_folder_and_a_pipe(
    stored: Fleece, disk: MadeImage, tmp_path: Path
) -> None:
    one = stored("restore", "vm/100/latest", "drive-scsi0.img/part2/etc/fstab", tmp_path / "fstab")
    assert (one.code, (tmp_path / "fstab").read_text()) == (0, "UUID=1 / ext4\n")
    some = stored(
        "restore", "vm/100/latest", "drive-scsi0.img/", tmp_path / "some", "--pattern", "/part1/hello*", "--pattern",
        "link5",
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "some").rglob("*") if not path.is_dir()) == ["hello.txt", "link5"]
    assert some.code == 3  # of the third partition nobody knows what is in it
    refused = stored("restore", "vm/100/latest", "drive-scsi0.img/part3", tmp_path / "none")
    assert refused.code == 1
    assert "nothing that is known is in it" in refused.err
    assert not (tmp_path / "none").exists()
    packed = tmp_path / "many.tar"
    with packed.open("wb") as file:
        process = stored.start("restore", "vm/100/latest", "drive-scsi0.img/part2/many", "-", stdout=file)
        _, said = process.communicate()
    assert process.returncode == 0, said
    with tarfile.open(packed) as archive:
        assert len(archive.getnames()) == 601
