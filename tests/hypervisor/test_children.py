"""Programs that end with the process that started them, however it ends."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio

from core.errors import SourceError
from hypervisor.children import end_process, running
from hypervisor.unix_socket import process_start_time
from tests.support.waiting import until

DEAF = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"]


async def test_it_runs_while_the_block_does_and_is_heard() -> None:
    async with running(["sh", "-c", "echo one; echo two >&2; exec sleep 1000"]) as child:
        await until(lambda: child.heard == "one two")
        assert (child.code, process_start_time(child.pid)) == (None, child.start_time)
    assert child.code == -signal.SIGTERM


async def test_its_last_words_are_there_when_it_has_ended() -> None:
    async with running(["sh", "-c", "yes x | head -c 100000; exit 3"]) as child:
        words = await child.last_words()
        assert (child.code, await child.wait()) == (3, 3)
        assert words.startswith("x x x")
        assert len(words) < 4001


async def test_several_may_wait_for_its_end() -> None:
    codes: list[int] = []
    async with running(["sleep", "1000"]) as child, trio.open_nursery() as nursery:

        async def wait() -> None:
            codes.append(await child.wait())

        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        child.terminate()
    assert codes == [-signal.SIGTERM] * 2


async def test_one_that_hears_nothing_is_killed() -> None:
    async with running(DEAF, stop_s=0.1) as child:
        await until(lambda: child.heard)
    assert child.code == -signal.SIGKILL


async def test_an_error_of_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(SourceError, match="cannot go on"):
        async with running(["sleep", "1000"]) as child:
            raise SourceError("go", "on", "why")
    assert child.code == -signal.SIGTERM


async def test_a_cancelled_block_ends_it() -> None:
    with trio.CancelScope() as scope:
        async with running(["sleep", "1000"]) as child:
            scope.cancel()
            await trio.sleep_forever()
    assert child.code == -signal.SIGTERM


async def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(SourceError, match="cannot run /no/such: "):
        async with running(["/no/such"]) as child:
            # `setpriv` runs, and says that it cannot run the program.
            raise SourceError("run", "/no/such", await child.last_words())


async def test_it_is_started_in_the_thread_that_lives_as_long_as_the_loop() -> None:
    # One of trio's own would end when idle, and take the program along.
    async with running(["sleep", "1000"]) as child:
        task = Path(f"/proc/self/task/{threading.main_thread().native_id}/children")
        assert str(child.pid) in task.read_text().split()


async def test_a_killed_parent_takes_it_along() -> None:
    code = """
import trio
from hypervisor.children import running
async def main():
    async with running(["sleep", "1000"]) as child:
        while open(f"/proc/{child.pid}/comm").read() != "sleep\\n":
            await trio.sleep(0.01)
        print(child.pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        pid = int(await trio.to_thread.run_sync(process.stdout.readline))
        start = process_start_time(pid)
        assert start is not None
        process.kill()
        await until(lambda: process_start_time(pid) != start)


@pytest.mark.parametrize(("line", "first_s"), [(["sleep", "1000"], 0.0), (["true"], 60.0)])
async def test_a_process_that_is_no_child_is_ended_by_its_descriptor(line: list[str], first_s: float) -> None:
    async with running(line) as child:
        descriptor = os.pidfd_open(child.pid)
        try:
            with trio.fail_after(30):
                assert await end_process(descriptor, first_s=first_s)
        finally:
            os.close(descriptor)


async def test_one_that_does_not_even_die_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypervisor.children.KILL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda descriptor, number: None)
    async with running(["sleep", "1000"]) as child:
        descriptor = os.pidfd_open(child.pid)
        try:
            assert not await end_process(descriptor, stop_s=0.05)
        finally:
            os.close(descriptor)
