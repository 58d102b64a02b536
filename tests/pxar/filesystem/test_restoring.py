"""Flags, projects and access lists that are set, and read again as they were stored."""

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pxar import filesystem
from pxar.features import CHATTR_BITS, STORED_FLAGS
from pxar.filesystem import (
    FAT_FLAGS,
    Features,
    acl_values,
    set_flags,
    set_projid,
)
from pxar.metadata import NO_PERMISSIONS, Acl, DefaultAcl
from tests.pxar.filesystem.folders import (
    EXT4,
    Folder,
    as_nobody,
)
from tests.support.file_systems import mounted, mounted_image


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
