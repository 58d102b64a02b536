"""From the command line's thread into trio and back: signals cancel, clean-up finishes, one error comes out."""

import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import trio

from agent.errors import InterruptedBySignalError, first_cause
from core.limits import bound_malloc

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def _supervised(
    work: Callable[[], Awaitable[T]],
    what: str,
    where: str,
    say: Callable[[str], None],
    watched: Sequence[signal.Signals],
    early: Sequence[int],
) -> T:
    """Run `work`; a signal cancels it, and further signals change nothing while it cleans up."""
    received: list[signal.Signals] = []
    finished: list[T] = []

    with trio.open_signal_receiver(*watched) as signals:
        async with trio.open_nursery() as nursery:

            def take(number: int) -> None:
                if received:
                    say("still cleaning up, so that nothing stays behind; please wait")
                else:
                    say(f"{signal.Signals(number).name} received, cleaning up")
                    scope.cancel()
                received.append(signal.Signals(number))

            async def watch() -> None:
                async for number in signals:
                    take(number)

            with trio.CancelScope() as scope:
                for number in early:
                    take(number)
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
        InterruptedBySignalError: a signal came; the work's clean-up has run. From here on these signals are ignored, so
            that the error can be reported in peace.
        Exception: the first cause of a failure; groups of exceptions are resolved.
    """
    bound_malloc()
    # nohup and background shells ignore a signal on purpose.
    watched = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    # What arrives before trio listens counts; what arrives when it no longer does comes too late.
    early: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: early.append(number)) for number in watched}
    interrupted = False
    try:
        return trio.run(_supervised, work, what, where, say, watched, early)
    except BaseException as error:
        cause = first_cause(error)
        interrupted = isinstance(cause, InterruptedBySignalError)
        if cause is error:
            raise
        raise cause from error
    finally:
        for number, handler in before.items():
            # Python itself puts handlers back to the default when it ends, but leaves ignored signals ignored.
            signal.signal(number, signal.SIG_IGN if interrupted else handler)
