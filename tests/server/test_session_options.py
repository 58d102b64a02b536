"""What a client or the server may want of a backup session besides the backup."""

import hashlib
from pathlib import Path

import pytest
import trio

from datastore.blob import Blob, BlobKind
from datastore.names import Group, Snapshot
from datastore.s3.counters import Counters, Method, Totals
from datastore.session import LocalBackupSession
from repository.local import LocalRepository
from server.application import Application
from server.state import ServerState
from tests.support.direct_server import Direct, Session
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_stores import s3_store
from tests.support.snapshots import CODEC, write_snapshot
from tests.support.wire_server import Stores

USER = "u@pbs"
DATA = b"a chunk of some bytes"
DIGEST = hashlib.sha256(DATA).digest()
GROUP = Group.parse("host/web")


async def back_up(direct: Direct, ctime: int, **more: object) -> Snapshot:
    """One archive of one chunk, as a client sends it."""
    query = {"store": "main", "backup-type": "host", "backup-id": "web", "backup-time": ctime, **more}
    async with direct.session("backup", USER, query) as session:
        assert (await session.call("POST", "/dynamic_index", {"archive-name": "a.pxar.didx"})).data == 1
        blob = bytes(Blob.make(BlobKind.PLAIN, DATA))
        sizes = {"size": len(DATA), "encoded-size": len(blob)}
        await ok(session, "POST", "/dynamic_chunk", {"wid": 1, "digest": DIGEST.hex(), **sizes}, blob)
        await ok(session, "PUT", "/dynamic_index", {"wid": 1, "digest-list": DIGEST.hex(), "offset-list": 0})
        csum = hashlib.sha256(len(DATA).to_bytes(8, "little") + DIGEST).hexdigest()
        await ok(session, "POST", "/dynamic_close", {"wid": 1, "chunk-count": 1, "size": len(DATA), "csum": csum})
        from datastore.crypt_mode import CryptMode
        from datastore.manifest import Manifest, ManifestFile

        manifest = Manifest.new(GROUP.at(ctime))
        manifest.add(ManifestFile("a.pxar.didx", CryptMode.NONE, len(DATA), bytes.fromhex(csum)))
        raw = bytes(manifest.encode(CODEC))
        await ok(session, "POST", "/blob", {"file-name": "index.json.blob", "encoded-size": len(raw)}, raw)
        await ok(session, "POST", "/finish", {})
    return GROUP.at(ctime)


async def ok(session: Session, method: str, path: str, query: dict[str, object], body: bytes = b"") -> None:
    got = await session.call(method, path, query, body=body)
    assert got.status == 200, got.text


