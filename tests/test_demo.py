"""What the README promises first: the main job from beginning to end."""

import subprocess
import sys

import pytest

from tests.support.cache import ROOT
from tests.support.guest import SmallGuest
from tests.support.qemu_binaries import QemuBinary


@pytest.mark.guest
@pytest.mark.qemu
def test_demo_reaches_its_end(distribution: QemuBinary, guest: SmallGuest) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("Done: live, incremental, checked, mounted, restored, booted.")
