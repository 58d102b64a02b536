"""Entries of all kinds in file archives, as a real mount shows them."""

import errno
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import pytest

from tests.fusefs.archives import ALL_KINDS, TIME, files_of, listed, store_trees
from tests.fusefs.mounts import (
    FIRST,
    error_of,
    mounted,
    names,
)
from tests.support.stores import StorePool

pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("fuse")]


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "split"])
def kinds(
    request: pytest.FixtureRequest, store_pool: StorePool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The root of `ALL_KINDS` in a mount of a repository."""
    base = store_pool.lend()
    try:
        store_trees(base, {"host/a": files_of(ALL_KINDS, split=request.param)})
        with mounted(base, tmp_path_factory.mktemp("kinds") / "mnt") as mount:
            yield mount.path / f"host/a/{TIME}/root.pxar"
            assert mount.errors() == []
    finally:
        store_pool.take_back(base)


def test_every_kind_of_entry_is_what_it_was(kinds: Path) -> None:
    assert names(kinds.parent) == ["root.pxar"]
    assert sorted(listed(kinds)) == sorted(ALL_KINDS.children)
    root = kinds.stat()
    assert (root.st_mode, root.st_mtime_ns) == (0o41777, FIRST * 10**9 + 1)
    block, character = (kinds / "blk").lstat(), (kinds / "chr").lstat()
    assert (block.st_mode, block.st_rdev) == (0o60660, os.makedev(8, 17))
    # No kernel has such a number.
    assert (character.st_mode, character.st_rdev) == (0o20600, 0)
    assert (kinds / "fifo").lstat().st_mode == 0o10600
    assert (kinds / "sock").lstat().st_mode == 0o140700
    assert str((kinds / "link").readlink()) == "/no/such/" + "t" * 300
    assert (kinds / "link").lstat().st_size == 309
    file = (kinds / "file").stat()
    assert (file.st_mode, file.st_size, file.st_blocks) == (0o104755, 6000, 12)
    assert (kinds / "file").read_bytes() == b"first\n" * 1000
    assert (kinds / os.fsdecode(b"w\xff\n")).read_bytes() == b"odd name"
    assert listed(kinds / "empty") == []
    assert error_of(lambda: (kinds / "blk").open("rb")) == errno.EACCES, "nodev"


def test_owner_times_and_attributes_are_the_stored_ones(kinds: Path) -> None:
    folder, file = kinds / "acl", kinds / "acl/f"
    found = folder.stat()
    assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (1, 2, -1_500_000_000)
    found = file.stat()
    assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (1000, 4_000_000_000, 5_999_999_999)
    attributes = {name: os.getxattr(file, name) for name in os.listxattr(file)}
    nobody = 0xFFFFFFFF
    assert attributes == {
        "user.a": b"1",
        "user.b": b"",
        "security.capability": bytes.fromhex("0100000200200000000000000000000000000000"),
        "system.posix_acl_access": pack("<I", 2) + b"".join(pack("<HHI", *entry) for entry in (
            (1, 6, nobody), (2, 6, 1002), (2, 4, 1003), (4, 4, nobody), (8, 5, 50), (16, 4, nobody), (32, 0, nobody),
        )),
    }  # fmt: skip
    assert os.listxattr(folder) == ["system.posix_acl_default"]
    default = [(1, 7, nobody), (2, 7, 1002), (4, 5, nobody), (8, 1, 50), (32, 0, nobody)]
    packed = pack("<I", 2) + b"".join(pack("<HHI", *entry) for entry in default)
    assert os.getxattr(folder, "system.posix_acl_default") == packed
    assert error_of(lambda: os.getxattr(file, "user.none")) == errno.ENODATA
    assert os.listxattr(kinds / "file") == []


def test_a_hard_link_is_one_inode_and_its_names_are_counted(kinds: Path) -> None:
    found = [(kinds / name).stat() for name in ("file", "hard", "zhard")]
    assert len({one.st_ino for one in found}) == 1
    assert [one.st_nlink for one in found] == [3, 3, 3]
    assert (kinds / "acl/f").stat().st_nlink == 1
    assert (kinds / "zhard").read_bytes() == b"first\n" * 1000


def test_names_that_are_not_there_and_writes_fail_as_they_must(kinds: Path) -> None:
    for name in ("none", "acl/none", "empty/none"):
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                (kinds / name).stat()
    assert error_of(lambda: listed(kinds / "file")) == errno.ENOTDIR
    assert error_of(lambda: (kinds / "file").open("wb")) == errno.EROFS
    assert error_of(lambda: (kinds / "new").mkdir()) == errno.EROFS
    assert error_of(lambda: os.setxattr(kinds / "file", "user.x", b"1")) == errno.EROFS


def test_tar_packs_the_mounted_tree_with_its_links_and_attributes(kinds: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.tar"
    command = [
        "tar",
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        "-cf",
        str(packed),
        "-C",
        str(kinds),
        "--exclude=sock",
        ".",
    ]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with tarfile.open(packed) as archive:
        members = {member.name: member for member in archive}
    assert members["./file"].isreg()
    assert [(members[name].islnk(), members[name].linkname) for name in ("./hard", "./zhard")] == [(True, "./file")] * 2
    assert members["./acl/f"].pax_headers["SCHILY.xattr.user.a"] == "1"
    assert "user:1002:rw-" in members["./acl/f"].pax_headers["SCHILY.acl.access"]
