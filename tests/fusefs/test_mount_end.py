"""How a real mount ends: by signals, by an unmount, by being killed."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.fusefs.mounts import (
    ENVIRONMENT,
    IMAGE,
    command,
    error_of,
    is_mounted,
    mounted,
    names,
    read_direct,
    run,
)
from tests.support.cache import ROOT as CHECKOUT

pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("fuse")]

DISK = "vm/100/2026-01-01T00:00:00Z/drive-scsi0.img"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts_cleanly(shared_store: Path, mountpoint: Path, number: int) -> None:
    with mounted(shared_store, mountpoint) as mount:
        assert (mount.path / DISK).exists()
        assert mount.end(number) == 0
        assert not is_mounted(mount.path)
        assert names(mount.path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("background", [[], ["--background"]])
def test_a_signal_that_comes_as_soon_as_there_is_a_mount_leaves_none(
    shared_store: Path, mountpoint: Path, number: int, background: list[str]
) -> None:
    mountpoint.mkdir()
    ended = run(shared_store, mountpoint, "--signal-when-attached", str(int(number)), *background)
    assert not is_mounted(mountpoint)
    assert ended.returncode == (1 if background else 0)
    assert "Traceback" not in ended.stderr


def test_a_signal_ends_a_mount_that_is_in_use(shared_store: Path, mountpoint: Path) -> None:
    with mounted(shared_store, mountpoint) as mount:
        descriptor = os.open(mount.path / DISK, os.O_RDONLY)
        assert os.read(descriptor, 10) == IMAGE[:10]
        assert mount.end() == 0
        assert not is_mounted(mount.path)
        with contextlib.suppress(OSError):
            os.close(descriptor)


def test_a_read_that_hangs_in_the_store_keeps_the_process_but_not_the_mount(
    shared_store: Path, mountpoint: Path, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with mounted(shared_store, mountpoint, "--hang", str(fifo)) as mount:
        ended = threading.Thread(target=error_of, args=[lambda: read_direct(mount.path / DISK, 0, 4096)])
        ended.start()
        # Opening it succeeds once the mount hangs in it.
        with fifo.open("wb"):
            for _ in range(2):
                mount.process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
            deadline = time.monotonic() + 60
            while is_mounted(mount.path):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert mount.process.poll() is None
            assert names(mount.path) == []
        assert mount.process.wait(60) == 0
        ended.join(60)
        assert not ended.is_alive()


@pytest.mark.parametrize("words", [["fusermount3", "-u"], ["umount"]])
def test_an_unmount_ends_the_process(shared_store: Path, mountpoint: Path, words: list[str]) -> None:
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    if words[0] == "umount" and os.getuid() != 0:
        pytest.skip("umount of a FUSE mount is for root")
    with mounted(shared_store, mountpoint) as mount:
        assert (mount.path / DISK).exists()
        subprocess.run([*words, str(mount.path)], check=True, timeout=60)
        assert mount.process.wait(60) == 0
        assert not is_mounted(mount.path)


def test_a_mount_that_was_killed_gets_a_hint_and_can_be_cleared(shared_store: Path, mountpoint: Path) -> None:
    with mounted(shared_store, mountpoint) as mount:
        mount.process.kill()
        mount.process.wait(60)
        again = subprocess.run(
            command(shared_store, mountpoint), capture_output=True, timeout=30, cwd=CHECKOUT, env=ENVIRONMENT, text=True
        )
        assert again.returncode == 1
        assert "a former mount there ended without unmounting" in again.stderr
        assert "fusermount3 -u" in again.stderr
        subprocess.run(["umount", str(mount.path)], check=True, timeout=60)
