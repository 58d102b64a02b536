"""The one place that each run goes through: what it tells, and that it never makes a job fail."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.config import Config
from agent.errors import HookError
from agent.job_store import JobStore, Run
from agent.jobs import run_job
from agent.monitoring.reporter import JobReport, Monitoring
from agent.monitoring.rules import TargetStates
from agent.monitoring.summaries import load_summary
from agent.monitoring.survey import Surveys
from agent.registry import Registry
from core.errors import BusyError, FleeceError
from core.progress import Progress
from tests.support.peers import HANG, WebPeer, answer, listening

from .conftest import a_run, config, record, script


class Host:
    """A configuration and a state folder of its own."""

    def __init__(self, folder: Path, text: str, store: Path | None = None) -> None:
        self.folder = folder
        where = "" if store is None else f'[repository.main]\npath = "{store}"\n'
        self.config: Config = config(
            f'default-repository = "main"\n{where}[events]\nfile = "{folder}/events.jsonl"\n'
            f'[job.night]\ntype = "backup"\narchives = ["one.conf:{folder}/one"]\nbackup-id = "box"\n'
            f'[job.sweep]\ntype = "gc"\n{text}'
        )
        (folder / "one").write_text("one")
        self.said: list[str] = []
        self.registry = Registry(folder / "datastores.toml")
        self.state = folder / "state"

    async def run(self, job: str) -> Run:
        section = self.config.job[job]
        store = JobStore(self.state, job)
        return await run_job(job, section, self.config, self.registry, store, Progress())

    @property
    def monitoring(self) -> Monitoring:
        return Monitoring(self.config, self.registry, self.state, self.said.append)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]

    def log(self, run: Run) -> str:
        return JobStore(self.state, run.job).read_log(run.id)

    def told(self) -> list[str]:
        path = self.folder / "told"
        return path.read_text().splitlines() if path.exists() else []

    def figures(self, name: str = "x") -> dict[str, Any]:
        return TargetStates(self.state).figures({name: self.config.notify[name]})[0]


def teller(folder: Path, ending: str = "exit 0") -> str:
    program = script(folder / "tell", f'echo "$FLEECE_KIND $FLEECE_JOB $FLEECE_STATE" >> {folder}/told; {ending}')
    return f'[notify.x]\ntype = "command"\non = "always"\ncommand = "{program}"\n'


async def test_a_run_tells_everything_in_order(tmp_path: Path, store_folder: Path) -> None:
    textfile = f'[metrics]\ntextfile = "{tmp_path}/fleece.prom"\n'
    host = Host(tmp_path, teller(tmp_path) + textfile, store_folder)
    run = await host.run("night")
    assert [event["event"] for event in host.events] == ["job-start", "guest-end", "job-end", "notification", "store"]
    start, guest, end, notification, store = host.events
    assert {event["run"] for event in (start, guest, end, notification)} == {run.id}
    assert (guest["guest"], guest["state"], guest["repository"], guest["size"]) == ("box", "ok", "main", 3)
    assert (end["state"], end["result"]["ok"], "guests" in end["result"]) == ("ok", 1, False)
    assert (notification["notification"], notification["outcome"]) == ("x", "sent")
    assert (store["repository"], store["error"]) == ("main", None)
    assert host.told() == ["success night ok"]
    assert "notification x: sent (success)" in host.log(run)
    summary = load_summary(JobStore(host.state, "night"))
    assert summary is not None
    assert (summary.through, summary.runs["ok"]) == (run.id, 1)
    known = Surveys(host.state).known("main")
    assert known is not None
    assert [(one["group"], one["snapshots"]) for one in known["groups"]] == [("host/box", 1)]
    text = (tmp_path / "fleece.prom").read_text()
    assert 'fleece_job_runs_total{job="night",state="ok"} 1.0' in text
    assert 'fleece_group_snapshots{group="host/box",ns="",repository="main"} 1.0' in text


async def test_a_job_of_another_type_goes_the_same_way_and_a_failure_is_told_with_its_reason(tmp_path: Path) -> None:
    host = Host(tmp_path, teller(tmp_path), tmp_path / "nowhere")
    with pytest.raises(FleeceError):
        await host.run("sweep")
    end = next(event for event in host.events if event["event"] == "job-end")
    assert (end["job"], end["type"], end["state"]) == ("sweep", "gc", "failed")
    assert end["error"]["why"]
    assert host.told() == ["failure sweep failed"]


async def test_a_notification_that_fails_fails_no_job_and_is_logged_counted_and_tried_later(
    tmp_path: Path, store_folder: Path
) -> None:
    host = Host(tmp_path, teller(tmp_path, "exit 1"), store_folder)
    run = await host.run("night")
    assert (run.state, run.warnings) == ("ok", [])
    assert "notification x failed: cannot run the command" in host.log(run)
    assert [event["outcome"] for event in host.events if event["event"] == "notification"] == ["failed"]
    figures = host.figures()
    assert (figures["sent"], figures["failed"], figures["pending"]) == (0, 1, 1)
    assert "exit code 1" in figures["last-error"]
    teller(tmp_path)  # it works again
    await host.monitoring.refresh()
    assert host.told() == ["success night ok", "success night ok"]
    assert (host.figures()["sent"], host.figures()["pending"]) == (1, 0)
    await host.monitoring.refresh()
    assert len(host.told()) == 2


async def test_what_could_not_be_sent_is_tried_once_at_each_look_however_many_jobs_there_are(
    tmp_path: Path, store_folder: Path
) -> None:
    host = Host(tmp_path, teller(tmp_path, "exit 1"), store_folder)
    await host.run("night")
    assert len(host.told()) == 1
    # It told of itself, or tried to.
    await host.monitoring.job_ended("night", 1, 0.0)
    assert len(host.told()) == 1
    assert len(host.config.job) == 2
    await host.monitoring.refresh()
    assert len(host.told()) == 2


async def test_a_webhook_that_hangs_holds_up_no_other_and_the_end_only_for_its_time(
    tmp_path: Path, store_folder: Path
) -> None:
    slow, quick = WebPeer([HANG]), WebPeer([answer(204)])
    async with listening(slow), listening(quick):
        text = "".join(
            f'[notify.{name}]\ntype = "webhook"\non = "success"\ntimeout = "1s"\nurl = "http://127.0.0.1:{peer.port}/"\n'
            for name, peer in (("slow", slow), ("quick", quick))
        )
        host = Host(tmp_path, text, store_folder)
        report = JobReport(host.monitoring, record(host.state, a_run("ok")), "main")
        with trio.CancelScope() as scope:
            scope.cancel()  # the job is being ended: one attempt
            await report.ended()
        assert (len(slow.requests), len(quick.requests)) == (1, 1)
    assert (host.figures("slow")["failed"], host.figures("quick")["sent"]) == (1, 1)


async def test_a_run_that_was_killed_is_told_by_the_next_one(tmp_path: Path, store_folder: Path) -> None:
    host = Host(tmp_path, teller(tmp_path), store_folder)
    await host.run("night")
    with JobStore(host.state, "night").begin("backup") as recording:
        pass  # no end is written
    await host.run("night")
    assert host.told() == ["success night ok", "failure night killed", "recovery night ok"]
    killed = [event for event in host.events if event["event"] == "job-end" and event["state"] == "killed"]
    assert [event["run"] for event in killed] == [recording.run.id]
    summary = load_summary(JobStore(host.state, "night"))
    assert summary is not None
    assert (summary.runs["ok"], summary.runs["killed"]) == (2, 1)


async def test_a_first_run_that_is_killed_is_told_too(tmp_path: Path, store_folder: Path) -> None:
    host = Host(tmp_path, teller(tmp_path), store_folder)
    with JobStore(host.state, "night").begin("backup") as recording:
        await JobReport(host.monitoring, recording.run, "main").began()
    await host.monitoring.job_ended("night", -9, 0.0)
    assert host.told() == ["failure night killed"]
    end = next(event for event in host.events if event["event"] == "job-end")
    assert (end["run"], end["state"]) == (recording.run.id, "killed")


async def test_the_past_before_anything_was_kept_is_counted_but_no_news(tmp_path: Path) -> None:
    host = Host(tmp_path, teller(tmp_path))
    for state in ("failed", "ok", "killed"):
        record(host.state, a_run(state))
    await host.monitoring.refresh()
    assert host.told() == []
    summary = load_summary(JobStore(host.state, "night"))
    assert summary is not None
    assert sum(summary.runs.values()) == 3


async def test_a_job_that_did_not_begin_is_told(tmp_path: Path) -> None:
    host = Host(tmp_path, teller(tmp_path))
    await host.monitoring.job_ended("sweep", 2, 0.0)
    assert host.told() == ["failure sweep failed"]
    assert [event["event"] for event in host.events] == ["job-not-begun", "notification"]
    # One that was killed has a history, and so is told once, by whoever comes first.
    record(host.state, a_run("ok"))
    await host.monitoring.report("night")
    record(host.state, a_run("killed"))
    await host.monitoring.job_ended("night", -9, 0.0)
    await host.monitoring.job_ended("night", -9, 0.0)
    assert host.told()[1:] == ["failure night killed"]
    # Somebody else runs it: that run tells of itself.
    with JobStore(host.state, "night").begin("backup"):
        await host.monitoring.job_ended("night", 1, 1e11)
    assert len(host.told()) == 2


async def test_that_a_job_did_not_begin_is_told_later_if_nobody_takes_it_now(tmp_path: Path) -> None:
    host = Host(tmp_path, teller(tmp_path, "exit 1"))
    await host.monitoring.job_ended("sweep", 2, 0.0)
    assert host.figures()["pending"] == 1
    teller(tmp_path)  # it works again
    await host.monitoring.refresh()
    assert host.told() == ["failure sweep failed"] * 2
    assert (host.figures()["sent"], host.figures()["pending"]) == (1, 0)


async def test_people_are_told_although_nothing_can_be_written(
    tmp_path: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, teller(tmp_path), store_folder)
    await host.run("night")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agent.monitoring.state.replace_file", full)
    run = await host.run("night")
    assert run.state == "ok"
    assert host.told() == ["success night ok", "success night ok"]
    assert "No space left on device" in host.log(run)


async def test_who_finds_another_at_the_report_of_a_job_leaves_it_to_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def held(path: Path, *, patience_s: float) -> Iterator[None]:
        raise BusyError("use", str(path), "another process holds it for too long")
        yield

    host = Host(tmp_path, teller(tmp_path))
    record(host.state, a_run("ok"))
    await host.monitoring.report("night")
    monkeypatch.setattr("agent.monitoring.reporter.locked", held)
    run = record(host.state, a_run("ok"))
    await host.monitoring.report("night")  # of the agent, while the job's process waits for a mail server
    assert host.told() == []
    await host.monitoring.report("night", run)
    assert host.told() == ["success night ok"]


async def test_a_mistake_in_here_fails_no_job(
    tmp_path: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError("a mistake")

    host = Host(tmp_path, teller(tmp_path), store_folder)
    monkeypatch.setattr("agent.monitoring.reporter.Monitoring.notify", broken)
    monkeypatch.setattr("agent.monitoring.reporter.Monitoring.survey", broken)
    run = await host.run("night")
    assert run.state == "ok"
    assert "not everything can be reported (ZeroDivisionError: a mistake)" in host.log(run)


async def test_a_job_that_is_interrupted_is_told_in_a_short_time_only_to_who_wants_that(
    tmp_path: Path, store_folder: Path
) -> None:
    host = Host(tmp_path, teller(tmp_path).replace('"always"', '["failure", "interrupted"]'), store_folder)
    text = f"[ -e {tmp_path}/hooked ] && exit; touch {tmp_path}/hooked; exec sleep 1000"  # not in what follows the end
    host.config.job["night"].__dict__["hook"] = script(tmp_path / "hook", text)
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            while not (tmp_path / "hooked").exists():  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

        nursery.start_soon(end)
        await host.run("night")
    assert JobStore(host.state, "night").runs()[-1].state == "interrupted"
    assert host.told() == ["interrupted night interrupted"]


async def test_a_job_that_is_ended_right_at_its_begin_was_interrupted_and_not_killed(
    tmp_path: Path, store_folder: Path
) -> None:
    host = Host(tmp_path, teller(tmp_path), store_folder)
    with trio.CancelScope() as scope:
        scope.cancel()  # as by a signal that comes before its loop runs
        await host.run("night")
    assert [run.state for run in JobStore(host.state, "night").runs()] == ["interrupted"]
    assert host.told() == ["interrupted night interrupted"]


async def test_a_repository_that_cannot_be_used_is_known_as_such_and_what_was_known_stays(
    tmp_path: Path, store_folder: Path
) -> None:
    host = Host(tmp_path, '[metrics]\nsurvey = "1h"\n', store_folder)
    assert await host.monitoring.survey(["main"]) == []
    before = Surveys(host.state).known("main")
    assert before is not None
    assert await host.monitoring.survey(["main"], after_job=True) == []
    away = store_folder.with_name(f"{store_folder.name}-away")
    store_folder.rename(away)
    (problem,) = await host.monitoring.survey(["main"], always=True)
    assert problem.startswith("repository main: cannot open")
    known = Surveys(host.state).known("main")
    assert known is not None
    assert known["error"]
    assert known["status"]["store"] == "main"
    assert known["time"] >= before["time"]
    assert [event["error"] is None for event in host.events] == [True, True, False]
    # The same error is one event, however often it is met.
    await host.monitoring.survey(["main"], always=True)
    assert len(host.events) == 3
    away.rename(store_folder)
    assert await host.monitoring.survey(["main"]) == [], "an hour has not passed"
    known = Surveys(host.state).known("main")
    assert known is not None
    assert known["error"], "nobody has looked"


async def test_hooks_and_notifications_get_along(tmp_path: Path, store_folder: Path) -> None:
    host = Host(tmp_path, teller(tmp_path), store_folder)
    host.config.job["night"].__dict__["hook"] = script(tmp_path / "hook", '[ "$1" = job-init ] && exit 1; exit 0')
    with pytest.raises(HookError):
        await host.run("night")
    assert host.told() == ["failure night failed"]


async def test_of_a_server_is_known_what_its_token_may_see(store_folder: Path) -> None:
    from agent.monitoring.survey import look_at
    from repository.local import open_local
    from repository.remote.errors import RemoteRefusedError

    class BackupOnly:
        """A repository whose server answers some questions with `status`."""

        def __init__(self, inner: Any, status: int) -> None:
            self._inner, self._status = inner, status

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        async def usage(self) -> Any:
            raise RemoteRefusedError("ask", "main", "no", status=self._status)

        gc_status = usage

    inner = await open_local(store_folder, name="main")
    try:
        repository: Any = BackupOnly(inner, 403)
        status = (await look_at(repository))["status"]
        assert (status["total"], status["used"], status["gc-status"], status["unfinished"]) == (None, None, None, 0)
        repository = BackupOnly(inner, 500)
        with pytest.raises(RemoteRefusedError):
            await look_at(repository)
    finally:
        inner.close()
