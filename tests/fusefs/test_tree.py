import logging
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from core.errors import FormatError
from datastore.codec import ChunkCodec, CryptKey
from datastore.errors import SnapshotNotFoundError
from datastore.names import ROOT, Namespace, Snapshot
from fusefs import nodes, opened, tree
from fusefs.errors import StaleError
from fusefs.nodes import File, Folder, Link, Node, Shared
from fusefs.opened import data_blocks, open_snapshot
from fusefs.pool import SnapshotPool
from fusefs.tree import NamespaceFolder
from repository.archive import open_cache
from repository.interface import FileInfo
from repository.local import LocalRepository, open_local
from tests.fusefs.mounts import CHUNK, CONF, FIRST, IMAGE, IMAGE_BLOCKS, KEY, SECOND, put, random_bytes, write
from tests.support.waiting import until

TIMES = ["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]


@asynccontextmanager
async def tree_of(store: Path, *, ns: Namespace = ROOT, key: CryptKey | None = None) -> AsyncIterator[NamespaceFolder]:
    repo = await open_local(store)
    async with open_cache(32 << 20) as cache, trio.open_nursery() as nursery:
        pool = SnapshotPool(lambda snapshot: open_snapshot(repo, key, snapshot, cache), repo.snapshot, nursery)
        yield NamespaceFolder(Shared(repo, key, pool, 0), b"", ns)
        nursery.cancel_scope.cancel()
    repo.close()


async def at(root: Folder, path: str) -> Node:
    node: Node = root
    for name in path.split("/"):
        assert isinstance(node, Folder)
        node = (await node.children())[name.encode()]
    return node


async def names(root: Folder, path: str = "") -> list[str]:
    folder = await at(root, path) if path else root
    assert isinstance(folder, Folder)
    return [name.decode() for name in await folder.children()]


async def test_the_tree_has_namespaces_types_groups_times_and_latest(shared_store: Path) -> None:
    async with tree_of(shared_store) as root:
        assert await names(root) == ["host", "vm", "ns"]
        assert await names(root, "vm") == ["100"]
        assert await names(root, "vm/100") == [*TIMES, "latest"]
        assert await names(root, "ns") == ["a"]
        assert await names(root, "ns/a") == ["ns"]
        assert await names(root, "ns/a/ns/b/vm/100") == [TIMES[0], "latest"]


async def test_a_namespace_can_be_the_root(shared_store: Path) -> None:
    async with tree_of(shared_store, ns=Namespace(("a",))) as root:
        assert await names(root) == ["ns"]
        assert await names(root, "ns/b/vm") == ["100"]


async def test_a_snapshot_shows_images_archives_and_small_files_but_not_the_manifest(shared_store: Path) -> None:
    async with tree_of(shared_store) as root:
        assert await names(root, f"vm/100/{TIMES[1]}") == ["drive-scsi0.img", "qemu-server.conf", "root.pxar"]


async def test_latest_leads_to_the_newest_finished_snapshot(store: Path) -> None:
    (store / "vm/100/2026-01-09T00:00:00Z").mkdir()
    async with tree_of(store) as root:
        assert await names(root, "vm/100") == [*TIMES, "latest"]
        link = await at(root, "vm/100/latest")
        assert isinstance(link, Link)
        assert link.target.decode() == TIMES[1]
        assert link.mtime_ns == SECOND * 10**9


async def test_a_group_without_finished_snapshots_is_not_shown(store: Path) -> None:
    (store / "ct/7/2026-01-09T00:00:00Z").mkdir(parents=True)
    async with tree_of(store) as root:
        assert await names(root) == ["host", "vm", "ns"]


async def test_new_snapshots_show_up_when_the_listing_is_old(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "LISTING_TTL_S", 0.05)
    async with tree_of(store) as root:
        before = await at(root, f"vm/100/{TIMES[0]}")
        repo = root.shared.repo
        assert isinstance(repo, LocalRepository)
        await write(repo, "vm/100", SECOND + 86400, {"a.conf.blob": b"x"})
        await trio.sleep(0.06)
        assert await names(root, "vm/100") == [*TIMES, "2026-01-03T00:00:00Z", "latest"]
        link = await at(root, "vm/100/latest")
        assert isinstance(link, Link)
        assert link.target == b"2026-01-03T00:00:00Z"
        assert await at(root, f"vm/100/{TIMES[0]}") is before


async def test_one_name_in_an_old_listing_is_asked_for_alone(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with tree_of(store) as root:
        group = await at(root, "vm/100")
        assert isinstance(group, Folder)
        repo = root.shared.repo
        assert isinstance(repo, LocalRepository)

        async def list_all(*args: object, **kwargs: object) -> None:
            raise AssertionError("the whole group was listed")

        monkeypatch.setattr(repo, "snapshots", list_all)
        (store / "vm/100/2026-01-09T00:00:00Z").mkdir()
        assert isinstance(await group.child(TIMES[0].encode()), tree.SnapshotFolder)
        link = await group.child(b"latest")
        assert isinstance(link, Link)
        assert link.target.decode() == TIMES[1]
        for name in (b"2026-01-09T00:00:00Z", b"2030-01-01T00:00:00Z", b"owner", b"..", b"\xff"):
            assert await group.child(name) is None


async def test_a_removed_snapshot_goes_from_the_listing_and_its_folder_is_stale(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "LISTING_TTL_S", 0.05)
    async with tree_of(store) as root:
        gone = await at(root, f"vm/100/{TIMES[1]}")
        assert isinstance(gone, Folder)
        await gone.children()
        await root.shared.repo.forget(Snapshot.parse(f"vm/100/{TIMES[1]}"))
        await trio.sleep(0.06)
        assert await names(root, "vm/100") == [TIMES[0], "latest"]
        with pytest.raises(SnapshotNotFoundError):
            await gone.children()


async def test_without_the_key_encrypted_archives_are_not_shown_and_one_line_says_so(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with tree_of(store) as root:
        repo = root.shared.repo
        assert isinstance(repo, LocalRepository)
        await write(repo, "host/web", SECOND, {"data.img.fidx": IMAGE}, key=KEY)
        with caplog.at_level(logging.WARNING):
            assert await names(root, f"host/web/{TIMES[0]}") == []
            assert await names(root, f"host/web/{TIMES[1]}") == []
        assert [record.getMessage() for record in caplog.records] == [
            f"encrypted archives are not shown, first of host/web/{TIMES[0]}: "
            f"missing is the key {KEY.fingerprint_text}; give it with --keyfile"
        ]


async def test_with_another_key_they_are_not_shown_either_and_plain_ones_are(
    shared_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with tree_of(shared_store, key=CryptKey.from_raw(bytes(32))) as root:
        with caplog.at_level(logging.WARNING):
            assert await names(root, f"host/web/{TIMES[0]}") == []
        assert "the given one is not the key" in caplog.text
        assert await names(root, f"vm/100/{TIMES[0]}") == ["drive-scsi0.img", "qemu-server.conf"]


async def test_with_the_key_encrypted_archives_have_their_plain_bytes_and_blocks(shared_store: Path) -> None:
    async with tree_of(shared_store, key=KEY) as root:
        assert await names(root, f"host/web/{TIMES[0]}") == ["data.img", "note.conf"]
        image, note = await at(root, f"host/web/{TIMES[0]}/data.img"), await at(root, f"host/web/{TIMES[0]}/note.conf")
        assert isinstance(image, File)
        assert isinstance(note, File)
        lease, content = await image.open()
        assert (content.size, content.blocks) == (len(IMAGE), IMAGE_BLOCKS)
        assert await content.read(CHUNK - 100, 200) == IMAGE[CHUNK - 100 : CHUNK + 100]
        lease.release()
        lease, content = await note.open()
        assert bytes(await content.read(0, 1 << 20)) == CONF
        lease.release()


async def test_a_listing_opens_no_snapshot_and_measuring_does(shared_store: Path) -> None:
    async with tree_of(shared_store) as root:
        image = await at(root, f"vm/100/{TIMES[0]}/drive-scsi0.img")
        assert isinstance(image, File)
        assert image.size == len(IMAGE)
        assert (image.exact, len(root.shared.pool)) == (False, 0)
        await image.measure()
        assert (image.exact, image.blocks, len(root.shared.pool)) == (True, IMAGE_BLOCKS, 1)


async def test_what_takes_much_memory_is_kept_only_while_it_is_used(
    shared_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "KEPT", 32 * 6 - 1)
    async with tree_of(shared_store) as root:
        image = await at(root, f"vm/100/{TIMES[0]}/drive-scsi0.img")
        conf = await at(root, f"vm/100/{TIMES[0]}/qemu-server.conf")
        assert isinstance(image, File)
        assert isinstance(conf, File)
        for file in (image, conf):
            (first, content), (second, same) = await file.open(), await file.open()
            assert content is same
            gone = weakref.ref(content)
            del content, same
            first.release()
            second.release()
            assert gone() is None


async def test_the_client_log_is_shown_though_the_manifest_does_not_list_it(store: Path) -> None:
    text = b"INFO: backup finished\n" * 20
    path = store / f"vm/100/{TIMES[0]}/client.log.blob"
    path.write_bytes(bytes(ChunkCodec().encode_blob(text)))
    async with tree_of(store) as root:
        log = await at(root, f"vm/100/{TIMES[0]}/client.log")
        assert isinstance(log, File)
        await log.measure()
        assert log.size == len(text)


async def test_a_snapshot_with_a_broken_manifest_is_an_error_and_its_neighbours_are_not(store: Path) -> None:
    path = store / f"vm/100/{TIMES[0]}/index.json.blob"
    path.write_bytes(path.read_bytes()[:-5])
    async with tree_of(store) as root:
        with pytest.raises(FormatError, match=TIMES[0]):
            await names(root, f"vm/100/{TIMES[0]}")
        assert await names(root, f"vm/100/{TIMES[1]}") == ["drive-scsi0.img", "qemu-server.conf", "root.pxar"]


async def test_inode_numbers_are_those_of_the_path_and_differ_between_mounts(shared_store: Path) -> None:
    async with tree_of(shared_store) as first, tree_of(shared_store) as second:
        again = NamespaceFolder(first.shared, b"", ROOT)
        path = f"vm/100/{TIMES[0]}/drive-scsi0.img"
        assert (await at(first, path)).inode == (await at(again, path)).inode
        assert (await at(first, path)).inode != (await at(second, path)).inode
        assert first.inode == 1


async def test_two_files_that_would_have_one_name_are_both_shown(store: Path) -> None:
    async with tree_of(store) as root:
        repo = root.shared.repo
        assert isinstance(repo, LocalRepository)
        await write(repo, "vm/7", FIRST, {"a.img.fidx": IMAGE[:100], "a.img.blob": b"x"})
        assert await names(root, f"vm/7/{TIMES[0]}") == ["a.img", "a.img.blob"]


async def test_blocks_count_the_chunks_that_are_not_zeros(store_folder: Path) -> None:
    repo = await open_local(store_folder)
    async with repo.backup(Snapshot.parse("vm/1/2026-01-01T00:00:00Z")) as session:
        codec = ChunkCodec()
        for name, data, blocks in [
            ("a.img.fidx", bytes(2 * CHUNK), 0),
            ("b.img.fidx", bytes(CHUNK) + b"x", 1),
            ("c.img.fidx", b"x" * (CHUNK + 513), (CHUNK + 1024) // 512),
        ]:
            await put(session, codec, name, data)
            index = await session_index(store_folder, session.snapshot, name)
            assert data_blocks(index, codec.zero_digest()) == blocks
            assert data_blocks(index, None) == -(-len(data) // 512)
    repo.close()


async def session_index(store: Path, snapshot: Snapshot, name: str):  # type: ignore[no-untyped-def]  # FixedIndex
    from datastore.fixed_index import FixedIndex

    return FixedIndex.open(store / snapshot.path / name)


async def test_names_that_shorten_to_the_same_show_every_file(store: Path) -> None:
    contents = {"x.img.blob.blob": b"1", "x.img.fidx": b"2" * 4096, "x.img.blob": b"3"}
    async with tree_of(store) as root:
        repo = root.shared.repo
        assert isinstance(repo, LocalRepository)
        await write(repo, "vm/7", FIRST, contents)
        folder = await at(root, f"vm/7/{TIMES[0]}")
        assert isinstance(folder, Folder)
        shown = {node.filename for node in (await folder.children()).values() if isinstance(node, File)}
        assert shown == set(contents)


async def test_a_size_beyond_what_the_kernel_knows_is_cut(store: Path) -> None:
    async with tree_of(store) as root:
        folder = await at(root, f"vm/100/{TIMES[0]}")
        assert isinstance(folder, tree.SnapshotFolder)
        file = File(folder, b"a", FileInfo("a.img.fidx", (1 << 64) - 1, None))
        assert file.size == (1 << 63) - 1


@pytest.mark.parametrize("size", [len(CONF), 4 * len(CONF)])
async def test_a_snapshot_made_anew_under_its_old_name_has_new_nodes(
    store: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(nodes, "LISTING_TTL_S", 0.0)
    monkeypatch.setattr("fusefs.pool.WATCH_S", 0.02)
    # Random data, as blobs of one length shall have one size.
    one, other = random_bytes(len(CONF), 1), random_bytes(size, 2)
    snapshot = Snapshot.parse(f"vm/8/{TIMES[0]}")
    async with tree_of(store) as root:
        root.shared.pool._idle_s = 0.0
        repo = root.shared.repo
        assert isinstance(repo, LocalRepository)
        await write(repo, "vm/8", FIRST, {"a.conf.blob": one, "b.conf.blob": one})
        old = await at(root, f"{snapshot}/a.conf")
        assert isinstance(old, File)
        lease, content = await old.open()
        assert bytes(await content.read(0, 1 << 20)) == one
        lease.release()
        await until(lambda: not len(root.shared.pool))
        await repo.forget(snapshot)
        await write(repo, "vm/8", FIRST, {"a.conf.blob": other, "b.conf.blob": one})
        with pytest.raises(StaleError, match="made anew"):
            await old.open()
        new = await at(root, f"{snapshot}/a.conf")
        assert isinstance(new, File)
        assert new.inode != old.inode
        lease, content = await new.open()
        assert bytes(await content.read(0, 1 << 20)) == other
        lease.release()
        # The old one stays what it was: removed.
        with pytest.raises(StaleError):
            await old.open()
        assert await at(root, f"{snapshot}/a.conf") is new


async def test_what_is_listed_from_its_parent_lives_no_longer_than_the_parent(
    store: Path,
) -> None:
    async with tree_of(store) as root:
        kinds, spaces = await at(root, "vm"), await at(root, "ns")
        assert isinstance(kinds, Folder)
        assert isinstance(spaces, Folder)
        await trio.sleep(0.01)
        await kinds.children()
        await spaces.children()
        assert kinds._fresh_until == spaces._fresh_until == root._fresh_until
