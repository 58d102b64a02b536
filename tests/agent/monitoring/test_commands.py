"""`fleece status`, `metrics` and `notify`, as people call them."""

import json
from pathlib import Path

import pytest

from ..conftest import Fleece
from .conftest import script


@pytest.fixture
def host(fleece: Fleece, store_folder: Path) -> Fleece:
    program = script(fleece.home / "tell", f'echo "$FLEECE_KIND" >> {fleece.home}/told; [ -z "$1" ]')
    (fleece.home / "fleece.toml").write_text(f"""
default-repository = "main"
[repository.main]
path = "{store_folder}"
[vm.web]
[job.sweep]
type = "gc"
schedule = "weekly"
[events]
file = "{fleece.home}/events.jsonl"
[metrics]
textfile = "{fleece.home}/fleece.prom"
[notify.good]
type = "command"
command = "{program}"
[notify.bad]
type = "command"
command = ["{program}", "fail"]
jobs = "other"
[notify.mail]
type = "mail"
to = "root"
smtp = "127.0.0.1:9"
[notify.chat]
type = "webhook"
url = "https://chat.example/$secret"
secret-file = "/nowhere"
""")
    return fleece


def test_status_shows_what_is_known_and_refresh_looks(host: Fleece) -> None:
    found = host.json("status")
    assert [guest["guest"] for guest in found["guests"]] == ["web"]
    assert (found["stores"][0]["repository"], found["stores"][0]["looked"]) == ("main", None)
    assert "not looked at yet" in host("status").out
    found = host.json("status", "--refresh")
    assert found["stores"][0]["error"] is None
    assert found["stores"][0]["status"]["total"] > 0
    text = host("status").out
    assert "web: no job backs it up" in text
    assert host("status", "--html").out.startswith("<!DOCTYPE html>")


def test_metrics_are_shown_and_written_and_a_repository_that_is_gone_is_a_warning(host: Fleece) -> None:
    assert host.json("job", "run", "sweep")["state"] == "ok"
    text = host("metrics", "show").out
    assert 'fleece_job_runs_total{job="sweep",state="ok"} 1.0' in text
    assert (host.home / "fleece.prom").read_text().count("# TYPE") == text.count("# TYPE")
    assert host.json("metrics", "refresh") == {"problems": []}
    configuration = host.home / "fleece.toml"
    configuration.write_text(
        configuration.read_text().replace('[repository.main]\npath = "', '[repository.main]\npath = "/no')
    )
    answer = host("metrics", "refresh", "--output", "json")
    assert answer.code == 3
    assert "repository main: cannot open" in answer.document["problems"][0]
    assert 'fleece_datastore_up{repository="main"} 0.0' in (host.home / "fleece.prom").read_text()


def test_a_notification_is_tried_by_hand(host: Fleece) -> None:
    assert host.json("notify", "test", "good") == {"name": "good", "sent": True, "preview": None}
    assert host("notify", "test", "good", "--kind", "failure").out == "good: sent\n"
    assert (host.home / "told").read_text().split() == ["test", "failure"]
    failed = host("notify", "test", "bad", "--output", "json")
    assert failed.code == 1
    assert "exit code 1" in failed.error["why"]
    assert "of type command" in failed.error["hint"]
    assert host("notify", "test", "mail").code == 1
    assert host("notify", "test", "nobody").code == 1
    assert host("notify", "test", "good", "--job", "../x").code == 2
    # A test is none of the messages that are counted.
    assert [(one["name"], one["sent"], one["failed"]) for one in host.json("notify", "list")] == [
        ("good", 0, 0), ("bad", 0, 0), ("mail", 0, 0), ("chat", 0, 0),
    ]  # fmt: skip


def test_what_would_be_sent_is_shown_without_sending_and_without_secrets(host: Fleece) -> None:
    mail = host("notify", "test", "mail", "--dry-run", "--kind", "failure", "--job", "night").out
    assert "To: root\n" in mail
    assert "job night has failed\n" in mail
    chat = host.json("notify", "test", "chat", "--dry-run")
    assert chat["sent"] is False
    head, _, body = chat["preview"].partition("\n\n")
    assert head.splitlines()[0] == "POST https://chat.example/$secret"
    assert json.loads(body)["kind"] == "test"
    assert "FLEECE_KIND='test'" in host("notify", "test", "good", "--dry-run").out
    assert not (host.home / "told").exists()


def test_without_notifications_there_are_none(fleece: Fleece) -> None:
    assert fleece.json("notify", "list") == []
    assert fleece("notify", "list").out == "No notifications.\n"
    assert "no [notify.x]" in fleece("notify", "test", "x").err
