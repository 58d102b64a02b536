"""Nurseries whose failure is one error, not a group of them.

trio wraps whatever ends a nursery in an exception group. People read one sentence and callers catch one class, so the
rooms open their nurseries here.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from core.errors import FleeceError


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises the error that ended it as it is: an interrupt first, then a foreign error, then ours.

    Further errors of other tasks are in its `__context__`. Cancelled as a whole it raises what trio raises.
    """
    with one_error():
        async with trio.open_nursery() as nursery:
            yield nursery


@asynccontextmanager
async def grace(seconds: float) -> AsyncIterator[None]:
    """Let the block end in peace when the caller is cancelled, but for `seconds` from then on at most.

    A block that ends in that time counts: nothing is raised behind it. One that does not is cancelled.
    """
    async with open_nursery() as nursery:
        scope = trio.CancelScope(shield=True)

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            except trio.Cancelled:  # not passed on: this task ends, and the block decides
                scope.deadline = trio.current_time() + seconds

        nursery.start_soon(watch)
        with scope:
            yield
        if scope.cancelled_caught:
            await trio.lowlevel.checkpoint()  # raises, for the caller is cancelled
        nursery.cancel_scope.cancel()


@contextmanager
def one_error() -> Iterator[None]:
    """Replace an exception group that leaves the block by the error in it that matters most."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = _first(group)
        if error is None:
            raise
        raise error from error.__cause__


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The leaf that callers should see; None if the group holds nothing but cancellation."""
    leaves = [leaf for leaf in _leaves(group) if not isinstance(leaf, trio.Cancelled)]
    return min(leaves, key=_rank, default=None)


def _rank(error: BaseException) -> int:
    if not isinstance(error, Exception):
        return 0
    return 2 if isinstance(error, FleeceError) else 1


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
