"""The suite of the repository interface over the wire: our client, TLS, and Fleece's server over a local store."""

import hashlib
import inspect
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from repository.interface import Repository
from repository.local import open_local
from tests.repository import test_interface as suite
from tests.support import snapshots
from tests.support.wire_server import wire_server

#: Servers write fixed indexes with chunks of 4 MiB only.
CHUNK = 4 << 20
ADMIN = "adm@pbs"
#: What is different, and has a test of its own below or in `test_upkeep.py`.
LEFT_OUT = {
    "test_the_owner_of_a_group_changes_unless_a_backup_runs",  # a user does not own what it gave away
}

for _name, _test in vars(suite).items():
    if _name.startswith("test_") and inspect.isfunction(_test) and _name not in LEFT_OUT:
        globals()[_name] = _test


@pytest.fixture(autouse=True)
def large_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    image = b"".join(hashlib.sha256(bytes([number])).digest() * (CHUNK // 32) for number in range(3)) + bytes(100)
    monkeypatch.setattr(suite, "CHUNK", CHUNK)
    monkeypatch.setattr(snapshots, "CHUNK", CHUNK)
    monkeypatch.setattr(suite, "IMAGE", image)
    monkeypatch.setattr(suite, "FILES", {**suite.FILES, "disk.img.fidx": image})
    monkeypatch.setattr(suite, "OWNER", ADMIN)


@pytest.fixture
async def repo(store_folder: Path, tmp_path: Path) -> AsyncIterator[Repository]:
    local = await open_local(store_folder, name="main", lock_wait_s=0)
    async with wire_server(tmp_path / "server", {"main": local}) as server:
        server.right("/", ADMIN, "Admin")
        async with server.repository(ADMIN) as remote:
            remote._name = "test"
            yield remote
    local.close()
