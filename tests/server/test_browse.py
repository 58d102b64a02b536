"""Catalogs, files and folders of archives over REST, with rights, limits and broken archives."""

import base64
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import trio
import zstandard

from agent.file_archives import ChangeDetection, FileArchiveOptions, add_file_archives
from agent.specifications import parse_specifications
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.names import Group
from repository.backup import SnapshotWriter
from repository.local import LocalRepository
from server import browsing
from server.answers import Answer
from server.http1 import Request
from tests.support.direct_server import Direct, Given, Got, query_of

BASE = "/admin/datastore/main"
USER = "u@pbs"
MANY = 40
MODES: tuple[ChangeDetection, ...] = ("legacy", "metadata")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "docs/deep").mkdir(parents=True)
    (root / "docs/a.txt").write_bytes(b"first")
    (root / "docs/deep/b.txt").write_bytes(b"second" * 1000)
    (root / "docs/same").hardlink_to(root / "docs/a.txt")
    (root / "docs/link").symlink_to("a.txt")
    (root / b"docs/\xff".decode("utf-8", "surrogateescape")).write_bytes(b"")
    return root


async def store(
    local: LocalRepository, tree: Path, name: str, mode: ChangeDetection, codec: ChunkCodec | None = None
) -> dict[str, Any]:
    """Back the tree up; the parameters that name the snapshot."""
    group = Group.parse(f"host/{name}")
    async with local.backup(group.at(1000), owner=USER) as session:
        writer = SnapshotWriter(session, codec or ChunkCodec())
        wanted = parse_specifications([f"root.pxar:{tree}"])
        await add_file_archives(writer, local, wanted, FileArchiveOptions(mode))
        await writer.finish()
    return {"backup-type": "host", "backup-id": name, "backup-time": 1000}


def encoded(path: bytes | str) -> str:
    return base64.b64encode(path.encode() if isinstance(path, str) else path).decode()


async def listed(direct: Direct, which: dict[str, Any], path: bytes | str, **more: Any) -> Got:
    query = {**which, "filepath": encoded(path), **more}
    return await direct.call("GET", f"{BASE}/catalog", USER, query=query)


async def fetched(direct: Direct, which: dict[str, Any], path: bytes | str, **more: Any) -> Got:
    query = {**which, "filepath": encoded(path), **more}
    return await direct.call("GET", f"{BASE}/pxar-file-download", USER, query=query)


async def test_folders_files_and_archives_of_both_kinds(direct: Direct, local: LocalRepository, tree: Path) -> None:
    direct.right("/datastore/main", USER, "DatastoreBackup")
    legacy = await store(local, tree, "legacy", "legacy")
    split = await store(local, tree, "split", "metadata")
    (found,) = (await listed(direct, legacy, "/")).data
    assert found == {"filepath": encoded("/root.pxar.didx"), "text": "root.pxar.didx", "type": "d", "leaf": False}
    for got, before in (
        (await listed(direct, legacy, "/root.pxar.didx/docs"), b"root.pxar.didx/docs/"),
        (await listed(direct, split, "/docs", **{"archive-name": "root.mpxar.didx"}), b"/docs/"),
        (await listed(direct, legacy, "docs/", **{"archive-name": "root.pxar.didx"}), b"/docs/"),
    ):
        entries = {base64.b64decode(one.pop("filepath")): one for one in got.data}
        assert entries[before + b"a.txt"]["size"] == 5
        assert entries[before + b"a.txt"]["mtime"] == int((tree / "docs/a.txt").stat().st_mtime)
        assert entries[before + b"deep"] == {"text": "deep", "type": "d", "leaf": False}
        assert entries[before + b"link"] == {"text": "link", "type": "l", "leaf": True}
        assert entries[before + b"same"] == {"text": "same", "type": "h", "leaf": True}
        assert entries[before + b"\xff"]["text"] == "�"
    for which, name in ((legacy, "root.pxar.didx"), (split, "root.mpxar.didx")):
        got = await fetched(direct, which, f"/{name}/docs/deep/b.txt")
        assert (got.status, got.content_type, got.body) == (200, "application/octet-stream", b"second" * 1000)
        assert (await fetched(direct, which, "docs/same", **{"archive-name": name})).body == b"first"
        with zipfile.ZipFile(io.BytesIO((await fetched(direct, which, f"{name}/docs")).body)) as packed:
            assert packed.read("docs/deep/b.txt") == b"second" * 1000
            assert "docs/link" in packed.namelist()
        raw = (await fetched(direct, which, f"{name}/docs", tar=True)).body
        with tarfile.open(fileobj=io.BytesIO(zstandard.ZstdDecompressor().decompressobj().decompress(raw))) as archive:
            assert archive.getmember("docs/same").linkname == "docs/a.txt"
        # The whole archive has no name of its own.
        with zipfile.ZipFile(io.BytesIO((await fetched(direct, which, name)).body)) as packed:
            assert "docs/a.txt" in packed.namelist()


