"""Push to Fleece's own server and pull back from it, over TLS."""

from pathlib import Path

from datastore.names import CLIENT_LOG_NAME, Group, Namespace
from tests.repository.sync.conftest import Pair
from tests.support.snapshots import CODEC, read_image, write_snapshot
from tests.support.syncs import SERVER_CHUNK, Said, pull, push, times, write
from tests.support.wire_server import wire_server

GROUP = Group.parse("vm/100")
IMAGE = bytes([1]) * SERVER_CHUNK + bytes([2]) * SERVER_CHUNK + b"tail"
TOKEN = "sync@pbs!host1"


async def test_there_and_back_and_what_vanished(pair: Pair, store_folder: Path, tmp_path: Path) -> None:
    first = await write_snapshot(pair.source, GROUP, 1000, {"d.img.fidx": IMAGE}, chunk_size=SERVER_CHUNK)
    await pair.source.upload_log(first, CODEC.encode_blob(b"log"))
    await pair.source.set_notes(first, "a\nb")
    await write_snapshot(pair.source, GROUP, 2000, {"d.img.fidx": IMAGE}, chunk_size=SERVER_CHUNK)
    await write(pair.source, Group.parse("host/x", Namespace.parse("a/b")), 1000)
    for name in ("vm/2", "vm/3"):
        await write(pair.source, name, 1000)
    async with wire_server(tmp_path / "server", {"main": pair.target}) as server:
        server.right("/datastore/main", "sync@pbs", "DatastoreAdmin")
        server.right("/datastore/main", TOKEN, "DatastoreAdmin")
        async with server.repository(TOKEN) as far:
            report = await push(pair.source, far, parallel=2)
            assert report.failed == {}
            assert [one.chunks_sent for one in report.snapshots if one.snapshot.group.id == "100"] == [3, 0]
            assert {info.owner for info in await pair.target.groups()} == {TOKEN}
            (info, _) = await pair.target.snapshots(group=GROUP)
            assert info.comment == "a\nb"
            assert CLIENT_LOG_NAME in [file.filename for file in info.files]
            assert await read_image(pair.target, GROUP.at(2000), "d.img.fidx") == IMAGE
            assert (await push(pair.source, far)).snapshots == []

            # Removal, with a protected snapshot.
            await pair.target.set_protected(Group.parse("vm/3").at(1000), protected=True)
            await pair.source.delete_namespace(Namespace.parse("a"), groups=True)
            for name in ("vm/2", "vm/3"):
                await pair.source.forget_group(Group.parse(name))
            await pair.source.forget(first)
            said = Said()
            report = await push(pair.source, far, said, remove_vanished=True)
            assert report.failed == {}
            assert (report.removed_snapshots, len(report.protected)) == (3, 1)
            assert await times(pair.target, GROUP) == [2000]
            assert await times(pair.target, "vm/3") == [1000]
            assert await pair.target.namespaces() == [Namespace()]

            # And back, into a namespace of another name.
            back = Namespace.parse("back")
            report = await pull(far, pair.source, target_ns=back)
            assert report.failed == {}
            assert await read_image(pair.source, Group(GROUP.type, GROUP.id, back).at(2000), "d.img.fidx") == IMAGE


async def test_a_user_that_may_only_add_pushes_but_removes_nothing(
    pair: Pair, store_folder: Path, tmp_path: Path
) -> None:
    await write(pair.source, "vm/1", 1000, 2000)
    async with wire_server(tmp_path / "server", {"main": pair.target}) as server:
        server.right("/datastore/main", "add@pbs", "DatastoreBackup")
        async with server.repository("add@pbs") as far:
            assert (await push(pair.source, far)).failed == {}
            await pair.source.forget(Group.parse("vm/1").at(1000))
            await write(pair.source, "vm/2", 1000)
            said = Said()
            await push(pair.source, far, said, remove_vanished=True)
            assert await times(pair.target, "vm/1") == [1000, 2000]
            assert any("vanished snapshot vm/1/1970-01-01T00:16:40Z stays" in one for one in said.warnings)
