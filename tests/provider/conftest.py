"""A worker of Proxmox VE whose storage is an empty datastore."""

import os
import shutil
from pathlib import Path

import pytest

from tests.provider.plugin import Worker
from tests.support.warm_command import WarmCommand


@pytest.fixture
def worker(tmp_path: Path, store_folder: Path, warm_command: WarmCommand) -> Worker:
    """The worker, not started."""
    if shutil.which("perl") != "/usr/bin/perl" and not Path("/usr/bin/perl").exists():
        pytest.skip("no Perl")
    home = tmp_path / "host"
    home.mkdir()
    (home / "fleece.toml").touch()
    return Worker(home, {"fleece-repository": str(store_folder)}, warm=warm_command)


@pytest.fixture
def as_root() -> None:
    """Skips what needs root."""
    if os.geteuid() != 0:
        pytest.skip("not root")
