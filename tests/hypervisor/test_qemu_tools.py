"""The end of QEMU's programs; that they serve images is shown in test_files.py and test_targets.py."""

import logging
import signal
import subprocess
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from hypervisor import qemu_tools


class Hanging:
    """A process that waits for a broken disk: no signal ends it."""

    pid = 4711

    def __init__(self) -> None:
        self.told: list[str] = []

    def terminate(self) -> None:
        self.told.append("terminate")

    def kill(self) -> None:
        self.told.append("kill")

    async def wait(self) -> int:
        await trio.sleep_forever()
        raise AssertionError


async def test_a_server_whose_disk_hangs_is_left_behind_and_told(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    process = Hanging()
    began = trio.current_time()
    with caplog.at_level(logging.WARNING), trio.CancelScope() as scope:
        scope.cancel()  # the end of a cancelled backup takes the same way
        await qemu_tools._stop(cast(trio.Process, process))
    assert process.told == ["terminate", "kill"]
    assert trio.current_time() - began == qemu_tools.STOP_TIMEOUT_S + qemu_tools._KILL_TIMEOUT_S
    assert "process 4711" in caplog.text


@pytest.mark.parametrize(("command", "signalled"), [("sleep 600", signal.SIGTERM), ("exit 3", None)])
async def test_a_server_that_obeys_or_has_ended_is_gone_afterwards(
    command: str, signalled: signal.Signals | None, caplog: pytest.LogCaptureFixture
) -> None:
    process = await trio.lowlevel.open_process(["sh", "-c", f"exec {command}" if signalled else command])
    if signalled is None:
        await process.wait()
    await qemu_tools._stop(process)
    assert process.returncode == (3 if signalled is None else -signalled)
    assert caplog.text == ""


async def test_a_server_that_takes_sigterm_for_nothing_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_tools, "STOP_TIMEOUT_S", 0.1)
    process = await trio.lowlevel.open_process(
        ["sh", "-c", "trap '' TERM; echo ready; while :; do read -r _ || :; done"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with process.stdout:
        with trio.fail_after(60):
            assert await process.stdout.receive_some() == b"ready\n"
        await qemu_tools._stop(process)
    assert process.returncode == -signal.SIGKILL
