"""From the command line's thread into trio and back: signals cancel, clean-up finishes, one error comes out."""

import signal
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from agent.errors import InterruptedBySignalError, first_cause

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def _supervised(work: Callable[[], Awaitable[T]], what: str, where: str, say: Callable[[str], None]) -> T:
    """Run `work`; a signal cancels it, and further signals change nothing while it cleans up."""
    received: list[signal.Signals] = []
    finished: list[T] = []
    # nohup and background shells ignore a signal on purpose.
    watched = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    with trio.open_signal_receiver(*watched) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for number in signals:
                    if received:
                        say("still cleaning up, so that nothing stays behind; please wait")
                    else:
                        say(f"{signal.Signals(number).name} received, cleaning up")
                        scope.cancel()
                    received.append(signal.Signals(number))

            with trio.CancelScope() as scope:
                nursery.start_soon(watch)
                finished.append(await work())
            nursery.cancel_scope.cancel()
    # Work that was done before the cancellation reached it is done.
    if finished:
        return finished[0]
    raise InterruptedBySignalError(what, where, f"{received[0].name} received; everything was cleaned up")


def run(
    work: Callable[[], Awaitable[T]], *, what: str, where: str = "", say: Callable[[str], None] = lambda text: None
) -> T:
    """Run `work` under trio and return its result.

    Args:
        work: the whole job; cancelled by SIGINT, SIGTERM and SIGHUP.
        what: what it does, for the error of an interruption ("back up").
        where: on which thing.
        say: called with a line for people when a signal arrives.

    Raises:
        InterruptedBySignalError: a signal came; the work's clean-up has run.
        Exception: the first cause of a failure; groups of exceptions are resolved.
    """
    try:
        return trio.run(_supervised, work, what, where, say)
    except BaseExceptionGroup as group:
        cause = first_cause(group)
        if cause is group:
            raise
        raise cause from group
