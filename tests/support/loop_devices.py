"""Real block devices for tests, where the machine lets us have loop devices."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def loop_device(path: Path) -> Iterator[str]:
    """The path of a block device with the content of the file at `path` while the block runs; skips without one."""
    try:
        done = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("no block devices to test with: losetup is missing")
    if done.returncode:
        pytest.skip(f"no block devices to test with: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=30)
