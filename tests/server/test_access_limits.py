"""What users with few rights can do to everybody, and what a crash leaves of keys."""

import threading
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from core.errors import FleeceError
from core.state_files import StateFile
from datastore.names import Group, Namespace
from repository.local import LocalRepository
from server.access import passwords, store
from server.access.acl import AclEntry
from server.access.auth_ids import AuthId
from server.access.passwords import hash_password, verify_password
from server.access.store import AccessStore
from server.access.tickets import Tickets
from server.access.turns import Turns
from server.application import Application
from server.errors import ServerError
from server.service import DEFAULT_PORT, DRAIN_S
from server.state import ServerState
from tests.support.direct_server import Direct
from tests.support.snapshots import write_snapshot
from tests.support.wire_server import Stores

ROOT = Path(__file__).parents[2]


async def test_nobody_fills_the_files_of_users_and_rights(
    direct: Direct, monkeypatch: pytest.MonkeyPatch, no_delays: None
) -> None:
    monkeypatch.setattr(store, "MAX_TOKENS", 2)
    monkeypatch.setattr(store, "MAX_RIGHTS", 3)
    direct.user("u@pbs")
    direct.user("other@pbs")
    for number in range(2):
        assert (await direct.call("POST", f"/access/users/u@pbs/token/t{number}x", "u@pbs")).status == 200
    got = await direct.call("POST", "/access/users/u@pbs/token/more", "u@pbs")
    assert (got.status, "u@pbs has 2 already" in got.text) == (400, True)
    right = {"role": "Audit", "auth-id": "u@pbs!t0x"}
    for number in range(3):
        query = {"path": f"/datastore/{number}", **right}
        assert (await direct.call("PUT", "/access/acl", "u@pbs", query=query)).status == 200
    got = await direct.call("PUT", "/access/acl", "u@pbs", query={"path": "/datastore/4", **right})
    assert (got.status, "have 3 rights already" in got.text) == (400, True)
    # What is there can be changed, and others are not concerned.
    again = {"path": "/datastore/1", **right, "propagate": 0}
    assert (await direct.call("PUT", "/access/acl", "u@pbs", query=again)).status == 200
    direct.right("/datastore/main", "other@pbs", "Audit")


def test_a_file_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "x.toml", "user", "the list", "x", "repair it")
    file.write({"a": {"comment": "x"}})
    with pytest.raises(FleeceError, match=r"cannot write the list .*it would have more than"):
        file.write({"a": {"comment": "x" * (4 << 20)}})
    assert file.read() == {"a": {"comment": "x"}}


@pytest.mark.parametrize(("path", "name", "more"), [
    ("/access/users/root@pam/token/abc", "comment", {}),
    ("/admin/datastore/main/group-notes", "notes", {"backup-type": "host", "backup-id": "web"}),
    ("/access/ticket", "password", {"username": "u@pbs"}),
])  # fmt: skip
async def test_half_of_a_pair_is_no_text(path: str, name: str, more: dict[str, str], direct: Direct) -> None:
    method = "PUT" if name == "notes" else "POST"
    got = await direct.call(method, path, json_body={**more, name: "a\ud800"})
    assert (got.status, got.text) == (400, f"parameter verification failed - '{name}': value is no Unicode text.")


def test_what_is_no_text_takes_as_long_to_refuse_for_known_users_as_for_unknown_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = hash_password("long enough")
    worked: list[str] = []

    class Counted(Scrypt):
        def derive(self, key_material: bytes) -> bytes:
            worked.append("derive")
            return super().derive(key_material)

        def verify(self, key_material: bytes, expected_key: bytes) -> None:
            worked.append("verify")
            super().verify(key_material, expected_key)

    monkeypatch.setattr(passwords, "Scrypt", Counted)
    assert not verify_password("\ud800", None)
    assert not verify_password("\ud800", kept)
    assert verify_password("long enough", kept)
    assert worked[0] == "derive"
    assert worked.count("verify") == 2


