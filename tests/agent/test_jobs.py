"""Jobs: run by the command, one at a time, with history and log; and what their store survives."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.cli_job import _result_lines
from agent.job_store import KEPT_RUNS, MAX_LOG_SIZE, JobStore, LogFile, split_run
from core.errors import BusyError, FleeceError, NotFoundError

from .conftest import Fleece, Popen
from .test_prune_command import fill


@pytest.fixture
def jobs(fleece: Fleece, store_folder: Path) -> Fleece:
    """The command with a configuration that has a job of each kind."""
    (fleece.home / "fleece.toml").write_text(f"""
default-repository = "main"
[repository.main]
path = "{store_folder}"
[job.old]
type = "prune"
schedule = "daily"
keep-last = 1
group-filter = ["type:vm"]
[job.check]
type = "verify"
comment = "at night"
[job.sweep]
type = "gc"
[job.boots]
type = "test-boot"
timeout = "1m"
[job.lost]
type = "gc"
repository = "/nowhere/at/all"
""")
    return fleece


def test_guests_are_told_a_line_each_whatever_they_are_called() -> None:
    guests = [
        {"guest": "a\nb\x1b[2J", "error": None, "snapshot": None, "state": "skipped"},
        {"guest": "web", "error": "QEMU says\r\n'no'", "snapshot": None, "state": "failed"},
    ]
    assert _result_lines({"ok": 0, "guests": guests}) == [
        "  ok: 0", "  a b [2J: skipped", "  web: QEMU says 'no' (failed)",
    ]  # fmt: skip


def test_a_prune_job_does_what_prune_does_and_is_recorded(jobs: Fleece, store_folder: Path) -> None:
    names = fill(store_folder, "vm/1", 3) + fill(store_folder, "ct/1", 2) + fill(store_folder, "vm/2", 2, ns="a")
    # A variable of the shell must not make a job prune another repository.
    jobs.environment["FLEECE_REPOSITORY"] = "/another/one"
    run = jobs.json("job", "run", "old")
    assert (run["job"], run["type"], run["state"], run["error"]) == ("old", "prune", "ok", None)
    assert run["result"] == {"groups": 2, "kept": 2, "removed": 3, "failed": 0}
    left = [one["snapshot"] for one in jobs.json("list", "--repo", "main")]
    assert sorted(left) == sorted([names[2], *names[3:5]])
    assert jobs.json("job", "history") == [run]
    log = jobs.json("job", "log", "old")
    assert f"removed {names[0]}" in log["log"]
    assert log["run"] == run["run"]
    assert jobs("job", "log", run["run"]).out.splitlines()[-1].endswith(" ended")
    assert jobs.json("job", "list")[0]["last-run"] == run


def test_list_shows_what_will_run_when(jobs: Fleece) -> None:
    listed = {job["job"]: job for job in jobs.json("job", "list")}
    assert list(listed) == ["old", "check", "sweep", "boots", "lost"]
    assert [job["runnable"] for job in listed.values()] == [True] * 5
    assert listed["old"]["schedule"] == "daily"
    due = listed["old"]["next"]
    assert due is None or time.time() < due <= time.time() + 86400 + 3600
    assert (listed["check"]["comment"], listed["check"]["last-run"]) == ("at night", None)
    assert jobs("job", "run", "nobody").code == 1
    assert jobs("job", "history", "nobody").code == 1
    assert jobs("job", "log", "check").code == 1
    assert jobs("job", "log", "../etc").code == 2
    assert jobs("job", "log", "old:20260102T030405Z-1a2b").code == 1


def test_verify_and_gc_run_and_a_damaged_snapshot_fails_the_job(jobs: Fleece, store_folder: Path) -> None:
    (name,) = fill(store_folder, "vm/1", 1)
    assert jobs.json("job", "run", "check")["result"]["ok"] == 1
    assert jobs.json("job", "run", "check")["result"] == {"ok": 0, "failed": 0, "skipped": 1, "failed-snapshots": []}
    swept = jobs.json("job", "run", "sweep")
    assert swept["result"]["index-file-count"] == 1
    blob = store_folder / name / "vm.conf.blob"
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    (jobs.home / "fleece.toml").write_text(
        (jobs.home / "fleece.toml").read_text().replace('"verify"', '"verify"\nignore-verified = false')
    )
    answer = jobs("job", "run", "check", "--output", "json")
    assert answer.code == 1
    assert name in answer.error["where"]
    last = jobs.json("job", "history", "check", "--limit", "1")[0]
    assert (last["state"], last["result"]["failed-snapshots"]) == ("failed", [name])
    assert last["error"]["why"] == "damaged"


def test_a_job_that_finds_no_machine_to_start_warns(jobs: Fleece, store_folder: Path) -> None:
    fill(store_folder, "ct/1", 1)
    answer = jobs("job", "run", "boots", "--output", "json")
    assert (answer.code, answer.document["state"], answer.document["result"]["machines"]) == (3, "warnings", [])
    assert "nothing was started" in answer.document["warnings"][0]


def test_a_verify_job_looks_as_deep_and_at_the_groups_that_it_is_told(jobs: Fleece, store_folder: Path) -> None:
    for ns, group in (("", "vm/1"), ("", "ct/1"), ("a", "vm/2"), ("a/b", "vm/3")):
        fill(store_folder, group, 1, ns=ns)
    path = jobs.home / "fleece.toml"
    path.write_text(path.read_text().replace('"verify"', '"verify"\nmax-depth = 1\ngroup-filter = ["type:vm"]'))
    assert jobs.json("job", "run", "check")["result"]["ok"] == 2
    verified = jobs.json("verify", "--max-depth", "1", "--group-filter", "exclude:type:ct")
    assert [(one["ns"], one["snapshot"].partition("/20")[0]) for one in verified] == [("", "vm/1"), ("a", "vm/2")]
    for arguments in (["vm/1", "--max-depth", "0"], ["--group-filter", "vm/1"], ["--max-depth", "8"]):
        assert jobs("verify", *arguments, "--output", "json").code == 2


def test_a_failed_job_is_recorded_with_its_reason(jobs: Fleece) -> None:
    answer = jobs("job", "run", "lost", "--output", "json")
    assert answer.code == 1
    (run,) = jobs.json("job", "history", "lost")
    assert run["state"] == "failed"
    assert run["error"] == answer.error
    assert "failed: cannot open" in jobs("job", "log", "lost").out


def wait_for_run(store: JobStore) -> None:
    deadline = time.monotonic() + 60
    while not store.running():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_run_is_known_as_what_it_was(
    jobs: Fleece, store_folder: Path, number: signal.Signals, ended: Callable[[Popen], Popen]
) -> None:
    import fcntl

    # Held as by a writer of PBS: the job waits for the store.
    with (store_folder / ".lock").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        running = ended(jobs.start("job", "run", "sweep"))
        store = JobStore(jobs.home / "state", "sweep")
        wait_for_run(store)
        while "begins as" not in "".join(path.read_text() for path in (store.folder / "logs").glob("*.log")):
            time.sleep(0.01)
        assert jobs.json("job", "history")[0]["state"] == "running"
        refused = jobs("job", "run", "sweep", "--output", "json")
        assert refused.code == 1
        assert f"it is running already, as {store.runs()[-1].id}" in refused.error["why"]
        running.send_signal(number)
        running.communicate(timeout=60)
    (run,) = jobs.json("job", "history", "sweep")
    assert run["state"] == ("interrupted" if number is signal.SIGTERM else "killed")
    assert jobs.json("job", "run", "sweep")["state"] == "ok"


def begin_and_end(store: JobStore, **how: object) -> str:
    with store.begin("gc") as recording:
        recording.end("ok", **how)  # type: ignore[arg-type]
        return recording.run.id


def test_only_the_newest_runs_and_logs_are_kept(tmp_path: Path) -> None:
    store = JobStore(tmp_path, "x")
    ids = [begin_and_end(store) for _ in range(KEPT_RUNS + 5)]
    assert [run.id for run in store.runs()] == ids[-KEPT_RUNS:]
    assert len(list((store.folder / "logs").iterdir())) == KEPT_RUNS
    assert store.read_log(ids[-1]) == ""
    with pytest.raises(NotFoundError):
        store.read_log(ids[0])


def test_a_torn_history_costs_only_the_torn_lines(tmp_path: Path) -> None:
    store = JobStore(tmp_path, "x")
    first = begin_and_end(store)
    path = store.folder / "history.jsonl"
    with path.open("ab") as file:
        file.write(
            b'[1]\n"x"\n{"event": "start"}\n{"run": "x:1", "event": "end"}\n\xff\n' + b"[" * 5000 + b'\n{"run": "x:'
        )
    second = begin_and_end(store)
    assert [(run.id, run.state) for run in store.runs()] == [(first, "ok"), (second, "ok")]


def test_one_run_at_a_time_even_in_one_process(tmp_path: Path) -> None:
    store = JobStore(tmp_path, "x")
    with store.begin("gc"):
        assert store.running()
        with pytest.raises(BusyError), JobStore(tmp_path, "x").begin("gc"):
            pass
    assert not store.running()
    assert store.runs()[-1].state == "killed"  # it never said how it ended


def test_looking_does_not_disturb_a_start(tmp_path: Path) -> None:
    store = JobStore(tmp_path, "x")
    begin_and_end(store)
    stop = threading.Event()
    lookers = [threading.Thread(target=lambda: [store.running() for _ in iter(stop.is_set, True)]) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(50):
            begin_and_end(store)
    finally:
        stop.set()
        for looker in lookers:
            looker.join()


def test_a_full_disk_keeps_no_job_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(tmp_path, "x")
    begin_and_end(store)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with store.begin("gc") as recording:
            recording.log.write("lost\n")
            assert any("No space left" in problem for problem in recording.problems)
            with pytest.raises(FleeceError, match="No space left"):
                recording.end("ok")


def test_a_log_has_times_and_an_end(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log")
    log.write("one\ntw")
    log.write("o\nrest")
    log.write("\udcff" * 10)
    log.close()
    lines = (tmp_path / "a.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines[:2]] == ["one", "two"]
    assert lines[2].split(" ", 1)[1].startswith("rest\\udcff")
    big = LogFile(tmp_path / "b.log")
    for _ in range(20):
        big.write("x" * (MAX_LOG_SIZE // 10) + "\n")
    big.close()
    text = (tmp_path / "b.log").read_text()
    assert len(text) <= MAX_LOG_SIZE + 100
    assert text.endswith("left out)\n")


def test_a_run_tells_its_job() -> None:
    assert split_run("a.b:20260102T030405Z-1a2b") == ("a.b", "a.b:20260102T030405Z-1a2b")
    assert split_run("a.b") == ("a.b", None)
    assert split_run("a:../../x") == ("a:../../x", None)
    json.dumps(split_run("x"))
