"""Whether a cancellation ends a backup depends on whether its snapshot is listed."""

import pytest
import trio

from agent.sessions import new_session, until_listed
from core.progress import Progress
from datastore.names import Group
from tests.support.sessions import MemoryRepository

SNAPSHOT = Group.parse("vm/100").at(1000)


async def test_until_the_snapshot_is_listed_a_cancellation_ends_the_block() -> None:
    progress = Progress()
    with trio.CancelScope() as outer, until_listed(progress):
        outer.cancel()
        await trio.sleep_forever()
    assert outer.cancelled_caught
    assert progress.warnings == []


async def test_from_then_on_the_block_goes_on_and_the_warning_names_the_snapshot() -> None:
    progress = Progress()
    done = []
    with trio.CancelScope() as outer:
        with until_listed(progress) as listed:
            listed(SNAPSHOT)
            outer.cancel()
            await trio.sleep(0.01)
            done.append("clean-up")
        done.append("after")
    assert done == ["clean-up", "after"]
    (warning,) = progress.warnings
    assert f"the snapshot {SNAPSHOT} is whole and listed" in warning


async def test_a_backup_that_nobody_interrupts_has_no_warning() -> None:
    progress = Progress()
    with until_listed(progress) as listed:
        listed(SNAPSHOT)
        await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()
    assert progress.warnings == []


async def test_an_error_after_the_snapshot_is_not_hidden() -> None:
    progress = Progress()
    with pytest.raises(KeyError, match="mine"), until_listed(progress) as listed:
        listed(SNAPSHOT)
        raise KeyError("mine")


async def test_warnings_of_a_session_are_told_once_those_of_its_end_too() -> None:
    progress = Progress()
    async with new_session(MemoryRepository(), SNAPSHOT.group, owner="root@pam", progress=progress) as session:
        assert isinstance(session.warnings, list)
        session.warnings.extend(["of its end", "and another one"])
    assert progress.warnings == ["of its end", "and another one"]