async def test_a_flood_of_passwords_delays_others_by_one_check() -> None:
    turns = Turns()
    order: list[str] = []
    gates = [threading.Event() for _ in range(2)]

    def check(who: str) -> bool:
        order.append(who)
        if len(order) <= 2:
            assert gates[len(order) - 1].wait(60)
        return True

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(turns.run, "192.0.2.66", lambda: check("flood"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.start_soon(turns.run, "192.0.2.1", lambda: check("somebody"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        for gate in gates:
            gate.set()
    assert order.index("somebody") <= 2
    assert len(order) == 21
    assert turns._locks == {}


def test_a_key_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("server.access.tickets.os.fsync", full)
        with pytest.raises(ServerError, match="No space left"):
            Tickets(tmp_path)
    assert list(tmp_path.iterdir()) == []
    first, second = Tickets(tmp_path), Tickets(tmp_path)
    assert second.verify(first.ticket("u@pbs")) == "u@pbs"
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "ticket.key": 0o600,
        "csrf.key": 0o600,
    }


async def test_a_verification_leaves_out_what_its_caller_may_not_see(direct: Direct, local: LocalRepository) -> None:
    for name, role in [("", "DatastoreReader"), ("hidden", "NoAccess"), ("own", "DatastoreBackup")]:
        ns = Namespace.parse(name)
        if name:
            await local.create_namespace(ns)
        for group_id, owner in [("mine", "u@pbs!t"), ("theirs", "other@pbs")]:
            group = Group.parse(f"host/{group_id}", ns)
            await write_snapshot(local, group, 1000, {"a.blob": b"x"})
            await local.set_owner(group, owner)
        direct.right(f"/datastore/main/{name}".rstrip("/"), "u@pbs", role)
    got = await direct.call("POST", "/admin/datastore/main/verify", "u@pbs", json_body={})
    task = direct.state.tasks.get(got.data)
    if task is not None:
        await task.over.wait()
    info = direct.state.tasks.info(got.data)
    assert info is not None
    assert info.status == "OK"
    checked = {
        (str(ns), one.snapshot.group.id)
        for ns in await local.namespaces()
        for one in await local.snapshots(ns)
        if one.verification
    }
    assert checked == {("", "mine"), ("", "theirs"), ("own", "mine")}


async def test_a_store_that_fails_unexpectedly_does_not_end_the_server(
    local: LocalRepository, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Stores):
        def open(self, name: str):  # type: ignore[no-untyped-def]
            if name == "bad":
                raise RuntimeError("unforeseen")
            return super().open(name)

    state = ServerState(tmp_path / "server", Failing({"main": local, "bad": local}))
    async with state.running():
        direct = Direct(state, Application(state))
        for _ in range(2):
            got = await direct.call("GET", "/admin/datastore/bad/status")
            assert (got.status, got.text) == (400, "internal error (RuntimeError)")
        assert (await direct.call("GET", "/admin/datastore/main/status")).status == 200
    assert "datastore 'bad' failed unexpectedly" in caplog.text


def test_units_fit_the_server() -> None:
    service = (ROOT / "systemd/fleece-serve.service").read_text()
    listening = (ROOT / "systemd/fleece-serve.socket").read_text()
    assert f"ListenStream={DEFAULT_PORT}\n" in listening
    settings = dict(line.split("=", 1) for line in service.splitlines() if "=" in line and not line.startswith("#"))
    assert settings["Type"] == "notify"
    assert settings["ExecStart"] == f"/usr/bin/fleece serve --drain {DRAIN_S:g}"
    assert int(settings["TimeoutStopSec"].removesuffix("min")) * 60 > DRAIN_S
    assert settings["Requires"] == settings["Also"] == "fleece-serve.socket"


def test_rights_of_others_are_counted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_RIGHTS", 1)
    access = AccessStore(tmp_path)
    access.add_user(AuthId("u@pbs"))
    access.set_right(AclEntry("/", "u@pbs", "Audit"))
    access.set_right(AclEntry("/", "root@pam", "Audit"))
    with pytest.raises(FleeceError, match="have 1 rights already"):
        access.set_right(AclEntry("/datastore", "u@pbs", "Audit"))
