"""Nurseries raise one error."""

import pytest
import trio
from trio.testing import MockClock

from core.errors import FleeceError, SourceError
from core.nursery import grace, one_error, open_nursery


async def fail(error: BaseException) -> None:
    raise error


async def test_error_of_a_task_comes_out_as_it_is() -> None:
    with pytest.raises(SourceError, match="broken"):
        async with open_nursery() as nursery:
            nursery.start_soon(fail, SourceError("read", "disk", "broken"))


async def test_error_comes_out_of_nested_nurseries() -> None:
    with pytest.raises(SourceError):
        async with open_nursery() as outer:
            outer.start_soon(trio.sleep_forever)
            async with open_nursery() as inner:
                inner.start_soon(trio.sleep_forever)
                inner.start_soon(fail, SourceError("read", "disk", "broken"))


@pytest.mark.parametrize(
    ("errors", "wanted"),
    [
        ([FleeceError("a", "b", "c"), ValueError("a bug")], ValueError),
        ([FleeceError("a", "b", "c"), KeyboardInterrupt()], KeyboardInterrupt),
        ([ValueError("a bug"), KeyboardInterrupt()], KeyboardInterrupt),
    ],
)
async def test_interrupts_come_before_bugs_and_bugs_before_our_own_errors(
    errors: list[BaseException], wanted: type[BaseException]
) -> None:
    with pytest.raises(wanted):
        async with open_nursery() as nursery:
            for error in errors:
                nursery.start_soon(fail, error)


async def test_cause_of_the_error_is_kept() -> None:
    cause = OSError(5, "Input/output error")
    error = SourceError("read", "disk", "broken")
    error.__cause__ = cause
    with pytest.raises(SourceError) as caught:
        async with open_nursery() as nursery:
            nursery.start_soon(fail, error)
    assert caught.value.__cause__ is cause


async def test_cancellation_from_outside_passes_through() -> None:
    with trio.move_on_after(0.01) as scope:
        async with open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)
    assert scope.cancelled_caught


async def test_error_during_cancellation_is_not_lost() -> None:
    async def clean_up_badly() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise SourceError("close", "disk", "broken")

    with pytest.raises(SourceError), trio.CancelScope() as scope:
        async with open_nursery() as nursery:
            nursery.start_soon(clean_up_badly)
            nursery.start_soon(trio.sleep_forever)
            await trio.lowlevel.checkpoint()
            scope.cancel()


def test_what_is_no_group_passes_as_it_is() -> None:
    with pytest.raises(ValueError, match="alone"), one_error():
        raise ValueError("alone")


async def test_a_block_with_grace_ends_in_peace_and_counts(autojump_clock: MockClock) -> None:
    done = []
    with trio.CancelScope(deadline=trio.current_time() + 5) as scope:
        async with grace(10.0):
            await trio.sleep(12)
            done.append("block")
        done.append("behind")
    assert (done, scope.cancelled_caught) == (["block", "behind"], False)
    assert trio.current_time() == pytest.approx(12, abs=0.1)


async def test_grace_ends_after_its_time_whenever_the_cancellation_came(autojump_clock: MockClock) -> None:
    done = []
    with trio.CancelScope(deadline=trio.current_time() + 5) as scope:
        async with grace(10.0):
            await trio.sleep(100)
            done.append("block")
        done.append("behind")
    assert (done, scope.cancelled_caught) == ([], True)
    assert trio.current_time() == pytest.approx(15, abs=0.1)


async def test_without_a_cancellation_grace_has_no_limit(autojump_clock: MockClock) -> None:
    async with grace(1.0):
        await trio.sleep(50)
    assert trio.current_time() == pytest.approx(50, abs=0.1)
    with pytest.raises(ValueError, match="plain"):
        async with grace(1.0):
            raise ValueError("plain")
