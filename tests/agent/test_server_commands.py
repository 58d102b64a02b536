"""`fleece user`, `token`, `acl`, `task`: what they write is what the server reads."""

import json
import os
from pathlib import Path

import pytest

from agent.cli_serve import parse_listen
from agent.main import run
from core.errors import UsageError
from server.access.passwords import verify_password
from server.access.store import AccessStore
from server.tasks import TaskFiles


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEECE_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("FLEECE_USER_PASSWORD", "long enough")
    return tmp_path / "server"


def test_users_tokens_and_rights(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["user", "add", "a@pbs", "--comment", "x"]) == 0
    assert run(["user", "add", "a@pbs"]) == 1
    assert run(["user", "add", "a@nope"]) == 2
    assert run(["token", "add", "b@pbs!t"]) == 1
    capsys.readouterr()
    assert run(["token", "add", "a@pbs!t", "--output", "json"]) == 0
    secret = json.loads(capsys.readouterr().out)["secret"]
    assert run(["acl", "update", "/datastore/main", "a@pbs!t", "DatastoreBackup", "--no-propagate"]) == 0
    assert run(["acl", "update", "/datastore/main", "c@pbs", "DatastoreBackup"]) == 1
    assert run(["acl", "update", "/datastore/main", "a@pbs", "Nope"]) == 2
    assert run(["acl", "update", "/nowhere", "a@pbs", "Admin"]) == 2
    capsys.readouterr()
    assert run(["acl", "list", "--output", "json"]) == 0
    entry = {"path": "/datastore/main", "auth-id": "a@pbs!t", "role": "DatastoreBackup", "propagate": False}
    assert json.loads(capsys.readouterr().out) == [entry]
    accounts = AccessStore(state).accounts()
    assert verify_password("long enough", accounts["a@pbs"].hash)
    assert verify_password(secret, accounts["a@pbs!t"].hash)
    assert (state / "users.toml").stat().st_mode & 0o777 == 0o600
    assert secret not in (state / "users.toml").read_text()
    assert run(["user", "remove", "a@pbs"]) == 0
    access = AccessStore(state)
    assert access.accounts() == {}
    assert access.tree().entries == ()


def test_a_password_is_text_and_has_to_come_from_somewhere(
    state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FLEECE_USER_PASSWORD")
    (tmp_path / "pw").write_bytes(b"long \xff enough\n")
    monkeypatch.setenv("FLEECE_USER_PASSWORD_FILE", str(tmp_path / "pw"))
    assert run(["user", "add", "a@pbs"]) == 2
    assert "it is no UTF-8" in capsys.readouterr().err
    assert "a@pbs" not in AccessStore(state).accounts()


def test_tasks_are_listed_shown_and_stopped(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = TaskFiles(state / "tasks")
    done, going = (f"UPID:host:00000001:00000001:0000000{n}:00000001:backup:main:a@pbs:" for n in (1, 2))
    files.log_path(done).parent.mkdir(parents=True)
    files.note(f"S {done}")
    files.note(f"S {going}")
    files.note(f"E {done} 5 WARNINGS: 1")
    files.log_path(done).write_text("one\ntwo\n")
    # No server has the folder: what did not end never will.
    assert run(["task", "list", "--output", "json"]) == 0
    assert [one["status"] for one in json.loads(capsys.readouterr().out)] == ["unknown", "WARNINGS: 1"]
    assert run(["task", "list", "--running", "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run(["task", "log", going, "--follow"]) == 0
    assert run(["task", "stop", going]) == 0
    assert "It had ended already" in capsys.readouterr().out
    assert list(files.requests_to_stop()) == []
    server = files.lock()
    assert run(["task", "list", "--output", "json"]) == 0
    assert [one["status"] for one in json.loads(capsys.readouterr().out)] == [None, "WARNINGS: 1"]
    assert run(["task", "log", done]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert run(["task", "stop", going]) == 0
    assert len(list(files.requests_to_stop())) == 1
    assert run(["task", "log", "UPID:x"]) == 1
    os.close(server)


@pytest.mark.parametrize(
    ("text", "place"),
    [("1.2.3.4:8007", ("1.2.3.4", 8007)), (":1", ("", 1)), ("[::1]:8007", ("::1", 8007)), ("h:0", ("h", 0))],
)
def test_where_to_listen(text: str, place: tuple[str, int]) -> None:
    assert parse_listen(text) == place


@pytest.mark.parametrize("text", ["8007", "::1:8007", "h:", "h:x", "h:70000"])
def test_where_nobody_can_listen(text: str) -> None:
    with pytest.raises(UsageError):
        parse_listen(text)
