import os
import signal
from collections.abc import Iterator

import pytest
import trio

from agent.errors import InterruptedBySignalError, first_cause
from agent.running import run
from core.errors import FleeceError, SourceError


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """An interrupted run leaves its signals without effect, which only a process that ends may do."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


async def _sleep_for_ever() -> None:
    await trio.sleep_forever()


def test_the_result_of_the_work_comes_back() -> None:
    async def work() -> int:
        await trio.lowlevel.checkpoint()
        return 42

    assert run(work, what="count") == 42


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_work_and_a_second_one_does_not_break_its_clean_up(number: signal.Signals) -> None:
    cleaned: list[bool] = []
    said: list[str] = []

    async def work() -> None:
        os.kill(os.getpid(), number)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                os.kill(os.getpid(), signal.SIGINT)
                await trio.sleep(0.05)
                cleaned.append(True)

    with pytest.raises(InterruptedBySignalError, match=f"cannot back up vm/100: {number.name} received"):
        run(work, what="back up", where="vm/100", say=said.append)
    assert cleaned == [True]
    assert said[0] == f"{number.name} received, cleaning up"
    assert "still cleaning up" in said[1]


def test_signals_after_an_interruption_are_too_late_to_do_anything() -> None:
    async def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep_forever()

    with pytest.raises(InterruptedBySignalError):
        run(work, what="back up")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)


def test_work_that_ends_before_the_signal_reaches_it_is_done() -> None:
    async def work() -> str:
        with trio.CancelScope(shield=True):
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep(0.05)
        return "finished"

    assert run(work, what="back up") == "finished"


def test_handlers_are_as_before_after_a_failure() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SourceError):
        run(_failing, what="back up")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


async def _failing() -> None:
    raise SourceError("read", "/dev/x", "gone")


def test_a_hangup_that_the_caller_ignores_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        async def work() -> str:
            os.kill(os.getpid(), signal.SIGHUP)
            await trio.sleep(0.05)
            return "went on"

        assert run(work, what="back up") == "went on"
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_the_failure_of_one_task_comes_out_as_itself_with_the_group_as_its_cause() -> None:
    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_sleep_for_ever)
            nursery.start_soon(_failing)

    with pytest.raises(SourceError) as caught:
        run(work, what="back up")
    assert isinstance(caught.value.__cause__, BaseExceptionGroup)


def test_our_own_error_tells_more_than_what_broke_because_of_it() -> None:
    ours = FleeceError("read", "x", "gone")
    group = ExceptionGroup("", [OSError("later"), ExceptionGroup("", [ours, ValueError()])])
    assert first_cause(group) is ours
    alone = ValueError("only one")
    assert first_cause(ExceptionGroup("", [alone])) is alone
