"""Waiting for a state instead of for a time: a busy machine makes a test slow, never wrong."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from core.nursery import open_nursery

#: Seconds after which something that should have happened counts as never happening.
PATIENCE_S: Final = 60.0


async def until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait until `condition` is true.

    Raises:
        TooSlowError: not within `timeout_s`.
    """
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110 - threads and other processes make it true
            await trio.sleep(0.005)


@asynccontextmanager
async def cancelled_when(condition: Callable[[], object]) -> AsyncIterator[trio.CancelScope]:
    """The block is cancelled as soon as `condition` is true; gives its scope.

    Raises:
        TooSlowError: neither is it true within `PATIENCE_S` nor has the block ended.
    """

    async def watch() -> None:
        await until(condition)
        scope.cancel()

    async with open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(watch)
            yield scope
        nursery.cancel_scope.cancel()
