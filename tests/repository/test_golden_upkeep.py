"""Prune and small changes on a datastore that a real PBS wrote."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from datastore.codec import ChunkCodec
from datastore.manifest import Manifest
from datastore.names import MANIFEST_NAME, Namespace
from datastore.prune import KeepOptions, Mark
from repository.local import LocalRepository, open_local
from repository.verify import VerifyOptions, verify
from tests.support.golden_store import unpack_golden_store


@pytest.fixture
async def repo(golden: Path, store_folder: Path) -> AsyncIterator[LocalRepository]:
    unpack_golden_store(golden, store_folder)
    local = await open_local(store_folder)
    yield local
    local.close()


async def test_notes_change_nothing_else_of_a_manifest_of_pbs(repo: LocalRepository) -> None:
    for info in await repo.snapshots():
        before = Manifest.parse(repo.store.read_manifest(info.snapshot), where="x")
        await repo.set_notes(info.snapshot, "from Fleece")
        after = Manifest.parse(repo.store.read_manifest(info.snapshot), where="x")
        assert after.unprotected == {**before.unprotected, "notes": "from Fleece"}
        assert (after.canonical(), after.signature) == (before.canonical(), before.signature)


async def test_pruned_to_one_of_each_group_what_is_left_is_whole(repo: LocalRepository) -> None:
    groups = [info.group for ns in await repo.namespaces() for info in await repo.groups(ns)]
    for group in groups:
        infos = await repo.snapshots(group.ns, group, unfinished=True)
        result = await repo.prune(group, KeepOptions(last=1))
        assert not result.failed
        protected = {info.snapshot for info in infos if info.protected}
        assert {one.snapshot for one in result.decisions if one.mark is Mark.PROTECTED} == protected
        left = {info.snapshot for info in await repo.snapshots(group.ns, group)}
        assert left == {one.snapshot for one in result.decisions if one.keep}
        assert len(left - protected) == 1
    snapshots = [info.snapshot for ns in await repo.namespaces() for info in await repo.snapshots(ns)]
    results = await verify(repo, snapshots, ChunkCodec(), options=VerifyOptions(record=False))
    assert {one.state for one in results} == {"ok"}


async def test_a_namespace_of_pbs_moves_with_its_owners_and_notes(repo: LocalRepository) -> None:
    before = await repo.groups(Namespace.parse("a/b"))
    done = await repo.move_namespace(Namespace.parse("a"), Namespace.parse("z"))
    assert not done.failed
    after = await repo.groups(Namespace.parse("z/b"))
    assert [(one.owner, one.comment, one.count) for one in after] == [
        (one.owner, one.comment, one.count) for one in before
    ]
    for info in await repo.snapshots(Namespace.parse("z/b")):
        async with repo.reader(info.snapshot) as reader:
            for file in info.files:
                if file.filename.endswith(".fidx"):
                    await reader.open_index(file.filename)
                elif file.filename != MANIFEST_NAME and file.filename.endswith(".blob"):
                    await reader.read_blob(file.filename)
