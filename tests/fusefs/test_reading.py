"""Reading through one mount that all tests here share."""

import errno
import hashlib
import os
import random
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fusefs.mounts import (
    CHUNK,
    CONF,
    IMAGE,
    IMAGE_BLOCKS,
    MIB,
    Mounted,
    mounted,
    read_direct,
)

pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("fuse")]

FIRST_TIME, SECOND_TIME = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
DISK = f"vm/100/{FIRST_TIME}/drive-scsi0.img"


@pytest.fixture(scope="module")
def mount(shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """One mount for all tests that only read."""
    with mounted(shared_store, tmp_path_factory.mktemp("mount") / "mnt") as mount:
        yield mount


def test_walking_finds_the_whole_tree(mount: Mounted) -> None:
    found = {str(Path(folder, name).relative_to(mount.path))
             for folder, folders, files in os.walk(mount.path) for name in [*folders, *files]}  # fmt: skip
    snapshot_files = {"drive-scsi0.img", "qemu-server.conf"}
    assert found == {
        "host", "host/web", f"host/web/{FIRST_TIME}", "host/web/latest",
        "vm", "vm/100", f"vm/100/{FIRST_TIME}", f"vm/100/{SECOND_TIME}", "vm/100/latest",
        *(f"vm/100/{SECOND_TIME}/root.pxar{below}" for below in ("", "/etc", "/etc/hosts")),
        *(f"vm/100/{time}/{name}" for time in (FIRST_TIME, SECOND_TIME) for name in snapshot_files),
        "ns", "ns/a", "ns/a/ns", "ns/a/ns/b", "ns/a/ns/b/vm", "ns/a/ns/b/vm/100",
        f"ns/a/ns/b/vm/100/{FIRST_TIME}", f"ns/a/ns/b/vm/100/{FIRST_TIME}/qemu-server.conf", "ns/a/ns/b/vm/100/latest",
    }  # fmt: skip


def test_stat_and_du_tell_size_data_mode_owner_and_time(mount: Mounted) -> None:
    found = (mount.path / DISK).stat()
    assert (found.st_size, found.st_blocks) == (len(IMAGE), IMAGE_BLOCKS)
    assert stat.S_IMODE(found.st_mode) == 0o444
    assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid())
    assert found.st_mtime == 1_767_225_600
    conf = (mount.path / f"vm/100/{FIRST_TIME}/qemu-server.conf").stat()
    assert conf.st_size == len(CONF)
    assert stat.S_IMODE((mount.path / "vm").stat().st_mode) == 0o555
    du = subprocess.run(["du", "-B512", str(mount.path / DISK)], capture_output=True, check=True, timeout=30)
    assert int(du.stdout.split()[0]) == IMAGE_BLOCKS


def test_latest_can_be_walked_through(mount: Mounted) -> None:
    assert str((mount.path / "vm/100/latest").readlink()) == SECOND_TIME
    assert (mount.path / "vm/100/latest/qemu-server.conf").read_bytes() == CONF


def test_any_range_of_an_image_has_the_bytes_that_were_backed_up(mount: Mounted) -> None:
    dice = random.Random(7)
    edges = [0, CHUNK, 2 * CHUNK, 3 * CHUNK, 5 * CHUNK, len(IMAGE)]
    with (mount.path / DISK).open("rb", buffering=0) as file:
        for number in range(200):
            offset = dice.choice(edges) - dice.randrange(5000) if number % 2 else dice.randrange(len(IMAGE))
            offset, length = max(0, offset), dice.choice([1, 511, 4096, 100_000, MIB])
            assert os.pread(file.fileno(), length, offset) == IMAGE[offset : offset + length]


def test_ranges_read_past_the_kernels_cache_are_the_same(mount: Mounted) -> None:
    for offset in (0, CHUNK - 4096, 2 * CHUNK - MIB, 5 * CHUNK):
        assert read_direct(mount.path / DISK, offset, 2 * MIB) == IMAGE[offset : offset + 2 * MIB]


def test_many_readers_at_once_read_the_right_bytes(mount: Mounted) -> None:
    wrong: list[int] = []

    def read(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(30):
            offset = dice.randrange(len(IMAGE) // 4096) * 4096
            if read_direct(mount.path / DISK, offset, 65536) != IMAGE[offset : offset + 65536]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert wrong == []


def test_images_can_be_copied(mount: Mounted, tmpfs: Path) -> None:
    subprocess.run(["cp", str(mount.path / DISK), str(tmpfs / "copy.img")], check=True, timeout=50)
    assert hashlib.sha256((tmpfs / "copy.img").read_bytes()).digest() == hashlib.sha256(IMAGE).digest()


def test_nothing_can_be_changed(mount: Mounted) -> None:
    for change in (
        lambda: (mount.path / "new").mkdir(),
        lambda: (mount.path / DISK).unlink(),
        lambda: (mount.path / DISK).open("r+b"),
        lambda: os.truncate(mount.path / DISK, 0),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS


def test_inode_numbers_stay_and_differ(mount: Mounted) -> None:
    def numbers() -> dict[str, int]:
        return {str(path): path.lstat().st_ino for path in sorted(mount.path.rglob("*"))}

    before = numbers()
    assert numbers() == before
    assert len(set(before.values())) == len(before)


def test_a_name_that_is_not_there_is_no_such_file(mount: Mounted) -> None:
    for name in ("none", "vm/101", f"vm/100/{FIRST_TIME}/none", f"vm/100/{FIRST_TIME}/index.json"):
        with pytest.raises(FileNotFoundError):
            (mount.path / name).stat()


def test_nothing_of_all_this_was_an_error(mount: Mounted) -> None:
    # The last test of the shared mount: its store has encrypted snapshots, and that is all there is to say.
    assert [line for line in mount.errors() if "encrypted archives are not shown" not in line] == []
    assert len([line for line in mount.errors() if "encrypted archives are not shown" in line]) == 1