async def test_what_is_not_there_or_cannot_be_shown_is_refused(
    direct: Direct, local: LocalRepository, tree: Path, no_delays: None
) -> None:
    direct.right("/datastore/main", USER, "DatastoreBackup")
    which = await store(local, tree, "legacy", "legacy")
    key = CryptKey.from_raw(bytes(range(32)))
    sealed = await store(local, tree, "sealed", "legacy", ChunkCodec(key, CryptMode.ENCRYPT))
    for path in ("/root.pxar.didx/../x", "/..", b"/root.pxar.didx/a\0b"):
        for got in (await listed(direct, which, path), await fetched(direct, which, path)):
            assert (got.status, got.text) == (400, "the path leads out of the archive"), path
    for name in ("../x.pxar.didx", "a/b.pxar.didx", ".pxar.didx"):
        assert (await listed(direct, which, "/", **{"archive-name": name})).status == 400
    for name in ("index.json.blob", "disk.img.fidx", "catalog.pcat1.didx"):
        got = await fetched(direct, which, f"/{name}/x")
        assert (got.status, got.text) == (400, f"'{name}' is no file archive")
    for got in (await listed(direct, sealed, "/"), await fetched(direct, sealed, "/root.pxar.didx/docs/a.txt")):
        assert got.status == 400
        assert got.text.endswith("- is encrypted")
    assert (await fetched(direct, which, "/root.pxar.didx/docs/link")).text == "cannot download file of type Symlink"
    assert (await fetched(direct, {**which, "backup-time": 5}, "/root.pxar.didx/docs")).status == 400
    # Neither a right on nothing nor one on own groups is enough for somebody else's.
    for role, status in (("DatastoreBackup", 400), ("DatastoreAudit", 403)):
        direct.right("/datastore/main", f"{role.lower()}@pbs", role)
        query = {**which, "filepath": encoded("/root.pxar.didx/docs/a.txt")}
        for call in ("catalog", "pxar-file-download"):
            got = await direct.call("GET", f"{BASE}/{call}", f"{role.lower()}@pbs", query=query)
            assert got.status == status, (role, call)


async def test_a_folder_with_too_many_entries_is_refused(
    direct: Direct, local: LocalRepository, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct.right("/datastore/main", USER, "DatastoreBackup")
    monkeypatch.setattr(browsing.Budget.__init__, "__defaults__", (200,))
    for mode in MODES:
        which = await store(local, tree, mode, mode)
        name = "root.pxar.didx" if mode == "legacy" else "root.mpxar.didx"
        got = await listed(direct, which, "/docs", **{"archive-name": name})
        assert (got.status, got.text) == (400, "the directory has more entries than one answer can hold")


async def test_damaged_data_end_the_answer_and_nothing_else(
    direct: Direct, local: LocalRepository, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    direct.right("/datastore/main", USER, "DatastoreBackup")
    (tree / "big").write_bytes(bytes(range(256)) * (64 << 10))
    which = await store(local, tree, "split", "metadata")
    path = next((local.store.base / "host/split").rglob("*.ppxar.didx"))
    for entry in range(4096, path.stat().st_size, 40):
        digest = path.read_bytes()[entry + 8 : entry + 40].hex()
        chunk = local.store.base / ".chunks" / digest[:4] / digest
        chunk.write_bytes(chunk.read_bytes()[:-1])
    query = {**which, "filepath": encoded("/root.mpxar.didx/big")}
    request = Request("GET", f"/api2/json{BASE}/pxar-file-download?{query_of(query)}", direct.ticket(USER), "192.0.2.1")
    answer = await direct.application.handle(request, Given(b""))
    assert isinstance(answer, Answer)
    assert answer.stream is not None
    with pytest.raises(trio.BrokenResourceError):
        async for _ in answer.stream:
            pass
    assert "could not be sent to its end" in caplog.text
    assert (await listed(direct, which, "/docs", **{"archive-name": "root.mpxar.didx"})).status == 200


async def test_who_stops_reading_frees_the_snapshot(direct: Direct, local: LocalRepository, tree: Path) -> None:
    direct.right("/datastore/main", USER, "DatastoreBackup")
    (tree / "big").write_bytes(bytes(range(256)) * (64 << 10))
    which = await store(local, tree, "split", "metadata")
    query = {**which, "filepath": encoded("/root.mpxar.didx/big")}
    request = Request("GET", f"/api2/json{BASE}/pxar-file-download?{query_of(query)}", direct.ticket(USER), "192.0.2.1")
    answers = [await direct.application.handle(request, Given(b"")) for _ in range(MANY)]
    # Answers that nobody begins to read hold nothing.
    await local.set_protected(Group.parse("host/split").at(1000), protected=False)
    answer = answers[0]
    assert isinstance(answer, Answer)
    assert answer.stream is not None
    await anext(answer.stream)
    assert direct.state.walks.borrowed_tokens == 1
    await answer.stream.aclose()
    with trio.fail_after(60):
        while direct.state.walks.borrowed_tokens:  # noqa: ASYNC110 - until its thread has noticed
            await trio.sleep(0.01)
    await local.forget(Group.parse("host/split").at(1000))
