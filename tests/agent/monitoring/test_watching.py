"""What the agent does for monitoring, with a clock of its own, and once in a process of its own."""

import json
import os
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent.config import Config
from agent.host_agent import HostAgent
from agent.monitoring.messages import Message
from agent.monitoring.overview import agent_path, agent_state
from agent.monitoring.watching import AgentWatch
from agent.registry import Registry
from tests.support.waiting import PATIENCE_S, until

from ..conftest import Fleece, Popen
from .conftest import a_run, config, record

START = 1_800_000_000.0


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps does not wait for threads."""

    async def here(work: Callable[..., Any], *arguments: object) -> Any:
        await trio.lowlevel.checkpoint()
        return work(*arguments)

    for module in ("watching", "reporter"):
        monkeypatch.setattr(f"agent.monitoring.{module}.in_io_thread", here)
    monkeypatch.setattr("agent.host_agent.in_io_thread", here)


class Watched:
    """An agent whose jobs end as the test says."""

    def __init__(self, folder: Path, text: str, code: int = 0) -> None:
        self.folder, self.code = folder, code
        self.text = f'[events]\nfile = "{folder}/events.jsonl"\n{text}'
        self.said: list[str] = []
        self.refreshed: list[tuple[str, ...]] = []
        self.refresh_code = 0
        self.watch = AgentWatch(folder, Registry(folder / "d.toml"), self.said.append, self.refresh, self.now)
        self.agent = HostAgent(self.load, self.run_job, folder, self.said.append, self.now, watch=self.watch)

    def now(self) -> float:
        return START + trio.current_time()

    def load(self) -> Config:
        return config(self.text)

    async def refresh(self, *arguments: str) -> int:
        self.refreshed.append(arguments)
        return self.refresh_code

    async def run_job(self, name: str) -> int:
        await trio.sleep(5000)
        return self.code

    async def runs_for(self, seconds: float) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.agent.run)
            await trio.sleep(seconds)
            self.agent.stop()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]


async def test_the_agent_says_that_it_lives_writes_metrics_and_looks_at_repositories(
    tmp_path: Path, autojump_clock: MockClock, no_threads: None
) -> None:
    watched = Watched(tmp_path, f'[metrics]\ntextfile = "{tmp_path}/fleece.prom"\nsurvey = "30m"\n')
    up: list[bool] = []

    async def look() -> None:
        await trio.sleep(100)
        up.append("fleece_agent_up 1.0" in (tmp_path / "fleece.prom").read_text())
        up.append(agent_path(tmp_path).exists())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await watched.runs_for(3700)
    assert up == [True, True]
    assert "fleece_agent_up 0.0" in (tmp_path / "fleece.prom").read_text()
    assert not agent_path(tmp_path).exists()
    assert watched.refreshed == [(), (), ()]
    assert [event["event"] for event in watched.events] == ["agent-start", "agent-stop"]


async def test_without_metrics_page_and_notifications_nothing_is_looked_at(
    tmp_path: Path, autojump_clock: MockClock, no_threads: None
) -> None:
    watched = Watched(tmp_path, "")
    await watched.runs_for(7300)
    assert watched.refreshed == []


async def test_a_job_that_was_killed_or_did_not_begin_is_told_by_another_process_or_by_the_agent_itself(
    tmp_path: Path, autojump_clock: MockClock, no_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_here: list[tuple[str, dict[str, str] | None]] = []

    async def deliver(section: Any, message: Message, log: object, *, hurried: bool) -> None:
        told_here.append((message.kind, message.run.error))

    monkeypatch.setattr("agent.monitoring.delivery.deliver", deliver)
    text = '[notify.x]\ntype = "command"\ncommand = "/bin/true"\n[job.sweep]\ntype = "gc"\nschedule = "hourly"\n'
    watched = Watched(tmp_path, text, code=2)
    await watched.runs_for(3600 + 5100)
    told = [arguments for arguments in watched.refreshed if arguments]
    assert told[0][:4] == ("--job", "sweep", "--exit-code", "2")
    assert told_here == []
    # The configuration is broken: no other process can read it.
    watched = Watched(tmp_path, text, code=2)
    watched.refresh_code = 2
    await watched.runs_for(3600 + 5100)
    ((kind, error),) = told_here
    assert kind == "failure"
    assert error is not None
    assert (error["where"], error["why"]) == ("sweep", "it did not begin (exit code 2)")


async def test_jobs_that_ended_well_are_told_by_nobody_else_and_those_left_out_are_events(
    tmp_path: Path, autojump_clock: MockClock, no_threads: None
) -> None:
    watched = Watched(tmp_path, '[job.sweep]\ntype = "gc"\nschedule = "hourly"\n', code=3)
    await watched.runs_for(3 * 3600)
    assert [arguments for arguments in watched.refreshed if arguments] == []
    left = [event for event in watched.events if event["event"] == "job-left-out"]
    assert [event["job"] for event in left] == ["sweep"]


async def test_a_reload_is_an_event_and_so_is_one_that_is_refused(
    tmp_path: Path, autojump_clock: MockClock, no_threads: None
) -> None:
    watched = Watched(tmp_path, "")
    async with trio.open_nursery() as nursery:
        await nursery.start(watched.agent.run)
        await watched.agent.reload()
        watched.text += "[nothing]\n"
        await watched.agent.reload()
        await trio.sleep(100)
        refused = agent_state(tmp_path, watched.agent.now())["refused"]
        watched.text = ""
        await watched.agent.reload()
        await trio.sleep(100)
        assert agent_state(tmp_path, watched.agent.now())["refused"] is None
        watched.agent.stop()
    assert "nothing is no known option" in refused
    reloads = [event["error"] for event in watched.events if event["event"] == "agent-reload"]
    assert reloads[0] is None
    assert "nothing is no known option" in reloads[1]


async def test_the_page_follows_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []

    class Server:
        def __init__(self, *arguments: object) -> None:
            pass

        async def run(self, section: Any) -> None:
            served.append(section.listen)
            try:
                await trio.sleep_forever()
            finally:
                served.append("ended")

    monkeypatch.setattr("agent.monitoring.web.StatusServer", Server)
    watched = Watched(tmp_path, "")
    text = watched.text
    async with trio.open_nursery() as nursery:
        await nursery.start(watched.agent.run)
        one, two = '[status]\nlisten = "127.0.0.1:1"\n', '[status]\nlisten = "127.0.0.1:2"\n'
        for wanted, so_far in (
            (one, ["127.0.0.1:1"]),
            (two, ["127.0.0.1:1", "ended", "127.0.0.1:2"]),
            ("", ["127.0.0.1:1", "ended", "127.0.0.1:2", "ended"]),
        ):
            watched.text = text + wanted
            await watched.agent.reload()
            await until(lambda so_far=so_far: served == so_far)  # type: ignore[misc]
        watched.agent.stop()
    assert len(served) == 4


async def test_what_fails_here_does_not_end_the_agent(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, no_threads: None
) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError("a mistake")

    async def broken_too(*arguments: object) -> None:
        broken()

    monkeypatch.setattr("agent.monitoring.watching.write_document", broken)
    monkeypatch.setattr("agent.monitoring.metrics.write_textfile", broken)
    monkeypatch.setattr("agent.monitoring.web.StatusServer.run", broken_too)
    watched = Watched(tmp_path, f'[status]\n[metrics]\ntextfile = "{tmp_path}/fleece.prom"\n')
    await watched.runs_for(200)
    assert any("a mistake" in text for text in watched.said)


def test_a_real_agent_serves_its_page_in_little_memory(
    fleece: Fleece, tmp_path: Path, ended: Callable[[Popen], Popen]
) -> None:
    (fleece.home / "fleece.toml").write_text(
        f'[status]\nlisten = "127.0.0.1:0"\n[metrics]\ntextfile = "{tmp_path}/fleece.prom"\n'
        '[vm.web]\nqmp = "/nowhere"\n[job.night]\ntype = "backup"\nvm = ["web"]\nschedule = "02:00"\n'
    )
    record(fleece.home / "state", a_run("ok"))
    agent = ended(fleece.start("agent"))
    assert agent.stderr is not None
    said = next(line for line in agent.stderr if "the status page is at" in line)
    page = said.split()[-1].rstrip("/")

    def get(path: str) -> str:
        with urllib.request.urlopen(f"{page}{path}", timeout=PATIENCE_S) as response:
            return str(response.read().decode())

    assert "web: no backup yet" in get("/")
    assert "fleece_agent_up 1.0" in get("/metrics")
    assert json.loads(get("/status.json"))["agent"]["running"] is True
    status = Path(f"/proc/{agent.pid}/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0])
    assert resident < 60 * 1024, f"{resident} KiB"
    assert fleece.json("status")["agent"]["running"] is True
    agent.send_signal(signal.SIGTERM)
    agent.wait(PATIENCE_S)
    assert fleece.json("status")["agent"]["running"] is False
    assert "fleece_agent_up 0.0" in (tmp_path / "fleece.prom").read_text()
    assert not os.path.exists(agent_path(fleece.home / "state"))  # noqa: PTH110
