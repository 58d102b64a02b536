"""Notifications of type command: what the program gets, and what it may do."""

import json
import os
from pathlib import Path

import pytest
import trio

from agent.monitoring.command import run_command
from agent.monitoring.errors import DeliveryError
from tests.support.waiting import PATIENCE_S, cancelled_when, until

from .conftest import a_message, command, script


def quiet(text: str) -> None:
    pass


async def test_a_program_gets_json_and_variables_and_no_environment_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PBS_PASSWORD", "wonderful")
    program = script(tmp_path / "told", f'env -0 > {tmp_path}/env; cat > {tmp_path}/stdin; echo "$1 said"')
    said: list[str] = []
    await run_command(command(str(program), "a b"), a_message(host="h"), 60, said.append)
    assert said == ["a b said"]
    found = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().split("\0") if line)
    assert {name for name in found if not name.startswith("FLEECE_")} <= {"PATH", "PWD", "SHLVL", "_", "OLDPWD"}
    assert (found["FLEECE_KIND"], found["FLEECE_JOB"], found["FLEECE_LEFT_OUT"]) == ("failure", "night", "0")
    assert found["FLEECE_SUBJECT"] == "[fleece] h: job night has failed"
    assert "\x1b" not in found["FLEECE_ERROR"]
    document = json.loads((tmp_path / "stdin").read_text())
    assert (document["schema"], document["subject"], document["kind"]) == (
        1,
        "[fleece] h: job night has failed",
        "failure",
    )
    assert "body" not in document
    await run_command(command(str(program), text='body = "$job!"'), a_message(), 60, said.append)
    assert json.loads((tmp_path / "stdin").read_text())["body"] == "night!"


async def test_a_program_that_reads_nothing_is_no_failure_and_one_that_fails_is(tmp_path: Path) -> None:
    message = a_message()
    message.run.warnings = ["w" * 1000] * 100  # more than a pipe takes
    program = script(tmp_path / "told", "exit 0")
    await run_command(command(str(program)), message, 60, quiet)
    script(program, "exit 3")
    with pytest.raises(DeliveryError, match="exit code 3") as raised:
        await run_command(command(str(program)), message, 60, quiet)
    assert not raised.value.temporary
    script(program, "exit 75")
    with pytest.raises(DeliveryError, match="exit code 75") as raised:
        await run_command(command(str(program)), message, 60, quiet)
    assert raised.value.temporary


async def test_a_program_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    program = script(tmp_path / "told", "exec sleep 1000")
    with trio.fail_after(PATIENCE_S), pytest.raises(DeliveryError, match="killed"):
        await run_command(command(str(program)), a_message(), 1, quiet)
    script(program, f"sleep 1000 & echo $! > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; wait")
    async with cancelled_when((tmp_path / "pid").exists):
        await run_command(command(str(program)), a_message(), 1000, quiet)
    pid = int((tmp_path / "pid").read_text())
    await until(lambda: not _lives(pid))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
