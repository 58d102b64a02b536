"""Death and disk errors at every single change of a small backup."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from core.errors import FleeceError
from datastore.files import SyncLevel
from tests.support.cache import ROOT
from tests.support.crash import back_up, check, failing_at, leftovers
from tests.support.disk_errors import each_in_turn

#: More changing calls than the small backup makes.
MOST_CALLS = 45


@pytest.mark.parametrize("level", ["filesystem", "file", "none"])
def test_killed_at_any_call_a_backup_leaves_a_sound_store(store_folder: Path, level: str) -> None:
    assert run(store_folder, level, "kill", MOST_CALLS, 1).returncode == 0


@pytest.mark.parametrize("level", ["filesystem", "file"])
def test_after_a_power_cut_at_any_call_every_listed_snapshot_is_whole(store_folder: Path, level: str) -> None:
    assert run(store_folder, level, "power", MOST_CALLS, 1).returncode == 0


def test_the_power_cut_is_a_real_one(store_folder: Path) -> None:
    """Level `none` promises nothing: after a finished backup the same simulation must find it damaged."""
    done = run(store_folder, "none", "power", MOST_CALLS, MOST_CALLS)
    assert done.returncode == 1
    assert "call 45, data: see above" in done.stdout


def run(store: Path, level: str, how: str, most: int, step: int) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.support.crash", str(store), level, how, str(most), str(step)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout, done.stderr)
    calls = [int(count) for count in re.findall(r"^(\d+) calls$", done.stdout, re.MULTILINE)]
    # The last rounds must outlive the backup, else some call was never died at.
    assert calls
    assert 20 < max(calls) < most
    return done


@each_in_turn
async def test_a_disk_error_at_any_call_is_a_clear_error_and_harms_nothing(
    store_folder: Path, codes: Sequence[int]
) -> None:
    await back_up(store_folder, SyncLevel.FILE, 1000)
    number, ctime, failures = 0, 1000, 0
    while True:
        number += 1
        ctime += 10
        try:
            with failing_at(number, codes[number % len(codes)]) as count:
                await back_up(store_folder, SyncLevel.FILE, ctime)
        except FleeceError:
            failures += 1
        assert len(await check(store_folder)) >= 1
        if count[0] < number:
            break
        await back_up(store_folder, SyncLevel.FILE, ctime + 5)
        assert leftovers(store_folder) == []
    assert failures > 20


class Canceller(trio.abc.Instrument):
    """Cancels `scope` just before the `number`-th step of the running task."""

    def __init__(self, scope: trio.CancelScope, number: int) -> None:
        self.steps, self._scope, self._number = 0, scope, number
        self._task = trio.lowlevel.current_task()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self.steps += 1
            if self.steps == self._number:
                self._scope.cancel()


async def test_cancelled_at_any_checkpoint_a_backup_leaves_nothing(store_folder: Path) -> None:
    descriptors = Path("/proc/self/fd")
    before, number, cancelled = len(list(descriptors.iterdir())), 0, 0
    while True:
        number += 1
        with trio.CancelScope() as scope:
            canceller = Canceller(scope, number)
            trio.lowlevel.add_instrument(canceller)
            try:
                await back_up(store_folder, SyncLevel.FILESYSTEM, 1000 + number)
            finally:
                trio.lowlevel.remove_instrument(canceller)
        cancelled += scope.cancelled_caught
        assert leftovers(store_folder) == []
        assert list((store_folder / ".fleece/writers").glob("*")) == []
        assert len(list(descriptors.iterdir())) == before
        if canceller.steps < number:
            break
        shutil.rmtree(store_folder / "vm", ignore_errors=True)
    assert cancelled > 20
    assert len(await check(store_folder)) == 1
