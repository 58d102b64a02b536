"""Fixtures of the tests that run the real command against real QEMUs."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.fleece_command import FleeceCommand
from tests.support.warm_command import WarmCommand
from tests.vm.lab import Lab, NothingLeft


@pytest.fixture
def fleece(tmpfs: Path, store_folder: Path, warm_command: WarmCommand) -> FleeceCommand:
    """The command with an empty datastore as its repository."""
    return FleeceCommand(tmpfs / "h", store_folder, warm=warm_command)


@pytest.fixture
async def nothing_left(fleece: FleeceCommand, tmpfs: Path) -> AsyncIterator[NothingLeft]:
    """Fails the test if a process, a socket, state, a fleecing image or a temporary file is left at its end."""
    left = NothingLeft(fleece, tmpfs / "scratch")
    yield left
    await left.check_host()
    left.check_chunk_folders()


@pytest.fixture
def lab(tmpfs: Path, fleece: FleeceCommand, nothing_left: NothingLeft) -> Lab:
    """See `Lab`."""
    fleece.home.mkdir()
    return Lab(tmpfs, fleece, nothing_left)
