"""A server without sockets: its state over an empty datastore, and users."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from repository.local import LocalRepository, open_local
from server.application import Application
from server.state import ServerState
from tests.support.direct_server import Direct
from tests.support.wire_server import Stores


@pytest.fixture
async def local(store_folder: Path) -> AsyncIterator[LocalRepository]:
    repository = await open_local(store_folder, name="main", lock_wait_s=0)
    yield repository
    repository.close()


@pytest.fixture
async def direct(local: LocalRepository, tmp_path: Path) -> AsyncIterator[Direct]:
    state = ServerState(tmp_path / "server", Stores({"main": local, "other": local}))
    async with state.running():
        yield Direct(state, Application(state))


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come at once. A clock that jumps would end the time limits of threads that work."""
    monkeypatch.setattr("server.errors.UNAUTHORIZED_DELAY_S", 0.0)
    monkeypatch.setattr("server.errors.FORBIDDEN_DELAY_S", 0.0)
