"""Lists, changes and tasks of a server."""

import pytest
import trio

from core.errors import UsageError
from core.progress import Progress
from datastore.errors import LockedError, ProtectedError, SnapshotNotFoundError
from datastore.names import Group, Namespace
from datastore.prune import KeepOptions
from repository.remote.errors import RemoteRefusedError
from repository.remote.upkeep import _VerifyLog
from repository.verify import VerifyOptions
from tests.support.pbs_double import PbsDouble
from tests.support.remote import remote
from tests.support.snapshots import CODEC, write_snapshot

GROUP = Group.parse("vm/100")
FILES = {"vm.conf.blob": b"x"}


async def test_small_changes_and_their_refusals() -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        first = await write_snapshot(repo, GROUP, 1000, FILES)
        assert await repo.set_protected(first, protected=True)
        assert not await repo.set_protected(first, protected=True)
        with pytest.raises(ProtectedError, match="it is protected"):
            await repo.forget(first)
        assert await repo.set_protected(first, protected=False)
        await repo.set_notes(first, "one\ntwo" + "x" * 4000)  # too long for a URL
        assert (await repo.snapshot(first)).comment.startswith("one\ntwoxxx")
        assert (await repo.snapshots())[0].comment == "one"
        async with repo.reader(first):
            with pytest.raises(LockedError):
                await repo.forget(first)
        missing = GROUP.at(5)
        for change in (
            lambda: repo.forget(missing),
            lambda: repo.set_notes(missing, "x"),
            lambda: repo.set_protected(missing, protected=True),
            lambda: repo.snapshot(missing),
            lambda: repo.groups(Namespace.parse("nowhere")),
            lambda: repo.namespaces(Namespace.parse("nowhere")),
            lambda: repo.move_namespace(Namespace.parse("nowhere"), Namespace.parse("b")),
        ):
            with pytest.raises(SnapshotNotFoundError):
                await change()
        await repo.forget(first)
        assert await repo.snapshots() == []


async def test_long_notes_of_many_groups_are_asked_for_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        {"backup-type": "vm", "backup-id": str(number), "last-backup": 1000, "backup-count": 1, "files": [],
         "comment": "short" if number == 105 else f"{number}\n"}
        for number in range(100, 112)
    ]  # fmt: skip
    asked, together = 0, trio.Event()

    async def call(method: str, path: str, parameters: dict[str, str], what: str, where: str) -> object:
        nonlocal asked
        if path == "/groups":
            return entries
        assert (method, path) == ("GET", "/group-notes")
        asked += 1
        if asked == 4:
            together.set()
        with trio.fail_after(60):
            await together.wait()  # never, if one is asked for after the other
        return f"{parameters['backup-id']}\nmore"

    async with remote(PbsDouble()) as repo:
        monkeypatch.setattr(repo, "_call", call)
        found = {info.group.id: info.comment for info in await repo.groups()}
    assert found == {str(number): "short" if number == 105 else f"{number}\nmore" for number in range(100, 112)}
    assert asked == 11


async def test_backups_that_a_server_refuses_say_why_in_our_words() -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        await write_snapshot(repo, GROUP, 1000, FILES)
        with pytest.raises(UsageError, match="not after that of the newest snapshot"):
            await write_snapshot(repo, GROUP, 1000, FILES)
        async with repo.backup(GROUP.at(2000)):
            with pytest.raises(LockedError):
                await write_snapshot(repo, GROUP, 3000, FILES)
        with pytest.raises(UsageError, match="servers use 4 MiB"):
            async with repo.backup(GROUP.at(2000)) as session:
                await session.open_index("a.img.fidx", size=5, chunk_size=65536)
        with pytest.raises(SnapshotNotFoundError, match="no such snapshot"):
            async with repo.reader(GROUP.at(7)):
                pass


async def test_namespaces_are_made_level_by_level() -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        assert await repo.create_namespace(Namespace.parse("a/b"))
        assert not await repo.create_namespace(Namespace.parse("a"))
        assert [str(ns) for ns in await repo.namespaces()] == ["", "a", "a/b"]
        assert [str(ns) for ns in await repo.namespaces(depth=1)] == ["", "a"]
        await write_snapshot(repo, Group.parse("vm/1", Namespace.parse("a/b")), 1000, FILES)
        assert [str(info.group) for info in await repo.groups(Namespace.parse("a/b"))] == ["vm/1"]
        assert await repo.groups() == []


async def test_prune_and_verify_are_the_servers(autojump_clock: trio.testing.MockClock) -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        first, second = [await write_snapshot(repo, GROUP, ctime, FILES) for ctime in (1000, 2000)]
        progress = Progress()
        results = await repo.verify_there(Namespace(), VerifyOptions(), progress)
        assert [(one.snapshot, one.state) for one in results] == [(second, "ok"), (first, "ok")]
        double.folders["", "vm", "100", 2000].failed = True
        (result,) = await repo.verify_there(second, VerifyOptions(), progress)
        assert result.errors[0] == "chunk aa was not loaded: verify failed"
        skipped = await repo.verify_there(GROUP, VerifyOptions(ignore_verified=True), progress)
        assert [bool(one.skipped) for one in skipped] == [False, True]
        planned = await repo.prune(GROUP, KeepOptions(last=1), dry_run=True)
        assert [decision.keep for decision in planned.decisions] == [False, True]
        done = await repo.prune(GROUP, KeepOptions(last=1))
        assert done.decisions == planned.decisions
        assert done.removed == {first}
        assert (await repo.usage()).available == 600
        assert (await repo.collect_garbage()).status.disk_chunks == 7
        with pytest.raises(UsageError):
            await repo.collect_garbage(dry_run=True)


def test_of_the_log_of_a_verification_little_is_kept_however_long_it_is() -> None:
    name = "vm/100/1970-01-01T00:16:40Z"
    log = _VerifyLog({name})
    for number in range(2000):
        log.line(f"verify store:host/h{number}/1970-01-01T00:16:40Z")  # nobody asked for these
        log.line("chunk cc was not loaded: verify failed")
    log.line(f"verify store:{name}")
    for _ in range(2000):
        log.line("chunk aa was not loaded: verify failed")
    log.line("percentage done: 100%")
    assert log.errors == {name: ["chunk aa was not loaded: verify failed"] * 20}


async def test_a_task_that_we_give_up_is_stopped(autojump_clock: trio.testing.MockClock) -> None:
    double = PbsDouble()
    double.keep_running = True
    async with remote(double) as repo:
        with trio.move_on_after(30) as scope:
            await repo.collect_garbage()
        assert scope.cancelled_caught
        assert double.running == set()
        assert "received abort request" in next(iter(double.tasks.values()))


async def test_the_log_is_stored_once_beside_a_snapshot() -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
        blob = CODEC.encode_blob(b"it went well")
        await repo.upload_log(snapshot, blob)
        assert double.folders["", "vm", "100", 1000].files["client.log.blob"] == bytes(blob)
        with pytest.raises(RemoteRefusedError, match="already contains a log"):
            await repo.upload_log(snapshot, blob)
