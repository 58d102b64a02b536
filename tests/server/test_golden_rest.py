"""What a test program asked the REST interface of a real PBS, asked of ours: status, labels, texts, shapes, values.

The requests build on each other, so they are one test; what differs is listed, with the reason.
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import trio

from agent.remote_hosts import RemoteRegistry
from agent.serving import RegisteredRemotes
from datastore.blob import Blob, BlobKind
from datastore.names import Group, Namespace
from repository.local import open_local
from server.application import Application
from tests.support.direct_server import Direct, Got
from tests.support.golden_rest import FIRST, OWNER, People, Replay, differences, fill
from tests.support.snapshots import write_snapshot
from tests.support.stores import StorePool
from tests.support.wire_server import WireServer, wire_server

JSON = "application/json;charset=UTF-8"
#: Texts with paths, calls and debug forms of PBS's own code, where ours says the same in its own words.
OWN_TEXTS = {"group notes put missing group", "pxar-file symlink", "log missing snapshot", "task log download"}
#: Asked about what is not there any more: a group that an aborted backup made does not stay.
NO_EMPTY_GROUP = "delete empty group"
#: Which tasks there are is another matter here; what is said of each is compared.
LISTS_OF_TASKS = {"tasks", "tasks store", "tasks errors", "tasks node name", "tasks other node", "tasks statusfilter"}
#: What other programs of theirs had left, and graphs, which we have not.
STRANGERS = ("ab", "foreign")
GRAPHS = {"subdir": "rrd"}
#: The snapshot came from a local session, which counts no uploads; PBS drops connections for a JSON body of this kind.
UPLOADS, ARRAY = "decoded manifest", "JSON array"
#: How tasks end here: those that failed there too.
FAILED = {"verify missing snapshot", "push missing remote store", "pull5"}


@pytest.fixture
async def server(store_pool: StorePool, tmp_path: Path) -> AsyncIterator[WireServer]:
    folders = [store_pool.lend(), store_pool.lend()]
    async with AsyncExitStack() as stack:
        source, target = [await open_local(folder, name=folder.name, lock_wait_s=0) for folder in folders]
        remotes = RegisteredRemotes(RemoteRegistry(tmp_path / "remotes.toml", tmp_path / "secrets"))
        stores = {"wirerest": source, "wire": source, "wiretgt": target}
        yield await stack.enter_async_context(wire_server(tmp_path / "server", stores, remotes))
        for repository in (source, target):
            repository.close()
    for folder in folders:
        store_pool.take_back(folder)


class Story:
    """What was done between the requests: sessions that stayed open, snapshots in namespaces."""

    def __init__(self, server: WireServer, direct: Direct, nursery: trio.Nursery, owner: Mapping[str, str]) -> None:
        self._server, self._direct, self._nursery = server, direct, nursery
        self._owner = owner  #: headers of who writes backups
        self._session: trio.Event | None = None

    async def before(self, entry: dict[str, Any], replay: Replay) -> None:
        """Bring things to where they were before a request."""
        what, repo = entry["what"], await self._server.state.stores.get("wirerest")
        match what:
            case "running task status":
                await self._nursery.start(self._hold, "ab")
                replay.upids[upid_in(entry)] = str(self._server.state.tasks.infos()[0].upid)
            case "in progress":
                await self._nursery.start(self._hold, "prog")
            case "backup task, sibling token":
                replay.upids[upid_in(entry)] = str(self._server.state.tasks.infos()[0].upid)
                assert self._session is not None
                self._session.set()
                await self._idle()
            case "aborted task status":
                await self._idle()
            case "remote create":
                replay.add_sync_user()
            case "prune ns" if "ns" in entry["request"]["json"] and entry["request"]["json"]["backup-id"] == "g1":
                await self._write("a/b")
            case "push to ns":
                await repo.create_namespace(Namespace.parse("a"))
                await self._write("a/b")

    async def _write(self, ns: str) -> None:
        repo = await self._server.state.stores.get("wirerest")
        await repo.create_namespace(Namespace.parse(ns))
        group = Group.parse("host/g1", Namespace.parse(ns))
        await write_snapshot(repo, group, FIRST, {"x.blob": b"x"})
        await repo.set_owner(group, OWNER)

    async def _hold(self, name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        query = {"store": "wirerest", "backup-type": "host", "backup-id": name, "backup-time": FIRST}
        over = self._session = trio.Event()
        async with self._direct.session("backup", self._owner, query) as session:
            blob = bytes(Blob.make(BlobKind.PLAIN, b"x"))
            got = await session.call("POST", "/blob", {"file-name": "x.blob", "encoded-size": len(blob)}, body=blob)
            assert got.status == 200
            task_status.started()
            await over.wait()

    async def _idle(self) -> None:
        with trio.fail_after(120):
            while self._server.state.tasks.busy:  # noqa: ASYNC110 - it lasts some milliseconds
                await trio.sleep(0.01)

    async def ended(self, got: Got) -> str:
        """How the task that an answer names has ended."""
        upid = got.data
        task = self._server.state.tasks.get(upid)
        if task is not None:
            with trio.fail_after(300):
                await task.over.wait()
        info = self._server.state.tasks.info(upid)
        assert info is not None
        return str(info.status)


def upid_in(entry: dict[str, Any]) -> str:
    """The UPID in the path of a request."""
    return next(part for part in map(unquote, entry["request"]["path"].split("/")) if part.startswith("UPID:"))


@pytest.mark.timeout(900)
async def test_replay(server: WireServer, golden: Path, tmp_path: Path, no_delays: None) -> None:
    entries = json.loads((golden / "wire/rest.json").read_text())
    repo = await server.state.stores.get("wirerest")
    await fill(repo, golden, tmp_path)
    direct = Direct(server.state, Application(server.state))
    people = People(server.state)
    replay = Replay(direct, people, server)
    faults = []
    async with trio.open_nursery() as nursery:
        story = Story(server, direct, nursery, people.headers({"user": OWNER}))
        for number, entry in enumerate(entries):
            what = entry["what"]
            await story.before(entry, replay)
            got = await replay.ask(entry)
            base = str(repo.store.base)
            faults += [f"{number} {what}: {one}" for one in compare(got, entry, base)]
            data = json.loads(got.body).get("data") if got.status == 200 and got.content_type == JSON else None
            if isinstance(data, str) and data.startswith("UPID:"):
                replay.upids[entry["response"]["data"]] = data
                status = await story.ended(got)
                if (what in FAILED) == (status == "OK" or status.startswith("WARNINGS: ")):
                    faults.append(f"{number} {what}: the task ended with {status}")
    assert len(entries) > 300
    assert not faults, "\n".join(faults)


def compare(got: Got, entry: dict[str, Any], base: str) -> list[str]:
    what: str = entry["what"]
    wanted: Any = entry.get("response")
    if what == NO_EMPTY_GROUP:
        return [] if got.status == 400 and "ENOENT" in got.text else [got.text]
    if what == ARRAY:
        return [] if got.status == 400 else [got.text]
    if got.status != entry["status"]:
        return [f"{got.status} instead of {entry['status']}: {got.text[:300]}"]
    if got.content_type != entry.get("content-type", JSON):
        return [f"labelled {got.content_type} instead of {entry.get('content-type', JSON)}"]
    if "text" in entry:
        same = got.text.replace(base, "/datastore/wirerest") == entry["text"] or what in OWN_TEXTS
        return [] if same else [f"{got.text!r} instead of {entry['text']!r}"]
    if isinstance(wanted, str):
        return [] if got.text == wanted else [f"{got.text[:100]!r} instead of {wanted[:100]!r}"]
    if set(wanted) == {"length", "sha256"}:
        return same_bytes(got, what, wanted)
    document = json.loads(got.body)
    if what == UPLOADS:
        del wanted["unprotected"]["chunk_upload_stats"]
    data = wanted.get("data")
    if what in LISTS_OF_TASKS:
        assert len(document["data"]) >= len(data)
        data[:], document["data"] = data[:1], document["data"][: min(len(data), 1)]
        document["total"] = wanted["total"]
        keys = [set(one) - {"endtime", "status"} for one in (*data, *document["data"])]
        return [] if all(one == keys[0] for one in keys) else [f"{keys}"]
    if what.startswith("task log") or what == "running log":
        data[:], document["data"], document["total"] = data[:1], document["data"][: len(data[:1])], wanted["total"]
    if isinstance(data, list):
        data[:] = [one for one in data if one != GRAPHS and not (isinstance(one, dict) and
                   one.get("backup-type") == "host" and one.get("backup-id") in STRANGERS)]  # fmt: skip
    return list(differences(document, wanted))


def same_bytes(got: Got, what: str, wanted: dict[str, Any]) -> list[str]:
    """Streams are the same; indexes have times and UUIDs, and what is compressed depends on the library."""
    import hashlib

    if what.startswith(("decoded ", "pxar-file hard")):
        return [] if hashlib.sha256(got.body).hexdigest() == wanted["sha256"] else [f"other bytes ({len(got.body)})"]
    if what in ("download", "download blob"):
        return [] if len(got.body) == wanted["length"] else [f"{len(got.body)} bytes instead of {wanted['length']}"]
    return []
