"""The suite of the repository interface over the wire: our client, TLS, and Fleece's server.

Everything runs over a local store; what carries data also with encrypted and signed data, and over one in a bucket.
"""

import hashlib
import inspect
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from core.errors import FleeceError
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import LockedError, OwnerError, SnapshotNotFoundError
from datastore.names import Group
from repository.interface import Repository
from repository.local import LocalRepository, open_local
from tests.repository import test_interface as suite
from tests.support import snapshots
from tests.support.s3_stores import s3_store
from tests.support.wire_server import wire_server

#: Servers write fixed indexes with chunks of 4 MiB only.
CHUNK = 4 << 20
ADMIN = "adm@pbs"
OTHER = "other@pbs"
#: What is different, and has a test of its own below.
LEFT_OUT = {
    "test_the_owner_of_a_group_changes_unless_a_backup_runs",  # a user does not own what it gave away
}

#: Kind of data and store behind the server.
KINDS = {
    "plain-local": (CryptMode.NONE, False),
    "encrypted-local": (CryptMode.ENCRYPT, False),
    "signed-local": (CryptMode.SIGN_ONLY, False),
    "plain-s3": (CryptMode.NONE, True),
    "encrypted-s3": (CryptMode.ENCRYPT, True),
}
#: Tests in which it matters what the data are and where they lie.
WITH_DATA = {
    "test_a_finished_snapshot_is_listed_with_its_files_and_reads_back",
    "test_cancelled_in_the_middle_nothing_stays",
    "test_the_base_is_the_newest_finished_snapshot_and_stays_while_it_is_used",
    "test_only_changed_chunks_need_appending_when_the_base_is_reused",
    "test_dynamic_indexes_are_appended_in_order",
    "test_a_damaged_blob_is_refused",
    "test_forgetting_the_last_snapshot_removes_the_group",
    "test_several_images_may_be_written_at_once",
    "test_notes_of_snapshots_and_groups_are_kept_apart",
}
KEY = CryptKey.from_raw(bytes(range(32)))

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "repo" in metafunc.fixturenames:
        kinds = KINDS if metafunc.function.__name__ in WITH_DATA else ["plain-local"]
        metafunc.parametrize("repo", kinds, indirect=True)


def test_the_tests_with_data_are_there() -> None:
    assert set(globals()) >= WITH_DATA


@pytest.fixture
async def repo(
    request: pytest.FixtureRequest, store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Repository]:
    mode, in_bucket = KINDS[request.param]
    codec = ChunkCodec() if mode is CryptMode.NONE else ChunkCodec(KEY, mode)
    for module in (suite, snapshots):
        monkeypatch.setattr(module, "CODEC", codec)
    async with AsyncExitStack() as stack:
        if in_bucket:
            endpoint = request.getfixturevalue("s3_emulator").endpoint()
            local = LocalRepository(await stack.enter_async_context(s3_store(store_folder, endpoint)), "main")
        else:
            local = await open_local(store_folder, name="main", lock_wait_s=0)
            stack.callback(local.close)
        server = await stack.enter_async_context(wire_server(tmp_path / "server", {"main": local}))
        server.right("/", ADMIN, "Admin")
        server.user(OTHER)
        async with server.repository(ADMIN) as remote:
            remote._name = "test"
            yield remote


async def test_the_owner_changes_to_a_user_that_exists_unless_a_backup_runs(repo: Repository) -> None:
    group = Group.parse("vm/100")
    await snapshots.write_snapshot(repo, group, 1000, {"vm.conf.blob": b"x"})
    async with repo.backup(group.at(2000)):
        with pytest.raises(LockedError):
            await repo.set_owner(group, OTHER)
    with pytest.raises(FleeceError):
        await repo.set_owner(group, "nobody@pbs")
    assert [info.owner for info in await repo.groups()] == [ADMIN]
    await repo.set_owner(group, OTHER)
    assert [info.owner for info in await repo.groups()] == [OTHER]
    with pytest.raises(OwnerError):  # it is not ours any more
        await snapshots.write_snapshot(repo, group, 3000, {"vm.conf.blob": b"x"})
    await repo.set_owner(group, ADMIN)
    await snapshots.write_snapshot(repo, group, 3000, {"vm.conf.blob": b"x"})
    with pytest.raises(SnapshotNotFoundError):
        await repo.set_owner(Group.parse("vm/101"), OTHER)