@pytest.mark.parametrize("no_cache", [False, True])
async def test_chunks_stay_out_of_the_cache_of_a_bucket_if_the_client_wants(
    no_cache: bool, store_folder: Path, tmp_path: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repository = LocalRepository(store, "main")
        state = ServerState(tmp_path / "server", Stores({"main": repository}))
        async with state.running():
            direct = Direct(state, Application(state))
            direct.right("/datastore/main", USER, "DatastoreBackup")
            snapshot = await back_up(direct, 1000, **{"no-cache": no_cache})
            cached = store_folder / ".chunks" / DIGEST.hex()[:4] / DIGEST.hex()
            # Without its content a file of no bytes stands for the chunk.
            assert (cached.stat().st_size > 0) is not no_cache
            async with repository.reader(snapshot) as reader:
                assert bytes((await reader.read_chunk(DIGEST)).payload) == DATA


class Words:
    """Counts as they are."""

    def line(self, totals: Totals) -> str:
        counts = ", ".join(f"{count} {method.value}" for method, count in sorted(totals.requests.items(), key=str))
        return f"the bucket was asked: {counts}"

    def crossing(self, name: str, value: int) -> str:
        return f"too much of {name}: {value}"


async def test_the_log_of_a_task_says_what_it_has_asked_of_a_bucket(
    store_folder: Path, tmp_path: Path, s3_emulator: S3Emulator
) -> None:
    """Its own part: the owner and the manifest too, which are stored before and after the client's requests."""
    counters = Counters({"s3-put": 3}, words=Words())
    async with s3_store(store_folder, s3_emulator.endpoint(), counters=counters) as store:
        state = ServerState(tmp_path / "server", Stores({"main": LocalRepository(store, "main")}))
        async with state.running():
            direct = Direct(state, Application(state))
            direct.right("/datastore/main", USER, "DatastoreBackup")
            state.verify_new = frozenset({"main"})
            logs = []
            for ctime in (1000, 2000):
                await back_up(direct, ctime)
                await idle(direct)
                kinds = {info.upid.kind: info for info in state.tasks.infos()[:2]}
                lines = {kind: state.tasks.files.log_lines(str(info.upid))[0] for kind, info in kinds.items()}
                logs.append({kind: [line.split(": ", 1)[1] for line in found] for kind, found in lines.items()})
                assert {kind: info.status for kind, info in kinds.items()} == {
                    "backup": "WARNINGS: 1" if ctime == 1000 else "OK", "verify_snapshot": "OK",
                }  # fmt: skip
    first, second = logs
    # Owner, chunk, index, blob or not, manifest; and nothing of the first is in the second.
    assert "the bucket was asked: 4 put" in first["backup"]
    assert "WARN: too much of s3-put: 4" in first["backup"]
    assert "the bucket was asked: 2 put" in second["backup"]
    # The chunk, and the manifest with the result; in the log of its own task.
    assert [line for line in second["verify_snapshot"] if line.startswith("the bucket")] == [
        "the bucket was asked: 1 get, 1 put"
    ]
    assert counters.totals().requests[Method.PUT] == 4 + 2 + 2


async def test_what_was_backed_up_is_verified_if_the_store_wants(direct: Direct, local: LocalRepository) -> None:
    direct.right("/datastore/main", USER, "DatastoreBackup")
    await back_up(direct, 1000)
    assert [info.upid.kind for info in direct.state.tasks.infos()] == ["backup"]
    direct.state.verify_new = frozenset({"main"})
    snapshot = await back_up(direct, 2000)
    await idle(direct)
    newest = direct.state.tasks.infos()[0]
    assert (newest.upid.kind, newest.upid.id, newest.status) == ("verify_snapshot", "main:/host/web/000007D0", "OK")
    verification = (await local.snapshot(snapshot)).verification
    assert verification == {"upid": str(newest.upid), "state": "ok"}
    assert (await local.snapshot(GROUP.at(1000))).verification is None
    # A chunk that was damaged before: the backup is whole, as far as its client can tell.
    path = local.store.base / ".chunks" / DIGEST.hex()[:4] / DIGEST.hex()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    await back_up(direct, 3000)
    await idle(direct)
    assert str(direct.state.tasks.infos()[0].status).startswith("verification failed")


async def idle(direct: Direct) -> None:
    """Wait for the end of all tasks."""
    with trio.fail_after(60):
        while direct.state.tasks.busy:  # noqa: ASYNC110 - it lasts some milliseconds
            await trio.sleep(0.01)


async def test_backups_without_an_owner_do_not_become_those_of_the_next_client(
    direct: Direct, local: LocalRepository
) -> None:
    direct.right("/datastore/main", USER, "DatastoreBackup")
    await write_snapshot(local, "host/web", 1000, {"a.conf.blob": b"secret"})
    owner = local.store.base / "host/web/owner"
    owner.unlink()
    query = {"store": "main", "backup-type": "host", "backup-id": "web", "backup-time": 2000}
    got = await direct.refusal("backup", USER, query)
    assert (got.status, got.text) == (400, f"backup owner check failed ({USER} != nobody)")
    assert not owner.exists()
    # What a server leaves that is killed right after it has made the folder.
    (local.store.base / "host/new").mkdir()
    assert (await direct.refusal("backup", USER, {**query, "backup-id": "new"})).status == 101


async def test_an_error_that_nobody_foresaw_is_no_finished_backup(
    direct: Direct, local: LocalRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, int] = {}

    async def finish(session: LocalBackupSession) -> None:
        raise RuntimeError("nobody foresaw this")

    async def noted(session: Session, method: str, path: str, query: dict[str, object], body: bytes = b"") -> None:
        answers[path] = (await session.call(method, path, query, body=body)).status

    direct.right("/datastore/main", USER, "DatastoreBackup")
    monkeypatch.setattr(LocalBackupSession, "finish", finish)
    monkeypatch.setitem(globals(), "ok", noted)
    with pytest.raises(RuntimeError, match="nobody foresaw this"):
        await back_up(direct, 1000)
    assert (answers["/blob"], answers["/finish"]) == (200, 400)
    assert await local.groups() == []


@pytest.mark.parametrize("mended", [False, True])
async def test_an_image_that_changed_its_size_within_its_last_chunk_needs_that_chunk_anew(
    direct: Direct, local: LocalRepository, mended: bool
) -> None:
    direct.right("/datastore/main", USER, "DatastoreBackup")
    await write_snapshot(local, "host/web", 1000, {"d.img.fidx": DATA}, chunk_size=4 << 20)
    await local.set_owner(GROUP, USER)
    query = {"store": "main", "backup-type": "host", "backup-id": "web", "backup-time": 2000}
    longer = DATA * 2
    digests = {data: hashlib.sha256(data).hexdigest() for data in (DATA, longer)}
    csums = {data: hashlib.sha256(bytes.fromhex(digest)).hexdigest() for data, digest in digests.items()}
    async with direct.session("backup", USER, query) as session:
        opening = {"archive-name": "d.img.fidx", "size": len(longer), "reuse-csum": csums[DATA]}
        await ok(session, "POST", "/fixed_index", opening)
        if mended:
            blob = bytes(Blob.make(BlobKind.PLAIN, longer))
            chunk = {"wid": 1, "digest": digests[longer], "size": len(longer), "encoded-size": len(blob)}
            await ok(session, "POST", "/fixed_chunk", chunk, blob)
            await ok(session, "PUT", "/fixed_index", {"wid": 1, "digest-list": digests[longer], "offset-list": 0})
        csum = csums[longer if mended else DATA]
        closing = {"wid": 1, "chunk-count": int(mended), "size": len(longer), "csum": csum}
        got = await session.call("POST", "/fixed_close", closing)
    why = f"the last chunk is still that of an image of {len(DATA)} bytes"
    assert (got.status, why in got.text) == ((200, False) if mended else (400, True))
