"""`fleece mount` as a person uses it; what the file system does is tested in tests/fusefs."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fuse import NEEDS_FUSE

from .conftest import Fleece

pytestmark = [
    pytest.mark.fuse,
    NEEDS_FUSE,
]
MIB = 1 << 20


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    subprocess.run(["fusermount3", "-u", "-q", folder], check=False, capture_output=True)


@pytest.fixture
def filled(stored: Fleece, tmpfs: Path) -> Fleece:
    (tmpfs / "disk.raw").write_bytes(os.urandom(5 * MIB))
    (tmpfs / "web.conf").write_text("memory: 64\n")
    stored.json("backup", f"disk.img:{tmpfs}/disk.raw", f"web.conf:{tmpfs}/web.conf", "--backup-id", "web")
    return stored


def gone(mountpoint: Path) -> bool:
    for _ in range(100):
        if not os.path.ismount(mountpoint):
            return True
        time.sleep(0.1)
    return False


def test_the_command_returns_when_the_tree_is_there_and_umount_ends_it(
    filled: Fleece, mountpoint: Path, tmpfs: Path
) -> None:
    assert filled.json("mount", mountpoint) == {"mountpoint": str(mountpoint)}
    latest = mountpoint / "host/web/latest"
    assert (latest / "disk.img").read_bytes() == (tmpfs / "disk.raw").read_bytes()
    assert (latest / "web.conf").read_text() == "memory: 64\n"
    subprocess.run(["fusermount3", "-u", mountpoint], check=True)
    assert gone(mountpoint)


def test_one_archive_can_be_mounted_alone(filled: Fleece, mountpoint: Path, tmpfs: Path) -> None:
    assert filled.repo is not None
    # The process in the background has another current folder.
    relative = os.path.relpath(filled.repo)
    assert filled("mount", "host/web/latest", "disk.img", mountpoint, "--repo", relative).code == 0
    assert [path.name for path in mountpoint.iterdir()] == ["disk.img"]
    assert (mountpoint / "disk.img").stat().st_size == 5 * MIB


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_mount_in_the_foreground_ends_cleanly_at_a_signal(
    number: signal.Signals,
    filled: Fleece,
    mountpoint: Path,
    ended: Callable[["subprocess.Popen[str]"], "subprocess.Popen[str]"],
) -> None:
    running = ended(filled.start("mount", "--foreground", mountpoint))
    assert running.stdout is not None
    assert running.stdout.readline() == f"mounted on {mountpoint}\n"
    running.send_signal(number)
    assert running.wait(30) == 0
    assert gone(mountpoint)


def test_what_cannot_be_mounted_is_an_error_and_nothing_is_mounted(filled: Fleece, mountpoint: Path) -> None:
    assert filled.repo is not None
    for arguments, code in (
        ([filled.repo], 1),
        ([mountpoint / "missing"], 1),
        (["host/web/latest", "nothing.img", mountpoint], 1),
        (["host/web/latest", mountpoint], 2),
        ([mountpoint, "-o", "nonsense=3"], 2),
        ([""], 2),
        (["host/web/latest", "disk.img", ""], 2),
    ):
        answer = filled("mount", *arguments, "--output", "json")
        assert (answer.code, answer.out) == (code, ""), answer
        assert answer.error["why"]
    assert not mountpoint.is_mount()


@pytest.mark.parametrize("options", [[], ["--foreground"]])
def test_a_mount_that_cannot_be_announced_is_an_error_and_does_not_stay(
    options: list[str],
    filled: Fleece,
    mountpoint: Path,
    ended: Callable[["subprocess.Popen[str]"], "subprocess.Popen[str]"],
) -> None:
    with Path("/dev/full").open("w") as full:
        running = ended(filled.start("mount", mountpoint, *options, stdout=full))
        _, complaint = running.communicate(timeout=60)
    assert running.returncode == 1
    assert complaint == "Error: cannot write to standard output: No space left on device\n"
    assert not mountpoint.is_mount()


def test_a_mount_with_closed_standard_streams_is_a_mount(
    filled: Fleece, mountpoint: Path, ended: Callable[["subprocess.Popen[str]"], "subprocess.Popen[str]"]
) -> None:
    running = ended(filled.start("mount", mountpoint, stdout=None, preexec_fn=lambda: os.closerange(0, 3)))
    assert running.wait(60) == 0
    assert (mountpoint / "host/web/latest/web.conf").read_text() == "memory: 64\n"
