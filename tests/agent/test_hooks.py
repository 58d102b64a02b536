"""Hook scripts: what they are called with, how they fail, and that one which hangs is ended with all it started."""

import os
import stat
import time
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from agent import hooks as module
from agent.errors import HookError
from agent.hooks import Hook, Hooks, check_script, job_phases


def script(folder: Path, text: str) -> Path:
    path = folder / "hook"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def gone(pid: int) -> None:
    with trio.fail_after(30):
        while alive(pid):  # noqa: ASYNC110 - only the system knows
            await trio.sleep(0.01)


async def number_in(path: Path) -> int:
    with trio.fail_after(30):
        while not (path.exists() and path.read_text().endswith("\n")):  # noqa: ASYNC110
            await trio.sleep(0.01)
    return int(path.read_text())


async def test_a_script_gets_phase_mode_id_and_no_variables_but_those_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PBS_PASSWORD", "secret")
    path = script(tmp_path, f'echo "$@"; /usr/bin/env | /usr/bin/sort > {tmp_path}/env; pwd')
    said: list[str] = []
    hooks = Hooks(Hook(path), said.append, {"FLEECE_JOB": "night"}).of(said.append, VMTYPE="qemu", HOSTNAME="web")
    await hooks.call("backup-end", "snapshot", "100", TARGET="vm/100/2026-01-02T03:04:05Z")
    assert said == ["hook: backup-end snapshot 100", "  backup-end snapshot 100", "  /"]
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert names - {"PWD", "_", "SHLVL", "OLDPWD"} == {"PATH", "FLEECE_JOB", "VMTYPE", "HOSTNAME", "TARGET"}


async def test_a_failure_tells_how_the_script_ended(tmp_path: Path) -> None:
    for text, how in (("exit 3", "exit code 3"), ("kill -9 $$", "signal 9")):
        with pytest.raises(HookError, match=f"cannot run the hook {tmp_path}/hook job-start: it ended with {how}"):
            await Hook(script(tmp_path, text)).call(("job-start",), {}, lambda line: None)


def test_only_an_executable_file_that_nobody_else_can_change_is_run(tmp_path: Path) -> None:
    path = script(tmp_path, "exit 0")
    check_script(path)
    for mode, why in ((0o757, "others than root"), (0o644, "no executable file")):
        path.chmod(mode)
        with pytest.raises(HookError, match=why):
            check_script(path)
    # A group of this user's own, as each has on Debian, is no other.
    path.chmod(0o775)
    check_script(path)
    if os.geteuid() == 0:
        os.chown(path, 0, 65534)
        with pytest.raises(HookError, match="others than root"):
            check_script(path)
        os.chown(path, 0, 0)
    with pytest.raises(HookError, match="no executable file"):
        check_script(tmp_path)
    with pytest.raises(HookError, match="No such file"):
        check_script(tmp_path / "missing")
    assert stat.S_ISREG(path.stat().st_mode)


async def test_what_is_no_program_at_all_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "hook"
    path.write_bytes(b"\x7fELF nonsense")
    path.chmod(0o755)
    with pytest.raises(HookError, match="Exec format error"):
        await Hook(path).call(("job-init",), {}, lambda line: None)
    with pytest.raises(HookError, match="null"):
        await Hook(script(tmp_path, "exit 0")).call(("job-init",), {"A": "b\0c"}, lambda line: None)


async def test_a_script_that_hangs_is_ended_with_its_children_even_if_they_ignore_it(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    path = script(tmp_path, f"trap '' TERM; (trap '' TERM; sleep 1000) & echo $! > {tmp_path}/child; sleep 1000")
    failures: list[HookError] = []

    async def call() -> None:
        with pytest.raises(HookError) as caught:
            await Hook(path, option="timeout in [x]").call(("pre-stop", "snapshot", "1"), {}, lambda line: None)
        failures.append(caught.value)

    def child() -> int:
        deadline = time.monotonic() + 60
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().endswith("\n"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return int((tmp_path / "child").read_text())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        pid = await trio.to_thread.run_sync(child)
        mock_clock.rate = 1000.0  # the ten minutes that it has
    assert "it did not end in 10 min" in str(failures[0])
    assert "timeout in [x] gives it more time" in str(failures[0])
    mock_clock.rate = 1.0
    await gone(pid)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # that it is still running
async def test_a_script_that_nobody_may_end_does_not_hold_up_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.05)
    monkeypatch.setattr(module, "_DRAIN_S", 0.05)
    path = script(tmp_path, f"echo $$ >{tmp_path}/pid; exec /usr/bin/sleep 60")
    kill = os.killpg

    def refused(group: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "killpg", refused)
    with trio.fail_after(30), pytest.raises(HookError, match="and cannot be killed: it still runs"):
        await Hook(path, 1.0).call(("job-start",), {}, lambda _: None)
    pid = await number_in(tmp_path / "pid")
    assert alive(pid)
    kill(pid, 9)
    await gone(pid)


async def test_a_cancelled_call_leaves_no_process(tmp_path: Path) -> None:
    path = script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Hook(path).call, ("job-init",), {}, print)
        pid = await number_in(tmp_path / "pid")
        nursery.cancel_scope.cancel()
    assert not alive(pid)


async def test_a_process_that_a_script_leaves_behind_does_not_hold_up_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DRAIN_S", 0.1)
    path = script(tmp_path, f"sleep 1000 & echo $! > {tmp_path}/child; printf done")
    said: list[str] = []
    began = time.monotonic()
    await Hook(path).call(("job-init",), {}, said.append)
    assert time.monotonic() - began < 300
    assert said == ["done"]
    os.kill(await number_in(tmp_path / "child"), 9)


async def test_output_is_logged_up_to_a_limit_and_without_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_OUTPUT", 1000)
    path = script(
        tmp_path, "printf 'a\\033[2Jb\\n\\377\\n'; i=0; while [ $i -lt 999 ]; do echo 0123456789; i=$((i+1)); done"
    )
    said: list[str] = []
    await Hook(path).call(("job-init",), {}, said.append)
    assert said[:2] == ["a?[2Jb", "\\xff"]
    assert "(the script says more than is logged)" in said[-1] + said[-2]
    assert len(said) < 100


async def test_phases_that_tell_of_a_failure_are_logged_and_never_raise(tmp_path: Path) -> None:
    said: list[str] = []
    hooks = Hooks(Hook(script(tmp_path, f'echo "$1" >> {tmp_path}/calls; exit 1')), said.append)
    await hooks.tell("log-end", "stop", "1")
    assert said[-1].startswith("not heeded: cannot run the hook")
    with pytest.raises(HookError):
        async with job_phases(hooks):
            raise AssertionError("the block must not begin")
    assert (tmp_path / "calls").read_text().split() == ["log-end", "job-init", "job-abort"]


async def test_a_job_that_is_cancelled_still_calls_job_abort(tmp_path: Path) -> None:
    hooks = Hooks(Hook(script(tmp_path, f'echo "$1" >> {tmp_path}/calls')), lambda line: None)
    with trio.CancelScope() as scope:
        async with job_phases(hooks):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert (tmp_path / "calls").read_text().split() == ["job-init", "job-abort"]
    async with job_phases(hooks):
        pass
    assert (tmp_path / "calls").read_text().split()[2:] == ["job-init", "job-end"]
    async with job_phases(Hooks(None, print)):  # without a script
        pass
