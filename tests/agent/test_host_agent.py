"""The service: what is due when, missed times, reload, stop, and what it tells systemd."""

import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from agent import host_agent
from agent.cli_agent import loader
from agent.config import Config, parse_config
from agent.due_jobs import DueJobs
from agent.host_agent import ChildRunner, HostAgent
from agent.invocation import Invocation
from agent.job_store import JobStore
from core.errors import BusyError, UsageError
from core.systemd import notify, watchdog_s
from datastore.names import parse_time
from tests.support.waiting import PATIENCE_S, cancelled_when, until

from .conftest import Fleece, Popen

START = parse_time("2026-03-02T12:00:00Z")
HOUR = 3600


def jobs(text: str) -> Config:
    return parse_config(text, "f")


DAILY = '[job.sweep]\ntype = "gc"\nschedule = "02:00 UTC"\n'


class Notified:
    """The socket that systemd would listen at."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self._lines: list[str] = []
        self._marks: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self) -> None:
        while (message := self._socket.recv(65536).decode()) != "end":
            if message == "mark":
                self._marks.put(message)
            else:
                self._lines += message.splitlines()

    def _send(self, message: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), self._path)

    def read(self) -> list[str]:
        """All lines that were sent until now."""
        self._send("mark")
        self._marks.get(timeout=120)
        return list(self._lines)

    def close(self) -> None:
        self._send("end")
        self._thread.join()
        self._socket.close()


@pytest.fixture
def notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notified]:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    found = Notified(tmp_path / "notify")
    yield found
    found.close()


def due_at(folder: Path, now: float, config: Config, last: float | None = None) -> tuple[float, str] | None:
    found = DueJobs(folder, lambda: now)
    found.take(config.job, lambda name: last)
    return found.next()


def test_a_new_job_waits_for_its_time_and_a_missed_one_is_made_up_for_once(tmp_path: Path) -> None:
    config = jobs(DAILY)
    assert due_at(tmp_path, START, config) == (START + 14 * HOUR, "sweep")
    # The host was off for three days.
    later = START + 72 * HOUR
    found = DueJobs(tmp_path, lambda: later)
    found.take(config.job, lambda name: None)
    assert found.due() == ["sweep"]
    found.begin("sweep")
    assert found.due() == []
    found.end("sweep")
    assert due_at(tmp_path, later + 1, config) == (START + 86 * HOUR, "sweep")


def test_no_time_is_made_up_for_that_a_run_by_hand_or_a_new_schedule_came_after(tmp_path: Path) -> None:
    due_at(tmp_path, START, jobs(DAILY))
    later = START + 20 * HOUR
    assert due_at(tmp_path, later, jobs(DAILY), last=START + 15 * HOUR) == (START + 38 * HOUR, "sweep")
    assert due_at(tmp_path, later, jobs(DAILY + "catch-up = false\n")) == (START + 38 * HOUR, "sweep")
    assert due_at(tmp_path, later, jobs(DAILY), last=START + 1) == (START + 14 * HOUR, "sweep")
    assert due_at(tmp_path, later, jobs(DAILY.replace("02:00", "03:00"))) == (START + 39 * HOUR, "sweep")
    assert due_at(tmp_path, later, jobs("")) is None
    assert due_at(tmp_path, later, jobs('[job.x]\ntype = "gc"\n')) is None


def test_a_run_that_was_cut_off_is_made_up_for(tmp_path: Path) -> None:
    found = DueJobs(tmp_path, lambda: START)
    found.take(jobs(DAILY).job, lambda name: None)
    found.begin("sweep")
    assert due_at(tmp_path, START + 60, jobs(DAILY)) == (START + 60, "sweep")
    assert due_at(tmp_path, START + 60, jobs(DAILY + "catch-up = false\n")) == (START + 14 * HOUR, "sweep")


def test_a_clock_that_is_set_while_the_agent_runs_stops_no_schedule(tmp_path: Path) -> None:
    clock = [float(START + 10 * 365 * 24 * HOUR)]
    found = DueJobs(tmp_path, lambda: clock[0])
    found.take(jobs(DAILY).job, lambda _: None)
    ahead = found.next()
    assert ahead is not None
    clock[0] = ahead[0]
    assert found.due() == ["sweep"]
    found.begin("sweep")
    found.end("sweep")
    # Right again: not in ten years, but at the next time there is.
    clock[0] = START
    assert found.due() == []
    assert found.next() == (START + 14 * HOUR, "sweep")
    clock[0] = START + 14 * HOUR
    assert found.due() == ["sweep"]
    found.begin("sweep")
    # A little back, as time servers do it: what was done at two o'clock is not done again.
    clock[0] -= 5
    assert found.due() == []
    assert found.next() == (START + 38 * HOUR, "sweep")
    # Nor if the configuration is read again then, or the agent is started anew.
    found.take(jobs(DAILY).job, lambda _: START + 14 * HOUR, ["sweep"])
    assert found.next() == (START + 38 * HOUR, "sweep")
    found.end("sweep")
    assert due_at(tmp_path, clock[0], jobs(DAILY), START + 14 * HOUR) == (START + 38 * HOUR, "sweep")


@pytest.mark.parametrize("catch_up", [True, False])
def test_a_time_that_the_host_slept_through_is_missed(catch_up: bool, tmp_path: Path) -> None:
    clock = [float(START)]
    found = DueJobs(tmp_path, lambda: clock[0])
    found.take(jobs(DAILY + f"catch-up = {str(catch_up).lower()}\n").job, lambda _: None)
    clock[0] = START + 14 * HOUR + 100
    assert found.due() == ["sweep"]
    clock[0] = START + 20 * HOUR
    assert found.due() == (["sweep"] if catch_up else [])
    assert found.next() == (START + (14 if catch_up else 38) * HOUR, "sweep")


def test_a_time_that_comes_while_the_agent_is_started_anew_is_not_missed(tmp_path: Path) -> None:
    config = jobs(DAILY + "catch-up = false\n")
    due_at(tmp_path, START, config)
    assert due_at(tmp_path, START + 14 * HOUR + 5, config) == (START + 14 * HOUR, "sweep")


def test_a_damaged_state_and_a_clock_that_was_set_back_count_from_now(tmp_path: Path) -> None:
    entries = [b'{"sweep": {"schedule": "02:00 UTC", "since": %b, "begun": 0}}' % since
               for since in (b'"x"', b"NaN", b"-Infinity", b"1" + 400 * b"0")]  # fmt: skip
    for text in (b"", b"{", b"[]", b'{"sweep": 1}', *entries):
        (tmp_path / "schedule.json").write_bytes(text)
        assert due_at(tmp_path, START, jobs(DAILY)) == (START + 14 * HOUR, "sweep")
    due_at(tmp_path, START + 1000 * HOUR, jobs(DAILY))
    assert due_at(tmp_path, START, jobs(DAILY), last=START + 900 * HOUR) == (START + 14 * HOUR, "sweep")


class Host:
    """An agent with a clock of its own and jobs that last as long as the test says."""

    def __init__(self, folder: Path, text: str, lasts_s: float = 60.0) -> None:
        self.text, self.lasts_s = text, lasts_s
        self.ran: list[tuple[str, float]] = []
        self.ended: list[str] = []
        self.said: list[str] = []
        self.agent = HostAgent(lambda: jobs(self.text), self.run_job, folder, self.said.append, self.now)

    def now(self) -> float:
        return START + trio.current_time()

    async def run_job(self, name: str) -> int:
        self.ran.append((name, self.now() - START))
        try:
            await trio.sleep(self.lasts_s)
        except trio.Cancelled:
            self.ended.append(name)
            raise
        return 0


async def test_jobs_run_when_they_are_due_side_by_side_and_never_twice_at_a_time(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    text = '[job.a]\ntype = "gc"\nschedule = "*:0/20 UTC"\n[job.b]\ntype = "gc"\nschedule = "hourly UTC"\n'
    host = Host(tmp_path, text, lasts_s=25 * 60)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.agent.run)
        await trio.sleep(2 * HOUR + 60)
        nursery.cancel_scope.cancel()
    begun = [(name, round(at / 60)) for name, at in host.ran]
    assert sorted(begun) == [("a", 20), ("a", 60), ("a", 100), ("b", 60), ("b", 120)]
    assert sum("job a is due, but still runs" in text for text in host.said) == 3


async def test_reload_takes_a_new_configuration_and_leaves_a_wrong_one_and_running_jobs_alone(
    tmp_path: Path, autojump_clock: MockClock, notified: Notified
) -> None:
    host = Host(tmp_path, '[job.a]\ntype = "gc"\nschedule = "12:10 UTC"\n', lasts_s=HOUR)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.agent.run)
        first = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(START + 600))
        assert notified.read()[:2] == ["READY=1", f"STATUS=Next: a at {first}"]
        await trio.sleep(700)
        host.text = "[job.a]\n"
        await host.agent.reload()
        assert "the old configuration stays in use" in host.said[-1]
        host.text = '[job.b]\ntype = "gc"\nschedule = "12:30 UTC"\n'
        await host.agent.reload()
        host.text += '[job.a]\ntype = "gc"\nschedule = "12:10 UTC"\n'
        await host.agent.reload()
        await trio.sleep(1800)
        host.agent.stop()
    assert [(name, round(at)) for name, at in host.ran] == [("a", 600), ("b", 1800)]
    lines = notified.read()
    assert [line for line in lines if line in ("READY=1", "RELOADING=1", "STOPPING=1")] == [
        "READY=1", *["RELOADING=1", "READY=1"] * 3, "STOPPING=1",
    ]  # fmt: skip
    assert sum(line.startswith("MONOTONIC_USEC=") for line in lines) == 3


async def test_stop_ends_running_jobs_and_their_time_is_made_up_for_at_the_next_start(
    tmp_path: Path, autojump_clock: MockClock, notified: Notified
) -> None:
    host = Host(tmp_path, '[job.a]\ntype = "gc"\nschedule = "12:10 UTC"\n', lasts_s=HOUR)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.agent.run)
        await trio.sleep(700)
        host.agent.stop()
        host.agent.stop()
    assert host.ended == ["a"]
    assert notified.read().count("STOPPING=1") == 1
    again = Host(tmp_path, host.text)
    async with trio.open_nursery() as nursery:
        await nursery.start(again.agent.run)
        await trio.sleep(100)
        again.agent.stop()
    assert len(again.ran) == 1
    third = Host(tmp_path, host.text)
    async with trio.open_nursery() as nursery:
        await nursery.start(third.agent.run)
        await trio.sleep(100)
        third.agent.stop()
    assert third.ran == []


@pytest.mark.parametrize(("code", "again"), [(0, 0), (3, 0), (1, 1)])
async def test_a_job_that_was_done_when_the_agent_ended_it_is_not_run_again(
    tmp_path: Path, code: int, again: int
) -> None:
    """It was in its last steps, or ended by itself at that moment; what failed then counts as cut off."""
    script = tmp_path / "job"
    script.write_text(f"#!/bin/sh\ntrap 'exit {code}' TERM\n: >{tmp_path}/ready\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    config = jobs(DAILY)
    due = DueJobs(tmp_path / "agent", lambda: START)
    due.take(config.job, lambda name: None)
    due.begin("sweep")  # as an earlier agent left it, so that it begins at once
    said: list[str] = []
    agent = HostAgent(lambda: config, ChildRunner(program=(str(script),)), tmp_path, said.append, lambda: START + 60.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        await until((tmp_path / "ready").exists)
        agent.stop()
    assert sum("job sweep has" in text for text in said) == (not again)
    found = due_at(tmp_path / "agent", START + 120, config)
    assert found == ((START + 120 if again else START + 14 * HOUR), "sweep")


async def test_a_job_gets_the_configuration_that_the_agent_has_and_not_what_its_file_has_become(tmp_path: Path) -> None:
    script, seen = tmp_path / "job", tmp_path / "seen"
    script.write_text(f'#!/bin/sh\n[ "$5" = --config ] && cat "$6" >{seen}\n')
    script.chmod(0o755)
    (tmp_path / "fleece.toml").write_text("in the middle of being edited")
    runner = ChildRunner(program=(str(script),))
    for text in (DAILY, f"# {'é' * 200_000}\n{DAILY}"):
        runner.config = text
        assert await runner("sweep") == 0
        assert seen.read_text() == text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # that it still runs
async def test_a_job_that_cannot_be_killed_does_not_keep_the_agent_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_agent, "_KILLED_S", 0.05)
    monkeypatch.setattr(trio.Process, "kill", lambda process: None)
    script, pid = tmp_path / "job", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\ntrap '' TERM\necho $$ >{pid}\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    try:
        with trio.fail_after(PATIENCE_S):
            async with cancelled_when(lambda: pid.exists() and pid.read_text().endswith("\n")) as scope:
                await ChildRunner(stop_timeout_s=0.05, program=(str(script),))("sweep")
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert scope.cancelled_caught


async def test_a_second_agent_is_refused_and_a_state_that_cannot_be_written_stops_no_job(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    host = Host(tmp_path, '[job.a]\ntype = "gc"\nschedule = "12:10 UTC"\n')
    (tmp_path / "agent/schedule.new").mkdir(parents=True)  # in the way of the file
    async with trio.open_nursery() as nursery:
        await nursery.start(host.agent.run)
        with pytest.raises(BusyError, match="another one runs already"):
            await Host(tmp_path, host.text).agent.run()
        await trio.sleep(700)
        host.agent.stop()
    assert len(host.ran) == 1
    assert "cannot write the agent's state" in host.said[0]


async def test_a_configuration_that_is_wrong_at_the_start_ends_the_agent(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"job\.a\.type is missing"):
        await Host(tmp_path, "[job.a]\n").agent.run()


def test_a_configuration_that_is_gone_is_refused_and_not_taken_for_one_without_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runner = tmp_path / "fleece.toml", ChildRunner()
    monkeypatch.delenv("FLEECE_CONFIG", raising=False)
    monkeypatch.setattr("agent.places.config_file", lambda: path)
    load = loader(Invocation(), runner)
    assert load().job == {}  # a user's agent, before there is one
    path.write_text(DAILY)
    assert list(load().job) == ["sweep"]
    path.unlink()
    with pytest.raises(UsageError, match="there is no such file"):
        load()
    assert runner.config == DAILY


async def test_the_watchdog_hears_of_the_loop_and_not_of_one_that_hangs(
    tmp_path: Path, autojump_clock: MockClock, notified: Notified, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    host = Host(tmp_path, DAILY)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.agent.run)
        await trio.sleep(1000)
        assert notified.read().count("WATCHDOG=1") >= 100
        # As if the loop had not come round for long.
        monkeypatch.setattr(host.agent, "_looked", -1e9)
        before = len(notified.read())
        await trio.sleep(15)
        assert len(notified.read()) == before
        host.agent.stop()


def test_what_systemd_does_not_ask_for_it_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for socket_name in ("", "relative", "/nowhere/at/all", "@nobody-listens-here"):
        monkeypatch.setenv("NOTIFY_SOCKET", socket_name)
        notify("READY=1")
    for text, pid, expected in (("", "", None), ("0", "", None), ("x", "", None), ("5000000", "1", None)):
        monkeypatch.setenv("WATCHDOG_USEC", text)
        monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
        assert watchdog_s() == expected
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_s() == 5.0


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_command_runs_jobs_is_small_and_ends_one_in_the_middle_leaving_nothing_half(
    fleece: Fleece, store_folder: Path, ended: Callable[[Popen], Popen], notified: Notified
) -> None:
    hook = fleece.home / "hook"
    hook.write_text(
        f"#!/bin/sh\necho $1 >> {fleece.home}/calls\n"
        f"[ $1 = backup-end ] && [ -e {fleece.home}/hang ] && touch {fleece.home}/hangs && exec sleep 1000\nexit 0\n"
    )
    hook.chmod(0o755)
    (fleece.home / "fleece.toml").write_text(
        f'default-repository = "main"\n[repository.main]\npath = "{store_folder}"\n'
        f'[job.night]\ntype = "backup"\nschedule = "*:*:0/2"\nbackup-id = "box"\nhook = "{hook}"\n'
        f'archives = ["conf.conf:{fleece.home}/fleece.toml"]\n'
    )
    calls, store = fleece.home / "calls", JobStore(fleece.home / "state", "night")
    running = ended(fleece.start("agent"))
    wait_until(lambda: any(run.state == "ok" for run in store.runs()))
    status = Path(f"/proc/{running.pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert resident < 60_000, f"{resident} KiB"
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: notified.read().count("READY=1") == 2)
    (fleece.home / "hang").touch()
    wait_until((fleece.home / "hangs").exists)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert (running.returncode, "Traceback" in said) == (0, False), said
    assert store.runs()[-1].state == "interrupted"
    assert calls.read_text().split()[-3:] == ["backup-abort", "log-end", "job-abort"]
    assert "STOPPING=1" in notified.read()
    listed = fleece.json("list", "--unfinished", "--repo", "main")
    assert all(one["files"] for one in listed)
