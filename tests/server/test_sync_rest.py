"""Push, pull, remotes and sync jobs over REST: who may, what is refused, what a run does with whose rights."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.remote_hosts import RemoteRegistry
from agent.serving import RegisteredRemotes
from datastore.names import Group, Namespace
from repository.local import LocalRepository, open_local
from server.access.acl import AclEntry
from server.application import Application
from tests.support.direct_server import Direct, Got
from tests.support.snapshots import write_snapshot
from tests.support.stores import StorePool
from tests.support.wire_server import WireServer, wire_server

USER = "u@pbs"
SECRET = "nothing secret here"
FILES = {"a.conf.blob": b"x"}
MISSING = "missing permissions"
PULL: dict[str, Any] = {"store": "main", "remote-store": "other"}
PUSH: dict[str, Any] = {"store": "main", "remote": "far", "remote-store": "other"}
#: What each kind of sync needs, path by path; see spec 6.11.
NEEDS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "pull from here": ("/pull", PULL, {"/datastore/main": "DatastoreBackup", "/datastore/other": "DatastoreBackup"}),
    "pull, removing": (
        "/pull",
        {**PULL, "remove-vanished": True},
        {"/datastore/main": "DatastorePowerUser", "/datastore/other": "DatastoreBackup"},
    ),
    "pull from afar": (
        "/pull",
        {**PULL, "remote": "far"},
        {"/datastore/main": "DatastoreBackup", "/remote/far/other": "RemoteSyncOperator"},
    ),
    "push": ("/push", PUSH, {"/datastore/main": "DatastoreBackup", "/remote/far/other": "RemoteSyncPushOperator"}),
    "push to a namespace, removing": (
        "/push",
        {**PUSH, "remote-ns": "a", "remove-vanished": True},
        {"/datastore/main": "DatastoreReader", "/remote/far/other/a": "RemoteDatastorePowerUser"},
    ),
}  # fmt: skip


@pytest.fixture
async def stores(store_pool: StorePool) -> AsyncIterator[dict[str, LocalRepository]]:
    folders = [store_pool.lend(), store_pool.lend()]
    opened = {name: await open_local(folder, name=name, lock_wait_s=0)
              for name, folder in zip(("main", "other"), folders, strict=True)}  # fmt: skip
    yield opened
    for repository in opened.values():
        repository.close()
    for folder in folders:
        store_pool.take_back(folder)


@pytest.fixture
async def server(stores: dict[str, LocalRepository], tmp_path: Path) -> AsyncIterator[WireServer]:
    remotes = RegisteredRemotes(RemoteRegistry(tmp_path / "remotes.toml", tmp_path / "secrets"))
    async with wire_server(tmp_path / "server", stores, remotes) as running:
        yield running


@pytest.fixture
def direct(server: WireServer, no_delays: None) -> Direct:
    return Direct(server.state, Application(server.state))


async def add_remote(direct: Direct, server: WireServer, name: str = "far") -> Got:
    """The server itself as a remote, where `sync@pbs` is known."""
    server.right("/datastore/other", "sync@pbs", "DatastoreAdmin")
    values = {
        "name": name, "host": "127.0.0.1", "port": server.port, "auth-id": "sync@pbs",
        "password": server.secrets["sync@pbs"], "fingerprint": server.certificate.fingerprint,
    }  # fmt: skip
    return await direct.call("POST", "/config/remote", json_body=values)


async def ended(direct: Direct, got: Got) -> str:
    """How the task that an answer names ended."""
    assert got.status == 200, got.text
    task = direct.state.tasks.get(got.data)
    if task is not None:
        with trio.fail_after(120):
            await task.over.wait()
    info = direct.state.tasks.info(got.data)
    assert info is not None
    return str(info.status)


@pytest.mark.parametrize("name", list(NEEDS))
async def test_every_right_is_needed_and_all_of_them_are_enough(
    name: str, direct: Direct, server: WireServer, stores: dict[str, LocalRepository]
) -> None:
    assert (await add_remote(direct, server)).data is None
    if "namespace" in name:  # who may not make one needs one that is there
        await stores["other"].create_namespace(Namespace.parse("a"))
    source, target = (stores["main"], stores["other"]) if "push" in name else (stores["other"], stores["main"])
    await write_snapshot(source, "host/mine", 1000, FILES)
    await source.set_owner(Group.parse("host/mine"), USER)
    await write_snapshot(source, "host/hers", 1000, FILES)
    path, body, rights = NEEDS[name]
    direct.user(USER)
    for left_out in rights:
        for where, role in rights.items():
            direct.right(where, USER, "DatastoreAudit" if where == left_out else role)
        got = await direct.call("POST", path, USER, json_body=body)
        assert (got.status, got.text[: len(MISSING)]) == (400, MISSING), (left_out, got.text)
        for where, role in rights.items():
            granted = "DatastoreAudit" if where == left_out else role
            direct.state.access.set_right(AclEntry(where, USER, granted), delete=True)
    for where, role in rights.items():
        direct.right(where, USER, role)
    status = await ended(direct, await direct.call("POST", path, USER, json_body=body))
    assert status == "OK" or status.startswith("WARNINGS: ")
    ns = Namespace.parse(str(body.get("remote-ns", "")) if "push" in name else "")
    there = {str(info.group): info.owner for info in await target.groups(ns)}
    # Of a store of this server one who may only back up sees its own groups; a remote shows what it shows.
    sees_all = name in ("pull from afar", "push to a namespace, removing")
    owner = "sync@pbs" if "push" in name else USER
    assert there == dict.fromkeys(["host/hers", "host/mine"] if sees_all else ["host/mine"], owner)


async def test_what_makes_no_sense_is_refused_before_a_task(direct: Direct, server: WireServer) -> None:
    await add_remote(direct, server)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/pull", {**PULL, "remote-store": "main"}, "can't sync to same datastore"),
        ("/pull", {**PULL, "remote-store": "none"}, "no such datastore 'none'"),
        ("/pull", {**PULL, "remote": "nobody"}, "no such remote 'nobody'"),
        ("/push", {**PUSH, "ns": "zz"}, "Source namespace 'zz' doesn't exist in datastore 'main'!"),
        ("/push", {**PUSH, "group-filter": ["regex:("]}, "'group-filter'"),
        ("/push", {**PUSH, "rate-out": "fast"}, "'rate-out'"),
        ("/push", {**PUSH, "burst-out": "1MiB"}, ""),
        ("/pull", {**PULL, "ns": "a/b/c", "max-depth": 7}, "deeper than 7"),
        ("/pull", {**PULL, "transfer-last": 0}, "'transfer-last'"),
        ("/push", {key: value for key, value in PUSH.items() if key != "remote"}, "'remote'"),
    ]
    for path, body, text in cases:
        got = await direct.call("POST", path, json_body=body)
        if "burst-out" in body:
            assert (await ended(direct, got)) not in ("OK",)  # the remote's rates are known when it is opened
            continue
        assert got.status == 400, body
        assert text in got.text


async def test_a_remote_is_changed_looked_at_and_removed(direct: Direct, server: WireServer) -> None:
    await add_remote(direct, server)
    direct.right("/remote/far", USER, "RemoteAudit")
    (listed,) = (await direct.call("GET", "/config/remote", USER)).data
    assert "password" not in listed
    direct.user("nobody@pbs")
    assert (await direct.call("GET", "/config/remote", "nobody@pbs")).data == []
    assert (await direct.call("PUT", "/config/remote/far", USER, query={"comment": "x"})).status == 403
    wrong = {"comment": "x", "digest": "0" * 64}
    assert "modified" in (await direct.call("PUT", "/config/remote/far", query=wrong)).text
    changed = await direct.call("PUT", "/config/remote/far", json_body={"comment": "office", "delete": ["fingerprint"]})
    assert changed.data is None
    shown = (await direct.call("GET", "/config/remote/far", USER)).data
    assert (shown["comment"], "fingerprint" in shown) == ("office", False)
    # Without its fingerprint the certificate is nobody's.
    got = await direct.call("GET", "/config/remote/far/scan", USER)
    assert (got.status, "certificate" in got.text) == (400, True)
    again = {"fingerprint": server.certificate.fingerprint, "password": "wrong password"}
    await direct.call("PUT", "/config/remote/far", json_body=again)
    assert (await direct.call("GET", "/config/remote/far/scan", USER)).status == 400
    await direct.call("PUT", "/config/remote/far", json_body={"password": server.secrets["sync@pbs"]})
    assert [one["store"] for one in (await direct.call("GET", "/config/remote/far/scan", USER)).data] == ["other"]
    job = {"id": "nightly", **PUSH, "sync-direction": "push"}
    assert (await direct.call("POST", "/config/sync", json_body=job)).data is None
    assert "is used by sync job 'nightly'" in (await direct.call("DELETE", "/config/remote/far")).text
    await direct.call("DELETE", "/config/sync/nightly")
    assert (await direct.call("DELETE", "/config/remote/far")).data is None
    assert (await direct.call("GET", "/config/remote/far")).text == "no such remote 'far'"


async def test_a_job_runs_with_the_rights_of_its_owner(
    direct: Direct, server: WireServer, stores: dict[str, LocalRepository]
) -> None:
    await write_snapshot(stores["other"], "host/mine", 1000, FILES)
    job: dict[str, Any] = {"id": "pull", **PULL, "owner": USER, "comment": "c", "group-filter": ["type:host"]}
    faults: list[tuple[dict[str, Any], str]] = [
        ({"schedule": "daily"}, "'schedule'"),
        ({"run-on-mount": True}, "'run-on-mount'"),
        ({"sync-direction": "push"}, "'remote'"),
        ({"sync-direction": "push", "remote": "far", "resync-corrupt": True}, "do not support resync-corrupt"),
        ({"remote-store": "main"}, "same datastore"),
    ]
    for wrong, text in faults:
        got = await direct.call("POST", "/config/sync", json_body={**job, **wrong})
        assert (got.status, text in got.text) == (400, True), got.text
    assert (await direct.call("POST", "/config/sync", json_body=job)).data is None
    assert "already exists" in (await direct.call("POST", "/config/sync", json_body=job)).text
    run = "/admin/sync/pull/run"
    assert (await direct.call("POST", run)).text == f"the job's owner '{USER}' is inactive or non-existent"
    direct.user(USER)
    # The owner may nothing: the job does nothing, whoever starts it.
    await ended(direct, await direct.call("POST", run))
    assert await stores["main"].groups() == []
    assert (await direct.call("POST", run, USER)).text == f"permission check failed, '{USER}' is missing access"
    assert (await direct.call("GET", "/config/sync/pull", USER)).status == 403
    assert (await direct.call("GET", "/config/sync", USER)).data == []
    for store in ("main", "other"):
        direct.right(f"/datastore/{store}", USER, "DatastoreAdmin")
    await stores["other"].set_owner(Group.parse("host/mine"), USER)
    assert await ended(direct, await direct.call("POST", run, USER)) == "OK"
    assert [(str(info.group), info.owner) for info in await stores["main"].groups()] == [("host/mine", USER)]
    (shown,) = (await direct.call("GET", "/admin/sync", USER, query={"store": "main"})).data
    assert (shown["last-run-state"], shown["group-filter"]) == ("OK", ["type:host"])
    assert (await direct.call("GET", "/admin/sync", USER, query={"sync-direction": "push"})).data == []
    digest = "0" * 64
    assert "modified" in (await direct.call("PUT", "/config/sync/pull", json_body={"digest": digest})).text
    changed = {"delete": ["comment", "group-filter"], "max-depth": 0}
    assert (await direct.call("PUT", "/config/sync/pull", json_body=changed)).data is None
    shown = (await direct.call("GET", "/config/sync/pull")).data
    assert shown == {"id": "pull", **PULL, "owner": USER, "max-depth": 0}
    # One who may only back up here cannot turn the job into one that removes.
    direct.right("/datastore/main", "v@pbs", "DatastoreBackup")
    assert (await direct.call("PUT", "/config/sync/pull", "v@pbs", json_body={"comment": "x"})).status == 403
    assert (await direct.call("DELETE", "/config/sync/pull", "v@pbs")).status == 403
    assert (await direct.call("DELETE", "/config/sync/pull")).data is None
    assert (await direct.call("POST", run)).text == "no such sync 'pull'"


async def test_nobody_reads_the_backups_of_others_by_a_job_of_somebody_else(
    direct: Direct, stores: dict[str, LocalRepository]
) -> None:
    await write_snapshot(stores["other"], "host/secret", 1000, FILES)
    direct.right("/datastore/main", USER, "DatastoreAdmin")
    direct.right("/datastore/other", USER, "DatastoreBackup")
    for owner in ({}, {"owner": "root@pam"}, {"owner": "v@pbs"}):
        job = {"id": "pull", **PULL, **owner}
        assert (await direct.call("POST", "/config/sync", USER, json_body=job)).status == 403
    assert (await direct.call("POST", "/config/sync", json_body={"id": "pull", **PULL})).status == 200
    assert "missing access" in (await direct.call("POST", "/admin/sync/pull/run", USER)).text
    assert (
        await direct.call("POST", "/config/sync", USER, json_body={"id": "own", **PULL, "owner": USER})
    ).status == 200
    assert await ended(direct, await direct.call("POST", "/admin/sync/own/run", USER)) == "OK"
    assert await stores["main"].groups() == []
    direct.right("/datastore/other", USER, "DatastoreReader")
    assert await ended(direct, await direct.call("POST", "/admin/sync/pull/run", USER)) == "OK"
